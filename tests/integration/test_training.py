# SPDX-License-Identifier: Apache-2.0
"""Training as a user runs it: loss falls, a kill loses nothing, micro-batches change nothing that they should not."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from opendino.cli import main

SMALL = [
    "--recipe", "vitt14_demo", "--batch-size", "8", "--num-workers", "0", "--precision", "fp32",
    "--model.patch-size", "7", "--model.embed-dim", "32", "--model.depth", "2", "--model.num-heads", "2",
    "--model.drop-path-rate", "0.2", "--crops.global-size", "28", "--crops.local-size", "14", "--crops.num-local", "2",
    "--heads.num-prototypes", "64", "--heads.hidden-dim", "64", "--heads.bottleneck-dim", "16",
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(24):
        field = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(field).resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.jpg")
    return folder


def command(images, out, steps, *extra):
    return ["pretrain", *SMALL, "--data", str(images), "--out", str(out), "--steps", str(steps), *extra]


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    return {r["step"]: r["loss"] for r in records(run)}


def test_the_loss_falls_and_the_run_folder_describes_itself(images, tmp_path):
    torch.set_num_threads(1)
    assert main(command(images, tmp_path / "run", 30, "--optim.lr", "5e-3")) == 0
    found = [r["dino"] + r["ibot"] for r in records(tmp_path / "run")]
    assert np.mean(found[-5:]) < np.mean(found[:5])
    for name in ("config.yaml", "metrics.jsonl", "weights/teacher.safetensors", "heads.safetensors"):
        assert (tmp_path / "run" / name).is_file()


def test_sigkill_and_resume_equal_an_uninterrupted_run_bit_for_bit(images, tmp_path):
    flags = ("--checkpoint-every", "3", "--seed", "4")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    cli = [sys.executable, "-m", "opendino.cli"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*cli, *command(images, whole, 34, *flags)], check=True, env=env, capture_output=True)
    process = subprocess.Popen([*cli, *command(images, cut, 34, *flags)], env=env, stderr=subprocess.DEVNULL)
    metrics, deadline = cut / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 8) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 8 <= max(losses(cut)) < 34
    subprocess.run([*cli, "resume", str(cut)], check=True, env=env, capture_output=True)
    assert losses(cut) == losses(whole)
    a, b = (load_file(run / "weights" / "teacher.safetensors") for run in (whole, cut))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_folder_of_other_settings_is_refused(images, tmp_path, capsys):
    assert main(command(images, tmp_path / "run", 1)) == 0
    assert main(command(images, tmp_path / "run", 2)) == 2
    assert "other settings" in capsys.readouterr().err


def test_too_few_images_and_unknown_recipe_are_one_paragraph(images, tmp_path, capsys):
    assert main(command(images, tmp_path / "run", 2, "--batch-size", "32")) == 1
    assert "has 24 images and a batch is 32" in capsys.readouterr().err
    assert main(["pretrain", "--recipe", "vits41", "--data", str(images), "--out", str(tmp_path)]) == 2
    assert "Did you mean 'vits14'" in capsys.readouterr().err
