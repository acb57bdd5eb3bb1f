# SPDX-License-Identifier: Apache-2.0
"""Which images a released model may be trained on: an allow-list of licences, read per file, and a ledger of credits.

Only what asks for no more than credit is open. Copyleft (GPL, LGPL, AGPL, GFDL, CC-BY-SA, Free Art), non-commercial and
no-derivatives terms are refused, and so is everything whose name is not on the list.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

OPEN = frozenset([
    "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc0-1.0", "isc", "mit", "public-domain", "unlicense", "zlib",
])  # fmt: skip
"""Names of the licences that are let in, lower case."""

_NAMES = {
    "cc-0": "cc0-1.0", "cc0": "cc0-1.0", "cc-0-1.0": "cc0-1.0", "cc-zero": "cc0-1.0", "expat": "mit",
    "pd": "public-domain", "public domain": "public-domain", "publicdomain": "public-domain", "cc-pd": "public-domain",
    "creativecommons-cc-by-3.0": "cc-by-3.0", "creativecommons-cc-by-4.0": "cc-by-4.0", "apache-2": "apache-2.0",
    "cc-by-3": "cc-by-3.0", "cc-by-4": "cc-by-4.0", "cc-by-2": "cc-by-2.0",
}  # fmt: skip
_VERSION_SUFFIX = re.compile(r"-(us|int|unported|deed)$")


def open_licence(expression: str) -> str | None:
    """Give the licence of an expression under which a work may be used, or None when it must be left out.

    Of alternatives ("GPL-3+ or CC-BY-4.0") the first open one is taken; of licences that hold together ("MIT and
    CC-BY-SA-3.0", also with a comma) every one must be open.
    """
    for alternative in re.split(r"\s+or\s+|\s*\|\s*", expression.strip(), flags=re.I):
        parts = [_normal(part) for part in re.split(r"\s+and\s+|\s*,\s*", alternative, flags=re.I) if part.strip()]
        if parts and all(part in OPEN for part in parts):
            return " and ".join(sorted(set(parts)))
    return None


def _normal(name: str) -> str:
    low = name.strip(" ()").lower().replace("_", "-")
    return _NAMES.get(low, _NAMES.get(_VERSION_SUFFIX.sub("", low), _VERSION_SUFFIX.sub("", low)))


@dataclass(frozen=True)
class Credit:
    """One work that was let in: where it is from, under which licence, and who is to be named."""

    work: str
    licence: str
    holder: str
    package: str


@dataclass
class Ledger:
    """What was let in and what was left out of a set; a builder writes only what `admits` says yes to."""

    credits: list[Credit] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)

    def admits(self, work: str, licence: str | None, holder: str, package: str) -> bool:
        """Whether a work may be used; it is recorded either way. A work without a known licence may not."""
        chosen = open_licence(licence or "")
        if chosen is None:
            self.refused[f"licence {licence or 'unknown'}"] += 1
            return False
        self.credits.append(Credit(work, chosen, " ".join(holder.split()), package))
        return True

    def leave_out(self, reason: str) -> None:
        """Count a work that is left out for another reason than its licence."""
        self.refused[reason] += 1

    def write(self, folder: Path) -> None:
        """Write credits.json beside the images."""
        record = {"credits": [asdict(c) for c in self.credits], "left_out": dict(sorted(self.refused.items()))}
        (folder / "credits.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")


# --- the copyright file of a Debian package ------------------------------------------------------------------------


@dataclass(frozen=True)
class Stanza:
    """A paragraph of a machine-readable copyright file: which files, whose, and the short name of their licence."""

    patterns: tuple[str, ...]
    licence: str
    holder: str


def read_copyright(text: str) -> list[Stanza]:
    """Read the `Files:` paragraphs of a machine-readable (DEP-5) copyright file, in their order."""
    found = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        fields = _fields(paragraph)
        if "files" in fields:
            licence = fields.get("license", "").splitlines()
            patterns = re.split(r"[\s,]+", fields["files"].strip())
            found.append(Stanza(tuple(patterns), licence[0].strip() if licence else "", fields.get("copyright", "")))
    return found


def _fields(paragraph: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    current = ""
    for line in paragraph.splitlines():
        match = re.match(r"([A-Za-z-]+):\s?(.*)$", line)
        if match:
            current = match[1].lower()
            fields[current] = match[2]
        elif current and line[:1] in (" ", "\t"):
            fields[current] += "\n" + line.strip()
    return fields


def stanza_of(stanzas: list[Stanza], path: str) -> Stanza | None:
    """Give the paragraph that holds for a path of the source tree: the last one with a pattern that fits."""
    fitting = [s for s in stanzas if any(fnmatch.fnmatchcase(path, pattern) for pattern in s.patterns)]
    return fitting[-1] if fitting else None
