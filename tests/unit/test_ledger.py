# SPDX-License-Identifier: Apache-2.0
"""The ledger of figures: complete, up to date, and quick to notice a figure that changed, came or fell out of range."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import ledger as book  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))

PAGE = """# Speeds

Ours takes 2.5 s,
theirs 7.

| what | s |
| --- | --- |
| ours | 2.5 |
| none | – |

```
| code | 3 |
```

## Flags

| `--k` | 20 |
"""
ENTRY = {
    "id": "speed", "what": "Speed", "kind": "cheap", "command": "echo {}", "hardware": "any", "time": "1 s",
    "range": "2 to 3", "check": [{"get": "a.1", "low": 2, "high": 3}],
    "stated": {"docs/x.md": ["| ours | 2.5 |", "Ours takes 2.5 s, theirs 7."]},
}  # fmt: skip
FREE = {"file": "docs/x.md", "section": "Flags", "why": "flags"}


@pytest.fixture
def root(tmp_path):
    """A project with one page."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "README.md").write_text("Nothing.")
    (tmp_path / "benchmarks" / "RESULTS.md").write_text("Nothing.")
    (tmp_path / "docs" / "x.md").write_text(PAGE)
    return tmp_path


def ledger(*entries, exempt=(FREE,)):
    return book.Ledger.model_validate({"hardware": {}, "exempt": exempt, "entries": entries})


# --- this project's ledger -----------------------------------------------------------------------------------------


def test_every_figure_has_an_entry_and_every_entry_its_figure():
    assert book.problems(book.load_ledger()) == []


def test_the_page_is_up_to_date():
    """When this fails: python benchmarks/ledger.py write."""
    assert (ROOT / book.PAGE).read_text(encoding="utf-8") == book.markdown(book.load_ledger())


def test_commands_of_the_checks_name_files_that_exist():
    import re

    for entry in book.load_ledger().entries:
        for name in re.findall(r"(?:benchmarks|tests)/[\w/]+\.py", f"{entry.command} {entry.measure or ''}"):
            assert (ROOT / name).is_file(), f"{entry.id}: {name}"


def test_a_changed_figure_of_this_project_is_noticed(tmp_path):
    for name in ("docs", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "README.md", tmp_path)
    page = tmp_path / "docs" / "small-runs.md"
    page.write_text(page.read_text().replace("| raw 16×16 pixels | 42.9 |", "| raw 16×16 pixels | 43.9 |"))
    found = book.problems(book.load_ledger(tmp_path), tmp_path)
    assert len(found) == 2
    assert "demo-start: docs/small-runs.md does not say any more: | raw 16×16 pixels | 42.9 |" in found[0]
    assert "no entry has this row: | raw 16×16 pixels | 43.9 |" in found[1]


# --- the rules -----------------------------------------------------------------------------------------------------


def test_rows_with_digits_outside_of_code():
    rows = [(r.section, r.line, r.text) for r in book.table_rows(PAGE)]
    assert rows == [("Speeds", 8, "| ours | 2.5 |"), ("Flags", 17, "| `--k` | 20 |")]


def test_a_sound_ledger_has_no_problems(root):
    assert book.problems(ledger(ENTRY), root) == []


@pytest.mark.parametrize(("old", "new", "words"), [
    ("| ours | 2.5 |", "| ours | 2.6 |", ["not say any more: | ours | 2.5 |", "no entry has this row: | ours | 2.6 |"]),
    ("takes 2.5 s,", "takes 2.6 s,", ["does not say any more: Ours takes 2.5 s"]),
    ("| none | – |", "| none | 9 |", ["docs/x.md:9: no entry has this row: | none | 9 |"]),
    ("| `--k` | 20 |", "", ["exemption of docs/x.md, Flags, covers no table"]),
])  # fmt: skip
def test_what_changed_in_a_page_is_told(root, old, new, words):
    (root / "docs" / "x.md").write_text(PAGE.replace(old, new))
    found = book.problems(ledger(ENTRY), root)
    assert len(found) == len(words)
    assert all(word in text for word, text in zip(words, found))


