# SPDX-License-Identifier: Apache-2.0
"""Emoji of the train split, by vendors whose licences ask for no more than credit.

The same split by code as in `emoji`, whose val and test emoji stay unseen here in every vendor's drawing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.progress import Progress

from opendino.sample_data.drawings import fingerprint, on_ground, open_drawing
from opendino.sample_data.emoji import CLASSES, find_drawing, split_of
from opendino.sample_data.licences import Ledger

VENDORS = {
    "google": ("Apache-2.0", "Google (Noto Emoji)", "emoji-datasource-google"),
    "twitter": ("CC-BY-4.0", "Twitter, Inc. and other contributors (Twemoji)", "emoji-datasource-twitter"),
    "fluent3d": ("MIT", "Microsoft Corporation (Fluent Emoji)", "@lobehub/fluent-emoji-3d"),
}
"""Vendor → licence, who is to be named, package."""

PACKAGES_NEEDED = ("emoji-google", "emoji-twitter", "emoji-fluent3d")
SIDE = 160


def build_open_emoji(raw: Mapping[str, Path], out: Path, progress: Progress) -> dict[str, int]:
    """Write CODE_VENDOR.png of every emoji of the train split in a class that is scored, and credits.json.

    Returns:
        Number of images of each vendor.
    """
    entries = json.loads((raw["emoji-google"] / "package/emoji.json").read_text(encoding="utf-8"))
    ledger, seen, counts = Ledger(), set[bytes](), dict.fromkeys(VENDORS, 0)
    for code, entry in progress.track(list(train_entries(entries)), description="emoji, train"):
        for vendor, (licence, holder, package) in VENDORS.items():
            path = find_drawing(raw, vendor, entry)
            drawing = open_drawing(path) if path else None
            if drawing is None or (mark := fingerprint(drawing)) in seen:
                continue
            seen.add(mark)
            name = f"{code}_{vendor}"
            if ledger.admits(name, licence, holder, package):
                on_ground(drawing, name, SIDE).save(out / f"{name}.png", compress_level=4)
                counts[vendor] += 1
    ledger.write(out)
    return counts


def train_entries(entries: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Iterate over (code, entry) of the scored classes' emoji of the train split, and their skin tones.

    A tone belongs to the split of the emoji that it is a variant of.
    """
    used = {sub for subs in CLASSES.values() for sub in subs}
    for entry in sorted(entries, key=lambda e: e["sort_order"]):
        code = entry["unified"].lower()
        if entry["subcategory"] in used and split_of(code) == "train":
            yield code, entry
            for variant in entry.get("skin_variations", {}).values():
                yield variant["unified"].lower(), variant
