# SPDX-License-Identifier: Apache-2.0
"""What the files of a run folder say about the model in it. What no file says is None, and never guessed.

Read are config.yaml or finetune.json, metrics.jsonl, sessions.jsonl, the newest checkpoint's list of images, and the
header of the weight file; no tensor is loaded unless its hash is asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from opendino.errors import DataError, WeightsError
from opendino.models.files import RUN_WEIGHTS, TUNED_WEIGHTS
from opendino.report.card.hours import measured_time
from opendino.report.training import read_records

Facts = dict[str, Any]
LAST = 20
"""Steps over which the last losses are averaged."""
PLACES = ("data", "out", "probe", "weights", "teacher", "frozen_teacher", "teacher_heads", "cache_teacher")
"""Settings that may be places on somebody's machine."""


def run_facts(run: Path, hashed: bool = True) -> Facts:
    """Read a run folder of pre-training or fine-tuning.

    Args:
        run: the folder.
        hashed: also the sha256 of the weight file, which reads all of it.

    Returns:
        "name"; "kind", pretrained or finetuned; "model", "training", "data", "sessions", "time" (see the functions).

    Raises:
        DataError: when the folder is none of a run, or has no weights yet.
        WeightsError: when the weight file is damaged or not one of this package.
    """
    tuned = (run / "finetune.json").is_file()
    if not tuned and not (run / "config.yaml").is_file():
        raise DataError(
            f"{run} has neither config.yaml nor finetune.json, so it is no run folder. Give the folder of --out of "
            "`opendino pretrain` or `opendino finetune`."
        )
    weights = run / (TUNED_WEIGHTS if tuned else RUN_WEIGHTS)
    if not weights.is_file():
        raise DataError(
            f"{run} has no {weights.relative_to(run)} yet, so there is no model to describe. Let it train to its "
            "first checkpoint" + ("." if tuned else f" (`opendino resume {run}`).")
        )
    facts: Facts = {"name": run.resolve().name, "kind": "finetuned" if tuned else "pretrained"}
    facts["model"] = model_facts(weights, run, hashed)
    if tuned:
        training, sessions, records, data = tuning_facts(run), [], [], None
        data = {"name": None, "images": training.pop("num_train"), "names": None}
    else:
        config, records, sessions = read_yaml(run / "config.yaml"), read_records(run), read_sessions(run)
        training = training_facts(config, records, sessions, facts["model"].pop("step") or newest_checkpoint(run))
        data = data_facts(run, config, sessions)
    stages = stages_of(training["settings"])
    return facts | {
        "training": training, "data": data, "sessions": [s for s in sessions if s.get("event") == "start"],
        "time": measured_time(run, records, sessions, lambda step: batch_at(stages, step)),
    }  # fmt: skip


# --- the model -----------------------------------------------------------------------------------------------------


def model_facts(weights: Path, run: Path, hashed: bool) -> Facts:
    """Read the header of a weight file.

    Returns:
        "file", "bytes", "sha256", "parameters", "dtype", "config" and "preprocess" as the file has them, and "step" at
        which it was written.
    """
    header = safetensors_header(weights)
    metadata = header.pop("__metadata__", {})
    if "opendino.config" not in metadata or "opendino.preprocess" not in metadata:
        raise WeightsError(
            f"{weights} does not say what model it holds. It was not written by this package; "
            "opendino.models.weights.save_backbone writes a file that does."
        )
    step = metadata.get("opendino.step")
    return {
        "file": weights.relative_to(run).as_posix(),
        "bytes": weights.stat().st_size,
        "sha256": sha256(weights) if hashed else None,
        "parameters": sum(math.prod(t["shape"]) for t in header.values()),
        "dtype": ", ".join(sorted({str(t["dtype"]) for t in header.values()})),
        "config": json.loads(metadata["opendino.config"]),
        "preprocess": json.loads(metadata["opendino.preprocess"]),
        "step": int(step) if step else None,
    }


def safetensors_header(path: Path) -> dict[str, Any]:
    """Give name → dtype and shape of the tensors in a file, and "__metadata__"."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            found = json.loads(file.read(size)) if 0 < size < 100_000_000 else None
        except ValueError:
            found = None
    if not isinstance(found, dict):
        raise WeightsError(f"{path} is no whole safetensors file. Copy it again, or resume the run that writes it.")
    return found


def sha256(path: Path) -> str:
    """Give the sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


# --- pre-training --------------------------------------------------------------------------------------------------


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the settings of a run."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise DataError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    return found if isinstance(found, dict) else {}


def read_sessions(run: Path) -> list[dict[str, Any]]:
    """Read RUN/sessions.jsonl; none of a run that older code made, and a line that a kill cut off is left out."""
    path, found = run / "sessions.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def newest_checkpoint(run: Path) -> int | None:
    """Give the step of the newest checkpoint, which is that of weights that do not say it themselves."""
    names = [re.fullmatch(r"step_(\d+)", p.name) for p in (run / "checkpoints").glob("step_*")]
    return max((int(m[1]) for m in names if m), default=None)


