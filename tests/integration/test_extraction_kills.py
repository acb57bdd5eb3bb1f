# SPDX-License-Identifier: Apache-2.0
"""Extractions that are killed again and again: every image has one row, with the values of an undisturbed run.

    python -m pytest tests/integration/test_extraction_kills.py -m slow -s

kills each kind of run twenty times, and prints what was hit; docs/extraction.md has a summary.
"""

import random
import subprocess
import sys
import time

import pytest
from extractions import (
    check_whole,
    children,
    command_of,
    embed,
    here,
    kill_at_random,
    kill_worker,
    shards,
    write_inputs,
)
from runs import opendino, start

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
KILLS = 20


def kill_and_go_on(tmp_path, count, kills, nproc, seed):
    names = write_inputs(tmp_path, count)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    here(*embed(tmp_path, whole))
    rng, writing = random.Random(seed), []
    arguments = embed(tmp_path, cut, "--nproc", nproc)
    for _ in range(kills):
        found = kill_at_random(arguments, cut, rng)
        if found is None:
            break
        writing.append(found)
    killed_at = len(shards(cut))
    opendino(*arguments, timeout=900)
    print(f"{len(writing)} kills, {sum(writing)} while a shard was written; {killed_at} of {len(shards(cut))} shards "
          f"were there after the last, {nproc} process(es)")  # fmt: skip
    assert len(writing) == kills, "the run was over before it was killed often enough"
    check_whole(cut, whole, names)
    return writing


@pytest.mark.timeout(300)
def test_three_kills_change_no_row(tmp_path):
    kill_and_go_on(tmp_path, 300, 3, 1, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("nproc", [1, 2])
def test_twenty_kills_change_no_row(nproc, tmp_path):
    writing = kill_and_go_on(tmp_path, 3000, KILLS, nproc, seed=nproc)
    assert sum(writing) >= KILLS // 5


def workers_of(process):
    return [pid for pid in children(process.pid) if "pool_worker" in command_of(pid)]


def kill_workers_of_one_run(tmp_path, count, kills):
    names = write_inputs(tmp_path, count)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    here(*embed(tmp_path, whole))
    rng, killed = random.Random(0), 0
    process = start(*embed(tmp_path, cut, "--nproc", "2"))
    while killed < kills and process.poll() is None:
        goal = len(shards(cut)) + rng.randint(1, 6)
        while len(shards(cut)) < goal and process.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        pids = workers_of(process)
        killed += bool(pids) and kill_worker(rng.choice(pids))
    _, messages = process.communicate(timeout=900)
    assert process.returncode == 0, messages
    print(f"{killed} workers killed in one run")
    assert killed == kills
    check_whole(cut, whole, names)


@pytest.mark.slow
@linux
@pytest.mark.timeout(300)
def test_a_killed_worker_is_replaced_and_its_range_redone(tmp_path):
    kill_workers_of_one_run(tmp_path, 400, 1)


@linux
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_twenty_killed_workers_change_no_row(tmp_path):
    kill_workers_of_one_run(tmp_path, 3000, KILLS)


@linux
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_killed_workers_of_ray_change_no_row(tmp_path):
    pytest.importorskip("ray")
    names = write_inputs(tmp_path, 900)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    here(*embed(tmp_path, whole))
    process = start(*embed(tmp_path, cut, "--engine", "ray", "--nproc", "2"))
    rng, killed = random.Random(0), 0
    while killed < 5 and process.poll() is None:
        goal = len(shards(cut)) + rng.randint(2, 12)
        while len(shards(cut)) < goal and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        pids = [pid for pid in children(process.pid) if "ray::MapWorker" in command_of(pid)]
        killed += bool(pids) and kill_worker(rng.choice(pids))
    _, messages = process.communicate(timeout=900)
    assert process.returncode == 0, messages
    print(f"{killed} actors killed; {len(shards(cut))} shards")
    assert killed == 5
    check_whole(cut, whole, names)


def test_a_run_that_is_asked_to_stop_keeps_what_it_has_and_says_how_to_go_on(tmp_path):
    names = write_inputs(tmp_path, 300)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for nproc in ("1", "2"):
        process = start(*embed(tmp_path, cut, "--nproc", nproc))
        before = len(shards(cut))
        while len(shards(cut)) < before + 2 and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(subprocess.signal.SIGTERM)
        _, messages = process.communicate(timeout=60)
        assert process.returncode == 143, messages
        assert "the same command goes on from there" in messages
    here(*embed(tmp_path, cut))
    here(*embed(tmp_path, whole))
    check_whole(cut, whole, names)
