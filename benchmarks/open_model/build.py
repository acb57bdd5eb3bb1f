# SPDX-License-Identifier: Apache-2.0
"""Build the training images of `vitt14_open` from packages whose licences allow it (docs/open-model.md).

    python benchmarks/open_model/build.py --out SETS
    python benchmarks/open_model/build.py --out SETS --only openclipart emoji

Each set is made aside and renamed when it is whole, so a second call makes only what is missing; rooms come in shards.
LICENCES.md beside the sets says who is to be credited, and what was left out and why.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Mapping
from pathlib import Path

from credits_table import write_licences
from rich.console import Console
from rich.progress import Progress

from opendino.errors import DataError, OpendinoError
from opendino.sample_data import fashion_mnist, icon_sets, open_emoji, open_photos, open_rooms, openclipart
from opendino.sample_data.demo import build_folder, is_built
from opendino.sample_data.licences import Ledger
from opendino.sample_data.package_pins import PACKAGES
from opendino.sample_data.packages import fetch

ROOM_SHARDS = 18  # of about 200 views
Raw = Mapping[str, Path]


def build_fashion(raw: Raw, out: Path, progress: Progress) -> dict[str, int]:
    """Write the 60 000 training images of Fashion-MNIST, without their labels."""
    from PIL import Image

    data, ledger = fashion_mnist.load_fashion_mnist(raw["fashion-mnist"].parent), Ledger()
    if not ledger.admits("the 60 000 training images", "MIT", "Zalando SE", "dataset-fashion-mnist"):
        return {"images": 0}
    for number, image in enumerate(progress.track(data.train_images, description="fashion-mnist, train")):
        folder = out / f"{number // 1000:02d}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:05d}.png", compress_level=1)
    ledger.write(out)
    return {"images": len(data.train_images)}


BUILDERS: dict[str, tuple[tuple[str, ...], Callable[[Raw, Path, Progress], object]]] = {
    "openclipart": (openclipart.PACKAGES_NEEDED, openclipart.build_openclipart),
    "emoji": (open_emoji.PACKAGES_NEEDED, open_emoji.build_open_emoji),
    "fashion-mnist": (("fashion-mnist",), build_fashion),
    "photos": (open_photos.PACKAGES_NEEDED, open_photos.build_open_photos),
    "icons": (icon_sets.ICONS, icon_sets.build_icons),
    "emoji-more": ((*icon_sets.EMOJI, "emoji-google"), icon_sets.build_more_emoji),
}
"""Set → packages that it is made from, and what makes it."""


def main() -> None:
    """Build what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to fill, outside of git")
    names = [*BUILDERS, "rooms"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--packages", type=Path, help="folder of unpacked packages; default ~/.cache/opendino/packages")
    parser.add_argument("--room-shards", type=int, default=ROOM_SHARDS, help="of about 200 views each")
    args = parser.parse_args()
    console = Console(stderr=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with Progress(console=console) as progress:
        for name in args.only:
            if name == "rooms":
                build_rooms(args.out, args.packages, progress, args.room_shards)
            else:
                build(name, args.out, args.packages, progress)


def build(name: str, out: Path, packages: Path | None, progress: Progress) -> None:
    """Build one set unless it is there."""
    folder = out / name
    if is_built(folder):
        progress.console.print(f"{folder} is there.", highlight=False)
        return
    needed, make = BUILDERS[name]
    raw = {p: fetch(p, packages, progress.console) for p in needed}
    build_folder(folder, lambda part: make(raw, part, progress), _licences(needed))
    finish(out, progress)


def build_rooms(out: Path, packages: Path | None, progress: Progress, shards: int) -> None:
    """Render the shards that are missing: rooms/00, rooms/01 and so on."""
    folders = {number: out / "rooms" / f"{number:02d}" for number in range(shards)}
    missing = {number: folder for number, folder in folders.items() if not is_built(folder)}
    if not missing:
        progress.console.print(f"{out / 'rooms'} is there.", highlight=False)
        return
    raw = {p: fetch(p, packages, progress.console) for p in open_rooms.PACKAGES_NEEDED}
    for number, folder in progress.track(list(missing.items()), description="shards of rooms"):
        child = multiprocessing.get_context("spawn").Process(target=render, args=(raw, out, folder, number))
        child.start()
        child.join()
        if child.exitcode or not is_built(folder):
            raise DataError(
                f"{folder} was not rendered: its process ended with {child.exitcode}. Run the command again."
            )
        finish(out, progress)


def render(raw: dict[str, Path], out: Path, folder: Path, number: int) -> None:
    """Render a shard in a process of its own: its meshes and textures take about a gigabyte that is not given back."""
    licences = _licences(open_rooms.PACKAGES_NEEDED)
    with Progress(console=Console(stderr=True)) as progress:
        stage = open_rooms.open_stage(raw, out / ".surfaces")
        build_folder(folder, lambda part: open_rooms.render_shard(stage, number, part, progress), licences)


def finish(out: Path, progress: Progress) -> None:
    """Write LICENCES.md, licences.json and READY.txt of the sets that are whole."""
    lines = write_licences(out)
    (out / "READY.txt").write_text("".join(f"{line}\n" for line in lines))
    progress.console.print("\n".join(lines), highlight=False)


def _licences(needed: tuple[str, ...]) -> dict[str, str]:
    return {PACKAGES[p].package: PACKAGES[p].licence for p in needed}


if __name__ == "__main__":
    try:
        main()
    except OpendinoError as error:
        raise SystemExit(f"Error: {error}") from None
