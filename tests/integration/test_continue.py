# SPDX-License-Identifier: Apache-2.0
"""Continued training through the command line, from a run of our own, in one process and in two."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from runs import losses, opendino, pretrain, records, weights, write_images
from safetensors.torch import load_file

MODES = {"fsdp": ("--nproc", "2", "--sharding", "fsdp"), "ddp": ("--nproc", "2", "--sharding", "ddp")}
RUINOUS = ("--optim.lr", "20", "--optim.clip-grad", "0", "--init.backbone-lr", "1", "--optim.momentum", "0.5")
GUARD = ("--guard.every", "1", "--guard.patience", "2", "--max-rollbacks", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, a labelled probe, and a short run to continue."""
    folder = tmp_path_factory.mktemp("place")
    write_images(folder / "images")
    rng = np.random.default_rng(1)
    for part in ("train", "test"):
        for i in range(24):
            field = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8) * 0.7 + 60 * np.eye(3)[i % 3]
            target = folder / "probe" / part / "rgb"[i % 3] / f"{i}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(field.astype(np.uint8)).resize((48, 40), Image.Resampling.BICUBIC).save(target)
    opendino(*pretrain(folder / "images", folder / "first", 4))
    return folder


def events(run):
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def continued(place, out, steps, *more):
    return pretrain(place / "images", out, steps, "--init", place / "first", *more)


def test_a_run_from_own_weights_that_ends_below_its_start_says_so(place, tmp_path):
    flags = (*RUINOUS, "--probe", place / "probe", "--guard.patience", "99")
    done = opendino(*continued(place, tmp_path / "run", 6, *flags))
    assert f"Starting from {place / 'first'}" in " ".join(done.stderr.split())
    assert "heads of" in done.stderr
    assert "The result is BELOW its start" in " ".join(done.stderr.split())
    assert "The run ended below its start" in " ".join(done.stderr.split())
    assert "ended below its start" in (tmp_path / "run" / "report.html").read_text()


def test_a_stopped_run_ends_with_a_reason_and_the_weights_it_began_with(place, tmp_path):
    run = tmp_path / "run"
    done = opendino(*continued(place, run, 10, *RUINOUS, *GUARD, "--probe", place / "probe"), check=False)
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert "opendino pretrain: The features got worse than they began, in 2 checks in a row" in said
    assert "The run is stopped" in (run / "report.html").read_text()
    first, now = (load_file(p / "weights" / "teacher.safetensors") for p in (place / "first", run))
    assert all(torch.equal(first[k], now[k]) for k in first)
    again = opendino("resume", run, check=False)
    assert again.returncode == 1
    assert "The run is stopped" in " ".join(again.stderr.split())


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(MODES))
def test_two_processes_freeze_and_go_back_alike(mode, place, tmp_path):
    warm = ("--init.warm-heads-steps", "2", "--guard.every", "1")
    opendino(*continued(place, tmp_path / "one", 4, *warm))
    opendino(*continued(place, tmp_path / "two", 4, *warm, *MODES[mode]))
    one, two = (losses(tmp_path / n) for n in ("one", "two"))
    print(f"{mode}: largest difference of the loss {max(abs(one[s] - two[s]) for s in one):.1e}")
    assert max(abs(one[s] - two[s]) for s in one) < 1e-5
    ranks = [r["guard"]["feature_rank"] for r in records(tmp_path / "two")]
    assert len(set(ranks[:3])) == 1  # the start and two warm-up steps
    assert ranks[4] != ranks[0]
    run = tmp_path / "spoilt"
    flags = (*RUINOUS, *GUARD, *warm, "--probe", place / "probe", *MODES[mode])
    spoilt = opendino(*continued(place, run, 10, *flags), check=False)
    assert spoilt.returncode == 1, spoilt.stderr[-2000:]
    assert [e["event"] for e in events(run)] == ["start", "rollback", "stopped"]
    assert events(run)[-1]["step"] == 2  # the best with the warmest heads
    a, b = weights(place / "first"), weights(run)
    assert all(torch.equal(a[k], b[k]) for k in a if "head" not in k)
    assert not torch.equal(a["dino_head.mlp.0.weight"], b["dino_head.mlp.0.weight"])
