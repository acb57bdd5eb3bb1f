# SPDX-License-Identifier: Apache-2.0
"""Records arrive in each back-end: TensorBoard, W&B (offline) and MLflow (local), where they are installed."""

import importlib.util
import math
import subprocess
import sys

import pytest

from opendino.errors import ConfigError
from opendino.pretrain.loggers import flatten, open_loggers, settings

CONFIG = {"steps": 3, "optim": {"lr": 0.1, "betas": [0.9, 0.99]}}
RECORDS = [
    {"step": 0, "probe": {"knn20_top1": 30.0}},
    {"step": 1, "loss": 2.0, "bad_steps": 0, "reason": "text"},
    {"step": 2, "loss": math.nan, "dino": 1.5, "probe": {"knn20_top1": 31.0}},
]


def test_records_are_flattened_to_finite_numbers():
    assert flatten(RECORDS[0]) == {"probe/knn20_top1": 30.0}
    assert flatten(RECORDS[1]) == {"loss": 2.0, "bad_steps": 0.0}
    assert flatten(RECORDS[2]) == {"dino": 1.5, "probe/knn20_top1": 31.0}
    assert settings(CONFIG) == {"steps": 3, "optim.lr": 0.1, "optim.betas": [0.9, 0.99]}


def test_no_names_open_nothing_and_unknown_names_are_refused(tmp_path):
    assert open_loggers([], tmp_path, CONFIG) == []
    with pytest.raises(ConfigError, match="'tensorbord' is no logger; known are tensorboard, wandb, mlflow"):
        open_loggers(["tensorbord"], tmp_path, CONFIG)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_names_the_extra(name, tmp_path):
    # In a process of its own, in which the package cannot be imported.
    code = (
        f"import sys; sys.modules[{name!r}] = None\n"
        "from pathlib import Path\nfrom opendino.errors import MissingExtraError\n"
        "from opendino.pretrain.loggers import open_loggers\n"
        f"try: open_loggers([{name!r}], Path({str(tmp_path)!r}), {{}})\n"
        "except MissingExtraError as error: print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert f"{name!r}, which is not installed" in out
    assert "opendino[loggers]" in out


def test_tensorboard_gets_every_figure_at_its_step(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = open_loggers(["tensorboard", "tensorboard"], tmp_path, CONFIG)
    assert len(loggers) == 1
    for record in RECORDS:
        loggers[0].log(record)
    loggers[0].close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"probe/knn20_top1", "loss", "bad_steps", "dino"}
    assert [(e.step, e.value) for e in events.Scalars("probe/knn20_top1")] == [(0, 30.0), (2, 31.0)]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0)]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline_writes_a_run_and_continues_it(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    identities = set()
    for part in (RECORDS[:2], RECORDS[2:]):
        (logger,) = open_loggers(["wandb"], tmp_path, CONFIG)
        identities.add(logger._run.id)
        for record in part:
            logger.log(record)
        assert logger._run.summary["probe/knn20_top1"] == part[-1].get("probe", RECORDS[0]["probe"])["knn20_top1"]
        logger.close()
    assert identities == {(tmp_path / "wandb_id").read_text()}
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.skipif(
    not (importlib.util.find_spec("mlflow") and importlib.util.find_spec("sqlalchemy")),
    reason="mlflow is not installed",
)
def test_mlflow_keeps_figures_and_settings_and_continues_its_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for part in (RECORDS[:2], RECORDS[2:]):
        (logger,) = open_loggers(["mlflow"], tmp_path, CONFIG)
        for record in part:
            logger.log(record)
        logger.close()
    client, identity = logger._client, (tmp_path / "mlflow_id").read_text()
    history = client.get_metric_history(identity, "probe/knn20_top1")
    assert [(m.step, m.value) for m in history] == [(0, 30.0), (2, 31.0)]
    found = client.get_run(identity)
    assert found.data.params["optim.lr"] == "0.1"
    assert found.info.status == "FINISHED"
