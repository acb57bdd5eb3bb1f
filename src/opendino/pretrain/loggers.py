# SPDX-License-Identifier: Apache-2.0
"""Send the records of a run to TensorBoard, Weights & Biases or MLflow (extra `loggers`), beside metrics.jsonl.

The main process opens them. Each gets every record, nested figures flattened as `probe/knn20_top1`, at the record's
step; values that are no finite number are left out, because the back-ends draw or refuse them each in its own way.
"""

from __future__ import annotations

import importlib
import math
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from opendino.errors import ConfigError, MissingExtraError

Record = Mapping[str, Any]


class Logger(Protocol):
    """Takes records while a run goes on."""

    def log(self, record: Record) -> None:
        """Send the figures of one step; the record has its "step"."""

    def close(self) -> None:
        """Write out what is buffered and end the session."""


def open_loggers(names: Sequence[str], run: Path, config: Mapping[str, Any]) -> list[Logger]:
    """Open the back-ends that are asked for.

    Args:
        names: some of "tensorboard", "wandb", "mlflow".
        run: the run folder; its name is the run's name there.
        config: resolved settings as plain data.

    Raises:
        ConfigError: for an unknown name.
        MissingExtraError: when the package of a back-end is not installed.
    """
    for name in names:
        if name not in BACKENDS:
            raise ConfigError(f"{name!r} is no logger; known are {', '.join(BACKENDS)}. Remove it from --loggers.")
    return [BACKENDS[name](run, config) for name in dict.fromkeys(names)]


def flatten(record: Record, prefix: str = "") -> dict[str, float]:
    """Give the finite numbers of a record with nested names joined by "/", without its step."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value) and prefix + key != "step":
            flat[prefix + key] = float(value)
    return flat


def settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= settings(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


class TensorBoardLogger:
    """Event files in RUN/tensorboard; look with `tensorboard --logdir RUN`."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        _need("tensorboard", "The TensorBoard logger")
        module = importlib.import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(str(run / "tensorboard"))
        rows = "\n".join(f"| {k} | {v} |" for k, v in settings(config).items())
        self._writer.add_text("settings", f"| setting | value |\n| --- | --- |\n{rows}")

    def log(self, record: Record) -> None:
        for name, value in flatten(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """A Weights & Biases run; project, entity and mode come from its own environment variables (WANDB_PROJECT, …).

    A resumed run continues the same one: its identity lies in RUN/wandb_id.
    """

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        wandb = _need("wandb", "The W&B logger")
        place = run / "wandb_id"
        if not place.exists():
            place.write_text(uuid.uuid4().hex)
        self._run = wandb.init(
            id=place.read_text().strip(), resume="allow", name=run.resolve().name, dir=str(run), config=dict(config)
        )

    def log(self, record: Record) -> None:
        self._run.log(flatten(record), step=record["step"], commit=True)

    def close(self) -> None:
        self._run.finish()


class MLflowLogger:
    """An MLflow run; the tracking server comes from MLFLOW_TRACKING_URI, the experiment from MLFLOW_EXPERIMENT_NAME.

    Without the former the run is written to RUN/mlflow.db; look with `mlflow ui --backend-store-uri sqlite:///…`. A
    resumed run continues the same one: its identity lies in RUN/mlflow_id.
    """

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        mlflow = _need("mlflow", "The MLflow logger")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or _local_store(run)
        self._client = mlflow.tracking.MlflowClient(tracking_uri=uri)
        place = run / "mlflow_id"
        if place.exists():
            self._id = place.read_text().strip()
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "opendino")
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._id = self._client.create_run(number, run_name=run.resolve().name).info.run_id
        for key, value in settings(config).items():
            self._client.log_param(self._id, key, value)
        place.write_text(self._id)

    def log(self, record: Record) -> None:
        entities = importlib.import_module("mlflow.entities")
        now = int(time.time() * 1000)
        metrics = [entities.Metric(k, v, now, record["step"]) for k, v in flatten(record).items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


BACKENDS: dict[str, Any] = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger, "mlflow": MLflowLogger}


def _local_store(run: Path) -> str:
    _need("sqlalchemy", "MLflow without a server (MLFLOW_TRACKING_URI)")  # not part of mlflow-skinny
    return f"sqlite:///{(run / 'mlflow.db').resolve()}"


def _need(package: str, what_for: str) -> Any:
    """Import an optional package, or name the extra it belongs to."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(package, "loggers", what_for) from error
