# SPDX-License-Identifier: Apache-2.0
"""The ledger of figures: docs/ledger.yaml says where each comes from; docs/ledger.md is written from it.

    python benchmarks/ledger.py write            # docs/ledger.md
    python benchmarks/ledger.py check            # measure the cheap ones again; --net: those too that need packages
    python benchmarks/ledger.py draft docs/x.md  # entries to fill in, and sentences with figures that none quotes

A figure is stated by an entry when the entry quotes the text that holds it. Every row of a table with a digit in it
must be quoted, or stand in a section that is exempt; so no figure can change, and none can come, without its entry.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
LEDGER = "docs/ledger.yaml"
PAGE = "docs/ledger.md"
KINDS = {
    "cheap": "measured again by `make ledger-check`",
    "net": "measured again by `make ledger-check NET=--net`, which fetches packages",
    "test": "held by a test of `make test` or `make test-slow`",
    "long": "the command repeats it, in minutes to days",
    "lost": "the exact configuration is not recorded, so it cannot be repeated exactly",
}
"""How a figure can be had again."""
MEASURED = re.compile(
    r"\d\s?(%|ms|µs|s|[GT]FLOP|[GM]iB|[GM]B|min|minutes?|hours?|days?|images/s|points?|times|kWh|kg|t|m|px)\b|\d\.\d|\de-\d"
)
"""What looks like a figure in running text; settings look alike, so `draft` only shows these."""
LIMIT = 900
"""Seconds that one command of `check` may take."""


class Strict(BaseModel):
    """Base of the parts of the ledger."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Check(Strict):
    """One value of a command's JSON and the range that it must lie in."""

    get: str = Field(description="dotted path into the JSON; numbers count list places")
    low: float
    high: float

    @model_validator(mode="after")
    def _check(self) -> Check:
        if not self.low <= self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        return self


