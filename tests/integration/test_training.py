# SPDX-License-Identifier: Apache-2.0
"""Training as a user runs it: loss falls, a kill loses nothing, the run folder explains itself, mistakes are told."""

import numpy as np
import pytest
import torch
from runs import kill, last_step, losses, opendino, pretrain, records, same_weights, start, wait_until, write_images

from opendino.cli import main


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def test_the_loss_falls_and_the_run_folder_describes_itself(images, tmp_path, capsys):
    torch.set_num_threads(1)
    run = tmp_path / "run"
    assert main(pretrain(images, run, 30, "--optim.lr", "5e-3")) == 0
    found = [r["dino"] + r["ibot"] for r in records(run)]
    assert np.mean(found[-5:]) < np.mean(found[:5])
    for name in ("config.yaml", "metrics.jsonl", "weights/teacher.safetensors", "heads.safetensors", "report.html"):
        assert (run / name).is_file()
    assert list((run / "samples").glob("step_*.png"))
    said = capsys.readouterr().err
    assert "report.html has the curves" in said
    assert any(word in said for word in ("Nothing is wrong", "watch", "bad"))


def test_profile_says_where_the_time_goes_and_leaves_no_run(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = pretrain(images, "unused", 30, "--profile", "2")
    assert main(arguments) == 0
    said = capsys.readouterr().out
    for part in ("data wait", "augment", "teacher forward", "student forward + losses", "backward", "aten::"):
        assert part in said
    assert "loading is" in said or "limit" in said
    assert not list(tmp_path.iterdir())


def test_sigkill_and_resume_equal_an_uninterrupted_run_bit_for_bit(images, tmp_path):
    flags = ("--checkpoint-every", "3", "--seed", "4")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    opendino(*pretrain(images, whole, 34, *flags))
    process = start(*pretrain(images, cut, 34, *flags))
    wait_until(lambda: last_step(cut) >= 8, process)
    kill(process)
    assert 8 <= last_step(cut) < 34
    opendino("resume", cut)
    assert losses(cut) == losses(whole)
    assert same_weights(cut, whole)


def test_a_run_folder_of_other_settings_is_refused(images, tmp_path, capsys):
    assert main(pretrain(images, tmp_path / "run", 1)) == 0
    assert main(pretrain(images, tmp_path / "run", 2)) == 2
    assert "other settings" in capsys.readouterr().err


def test_too_few_images_and_unknown_recipe_are_one_paragraph(images, tmp_path, capsys):
    assert main(pretrain(images, tmp_path / "run", 2, "--batch-size", "32")) == 1
    assert "has 24 images and a batch is 32" in capsys.readouterr().err
    assert main(["pretrain", "--recipe", "vits41", "--data", str(images), "--out", str(tmp_path)]) == 2
    assert "Did you mean 'vits14'" in capsys.readouterr().err
