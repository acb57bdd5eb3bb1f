# SPDX-License-Identifier: Apache-2.0
"""Real colour photographs: square tiles to pre-train on, a small labelled set, and crops of held-out photographs.

Tiles overlap and come from about 190 photographs: enough to see a loss go down and features form, no stand-in for a
large pool. `labelled` shows photographs that are also tiled (without labels): say so where its score is quoted. The
held-out photographs and near copies of them are in no tile.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import Progress

from opendino.sample_data.cutouts import Cutouts, composite
from opendino.sample_data.rcc import read_rcc

PACKAGES_NEEDED = ("gcompris", "plasma-wallpapers", "mate-backgrounds", "lomiri-16.04", "lomiri-20.04")
BACKGROUND_GLOBS = {
    "mate-backgrounds": "usr/share/backgrounds/mate/nature/*.jpg",
    "plasma-wallpapers": "usr/share/wallpapers/*/contents/images/*.jpg",
    "lomiri-16.04": "usr/share/**/*.jpg",
    "lomiri-20.04": "usr/share/**/*.jpg",
}
SKIPPED_BACKGROUNDS = [
    "Kleiber", "Fossa", "TwoWings", "BytheWater", "FlyingKonqui", "Kite/", "IceCold", "Cascade", "Kokkini", "Shell/",
    "MilkyWay", "Flow/", "Opal", "Volna", "Next", "OneStandsOut", "SafeLanding", "Patak", "Altai", "DarkestHour",
    "Nuvole", "Painting", "umang", "FreshFlower", "Garden", "LadyBird", "YellowFlower", "Autumn", "EveningGlow",
    "Honeywave", "PastelHills", "Dragonfly", "Picture_", "Wine_", "free_by", "friends_by", "seeding_by", "Elarun",
    "Nexus", "boxTree", "screenshot", "vertical",
]  # fmt: skip
"""Parts of the paths of drawings, and of photographs that show an object of a cut-out class."""

MIN_SIDE, MAX_BACKGROUND_SIDE, LABELLED_SIDE = 120, 1600, 384
SIZE, SEED = 160, 0
COMPOSITE_SHARE = 0.25
HELD_OUT, CROPS_EACH = 60, 4
NEAR_COPY = 0.97  # cosine of 16×16 grey thumbnails, mean taken off
_CATEGORIES = {"fishes": "fish", "monuments": "monument", "renewable": "energy", "tools": "tool"}
_GCOMPRIS_DRAWINGS = {"erasers", "numbers"}


@dataclass(frozen=True)
class Photograph:
    """One photograph. `source` is its file, decoded when needed, or for a wallpaper (label None) the image itself."""

    name: str
    source: bytes | Image.Image
    label: str | None = None

    def open(self) -> Image.Image:
        """Give the image as RGB, not to be changed in place."""
        return self.source if isinstance(self.source, Image.Image) else open_rgb(self.source)


def open_rgb(content: bytes) -> Image.Image:
    """Decode an image file as RGB."""
    with Image.open(io.BytesIO(content)) as image:
        converted: Image.Image = image.convert("RGB")
    return converted


def open_wallpaper(path: Path) -> Image.Image:
    """Decode a large JPEG as RGB of at most 1600 pixels a side."""
    with Image.open(path) as image:
        image.draft("RGB", (MAX_BACKGROUND_SIDE, MAX_BACKGROUND_SIDE))
        rgb: Image.Image = image.convert("RGB")
    rgb.thumbnail((MAX_BACKGROUND_SIDE, MAX_BACKGROUND_SIDE), Image.Resampling.LANCZOS)
    return rgb


# --- where photographs come from -----------------------------------------------------------------------------------


def gcompris_photographs(package: Path) -> Iterator[Photograph]:
    """Iterate over the labelled photographs of the unpacked `gcompris` package, in a fixed order."""
    folder = package / "usr/share/gcompris-qt/rcc"
    seen = set()
    for activity in ("categorization", "erase", "explore_farm_animals", "explore_monuments", "explore_world_animals"):
        path = folder / f"{activity}.rcc"
        for inner, content in read_rcc(path) if path.exists() else ():
            stem, _, suffix = inner.rsplit("/", 1)[-1].rpartition(".")
            if suffix not in ("webp", "jpg", "png") or "/resource/" not in inner or len(content) < 4000:
                continue
            parts = inner.split("/resource/")[1].split("/")
            label = gcompris_label(activity, parts)
            if label is None or stem in _GCOMPRIS_DRAWINGS or (activity, stem) in seen:
                continue
            seen.add((activity, stem))
            group = parts[0] if activity == "explore_monuments" else activity
            yield Photograph(f"{group}_{stem}", content, label)


def gcompris_label(activity: str, parts: Sequence[str]) -> str | None:
    """Give the class of a file of GCompris by its activity and its path in it, or None when it is no photograph."""
    if activity == "categorization":
        return _CATEGORIES.get(parts[1]) if len(parts) > 2 and parts[0] == "images" else None
    if activity == "explore_monuments":
        return "monument" if len(parts) > 1 else None
    if activity == "erase":
        return "animal"
    return "animal" if parts[0] == "animals" else None


def wallpapers(raw: Mapping[str, Path]) -> Iterator[Photograph]:
    """Iterate over the photographs among the wallpapers, each once whatever resolutions it comes in."""
    seen = set()
    for package, pattern in BACKGROUND_GLOBS.items():
        if package not in raw:
            continue
        root = raw[package]
        for rel in sorted({p.relative_to(root).as_posix() for p in root.glob(pattern)}):
            parts = rel.split("/")
            key = parts[-4] if package == "plasma-wallpapers" else parts[-1]
            if key in seen or any(s in rel for s in SKIPPED_BACKGROUNDS):
                continue
            seen.add(key)
            image = open_wallpaper(root / rel)
            if np.asarray(image.resize((64, 64))).std() >= 12:  # an even ground is left out
                yield Photograph(f"{package}/{key}", image)


def load_photographs(raw: Mapping[str, Path], progress: Progress) -> list[Photograph]:
    """Read the photographs of those `PACKAGES_NEEDED` that are in `raw`."""
    task = progress.add_task("photographs", total=None)
    found = []
    sources = [gcompris_photographs(raw["gcompris"])] if "gcompris" in raw else []
    for source in (*sources, wallpapers(raw)):
        for photograph in source:
            found.append(photograph)
            progress.update(task, completed=len(found))
    progress.update(task, total=len(found))
    return found


# --- which are held out --------------------------------------------------------------------------------------------


def split_held_out(photographs: Sequence[Photograph]) -> tuple[list[Photograph], list[Photograph]]:
    """Split into photographs to tile and held-out ones: the first 60 (at most a quarter) by hash of the name.

    Of near copies only the first is used at all; photographs smaller than 120 pixels are not used.
    """
    kept: list[Photograph] = []
    thumbnails = np.zeros((0, 256))
    for photograph in photographs:
        image = photograph.open()
        thumbnail = thumbnail_of(image)
        if min(image.size) >= MIN_SIDE and not (thumbnails @ thumbnail > NEAR_COPY).any():
            kept.append(photograph)
            thumbnails = np.concatenate([thumbnails, thumbnail[None]])
    order = sorted(kept, key=lambda p: hashlib.sha256(p.name.encode()).hexdigest())
    held_out = {p.name for p in order[: min(HELD_OUT, len(order) // 4)]}
    return [p for p in kept if p.name not in held_out], [p for p in kept if p.name in held_out]


def thumbnail_of(image: Image.Image) -> np.ndarray:
    """Give 16×16 grey pixels (256,) without their mean, of length one: near copies have a cosine over `NEAR_COPY`."""
    grey = np.asarray(image.convert("L").resize((16, 16), Image.Resampling.BOX), float).ravel()
    grey = grey - grey.mean()
    unit: np.ndarray = grey / max(float(np.linalg.norm(grey)), 1e-9)
    return unit


# --- what is written -----------------------------------------------------------------------------------------------


def write_labelled(photographs: Sequence[Photograph], out: Path, progress: Progress) -> dict[str, int]:
    """Write train/ and test/ class folders (35 % test, by hash of the name); give the number of images per split."""
    counts = {"train": 0, "test": 0}
    labelled = [p for p in photographs if p.label]
    for photograph in progress.track(labelled, description="labelled photographs"):
        split = str(labelled_split(photograph))
        folder = out / split / str(photograph.label)
        folder.mkdir(parents=True, exist_ok=True)
        image = photograph.open().copy()
        image.thumbnail((LABELLED_SIDE, LABELLED_SIDE), Image.Resampling.LANCZOS)
        image.save(folder / f"{photograph.name}.jpg", quality=92)
        counts[split] += 1
    return counts


def labelled_split(photograph: Photograph) -> str | None:
    """Give "train" or "test", by hash of the name; None for a photograph without label."""
    if not photograph.label:
        return None
    share = int(hashlib.sha256(photograph.name.encode()).hexdigest()[:8], 16) % 100
    return "test" if share < 35 else "train"


def write_tiles(
    photographs: Sequence[Photograph], cutouts: Cutouts, out: Path, progress: Progress, count: int = 6000
) -> int:
    """Write square tiles NNNNNN.jpg of 160 pixels; a quarter are cut-outs pasted on the wallpapers.

    The number of tiles of a photograph grows with the square root of its pixels; the first is its largest square.

    Returns:
        Number of tiles.
    """
    out.mkdir(parents=True, exist_ok=True)
    backgrounds = [p.open() for p in photographs if p.label is None] if cutouts else []
    plain = int(count * (1 - COMPOSITE_SHARE)) if backgrounds else count
    task = progress.add_task("tiles", total=count)
    done = 0
    for index, (photograph, share) in enumerate(zip(photographs, tiles_each(photographs, plain), strict=True)):
        rng = np.random.default_rng([SEED, index])
        for tile in cut_tiles(photograph.open(), rng, share):
            tile.save(out / f"{done:06d}.jpg", quality=90)
            done += 1
        progress.update(task, completed=done)
    for number in range(done, count if backgrounds else done):
        rng = np.random.default_rng([SEED, 99, number])
        composite(rng, cutouts, backgrounds, SIZE).save(out / f"{number:06d}.jpg", quality=90)
        progress.update(task, completed=number + 1)
    return max(done, count if backgrounds else done)


def tiles_each(photographs: Sequence[Photograph], count: int) -> list[int]:
    """Share `count` tiles out in proportion to the square root of each photograph's pixels."""
    weight = np.array([math.sqrt(math.prod(p.open().size)) for p in photographs])
    share = np.floor(weight / weight.sum() * count).astype(int)
    share[: count - share.sum()] += 1
    return [int(s) for s in share]


