# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or not there, the newest whole one found, never a silent restart."""

import resource

import pytest
import torch

from opendino.errors import ConfigError, DataError
from opendino.pretrain.checkpoint import Checkpointer, list_checkpoints


def save(run, steps, **options):
    checkpointer = Checkpointer(run, **options)
    for step in steps:
        checkpointer.save(
            step, {"x": torch.arange(4096) + step, "y": torch.tensor(float(step))}, {"note": f"at {step}"}
        )
    checkpointer.finish(required=True)
    return checkpointer


def load(run, before=None):
    tensors = {"x": torch.zeros(4096, dtype=torch.int64), "y": torch.zeros(())}
    extras = Checkpointer(run).load(tensors, before)
    return None if extras is None else (extras["step"], int(tensors["x"][0]), float(tensors["y"]), extras["note"])


@pytest.mark.parametrize("background", [True, False])
def test_keeps_the_last_and_reads_the_newest(background, tmp_path):
    save(tmp_path, (1, 2, 12), background=background)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000012"]
    assert load(tmp_path) == (12, 12, 12.0, "at 12")
    assert load(tmp_path, before=12) == (2, 2, 2.0, "at 2")


def test_milestones_stay(tmp_path):
    save(tmp_path, range(1, 11), keep=1, milestone_every=4)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000004", "step_00000008", "step_00000010"]


def test_what_is_saved_in_the_background_is_the_state_of_that_moment(tmp_path):
    checkpointer, x = Checkpointer(tmp_path), torch.zeros(4096, dtype=torch.int64)
    checkpointer.save(3, {"x": x, "y": torch.tensor(3.0)}, {"note": ""})
    x.fill_(7)
    checkpointer.finish()
    assert load(tmp_path)[1] == 0


@pytest.mark.parametrize("how", ["cut", "missing", "no description", "garbage"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(how, tmp_path, caplog):
    save(tmp_path, (1, 2))
    newest = list_checkpoints(tmp_path)[-1]
    data = max(newest.iterdir(), key=lambda f: f.stat().st_size)
    if how == "cut":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif how == "missing":
        data.unlink()
    elif how == "no description":
        (newest / "trainer.json").write_text('{"step": 2')
    else:  # the right size, and nothing in it
        data.write_bytes(bytes(data.stat().st_size))
    assert load(tmp_path)[:2] == (1, 1)
    assert "step_00000002 cannot be read" in caplog.text


def test_no_readable_checkpoint_is_an_error_and_none_at_all_is_a_start(tmp_path):
    assert load(tmp_path) is None
    save(tmp_path, (1,))
    (list_checkpoints(tmp_path)[0] / "trainer.json").unlink()
    with pytest.raises(ConfigError, match="None of the 1 checkpoints"):
        load(tmp_path)


def test_an_unfinished_write_is_not_seen(tmp_path):
    (tmp_path / "checkpoints" / ".writing_00000005").mkdir(parents=True)
    assert list_checkpoints(tmp_path) == []
    save(tmp_path, (5,))
    assert load(tmp_path)[0] == 5


def test_a_full_disk_leaves_the_previous_checkpoint_and_says_so(tmp_path, caplog):
    """A limit on the size of files stands in for the disk: the write fails in the same place."""
    checkpointer = save(tmp_path, (1,))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        checkpointer.save(2, {"x": torch.zeros(100_000), "y": torch.zeros(())}, {})
        checkpointer.finish()
        assert "step 2 could not be written" in caplog.text
        assert "the last whole checkpoint is step_00000001" in caplog.text
        checkpointer.save(3, {"x": torch.zeros(100_000), "y": torch.zeros(())}, {})
        with pytest.raises(DataError, match="Make room there"):
            checkpointer.finish(required=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    assert load(tmp_path)[0] == 1
