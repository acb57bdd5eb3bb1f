# SPDX-License-Identifier: Apache-2.0
"""Photographed objects cut out with alpha (Tux Paint stamps): 16 classes by folder, alone or pasted on photographs."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageFilter
from rich.progress import Progress

CLASSES: dict[str, list[str]] = {
    "bird": ["animals/birds/"],
    "fish": ["animals/fish/", "animals/shellfish/"],
    "bug_reptile": ["animals/insects/", "animals/lizards/", "animals/amphibians/"],
    "hoofed_mammal": [
        f"animals/mammals/{a}"
        for a in ("bovines/", "deer/", "equines/", "camel/", "pig", "wildboar", "giraffe", "elephant", "rhino", "hippo")
    ],
    "other_mammal": ["animals/mammals/", "animals/marsupials/"],
    "fruit": ["food/fruit/", "food/nuts/"],
    "vegetable": ["food/vegetables/", "food/spices/", "plants/mushrooms/", "plants/eggplant", "plants/lettuce"],
    "flower": ["plants/flowers/", "plants/lavender"],
    "tree": ["plants/trees/", "plants/thyme", "seasonal/christmas/Christmas_Tree_photo"],
    "vehicle": ["vehicles/", "military/vehicles/", "space/apollo", "space/voyager"],
    "instrument": ["hobbies/music/"],
    "tool_household": ["household/", "hobbies/camera", "hobbies/binoc", "medical/", "clothes/clothespin"],
    "sign": ["town/roadsigns/"],
    "planet": ["space/planets/", "space/moon/"],
    "ball": ["sports/"],
    "gravestone": ["seasonal/halloween/grave"],
}
"""Class → folders of the package; the longest prefix that fits decides."""

DRAWN = {
    "animals/insects/bee", "animals/insects/fly", "animals/fish/shrimp", "household/arttools/scissors_small_closed",
    "household/arttools/scissors_small_open", "household/dishes/glass", "household/dishes/mug", "space/planets/0_sun",
    "sports/rugby_goal_posts", "medical/tooth", "medical/bandage_adhesive", "vehicles/7spoke256",
    "plants/trees/birch", "household/arttools/highlighter", "vehicles/ship/walnutBoat", "household/home_compost_bin",
    "hobbies/music/string/guitar2", "clothes/button", "food/nuts/walnut_shelled", "animals/mammals/echidna",
    "animals/mammals/hedgehog", "sports/trophy_cup", "plants/trees/pinecone",
}  # fmt: skip
"""Drawings among the photographs, found by eye."""

VAL_SHARE = 0.3
MAX_SIDE, MIN_PIXELS = 512, 1500
SOFT = (40, 215)
"""Opacities between which a pixel belongs to nothing."""
IGNORED = 255
_STAMPS = "usr/share/tuxpaint/stamps"


@dataclass(frozen=True)
class Cutout:
    """One object, RGBA, cropped to what is not transparent; `name` is its path in the package."""

    name: str
    image: Image.Image


Cutouts = dict[str, list[Cutout]]


def class_of(name: str) -> str | None:
    """Give the class of a path in the package, or None when it belongs to none."""
    fitting = [(len(p), label) for label, prefixes in CLASSES.items() for p in prefixes if name.startswith(p)]
    return max(fitting)[1] if fitting else None


def load_cutouts(package: Path, progress: Progress) -> Cutouts:
    """Read the cut-outs of the unpacked `tuxpaint` package, per class in the order of `CLASSES`."""
    root = package / _STAMPS
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*.png"))
    found: Cutouts = defaultdict(list)
    for name in progress.track(names, description="cut-outs"):
        name = name.removesuffix(".png")
        label = class_of(name)
        if label is None or "cartoon" in name or name.endswith("_mirror") or name in DRAWN:
            continue
        image = _cropped(root / f"{name}.png")
        if image is not None:
            found[label].append(Cutout(name, image))
    return {label: found[label] for label in CLASSES if label in found}


def _cropped(path: Path) -> Image.Image | None:
    with Image.open(path) as file:
        image: Image.Image = file.convert("RGBA")
    opaque = image.getchannel("A").point([255 * (a > 128) for a in range(256)])
    if opaque.histogram()[255] < MIN_PIXELS:
        return None
    image = image.crop(opaque.getbbox())
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return image


def split_cutouts(cutouts: Mapping[str, Sequence[Cutout]], split: str) -> Cutouts:
    """Give the cut-outs of "train" or "val": of each class the first 30 % by hash of the name are val, at least one."""
    parts: Cutouts = {}
    for label, items in cutouts.items():
        order = sorted(items, key=lambda c: hashlib.sha256(c.name.encode()).hexdigest())
        held_out = max(1, round(VAL_SHARE * len(order)))
        part = order[:held_out] if split == "val" else order[held_out:]
        parts[label] = sorted(part, key=lambda c: c.name)
    return parts


def write_objects(cutouts: Mapping[str, Sequence[Cutout]], out: Path) -> dict[str, int]:
    """Write train/ and val/ class folders of the cut-outs on grey; give the number of images per split."""
    counts = {}
    for split in ("train", "val"):
        part = split_cutouts(cutouts, split)
        for label, items in part.items():
            folder = out / split / label
            folder.mkdir(parents=True, exist_ok=True)
            for item in items:
                on_grey(item.image).save(folder / f"{item.name.replace('/', '_')}.jpg", quality=92)
        counts[split] = sum(map(len, part.values()))
    return counts


def on_grey(image: Image.Image) -> Image.Image:
    """Put a cut-out in the middle of a grey square with a small margin."""
    side = int(max(image.size) * 1.1) + 2
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2), image)
    return square


def composite(
    rng: np.random.Generator, cutouts: Mapping[str, Sequence[Cutout]], backgrounds: Sequence[Image.Image], size: int
) -> Image.Image:
    """Paste one to four cut-outs of random classes on a random part of a background, size × size pixels."""
    return composite_with_mask(rng, cutouts, backgrounds, size)[0]


def composite_with_mask(
    rng: np.random.Generator, cutouts: Mapping[str, Sequence[Cutout]], backgrounds: Sequence[Image.Image], size: int
) -> tuple[Image.Image, npt.NDArray[np.uint8]]:
    """Make a composite and say what is where.

    Returns:
        The image, and uint8 (size, size): 0 is background, i + 1 the i-th class of `cutouts`, IGNORED a soft edge. The
        cut-out that was pasted last covers the others.
    """
    labels = list(cutouts)
    canvas = background_patch(rng, backgrounds, size)
    mask = np.zeros((size, size), np.uint8)
    for _ in range(int(rng.integers(1, 5))):
        chosen = int(rng.integers(len(labels)))
        label = labels[chosen]
        item = cutouts[label][int(rng.integers(len(cutouts[label])))]
        pasted = _posed(rng, item.image, rng.uniform(0.22, 0.65) * size, may_flip=label != "sign")
        colours = ImageEnhance.Brightness(pasted.convert("RGB")).enhance(rng.uniform(0.75, 1.2))
        colours = ImageEnhance.Contrast(colours).enhance(rng.uniform(0.85, 1.15))
        alpha = pasted.getchannel("A").filter(ImageFilter.GaussianBlur(0.6))
        x = int(rng.uniform(-0.2, 1.2 - pasted.width / size) * size)
        y = int(rng.uniform(-0.1, 1.1 - pasted.height / size) * size)
        canvas.paste(colours, (x, y), alpha)
        _paste_class(mask, alpha, (x, y), chosen + 1)
    return canvas, mask


def _paste_class(mask: npt.NDArray[np.uint8], alpha: Image.Image, place: tuple[int, int], value: int) -> None:
    covered = Image.new("L", (mask.shape[1], mask.shape[0]))
    covered.paste(alpha, place)
    opacity = np.asarray(covered)
    mask[(opacity > SOFT[0]) & (opacity < SOFT[1])] = IGNORED
    mask[opacity >= SOFT[1]] = value


def background_patch(rng: np.random.Generator, backgrounds: Sequence[Image.Image], size: int) -> Image.Image:
    """Cut a random square from a random background and resize it; half of them are mirrored."""
    background = backgrounds[int(rng.integers(len(backgrounds)))]
    w, h = background.size
    side = int(rng.uniform(0.35, 0.95) * min(w, h))
    x, y = int(rng.integers(0, w - side + 1)), int(rng.integers(0, h - side + 1))
    patch = background.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side), reducing_gap=2.0)
    return patch.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else patch


def _posed(rng: np.random.Generator, image: Image.Image, side: float, may_flip: bool) -> Image.Image:
    factor = side / max(image.size)
    shape = (max(int(image.width * factor), 8), max(int(image.height * factor), 8))
    image = image.resize(shape, Image.Resampling.BICUBIC, reducing_gap=2.0)
    if rng.random() < 0.5 and may_flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.rotate(rng.uniform(-15, 15), Image.Resampling.BICUBIC, expand=True)