def test_two_entries_of_one_name_and_a_page_that_is_not_there(root):
    other = ENTRY | {"stated": {"docs/none.md": ["1"]}}
    assert book.problems(ledger(ENTRY, other), root) == [
        "speed is the id of two entries.",
        "speed: docs/none.md is no page that is looked at.",
    ]


@pytest.mark.parametrize("wrong", [
    {"check": []}, {"kind": "long"}, {"id": "Speed!"}, {"kind": "often"}, {"colour": 1},
    {"check": [{"get": "a", "low": 3, "high": 2}]},
])  # fmt: skip
def test_an_entry_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError):
        ledger(ENTRY | wrong)


def test_a_draft_has_what_no_entry_covers(root):
    (drafted,) = yaml.safe_load(book.draft("docs/x.md", ledger(ENTRY, exempt=()), root))
    assert (drafted["id"], drafted["stated"]) == ("x-flags", {"docs/x.md": ["| `--k` | 20 |"]})
    assert book.draft("docs/x.md", ledger(ENTRY), root) == ""
    assert book.draft("docs/x.md", ledger(ENTRY, exempt=()), root).startswith("  - id: x-flags\n")
    assert book.problems(ledger(ENTRY, drafted, exempt=()), root) == ["x-flags has a FILL IN left."]
    filled = drafted | {key: "known" for key, value in drafted.items() if str(value).startswith("FILL IN")}
    assert book.problems(ledger(ENTRY, filled, exempt=()), root) == []


def test_sentences_with_figures_that_no_entry_quotes_are_shown(root):
    """Of running text only: tables are checked row by row, and code says nothing."""
    assert book.hints("docs/x.md", ledger(ENTRY), root) == ""
    (root / "docs" / "x.md").write_text(PAGE + "\nIt is 3 times as fast. It has 2 parts;\nand\ntakes 4.5 GB.\n")
    lines = book.hints("docs/x.md", ledger(ENTRY), root).splitlines()
    assert lines[1:] == ["# It is 3 times as fast.", "# and takes 4.5 GB."]


def test_the_written_page_says_all_of_an_entry():
    text = book.markdown(ledger(ENTRY))
    for part in ("[Speed](#speed)", "2 to 3", "`a.1` in 2 to 3", "Ours takes 2.5 s, theirs 7.", "*Flags*: flags"):
        assert part in text


# --- measuring again -----------------------------------------------------------------------------------------------


def measured(tmp_path, command, **changes):
    entry = book.Entry.model_validate(ENTRY | {"measure": command} | changes)
    return book.measure([entry], tmp_path, say=lambda line: None)


def test_values_in_and_outside_their_range(tmp_path):
    (outcome,) = measured(tmp_path, "echo text && echo '{\"a\": [0, 2.5]}'")
    assert (outcome.got, outcome.good) == (2.5, True)
    (outcome,) = measured(tmp_path, "echo '{\"a\": [0, 3.5]}'")
    assert (outcome.got, outcome.good) == (3.5, False)


@pytest.mark.parametrize(("command", "why"), [
    ("echo sorry >&2; exit 3", "exit code 3: sorry"),
    ("echo none", "no JSON"),
    ("echo '{\"a\": [1]}'", "there is no '1' on the way to a.1"),
    ("echo '{\"a\": [1, true]}'", "a.1 is True and no number"),
    ("echo '{\"a\": [1, NaN]}'", "a.1 is nan and no number"),
])  # fmt: skip
def test_what_cannot_be_measured_counts_as_outside(tmp_path, command, why):
    (outcome,) = measured(tmp_path, command)
    assert not outcome.good
    assert why in outcome.why


def test_a_command_runs_once_and_may_leave_a_file(tmp_path):
    command = "echo x >> {work}/runs && echo '{\"a\": [0, 2]}' > {work}/out.json"
    entries = [
        book.Entry.model_validate(ENTRY | {"id": name, "measure": command, "json_file": "{work}/out.json"})
        for name in "ab"
    ]
    outcomes = book.measure(entries, tmp_path, say=lambda line: None)
    assert [o.good for o in outcomes] == [True, True]
    assert (tmp_path / "runs").read_text() == "x\n"
