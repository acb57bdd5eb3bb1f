# SPDX-License-Identifier: Apache-2.0
"""The page of a pre-training run: verdict, curves, sample crops, settings, and what to do next.

It reads files of the run folder only (config.yaml, metrics.jsonl, samples/*.png), so it can be made while the run goes
on, after it broke off, or on another machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from opendino.errors import DataError
from opendino.report.page import Figure, Note, Section, write_page
from opendino.report.panels import PANELS, Record, panels


def write_training_report(
    run: Path, findings: Sequence[Mapping[str, Any]] = (), stages: Sequence[Mapping[str, str]] = ()
) -> Path:
    """Write RUN/report.html and give its path.

    Args:
        run: a run folder, of a run that is finished or not; figures that are missing are left out.
        findings: the verdict as plain data, each with "level" ("ok", "watch" or "bad") and "text".
        stages: a row each of what the stages of the run differ in; none in a run without stages.

    Raises:
        DataError: when the folder holds no config.yaml or no step has been recorded.
        MissingExtraError: without the packages of the extra `report`.
    """
    config, records = read_config(run), read_records(run)
    if not records:
        raise DataError(f"{run} has no step in metrics.jsonl yet, so there is nothing to report. Let it train first.")
    sections = [
        Section("Verdict", [progress(records, config)], notes=[Note(f["level"], f["text"]) for f in findings]),
        Section("Stages", columns=list(stages[0]) if stages else [], rows=[list(s.values()) for s in stages]),
        *(Section(title, figures=panels(records, config, chosen)) for title, chosen in PANELS.items()),
        Section("What the networks see", sample_notes(run), figures=samples(run)),
        Section("Settings", columns=["setting", "value"], rows=list(flat(config)), folded=True),
        next_steps(run, records, config),
    ]
    path = run / "report.html"
    kept = [s for s in sections if s.text or s.rows or s.figures or s.notes or s.commands]
    write_page(path, f"Training run: {run.resolve().name}", kept)
    return path


def read_config(run: Path) -> dict[str, Any]:
    """Read RUN/config.yaml."""
    path = run / "config.yaml"
    if not path.is_file():
        raise DataError(f"{run} has no config.yaml, so it is no run folder. Give the folder of --out.")
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")) or {})


def read_records(run: Path) -> list[Record]:
    """Read RUN/metrics.jsonl; lines that a kill cut off are left out."""
    path, records = run / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def progress(records: Sequence[Record], config: Mapping[str, Any]) -> str:
    """Say how far the run is, how fast, and how long the rest takes at that speed."""
    step, steps = records[-1]["step"], config.get("steps", records[-1]["step"])
    name = records[-1].get("stage")
    stage: dict[str, Any] = next((s for s in config.get("stages") or () if s["name"] == name), {})
    batch = stage.get("batch_size") or config.get("batch_size", "?")
    text = f"Step {step} of {steps}" + (f", stage {stage['name']}" if stage else "")
    text += f", {config.get('recipe', '')}, batches of {batch} images."
    rates = [r["images_per_s"] for r in records[-50:] if r.get("images_per_s")]
    if rates and isinstance(batch, int):
        rate = median(rates)
        text += f" {rate:.3g} images/s"
        left = (steps - step) * batch / rate
        text += f"; {duration(left)} to go." if step < steps else "; the run is complete."
    return text


def duration(seconds: float) -> str:
    """Write a time in the largest unit that fits."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def samples(run: Path) -> list[Figure]:
    """Show the first and the newest picture of crops."""
    paths = sorted((run / "samples").glob("step_*.png"))
    shown = paths[:1] + paths[1:][-1:]
    return [Figure(p.read_bytes(), f"step {int(p.stem.removeprefix('step_'))}") for p in shown]


def sample_notes(run: Path) -> list[str]:
    """Say what the pictures of crops show, if there are any."""
    if not any((run / "samples").glob("step_*.png")):
        return []
    return [
        "Each block is one image: its first global crop, the same with the masked patches grey as the student gets it, "
        "both of its second global crop, and the local crops below. The teacher sees global crops without masks."
    ]


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """List settings as dotted names and values."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        rows += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, str(value))]
    return rows


def next_steps(run: Path, records: Sequence[Record], config: Mapping[str, Any]) -> Section:
    """Say how to continue the run and how to use what it gives."""
    commands = []
    if records[-1]["step"] < config.get("steps", 0):
        commands.append(f"opendino resume {run}")
    if (run / "weights" / "teacher.safetensors").is_file():
        commands += [
            f"opendino embed photos/ --model {run} --out features/",
            f"opendino eval knn --model {run} --train labelled/train --val labelled/val",
            f'python -c "import opendino; model = opendino.load({str(run)!r})"',
        ]
        text = "weights/teacher.safetensors is the result: the teacher's backbone."
    else:
        text = "There is no checkpoint yet."
    return Section("Continue and use", [text], commands=commands)
