# SPDX-License-Identifier: Apache-2.0
"""Stages over processes: the losses of one, and exact resumes on either side of a switch and at it."""

import shutil

import pytest
from runs import losses, opendino, records, same_weights, weights, write_images

from opendino.pretrain.checkpoint import list_checkpoints, step_of

RECIPE = """
batch_size: 8
num_workers: 0
precision: fp32
device: cpu
checkpoint_every: 3
keep_checkpoints: 20
model: {patch_size: 7, embed_dim: 32, depth: 2, num_heads: 2, drop_path_rate: 0.2, init_values: 1.0}
crops: {global_size: 28, local_size: 14, num_local: 2}
heads: {num_prototypes: 64, hidden_dim: 64, bottleneck_dim: 16, separate: true, batch_norm: true}
loss: {centering: sinkhorn, teacher_temp: 0.04}
optim: {lr: 5.0e-4, lr_rule: none, warmup_steps: 2, freeze_last_layer_steps: 0}
stages:
  - {name: low, steps: 8}
  - {name: high, steps: 7, compress_schedules: true, batch_size: 4, crops: {global_size: 56}}
"""
SWITCH = 8
MODES = {"one": (), "fsdp": ("--nproc", "2", "--sharding", "fsdp"), "ddp": ("--nproc", "2", "--sharding", "ddp")}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("staged")
    write_images(folder / "images")
    (folder / "recipe.yaml").write_text(RECIPE + f"data: {folder / 'images'}\n")
    return folder / "recipe.yaml"


def run(recipe, out, mode, *extra):
    opendino("pretrain", "--recipe", recipe, "--out", out, *MODES[mode], *extra)
    return out


def back_to(step, whole, out):
    """Copy a run as it was after a step."""
    shutil.copytree(whole, out)
    for folder in list_checkpoints(out):
        if step_of(folder) > step:
            shutil.rmtree(folder)
    assert step_of(list_checkpoints(out)[-1]) == step
    return out


def largest_difference(a, b):
    x, y = losses(a), losses(b)
    assert x.keys() == y.keys()
    return max(abs(x[step] - y[step]) for step in x)


def test_two_processes_switch_as_one_does_and_resume_at_the_switch(recipe, tmp_path):
    one = run(recipe, tmp_path / "one", "one")
    two = run(recipe, tmp_path / "two", "fsdp")
    assert [r["stage"] for r in records(two)] == ["low"] * 8 + ["high"] * 7
    assert weights(two)["pos_embed"].shape == (1, 65, 32)
    assert largest_difference(one, two) < 1e-5
    again = back_to(SWITCH, two, tmp_path / "again")  # two stopped at the switch, one goes on
    opendino("resume", again)
    assert largest_difference(one, again) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", MODES)
def test_resumes_around_a_switch_are_exact_in_every_mode(mode, recipe, tmp_path):
    whole = run(recipe, tmp_path / "whole", mode)
    assert [step_of(f) for f in list_checkpoints(whole)] == [3, 6, 8, 9, 12, 15]
    for step in (6, SWITCH, 9):
        again = back_to(step, whole, tmp_path / f"from{step}")
        opendino("resume", again, *MODES[mode][:2])
        assert losses(again) == losses(whole)
        assert same_weights(again, whole)
