# SPDX-License-Identifier: Apache-2.0
"""The licences of the sets that were built, as licences.json, LICENCES.md and SUMMARY.md beside them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from opendino.sample_data.packages import MARKER

SUFFIXES = (".jpg", ".png")


def write_licences(out: Path) -> list[str]:
    """Gather the credits.json of every set under `out`; give a line "folder, images" for each set."""
    sets: dict[str, dict[str, Any]] = {}
    for path in sorted(out.rglob("credits.json")):
        if not (path.parent / MARKER).exists() or any(p.startswith(".") for p in path.relative_to(out).parts):
            continue  # a set that is being made
        name = path.relative_to(out).parts[0]
        entry = sets.setdefault(name, {"images": 0, "packages": set(), "credits": {}, "left_out": {}})
        record = json.loads(path.read_text(encoding="utf-8"))
        entry["images"] += sum(p.suffix in SUFFIXES for p in path.parent.rglob("*"))
        entry["packages"] |= set(json.loads((path.parent / MARKER).read_text())["licences"])
        entry["credits"] |= {(c["package"], c["licence"], c["holder"], c["work"]): c for c in record["credits"]}
        entry["left_out"] |= record["left_out"]
    listed = {
        name: {**e, "packages": sorted(e["packages"]), "credits": list(e["credits"].values())}
        for name, e in sets.items()
    }
    (out / "licences.json").write_text(json.dumps(listed, indent=1, ensure_ascii=False), encoding="utf-8")
    (out / "LICENCES.md").write_text("\n".join(_page(listed)) + "\n", encoding="utf-8")
    (out / "SUMMARY.md").write_text("\n".join(summary(listed)) + "\n", encoding="utf-8")
    return [f"{(out / name).resolve()}, {entry['images']}" for name, entry in listed.items()]


def _page(sets: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["# Licences of the training images", ""]
    for name, entry in sets.items():
        lines += [f"## {name}: {entry['images']} images", ""]
        groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        for credit in entry["credits"]:
            groups[credit["package"], credit["licence"], credit["holder"]].append(credit["work"])
        lines += ["| package | licence | credit | works |", "| --- | --- | --- | --- |"]
        for (package, licence, holder), works in sorted(groups.items()):
            shown = ", ".join(works) if len(works) <= 12 else f"{len(works)} works, listed in licences.json"
            lines.append(f"| {package} | {licence} | {holder} | {shown} |")
        lines += ["", "Left out:" if entry["left_out"] else "Nothing was left out.", ""]
        lines += [f"- {count} × {reason}" for reason, count in sorted(Counter(entry["left_out"]).items())]
        lines.append("")
    return lines


def summary(sets: dict[str, dict[str, Any]]) -> list[str]:
    """Give the table and the credits of docs/open-model.md: packages by licence, and whom CC-BY asks to name."""
    lines = ["| set | images | package | licence | works |", "| --- | ---: | --- | --- | ---: |"]
    named: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name, entry in sets.items():
        works = Counter((c["package"], c["licence"]) for c in entry["credits"])
        for number, ((package, licence), count) in enumerate(sorted(works.items())):
            start = f"| `{name}` | {entry['images']}" if number == 0 else "| | "
            lines.append(f"{start} | {package} | {licence} | {count} |")
        for credit in entry["credits"]:
            if credit["licence"].startswith("cc-by"):
                named[credit["package"], credit["licence"]].add(credit["holder"])
    lines += ["", "Credits under CC-BY:", ""]
    for (package, licence), holders in sorted(named.items()):
        lines.append(f"- {package}, {licence.upper()}: {'; '.join(sorted(holders, key=str.lower))}")
    return lines
