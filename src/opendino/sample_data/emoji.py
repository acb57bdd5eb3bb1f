# SPDX-License-Identifier: Apache-2.0
"""The same emoji as drawn by three vendors: class folders, and a retrieval list with easy and hard matches.

Classes are merged subcategories of the emoji list. The split is by emoji, all vendors together, from a hash of its
code: 60 % train, 15 % val, 25 % test. Mean per class is the figure to quote: people and flags are many and look alike.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import Progress

CLASSES: dict[str, list[str]] = {
    "mammal": ["animal-mammal", "monkey-face", "cat-face"],
    "bird_reptile_fish_bug": ["animal-bird", "animal-marine", "animal-bug", "animal-reptile", "animal-amphibian"],
    "plant": ["plant-flower", "plant-other"],
    "fruit_vegetable": ["food-fruit", "food-vegetable"],
    "meal": ["food-prepared", "food-asian", "food-sweet"],
    "drink_dish": ["drink", "dishware"],
    "face": ["face-smiling", "face-affection", "face-tongue", "face-hand", "face-neutral-skeptical", "face-sleepy",
             "face-unwell", "face-hat", "face-glasses", "face-concerned", "face-negative"],
    "hand": ["hand-fingers-open", "hand-fingers-partial", "hand-single-finger", "hand-fingers-closed", "hands",
             "hand-prop"],
    "person": ["person", "person-role", "person-gesture", "person-fantasy"],
    "person_moving": ["person-activity", "person-sport", "person-resting"],
    "clothing": ["clothing"],
    "ground_vehicle": ["transport-ground"],
    "air_water_vehicle": ["transport-air", "transport-water"],
    "place": ["place-building", "place-religious", "place-other", "place-geographic", "place-map"],
    "sky_weather": ["sky & weather"],
    "time": ["time"],
    "sport_game": ["sport", "game", "award-medal", "arts & crafts", "event"],
    "tool": ["tool", "science", "medical", "household", "lock"],
    "office": ["office", "book-paper", "mail", "writing", "money"],
    "electronics_music": ["computer", "phone", "light & video", "musical-instrument", "music", "sound"],
    "heart_emotion": ["heart", "emotion"],
    "sign_symbol": ["alphanum", "arrow", "av-symbol", "transport-sign", "warning", "zodiac", "religion", "keycap",
                    "geometric", "punctuation", "math", "other-symbol"],
    "flag": ["country-flag", "flag", "subdivision-flag"],
}  # fmt: skip
"""Class → subcategories of the emoji list; subcategories that are small or odd are left out."""

PACKAGES_NEEDED = ("emoji-google", "emoji-twitter", "emoji-fluent3d")
_VARIANT_PARTS = {"200d", "2640", "2642", "fe0f", "1f9b0", "1f9b1", "1f9b2", "1f9b3"} | {f"1f3f{c}" for c in "bcdef"}
_PERSON_PARTS = {"1f468", "1f469", "1f9d1", "1f471"}


@dataclass(frozen=True)
class Drawing:
    """One emoji by one vendor; `path` is relative to the data set's folder."""

    code: str
    vendor: str
    label: str
    split: str

    @property
    def path(self) -> str:
        return f"{self.split}/{self.label}/{self.code}_{self.vendor}.png"


def split_of(code: str) -> str:
    """Give the split of an emoji: a fixed function of its code."""
    share = int(hashlib.sha256(code.encode()).hexdigest()[:8], 16) % 100
    return "train" if share < 60 else "val" if share < 75 else "test"


def build_emoji(raw: Mapping[str, Path], out: Path, progress: Progress, size: int = 72) -> dict[str, int]:
    """Write train/, val/ and test/ class folders and retrieval.json.

    Args:
        raw: unpacked folders of `PACKAGES_NEEDED`.
        out: folder to fill.
        progress: gets one line.
        size: side of the written images, pixels; drawings are put on white.

    Returns:
        Number of images per split.
    """
    emoji = json.loads((raw["emoji-google"] / "package/emoji.json").read_text(encoding="utf-8"))
    label_of = {sub: label for label, subs in CLASSES.items() for sub in subs}
    drawings = []
    for entry in progress.track(sorted(emoji, key=lambda e: e["sort_order"]), description="emoji"):
        label = label_of.get(entry["subcategory"])
        for vendor in ("google", "twitter", "fluent3d") if label else ():
            source = find_drawing(raw, vendor, entry)
            if source is None:
                continue
            code = entry["unified"].lower()
            drawing = Drawing(code, vendor, str(label), split_of(code))
            target = out / drawing.path
            target.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(source) as image:
                on_white(image, size).save(target, compress_level=1)
            drawings.append(drawing)
    (out / "retrieval.json").write_text(json.dumps(retrieval_list(drawings), indent=0))
    return {s: sum(d.split == s for d in drawings) for s in ("train", "val", "test")}


def find_drawing(raw: Mapping[str, Path], vendor: str, entry: Mapping[str, Any]) -> Path | None:
    """Give the file of an entry of the emoji list by a vendor, or None when the vendor has not drawn it."""
    if vendor == "fluent3d":
        code = entry["unified"].lower()
        names = [f"assets/{c}.webp" for c in (code, code.replace("-fe0f", ""), code + "-fe0f")]
    else:
        names = [f"img/{vendor}/64/{entry['image']}"] if entry.get(f"has_img_{vendor}") else []
    paths = (raw[f"emoji-{vendor}"] / "package" / name for name in names)
    return next((p for p in paths if p.exists()), None)


def on_white(image: Image.Image, size: int) -> Image.Image:
    """Resize a drawing to a square and put it on white."""
    drawn = image.convert("RGBA").resize((size, size), Image.Resampling.BICUBIC)
    return Image.alpha_composite(Image.new("RGBA", drawn.size, (255, 255, 255, 255)), drawn).convert("RGB")


def retrieval_list(drawings: list[Drawing]) -> dict[str, Any]:
    """Make the list of queries: google's drawings of the test split, flags left out.

    The gallery is everything. For a query, the same emoji by twitter (flat, as google's) is easy, by fluent3d
    (rendered) hard; variants that differ in gender, hair or presentation are junk; the rest is negative.

    Returns:
        {"gallery": [path], "queries": [{"query": path, "easy": [path], "hard": [path], "junk": [path]}]}.
    """
    groups: dict[str, list[Drawing]] = defaultdict(list)
    for drawing in drawings:
        groups[_base(drawing.code)].append(drawing)
    queries = []
    for drawing in drawings:
        if drawing.vendor != "google" or drawing.split != "test" or drawing.label == "flag":
            continue
        matches: dict[str, list[str]] = {"easy": [], "hard": [], "junk": []}
        for other in groups[_base(drawing.code)]:
            if other.code != drawing.code:
                matches["junk"].append(other.path)
            elif other.vendor != drawing.vendor:
                matches["easy" if other.vendor == "twitter" else "hard"].append(other.path)
        if matches["easy"] or matches["hard"]:
            queries.append({"query": drawing.path, **matches})
    return {"gallery": [d.path for d in drawings], "queries": queries}


def _base(code: str) -> str:
    """Give what is left of a code without gender, hair, skin and presentation."""
    return "-".join("person" if p in _PERSON_PARTS else p for p in code.split("-") if p not in _VARIANT_PARTS)
