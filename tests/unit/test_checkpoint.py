# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or not there, the newest whole one found, never a silent restart."""

import pytest
import torch

from opendino.errors import ConfigError
from opendino.pretrain.checkpoint import STATE, checkpoints, load_checkpoint, save_checkpoint


def test_keeps_the_last_and_reads_the_newest(tmp_path):
    for step in (1, 2, 12):
        save_checkpoint(tmp_path, step, {"x": torch.tensor(step)}, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000002", "step_00000012"]
    assert load_checkpoint(tmp_path)["x"] == 12


def test_a_checkpoint_cut_in_half_falls_back_to_the_one_before(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"x": torch.arange(100) + step}, keep=2)
    newest = checkpoints(tmp_path)[-1] / STATE
    newest.write_bytes(newest.read_bytes()[:200])
    assert load_checkpoint(tmp_path)["x"][0] == 1


def test_no_readable_checkpoint_is_an_error_and_none_at_all_is_a_start(tmp_path):
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 1, {"x": 1}, keep=1)
    (checkpoints(tmp_path)[0] / STATE).write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="None of the 1 checkpoints"):
        load_checkpoint(tmp_path)


def test_an_unfinished_write_is_not_seen(tmp_path):
    (tmp_path / "checkpoints" / ".writing_00000005").mkdir(parents=True)
    assert checkpoints(tmp_path) == []