def cut_tiles(image: Image.Image, rng: np.random.Generator, count: int) -> Iterator[Image.Image]:
    """Iterate over square crops, 0.3 to 1 of the shorter side, resized to 160 pixels; the first is as large as fits."""
    w, h = image.size
    short = min(w, h)
    for j in range(count):
        side = short if j == 0 else int(max(short * rng.uniform(0.3, 1.0), min(MIN_SIDE, short)))
        x, y = int(rng.integers(0, w - side + 1)), int(rng.integers(0, h - side + 1))
        yield _tile(image, x, y, side)


def write_held_out(photographs: Sequence[Photograph], out: Path, progress: Progress) -> int:
    """Write four crops NAME_0.jpg to NAME_3.jpg of each photograph, one from around each corner; give their number.

    A crop has 0.5 to 0.7 of the shorter side, so neighbours overlap somewhat and no two are alike.
    """
    out.mkdir(parents=True, exist_ok=True)
    for index, photograph in enumerate(progress.track(photographs, description="held-out photographs")):
        rng = np.random.default_rng([SEED, 7, index])
        image = photograph.open()
        for k in range(CROPS_EACH):
            corner_crop(image, rng, k).save(out / f"{photograph.name.replace('/', '_')}_{k}.jpg", quality=90)
    return CROPS_EACH * len(photographs)


def corner_crop(image: Image.Image, rng: np.random.Generator, corner: int) -> Image.Image:
    """Cut a square near corner 0 (top left), 1 (top right), 2 (bottom left) or 3, resized to 160 pixels."""
    side = int(min(image.size) * rng.uniform(0.5, 0.7))
    x, y = (
        int((room // 2) * rng.uniform(0, 0.6)) if near else room - int((room // 2) * rng.uniform(0, 0.6))
        for room, near in ((image.width - side, corner % 2 == 0), (image.height - side, corner < 2))
    )
    return _tile(image, x, y, side)


def _tile(image: Image.Image, x: int, y: int, side: int) -> Image.Image:
    box = (x, y, x + side, y + side)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS, box=box, reducing_gap=2.0)
