# SPDX-License-Identifier: Apache-2.0
"""Coloured vector drawings of npm's Iconify packages: icons of things, and emoji by more vendors (train split only).

Every package states its licence in `info.json`; what is not open is left out whole. Drawn by resvg, which needs
`pip install resvg-py`.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import Progress

from opendino.errors import DataError
from opendino.sample_data.drawings import cut_out, fingerprint, on_ground
from opendino.sample_data.emoji import CLASSES, split_of
from opendino.sample_data.licences import Ledger

ICONS = (
    "icons-flat", "icons-fluent-color", "icons-meteocons", "icons-kameleon", "icons-ultimate", "icons-plump",
    "icons-freehand", "icons-stickies",
)  # fmt: skip
"""Packages of things that are no emoji."""
EMOJI = ("icons-noto", "icons-twemoji", "icons-fluent-flat", "icons-noto-v1", "icons-emojitwo", "icons-fxemoji")
"""Packages of emoji; the first three tell which code a drawing is of, the others by its name in those."""
SIDE = 176
_TONES = {f"1f3f{c}" for c in "bcdef"}


def build_icons(raw: Mapping[str, Path], out: Path, progress: Progress) -> dict[str, int]:
    """Write PACKAGE__NAME.png of every icon of `ICONS`, copies left out, and credits.json."""
    names = {key: list(_read(raw[key], "icons.json")["icons"]) for key in ICONS}
    return _build(raw, names, out, progress)


def build_more_emoji(raw: Mapping[str, Path], out: Path, progress: Progress) -> dict[str, int]:
    """Write PACKAGE__NAME.png of the emoji of `EMOJI` that are in the train split, and credits.json.

    Args:
        raw: unpacked folders of `EMOJI` and "emoji-google", whose list tells classes and codes.
        out: folder to fill.
        progress: gets one line.
    """
    entries = json.loads((raw["emoji-google"] / "package/emoji.json").read_text(encoding="utf-8"))
    trained = train_names({key: _read(raw[key], "chars.json") for key in EMOJI}, aliases(raw), entries)
    names = {key: [n for n in _read(raw[key], "icons.json")["icons"] if n in trained] for key in EMOJI}
    return _build(raw, names, out, progress)


def train_names(
    chars: Mapping[str, Mapping[str, str]], same: Mapping[str, set[str]], entries: list[dict[str, Any]]
) -> set[str]:
    """Give the names of emoji that may be trained on: a name with any code of val or test is not among them.

    Args:
        chars: package → code → name, as chars.json has it.
        same: name → other names of the same drawing.
        entries: the emoji list.
    """
    used = {sub for subs in CLASSES.values() for sub in subs}
    split = {_plain(e["unified"]): split_of(e["unified"].lower()) for e in entries if e["subcategory"] in used}
    found: dict[str, set[str]] = {}
    for codes in chars.values():
        for code, name in codes.items():
            for each in {name} | same.get(name, set()):
                found.setdefault(each, set()).add(split.get(_plain(code), "unknown"))
    return {name for name, splits in found.items() if splits == {"train"}}


def aliases(raw: Mapping[str, Path]) -> dict[str, set[str]]:
    """Give the names that drawings of `EMOJI` have beside their own."""
    same: dict[str, set[str]] = {}
    for key in EMOJI:
        for other, entry in _read(raw[key], "icons.json").get("aliases", {}).items():
            same.setdefault(entry["parent"], set()).add(other)
            same.setdefault(other, set()).add(entry["parent"])
    return same


def _plain(code: str) -> str:
    """Give a code without presentation and skin tone, by which variants share the split of their emoji."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f" and part not in _TONES)


# --- drawing -------------------------------------------------------------------------------------------------------


def _build(raw: Mapping[str, Path], names: Mapping[str, list[str]], out: Path, progress: Progress) -> dict[str, int]:
    ledger, seen, counts = Ledger(), set[bytes](), dict.fromkeys(names, 0)
    for key, wanted in names.items():
        info = _read(raw[key], "info.json")
        licence, holder = info["license"].get("spdx") or info["license"]["title"], info["author"]["name"]
        package = f"@iconify-json/{_read(raw[key], 'package.json')['name'].rpartition('/')[2]}"
        drawings = draw_all(_read(raw[key], "icons.json"), wanted)
        for name, image in progress.track(drawings, total=len(wanted), description=key):
            drawing = cut_out(image) if image else None
            if drawing is None:
                ledger.leave_out("empty or not to be drawn")
            elif (mark := fingerprint(drawing)) in seen:
                ledger.leave_out("copy")
            elif ledger.admits(name, licence, holder, package):
                seen.add(mark)
                file = f"{key.removeprefix('icons-')}__{name}"
                on_ground(drawing, file, SIDE).save(out / f"{file}.png", compress_level=4)
                counts[key] += 1
    ledger.write(out)
    return counts


def draw_all(icons: Mapping[str, Any], wanted: list[str]) -> Iterator[tuple[str, Image.Image | None]]:
    """Iterate over (name, RGBA image or None when it cannot be drawn) of the wanted icons of a package.

    Raises:
        DataError: without resvg-py.
    """
    try:
        resvg_py = importlib.import_module("resvg_py")
    except ImportError as error:
        raise DataError("Icons are drawn by resvg. Run `pip install resvg-py`, or build the other sets.") from error
    for name in wanted:
        try:
            content = resvg_py.svg_to_bytes(svg_string=svg_of(icons, name), width=SIDE, skip_system_fonts=True)
            with Image.open(io.BytesIO(bytes(content))) as image:
                yield name, image.convert("RGBA")
        except (ValueError, OSError):
            yield name, None


def svg_of(icons: Mapping[str, Any], name: str) -> str:
    """Give an icon as a whole SVG file."""
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def _read(folder: Path, name: str) -> Any:
    return json.loads((folder / "package" / name).read_text(encoding="utf-8"))