class Entry(Strict):
    """One figure, or the figures of one run.

    Attributes:
        stated: file → texts that must stand in it, line breaks aside.
        measure: command of the check, when it is another than `command`; {python} is this interpreter, {work} a folder.
        json_file: where that command leaves its JSON; default: the last line of its standard output.
    """

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    what: str
    stated: dict[str, tuple[str, ...]]
    kind: Literal["cheap", "net", "test", "long", "lost"]
    command: str
    config: str = "as the command says"
    seed: str = "none"
    data: str = "none"
    hardware: str
    time: str
    range: str
    measure: str | None = None
    json_file: str | None = None
    check: tuple[Check, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Entry:
        if (self.kind in ("cheap", "net")) != bool(self.check):
            raise ValueError(f"{self.id}: checks belong to the kinds cheap and net, and to those always")
        return self


class Exempt(Strict):
    """A section, or a whole file, whose tables hold no figures that this project measured."""

    file: str
    section: str | None = None
    why: str


class Ledger(Strict):
    """All of docs/ledger.yaml; `hardware` gives names to machines."""

    hardware: dict[str, str]
    exempt: tuple[Exempt, ...]
    entries: tuple[Entry, ...]


class Row(Strict):
    """A row of a table that has a digit in it."""

    section: str
    line: int
    text: str


def load_ledger(root: Path = ROOT) -> Ledger:
    """Read the ledger.

    Raises:
        SystemExit: in words, for a key that is unknown or missing.
    """
    try:
        return Ledger.model_validate(yaml.safe_load((root / LEDGER).read_text(encoding="utf-8")))
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise SystemExit(f"{LEDGER}: {wrong}") from None
    except yaml.YAMLError as error:
        raise SystemExit(f"{LEDGER} is no valid YAML (quote texts with a colon): {plain(str(error))}") from None


# --- the pages -----------------------------------------------------------------------------------------------------


def scanned(root: Path = ROOT) -> list[str]:
    """Name the pages whose tables are looked at."""
    docs = [p.relative_to(root).as_posix() for p in sorted((root / "docs").glob("*.md"))]
    return ["README.md", *(p for p in docs if p != PAGE), "benchmarks/RESULTS.md"]


def table_rows(text: str) -> Iterator[Row]:
    """Give the rows of Markdown tables that hold a digit, with the heading above them; code blocks do not count."""
    section, fenced = "", False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced:
            continue
        elif heading := re.match(r"#+\s+(.*)", line):
            section = heading[1].strip()
        elif line.lstrip().startswith("|") and re.search(r"\d", line):
            yield Row(section=section, line=number, text=line.strip())


def loose_sentences(text: str, quoted: Sequence[str]) -> Iterator[str]:
    """Give the sentences of running text that hold what looks like a figure and that no entry quotes."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for block in re.split(r"\n\s*\n|\n(?=- |\d+\. )", text):
        if block.lstrip().startswith(("|", "#", "    ")):
            continue
        flat = plain(block)
        for quote in quoted:
            flat = flat.replace(plain(quote), "")
        yield from (s for s in re.split(r"(?<=[.;:])\s+", flat) if MEASURED.search(s))


def plain(text: str) -> str:
    """Put a text on one line, so that its line breaks do not matter."""
    return " ".join(text.split())


def problems(ledger: Ledger, root: Path = ROOT) -> list[str]:
    """Say in words what is wrong between the ledger and the pages; an empty list when nothing is."""
    found = []
    names = [e.id for e in ledger.entries]
    found += [f"{name} is the id of two entries." for name in sorted({n for n in names if names.count(n) > 1})]
    found += [f"{e.id} has a FILL IN left." for e in ledger.entries if "FILL IN" in e.model_dump_json()]
    pages = {f: (root / f).read_text(encoding="utf-8") for f in scanned(root)}
    flat = {file: plain(text) for file, text in pages.items()}
    for entry in ledger.entries:
        for file, texts in entry.stated.items():
            for text in texts:
                if file not in flat:
                    found.append(f"{entry.id}: {file} is no page that is looked at.")
                elif plain(text) not in flat[file]:
                    found.append(f"{entry.id}: {file} does not say any more: {plain(text)}")
    found += [f"{file}:{row.line}: no entry has this row: {row.text}" for file, row in uncovered(ledger, pages)]
    return found + _idle_exemptions(ledger, pages)


def uncovered(ledger: Ledger, pages: Mapping[str, str]) -> Iterator[tuple[str, Row]]:
    """Give the rows with digits that no entry quotes and no exemption covers."""
    free = {(e.file, e.section) for e in ledger.exempt}
    for file, text in pages.items():
        quoted = {plain(t) for e in ledger.entries for t in e.stated.get(file, ())}
        for row in table_rows(text):
            if (file, None) not in free and (file, row.section) not in free and plain(row.text) not in quoted:
                yield file, row


def _idle_exemptions(ledger: Ledger, pages: Mapping[str, str]) -> list[str]:
    there = {(file, row.section) for file, text in pages.items() for row in table_rows(text)}
    there |= {(file, None) for file, _ in there}
    return [
        f"The exemption of {e.file}, {e.section or 'all of it'}, covers no table with a digit; remove it."
        for e in ledger.exempt
        if (e.file, e.section) not in there
    ]


# --- the page that is written --------------------------------------------------------------------------------------


def markdown(ledger: Ledger) -> str:
    """Write docs/ledger.md."""
    counts = {kind: sum(e.kind == kind for e in ledger.entries) for kind in KINDS}
    lines = [
        "# Ledger of figures",
        "",
        "Written by `python benchmarks/ledger.py write` from `docs/ledger.yaml`; CONTRIBUTING.md says how a figure",
        "gets an entry. Every figure that README.md, the pages of docs and benchmarks/RESULTS.md state, with what it",
        "takes to have it again and the range in which it should then lie.",
        "",
        "| kind | entries | |",
        "| --- | --- | --- |",
        *(f"| {kind} | {counts[kind]} | {text} |" for kind, text in KINDS.items()),
        "",
        "## Machines",
        "",
        *(f"- **{name}**: {text}" for name, text in ledger.hardware.items()),
        "",
        "## All entries",
        "",
        "| figures | stated in | kind | expected |",
        "| --- | --- | --- | --- |",
        *(
            f"| [{e.what}](#{e.id}) | {', '.join(e.stated)} | {e.kind} | {_cell(e.range)} |"
            for e in ledger.entries
        ),
        "",
    ]  # fmt: skip
    for entry in ledger.entries:
        lines += _section(entry)
    lines += ["## Tables that hold no figures of ours", ""]
    lines += [f"- {e.file}{f', *{e.section}*' if e.section else ''}: {e.why}" for e in ledger.exempt]
    return "\n".join(lines) + "\n"


def _section(entry: Entry) -> list[str]:
    runs = re.match(r"(opendino|python|make|pytest|nice) \S+", entry.command) and ", " not in entry.command
    rows = [
        ("command", f"`{entry.command}`" if runs else entry.command),
        ("configuration", entry.config), ("seed", entry.seed), ("data", entry.data), ("hardware", entry.hardware),
        ("time", entry.time), ("expected range", entry.range), ("kind", f"{entry.kind}: {KINDS[entry.kind]}"),
    ]  # fmt: skip
    if entry.measure:
        rows.append(("measured by", f"`{_cell(entry.measure)}`"))
    if entry.check:
        rows.append(("checked", "; ".join(f"`{c.get}` in {c.low:.12g} to {c.high:.12g}" for c in entry.check)))
    lines = [f"## {entry.id}", "", f"{entry.what}.", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {_cell(text)} |" for name, text in rows]
    for file, texts in entry.stated.items():
        lines += ["", f"Stated in {file}:", "", "```", *(plain(t) for t in texts), "```"]
    return [*lines, ""]


def _cell(text: str) -> str:
    return plain(text).replace("|", "\\|")


# --- measuring again -----------------------------------------------------------------------------------------------


class Outcome(Strict):
    """One value that was measured again; `got` is None when it could not be, for the reason in `why`."""

    entry: str
    check: Check
    got: float | None
    why: str = ""

    @property
    def good(self) -> bool:
        """Whether the value lies in its range."""
        return self.got is not None and self.check.low <= self.got <= self.check.high


def measure(entries: Sequence[Entry], work: Path, say: Any = print) -> list[Outcome]:
    """Run the commands of entries, each command once, and compare."""
    answers: dict[tuple[str, str | None], tuple[Any, str]] = {}
    outcomes = []
    for entry in entries:
        key = (entry.measure or entry.command, entry.json_file)
        if key not in answers:
            began = time.perf_counter()
            answers[key] = run_command(*key, work)
            say(f"{entry.id}: {time.perf_counter() - began:.0f} s{answers[key][1] and ', failed'}")
        answer, why = answers[key]
        for check in entry.check:
            got, missing = (None, why) if why else pick(answer, check.get)
            outcomes.append(Outcome(entry=entry.id, check=check, got=got, why=missing))
    return outcomes


def run_command(command: str, json_file: str | None, work: Path) -> tuple[Any, str]:
    """Run a command in the repository's root; give its JSON, or why there is none."""
    words = command.replace("{work}", str(work)).replace("{python}", sys.executable)
    words = re.sub(r"^opendino ", f"{sys.executable} -m opendino.cli ", words)
    work.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(words, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return None, f"took more than {LIMIT} s"
    if done.returncode:
        return None, f"exit code {done.returncode}: {plain(done.stderr)[-300:]}"
    try:
        if json_file:
            return json.loads(Path(json_file.replace("{work}", str(work))).read_text()), ""
        return json.loads(done.stdout.strip().splitlines()[-1]), ""
    except (OSError, ValueError, IndexError) as error:
        return None, f"no JSON: {error}"


def pick(answer: Any, path: str) -> tuple[float | None, str]:
    """Take a number out of JSON by a dotted path; give it, or why it is not there."""
    for part in path.split("."):
        try:
            answer = answer[int(part)] if isinstance(answer, list) else answer[part]
        except (KeyError, IndexError, ValueError, TypeError):
            return None, f"there is no {part!r} on the way to {path}"
    if isinstance(answer, bool) or not isinstance(answer, int | float) or not math.isfinite(answer):
        return None, f"{path} is {answer!r} and no number"
    return float(answer), ""


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print what was expected and what came."""
    table = Table("", "entry", "value", "expected", "got")
    for o in outcomes:
        got = f"{o.got:.10g}" if o.got is not None else o.why
        expected = f"{o.check.low:.10g} to {o.check.high:.10g}"
        table.add_row("[green]ok" if o.good else "[red]outside", o.entry, o.check.get, expected, got)
    console.print(table)


# --- entries to fill in --------------------------------------------------------------------------------------------


def draft(file: str, ledger: Ledger, root: Path = ROOT) -> str:
    """Give entries as YAML, one for each section with rows that are not covered, to be filled in by hand."""
    text = (root / file).read_text(encoding="utf-8")
    sections: dict[str, list[str]] = {}
    for _, row in uncovered(ledger, {file: text}):
        sections.setdefault(row.section, []).append(row.text)
    stem = Path(file).stem
    entries = [
        {
            "id": f"{stem}-{re.sub(r'[^a-z0-9]+', '-', section.lower()).strip('-')}"[:60].strip("-"),
            "what": f"FILL IN ({section})", "stated": {file: rows}, "kind": "long", "command": "FILL IN",
            "config": "FILL IN", "seed": "FILL IN", "data": "FILL IN", "hardware": "FILL IN", "time": "FILL IN",
            "range": "FILL IN",
        }
        for section, rows in sections.items()
    ]  # fmt: skip
    text = "\n".join(yaml.safe_dump([e], sort_keys=False, allow_unicode=True, width=10**6) for e in entries)
    return textwrap.indent(text, "  ")  # as the ledger's own entries are


def hints(file: str, ledger: Ledger, root: Path = ROOT) -> str:
    """Give, as comments, the sentences of a page that may hold figures without an entry."""
    quoted = [text for entry in ledger.entries for text in entry.stated.get(file, ())]
    found = list(loose_sentences((root / file).read_text(encoding="utf-8"), quoted))
    return "".join(f"# {line}\n" for line in ["Sentences with numbers that no entry quotes:", *found]) if found else ""


def main() -> int:
    """Write, check or draft."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    jobs.add_parser("write", help="write docs/ledger.md")
    checks = jobs.add_parser("check", help="measure the cheap figures again")
    checks.add_argument("--net", action="store_true", help="also those that fetch packages")
    checks.add_argument("--only", nargs="+", default=[], help="ids of entries")
    checks.add_argument("--work", type=Path, default=ROOT / ".ledger", help="folder for what the commands write")
    jobs.add_parser("draft", help="entries for a page's tables").add_argument("file")
    args = parser.parse_args()
    ledger = load_ledger()
    if args.job == "draft":
        print(draft(args.file, ledger) or f"# {args.file}: every row with a digit has an entry or is exempt")
        print(hints(args.file, ledger), end="")
        return 0
    wrong = problems(ledger)
    for line in wrong:
        print(line, file=sys.stderr)
    if args.job == "write":
        (ROOT / PAGE).write_text(markdown(ledger), encoding="utf-8")
        return bool(wrong)
    kinds = {"cheap", "net"} if args.net else {"cheap"}
    chosen = [e for e in ledger.entries if (e.id in args.only if args.only else e.kind in kinds) and e.check]
    console = Console(width=None if sys.stdout.isatty() else 160)
    outcomes = measure(chosen, args.work.resolve(), lambda line: Console(stderr=True).print(line, highlight=False))
    show(outcomes, console)
    bad = sum(not o.good for o in outcomes)
    console.print(f"{len(outcomes)} values of {len(chosen)} entries, {bad} outside their range.", highlight=False)
    return bool(bad or wrong)


if __name__ == "__main__":
    sys.exit(main())
