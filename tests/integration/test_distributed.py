# SPDX-License-Identifier: Apache-2.0
"""Any number of processes computes what one does; checkpoints go from any number to any other."""

import json
import signal

import pytest
import torch
from runs import kill, losses, opendino, pretrain, records, start, wait_until, weights, write_images

from opendino.pretrain.checkpoint import list_checkpoints

MODES = {"one": (), "fsdp": ("--nproc", "2", "--sharding", "fsdp"), "ddp": ("--nproc", "2", "--sharding", "ddp")}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def one(images, tmp_path_factory):
    """Runs of one process, 20 steps, by centring."""
    folder = tmp_path_factory.mktemp("one")
    for centering in ("sinkhorn", "moving"):
        opendino(*pretrain(images, folder / centering, 20, "--loss.centering", centering, "--checkpoint-every", "10"))
    return folder


def largest_difference(a, b):
    x, y = losses(a), losses(b)
    assert x.keys() == y.keys()
    return max(abs(x[step] - y[step]) for step in x)


@pytest.mark.parametrize("centering", ["sinkhorn", "moving"])
@pytest.mark.parametrize("mode", ["fsdp", "ddp"])
def test_two_processes_give_the_losses_of_one(mode, centering, images, one, tmp_path):
    run = tmp_path / "run"
    opendino(*pretrain(images, run, 20, "--loss.centering", centering), *MODES[mode])
    found = largest_difference(run, one / centering)
    print(f"{mode} {centering}: largest difference of the loss over 20 steps {found:.1e}")
    assert found < 1e-5
    for key in ("grad_norm_backbone", "teacher_entropy", "koleo"):
        first = [r[key] for r in (records(run)[0], records(one / centering)[0])]
        if key != "teacher_entropy":  # of the first process's images alone
            assert first[0] == pytest.approx(first[1], rel=1e-4), key


@pytest.mark.parametrize("mode", ["fsdp", "ddp"])
def test_two_processes_describe_crops_as_one_does_although_no_loss_looks_at_the_heads(mode, images, tmp_path):
    flags = ["--loss.dino-weight", "0", "--loss.ibot-weight", "0", "--loss.koleo-weight", "0"]
    flags += ["--loss.hog-weight", "1", "--loss.hog-patches", "all"]
    for name, more in (("one", ()), ("two", MODES[mode])):
        opendino(*pretrain(images, tmp_path / name, 6, *flags), *more)
    assert largest_difference(tmp_path / "two", tmp_path / "one") < 1e-5


@pytest.mark.parametrize(("first", "second"), [(2, 1), (2, 4), (1, 2), (4, 2)])
def test_a_checkpoint_continues_on_another_number_of_processes(first, second, images, one, tmp_path):
    run = tmp_path / "run"
    flags = ("--sharding", "fsdp", "--checkpoint-every", "10")
    process = start(*pretrain(images, run, 20, *flags), "--nproc", str(first))
    wait_until(lambda: len(records(run)) > 11, process)
    code, messages = kill(process, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, messages
    assert "continue with: opendino resume" in messages
    stopped = max(losses(run))
    assert 11 <= stopped < 20
    assert list_checkpoints(run)[-1].name == f"step_{stopped:08d}"
    opendino("resume", run, "--nproc", second)
    assert largest_difference(run, one / "sinkhorn") < 1e-5
    a, b = weights(run), weights(one / "sinkhorn")
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k].float(), b[k].float(), atol=1e-3) for k in a)


def test_accumulation_over_processes_and_activation_checkpointing_change_nothing(images, tmp_path):
    common = ("--accumulate", "2", "--heads.batch-norm", "False")
    opendino(*pretrain(images, tmp_path / "a", 6, *common))
    more = ("--activation-checkpointing", "True", *MODES["fsdp"])
    opendino(*pretrain(images, tmp_path / "b", 6, *common, "--loss.koleo-weight", "0.0", *more))
    opendino(*pretrain(images, tmp_path / "c", 6, *common, "--loss.koleo-weight", "0.0"))
    assert largest_difference(tmp_path / "b", tmp_path / "c") < 1e-5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_shards_compute_in_half_precision(precision, images, tmp_path):
    """fp16 begins with overflows, which halve its loss scale in both processes alike; then it trains."""
    steps = 16
    arguments = pretrain(images, tmp_path / "one", steps), pretrain(images, tmp_path / "two", steps)
    for words, mode in zip(arguments, ("one", "fsdp"), strict=True):
        words[words.index("--precision") + 1] = precision
        opendino(*words, *MODES[mode])
    one, two = (list(losses(tmp_path / name).values()) for name in ("one", "two"))
    assert one[:2] == pytest.approx(two[:2], rel=5e-3)
    assert max(two[-3:]) < min(two[:3])
    assert records(tmp_path / "two")[-1]["bad_steps"] == 0
    assert all(w.dtype is torch.float32 for w in weights(tmp_path / "two").values() if w.is_floating_point())


def test_a_batch_that_cannot_be_shared_and_a_wrong_number_are_one_paragraph(images, tmp_path):
    done = opendino(*pretrain(images, tmp_path / "run", 2), "--nproc", "3", check=False)
    assert done.returncode == 2
    assert "cannot be shared by 3 processes" in done.stderr
    assert "Traceback" not in done.stderr
    done = opendino(*pretrain(images, tmp_path / "run", 2), "--nproc", "0", check=False)
    assert done.returncode == 2
    assert "--nproc is 0" in done.stderr


def test_under_torchrun_the_processes_that_are_there_are_used(images, tmp_path):
    import subprocess
    import sys

    from runs import ENVIRONMENT

    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "opendino.cli",
    ]
    run = tmp_path / "run"
    done = subprocess.run(
        [*command, *pretrain(images, run, 2)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(losses(run)) == [1, 2]
    files = [f.name for f in list_checkpoints(run)[-1].iterdir()]
    assert "trainer.json" in files
    assert json.loads((list_checkpoints(run)[-1] / "trainer.json").read_text())["step"] == 2
