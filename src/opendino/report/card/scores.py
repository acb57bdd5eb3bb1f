# SPDX-License-Identifier: Apache-2.0
"""What `opendino eval suite` and `opendino eval fairness` measured, as a model card takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opendino.errors import ConfigError, DataError

METRICS = {
    "%": ("accuracy", "top-1 accuracy, %"),
    "mIoU, %": ("mean_iou", "mIoU, %"),
    "RMSE, m": ("rmse", "RMSE, m"),
    "mAP, %": ("mean_average_precision", "mean average precision, %"),
}
"""Unit of a column → type and name of its metric in a hub's index."""
TASKS = {
    "classification": "image-classification",
    "segmentation": "image-segmentation",
    "depth": "depth-estimation",
    "retrieval": "image-feature-extraction",
}
"""First word of a column's title → the hub's task."""


def read_evaluation(folders: tuple[Path, ...], run: Path, weights_sha256: str | None) -> dict[str, Any]:
    """Read the tables of `opendino eval suite --out`.

    Args:
        folders: each with table.json.
        run: whose model is to have been measured.
        weights_sha256: fingerprint of its weights, which newer tables hold; older ones are known by the run's path.

    Returns:
        "columns": each with title, data, unit, lower_is_better, value, note, task, metric, metric_name, and
        "published", figures of published models on the same set; "failed": what could not be measured and why.

    Raises:
        DataError: for a folder without a table.
        ConfigError: for the table of another model, or two figures of one protocol on one set.
    """
    columns: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for folder in folders:
        report = _read(folder / "table.json", "opendino eval suite", "--evaluation")
        _check_model(report, folder, run, weights_sha256)
        own = Path(str(report["model"])).name or str(report["model"])
        failed |= report.get("failed") or {}
        for column in report["columns"]:
            if own not in column["scores"]:
                continue
            if any((c["title"], c["data"]) == (column["title"], column["data"]) for c in columns):
                raise ConfigError(
                    f"{folder} measures {column['title']} on {column['data']} once more. Give --evaluation one folder "
                    "for each protocol and set."
                )
            columns.append(_column(column, own))
    return {"columns": columns, "failed": failed}


def _column(column: dict[str, Any], own: str) -> dict[str, Any]:
    metric, name = METRICS.get(column["unit"], (column["unit"], column["unit"]))
    if column["title"] == "retrieval, GAP":
        metric, name = "global_average_precision", "global average precision, %"
    return {
        "title": column["title"], "data": column["data"], "unit": column["unit"],
        "lower_is_better": bool(column["lower_is_better"]), "value": float(column["scores"][own]),
        "note": column.get("note") or "", "published": {k: v for k, v in column["scores"].items() if k != own},
        "task": TASKS.get(column["title"].split(",")[0], "image-feature-extraction"), "metric": metric,
        "metric_name": name,
    }  # fmt: skip


def _check_model(report: dict[str, Any], folder: Path, run: Path, weights_sha256: str | None) -> None:
    measured, given = report.get("weights_sha256"), Path(str(report["model"]))
    same = measured == weights_sha256 if measured else run.resolve() in (given.resolve(), *given.resolve().parents)
    if not same:
        raise ConfigError(
            f"The figures in {folder} are of {report['model']}, whose weights are not those of {run}. Measure this "
            f"model: opendino eval suite --model {run} --data DATA --out {folder}"
        )


def read_fairness(folder: Path, run: Path) -> dict[str, Any]:
    """Read fairness.json of `opendino eval fairness --out`.

    Raises:
        DataError: for a folder without it.
        ConfigError: when it is of another model; one that was made from a table of predictions names none.
    """
    result = _read(folder / "fairness.json", "opendino eval fairness", "--fairness")
    model = result.get("model")
    if model and run.resolve() not in (Path(model).resolve(), *Path(model).resolve().parents):
        raise ConfigError(
            f"The figures in {folder} are of {model}, not of {run}. Measure this model: opendino eval fairness "
            f"--model {run} --csv TABLE --train TRAIN --out {folder}"
        )
    return result


def _read(path: Path, command: str, flag: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist. Give {flag} the folder that `{command} --out` wrote.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. Run `{command}` again.") from error
    if not isinstance(found, dict) or "columns" not in found:
        raise DataError(f"{path} holds no result of `{command}`. Give {flag} the folder that it wrote.")
    return found
