# SPDX-License-Identifier: Apache-2.0
"""Twenty kills over one run, at random moments and while checkpoints are written: nothing is lost, nothing repeated.

    python -m pytest tests/integration/test_kills.py -m slow -s

prints a line for each kill and a summary; docs/training.md has one.
"""

import random
import shutil
import time

import pytest
from runs import kill, last_step, losses, opendino, pretrain, same_weights, start, wait_until, write_images

from opendino.pretrain.checkpoint import list_checkpoints, step_of

KILLS = 20


def writing(run):
    return any((run / "checkpoints").glob(".writing_*"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("nproc", [1, 2])
def test_twenty_kills_change_nothing(nproc, tmp_path):
    rng, images = random.Random(nproc), write_images(tmp_path / "images")
    flags = ("--checkpoint-every", "4", "--heads.num-prototypes", "4096", "--heads.hidden-dim", "512")
    steps = 8 * KILLS
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    opendino(*pretrain(images, whole, steps, *flags), "--nproc", nproc, timeout=900)
    began = []
    arguments = pretrain(images, cut, steps, *flags)
    for number in range(KILLS):
        process = start(*arguments, "--nproc", nproc)
        # It has trained again, then a random moment, or the next writing of a checkpoint.
        goal = (step_of(list_checkpoints(cut)[-1]) if list_checkpoints(cut) else 0) + rng.randint(2, 9)
        wait_until(lambda goal=goal: last_step(cut) >= goal, process)
        during = number % 2 == 1
        if during:
            wait_until(lambda: writing(cut), process)
        time.sleep(rng.uniform(0, 0.02 if during else 0.4))
        was_writing = writing(cut)
        code, messages = kill(process)
        assert code == -9, messages
        began.append(was_writing)
        print(f"kill {number + 1} at step {last_step(cut)}{', while a checkpoint was written' if was_writing else ''}")
        arguments = ["resume", str(cut)]
        time.sleep(0.5)  # the other process notices that its launcher is gone
    assert last_step(cut) < steps
    opendino("resume", cut, "--nproc", nproc, timeout=900)
    print(f"{KILLS} kills, {sum(began)} while a checkpoint was written; {steps} steps, {nproc} process(es)")
    assert sum(began) >= KILLS // 4
    assert losses(cut) == losses(whole)
    assert same_weights(cut, whole)
    assert not writing(cut)
    shutil.rmtree(whole)