def training_facts(
    config: Mapping[str, Any], records: Sequence[Mapping[str, Any]], sessions: list[dict[str, Any]], step: int | None
) -> Facts:
    """Say how a pre-training run went.

    Returns:
        "settings" (paths cut to their last part), "stages" if there are several, "step" of the weights, "steps"
        planned, "images_seen" up to that step, "started_from" and frozen "teacher", names of weights or None,
        "precision" it was computed in (None when not recorded), "losses" as medians of the last steps, "probe" with the
        first and the last score, and counts of skipped steps, rollbacks and unreadable images.
    """
    init = config.get("init")
    last: Mapping[str, Any] = next((r for r in reversed(records) if r["step"] > 0), {})
    used = sorted({s["precision"] for s in sessions if s.get("precision")})
    given = config.get("precision")
    probes = [(r["step"], r["probe"]) for r in records if isinstance(r.get("probe"), dict) and r["probe"]]
    tail = [r for r in records if step is None or r["step"] <= step][-LAST:]
    return {
        "settings": without_paths(config),
        "step": step,
        "steps": config.get("steps"),
        "stages": stages if len(stages := stages_of(without_paths(config))) > 1 else [],
        "images_seen": images_until(stages, step),
        "started_from": _name(init.get("weights") if isinstance(init, Mapping) else None, "weights"),
        "teacher": _name(config.get("teacher"), "teacher"),
        "precision": ", ".join(used) or (given if given != "auto" else None),
        "losses": {k: median(v) for k in ("loss", "dino", "ibot", "koleo") if (v := finite(tail, k))},
        "probe": {"first": probes[0], "last": probes[-1]} if probes else None,
        "counts": {k: last.get(k) for k in ("bad_steps", "rollbacks", "image_errors")},
        "mfu": median(v) if (v := finite(records, "mfu")) else None,
        "tflops": median(v) if (v := finite(records, "tflops")) else None,
        "peak_memory_gb": max(finite(records, "peak_memory_gb"), default=None),
    }


def _name(value: Any, key: str) -> str | None:
    return str(_cut(key, value)) if value else None


def finite(records: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Give the finite values of a figure."""
    return [float(r[key]) for r in records if isinstance(r.get(key), int | float) and math.isfinite(r[key])]


def without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Cut places on somebody's machine to their last part; web addresses and hub names (owner/name) stay."""
    return {key: _cut(key, value) for key, value in settings.items()}


def _cut(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_paths(value)
    if isinstance(value, list | tuple):
        return [_cut(key, v) for v in value]
    if not isinstance(value, str) or "://" in value:
        return value
    path = Path(value).expanduser()
    place = key in PLACES and (path.exists() or value.count("/") > 1 or value.startswith(".") or key in PLACES[:3])
    return path.name if place or path.is_absolute() else value


def stages_of(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give the stages of a run in order, each with "first" and "end" step and "batch_size"; a plain run is one."""
    given = config.get("stages")
    found: list[dict[str, Any]] = []
    first = 0
    for stage in given if isinstance(given, list) and given else [{"steps": config.get("steps")}]:
        steps = stage.get("steps")
        end = first + steps if isinstance(steps, int) else 10**12
        batch = stage.get("batch_size") or config.get("batch_size")
        found.append({**stage, "first": first, "end": end, "batch_size": batch})
        first = end
    return found


def batch_at(stages: Sequence[Mapping[str, Any]], step: int) -> int | None:
    """Give the images in a step, counted from 1."""
    batch = next((s["batch_size"] for s in stages if s["first"] < step <= s["end"]), None)
    return batch if isinstance(batch, int) else None


def images_until(stages: Sequence[Mapping[str, Any]], step: int | None) -> int | None:
    """Give the images seen up to a step; None when step or batch is not known."""
    if step is None or any(not isinstance(s["batch_size"], int) for s in stages):
        return None
    return sum(int(max(0, min(step, s["end"]) - s["first"]) * s["batch_size"]) for s in stages)


def data_facts(run: Path, config: Mapping[str, Any], sessions: list[dict[str, Any]]) -> Facts:
    """Give "name", number of "images" and hash of their "names", from the sessions or the newest checkpoint."""
    name = without_paths({"data": config.get("data") or ""})["data"] or None
    for session in reversed(sessions):
        if session.get("event") == "start" and "images" in session:
            return {"name": name, "images": session["images"], "names": session.get("names")}
    for path in sorted((run / "checkpoints").glob("step_*/trainer.json"), reverse=True):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["data"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return {"name": name, "images": found.get("images"), "names": found.get("names")}
    return {"name": name, "images": None, "names": None}


# --- fine-tuning ---------------------------------------------------------------------------------------------------


def tuning_facts(run: Path) -> Facts:
    """Say how a fine-tuning run went: settings, task, what it began from, its score beside that of the linear probe."""
    path = run / "finetune.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        settings = dict(found["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}). Give the folder of `opendino finetune --out`.") from error
    result = found.get("result") or {}
    epochs, num_train = found.get("epochs") or [], found.get("num_train")
    return {
        "settings": settings, "task": found.get("task"), "classes": found.get("classes"), "num_train": num_train,
        "num_val": found.get("num_val"), "base_sha256": found.get("backbone_sha256"), "metric": result.get("metric"),
        "probe": (result.get("probe") or {}).get("score"), "best": result.get("best"), "size": found.get("size"),
        "epochs_done": len(epochs), "trainable": result.get("trainable"), "precision": None,
        "images_seen": num_train * len(epochs) if isinstance(num_train, int) else None,
    }  # fmt: skip
