# SPDX-License-Identifier: Apache-2.0
"""Who a process is by its environment; starting local ones."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from opendino.distributed.launch import launch_local
from opendino.distributed.process import Place, first_host, local_device, place_of

STEP = {
    "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "41234567",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip


def test_without_variables_there_is_one_process():
    assert place_of({}) == Place(0, 0, 1, None)


def test_a_batch_script_is_no_task_of_its_job():
    assert place_of({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}) == Place()


def test_torchrun_is_believed_before_slurm():
    torchrun = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "5"}
    assert place_of(STEP | torchrun) == Place(1, 1, 2, ("h", 5))


def test_a_slurm_step_gives_rank_host_and_a_port_of_the_job():
    place = place_of(STEP)
    assert (place.rank, place.local_rank, place.world_size) == (3, 1, 4)
    host, port = place.address
    assert host == "gpu07"
    assert 20_000 <= port < 40_000
    assert place_of(STEP | {"SLURM_PROCID": "0"}).address == place.address
    assert place_of(STEP | {"SLURM_JOB_ID": "41234568"}).address[1] != port
    assert place_of(STEP | {"MASTER_ADDR": "x", "MASTER_PORT": "9"}).address == ("x", 9)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu07", "gpu07"),
        ("gpu[07-09,12]", "gpu07"),
        ("a1,b2", "a1"),
        ("n-3[1,5]", "n-31"),
        ("r2[003-4],x", "r2003"),
    ],
)
def test_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def test_a_named_device_is_taken_as_it_is():
    assert local_device("cpu") == torch.device("cpu")
    assert local_device("auto").type in ("cpu", "cuda", "mps")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that can be started by its name, with the text given to it."""

    def write(text):
        (tmp_path / "job.py").write_text("import os, sys, time, signal\n" + textwrap.dedent(text))
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        return tmp_path

    return write


def test_each_process_knows_its_place_and_gets_its_arguments(module):
    folder = module("""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
        open(f"{sys.argv[1]}/{os.environ['RANK']}", "w").write(" ".join(os.environ[n] for n in names))
    """)
    assert launch_local("job", [str(folder)], 3) == 0
    assert [(folder / str(i)).read_text() for i in range(3)] == [f"{i} {i} 3 127.0.0.1" for i in range(3)]


def test_when_one_fails_the_others_are_ended_and_its_code_is_given(module):
    folder = module("""
        if os.environ["RANK"] == "1":
            sys.exit(7)
        time.sleep(60)
    """)
    began = time.monotonic()
    assert launch_local("job", [str(folder)], 2) == 7
    assert time.monotonic() - began < 30


def test_a_signal_that_ends_one_is_the_exit_code_of_shells(module):
    folder = module("""
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    """)
    assert launch_local("job", [str(folder)], 2) == 128 + signal.SIGKILL


def test_a_signal_to_the_launcher_reaches_every_process_once(module):
    folder = module("""
        got = []
        signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
        open(f"{sys.argv[1]}/ready{os.environ['RANK']}", "w").close()
        while not got:
            time.sleep(0.01)
        time.sleep(0.3)
        open(f"{sys.argv[1]}/got{os.environ['RANK']}", "w").write(str(len(got)))
    """)
    code = f"from opendino.distributed.launch import launch_local; exit(launch_local('job', [{str(folder)!r}], 2))"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not all((folder / f"ready{i}").exists() for i in range(2)) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    assert process.wait(30) == 0
    assert [(folder / f"got{i}").read_text() for i in range(2)] == ["1", "1"]


def test_processes_end_when_their_launcher_is_killed(module):
    folder = module("""
        from opendino.distributed.launch import end_with_launcher
        end_with_launcher()
        open(f"{sys.argv[1]}/{os.environ['RANK']}.part", "w").write(str(os.getpid()))
        os.rename(f"{sys.argv[1]}/{os.environ['RANK']}.part", f"{sys.argv[1]}/{os.environ['RANK']}")
        time.sleep(60)
    """)
    code = f"from opendino.distributed.launch import launch_local; exit(launch_local('job', [{str(folder)!r}], 2))"
    launcher = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not all((folder / str(i)).exists() for i in range(2)) and time.monotonic() < deadline:
        time.sleep(0.01)
    launcher.kill()
    launcher.wait()
    pids = [int((folder / str(i)).read_text()) for i in range(2)]
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, pids))


def alive(pid):
    """Whether a process runs; one that has ended and was not asked for its code does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
