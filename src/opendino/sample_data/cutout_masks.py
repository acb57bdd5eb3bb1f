# SPDX-License-Identifier: Apache-2.0
"""Cut-outs pasted on photographs, with a class at every pixel: a small set for semantic segmentation.

Shape and texture are photographed, the scene is put together: pasted objects have an edge and a light of their own. A
cut-out and a background belong to one split only, so val shows unseen objects on unseen backgrounds. Background is four
fifths of the pixels: quote mIoU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import Progress

from opendino.sample_data.cutouts import VAL_SHARE, Cutouts, composite_with_mask, load_cutouts, split_cutouts
from opendino.sample_data.photos import BACKGROUND_GLOBS, Photograph, wallpapers
from opendino.sample_data.surfaces import unpack_surfaces

PACKAGES_NEEDED = ("tuxpaint", *BACKGROUND_GLOBS, "sweethome3d")
TRAIN, VAL, SIZE, SEED = 1500, 400, 224, 0
MIN_TEXTURE_SIDE, MIN_SPREAD = 448, 12
_SKIPPED_TEXTURES = ("boxTree",)


def load_backgrounds(raw: Mapping[str, Path], progress: Progress) -> list[Photograph]:
    """Read the photographs without a close-up object: wallpapers, then floors and walls.

    Args:
        raw: unpacked folders of `PACKAGES_NEEDED`.
        progress: gets one line.
    """
    task = progress.add_task("backgrounds", total=None)
    found: list[Photograph] = []
    for source in (wallpapers(raw), _textures(raw["sweethome3d"])):
        for photograph in source:
            found.append(photograph)
            progress.update(task, completed=len(found))
    progress.update(task, total=len(found))
    return found


def split_backgrounds(backgrounds: Sequence[Photograph], split: str) -> list[Photograph]:
    """Give the backgrounds of "train" or "val": the first 30 % by hash of the name are val, at least one."""
    order = sorted(backgrounds, key=lambda p: hashlib.sha256(p.name.encode()).hexdigest())
    held_out = max(1, round(VAL_SHARE * len(order)))
    return sorted(order[:held_out] if split == "val" else order[held_out:], key=lambda p: p.name)


def build_cutout_masks(
    raw: Mapping[str, Path], out: Path, progress: Progress, *, train: int = TRAIN, val: int = VAL, size: int = SIZE
) -> dict[str, int]:
    """Write images/, masks/ and classes.txt, the folder form that `evaluate.datasets.folders` reads.

    Args:
        raw: unpacked folders of `PACKAGES_NEEDED`.
        out: folder to fill.
        progress: gets a line for each step.
        train: composites of train cut-outs on train backgrounds.
        val: composites of val cut-outs on val backgrounds.
        size: side, pixels.

    Returns:
        Number of images per split.
    """
    cutouts, backgrounds = load_cutouts(raw["tuxpaint"], progress), load_backgrounds(raw, progress)
    for split, count in (("train", train), ("val", val)):
        part = split_cutouts(cutouts, split)
        photographs = [p.open() for p in split_backgrounds(backgrounds, split)]
        write_composites(part, photographs, out, split, range(count), size, progress)
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in ("background", *cutouts)))
    return {"train": train, "val": val}


def write_composites(
    cutouts: Cutouts, backgrounds: Sequence[Image.Image], out: Path, split: str, numbers: range, size: int,
    progress: Progress,
) -> None:  # fmt: skip
    """Write images/SPLIT/NNNNN.jpg and masks/SPLIT/NNNNN.png; each is a function of the split and its number."""
    for kind in ("images", "masks"):
        (out / kind / split).mkdir(parents=True, exist_ok=True)
    for number in progress.track(numbers, description=f"cut-outs {split}"):
        rng = np.random.default_rng([SEED, int(split == "val"), number])
        image, mask = composite_with_mask(rng, cutouts, backgrounds, size)
        image.save(out / "images" / split / f"{number:05d}.jpg", quality=92)
        Image.fromarray(mask).save(out / "masks" / split / f"{number:05d}.png")


def _textures(package: Path) -> Iterator[Photograph]:
    for path in unpack_surfaces(package):
        if any(s in path.name for s in _SKIPPED_TEXTURES):
            continue
        with Image.open(path) as file:
            image = file.convert("RGB")
        if np.asarray(image.resize((64, 64))).std() >= MIN_SPREAD:  # an even ground is left out
            yield Photograph(f"sweethome3d/{path.name}", tiled(image, MIN_TEXTURE_SIDE))


def tiled(image: Image.Image, side: int) -> Image.Image:
    """Repeat a texture in both directions until its shorter side is at least `side` pixels."""
    while min(image.size) < side:
        twice = Image.new("RGB", (2 * image.width, 2 * image.height))
        for x in (0, image.width):
            for y in (0, image.height):
                twice.paste(image, (x, y))
        image = twice
    return image
