# SPDX-License-Identifier: Apache-2.0
"""`opendino distill` as a user calls it: killed, resumed, on two processes, with heads trained first, and mistakes."""

import json

import pytest
from runs import SMALL, kill, last_step, losses, opendino, pretrain, same_weights, start, wait_until, write_images

STUDENT = [
    "--student", "vitt14", "--batch-size", "8",
    "--model.embed-dim", "16", "--model.depth", "1", "--model.num-heads", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Images, and a run that becomes the teacher."""
    folder = tmp_path_factory.mktemp("distill")
    images = write_images(folder / "images")
    opendino(*pretrain(images, folder / "teacher", 4))
    return images, folder / "teacher"


def distill(setting, out, *extra, steps=12):
    """Arguments of a small distillation."""
    images, teacher = setting
    place = ["--teacher", str(teacher), "--data", str(images), "--out", str(out), "--steps", str(steps)]
    return ["distill", *place, *STUDENT, *map(str, extra)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "extra",
    [
        ("--mode", "paper"),
        pytest.param(("--mode", "features", "--views", "2", "--cache-teacher", "CACHE"), marks=pytest.mark.slow),
    ],
)
def test_a_distillation_that_is_killed_ends_as_one_that_is_not(extra, setting, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def flags(name):
        return [e.replace("CACHE", str(tmp_path / name)) for e in extra] + ["--checkpoint-every", "2"]

    opendino(*distill(setting, whole, *flags("a")))
    process = start(*distill(setting, cut, *flags("b")))
    wait_until(lambda: last_step(cut) >= 5, process)
    code, messages = kill(process)
    assert code == -9, messages
    assert last_step(cut) < 12
    done = opendino("resume", cut)
    assert "Continuing" in done.stderr
    assert losses(cut) == losses(whole)
    assert same_weights(cut, whole)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mode", ["paper", "features"])
def test_two_processes_learn_the_same(mode, setting, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    cache = [] if mode == "paper" else ["--views", "1", "--cache-teacher"]
    for out, nproc in ((one, 1), (two, 2)):
        own = [*cache, tmp_path / f"cache{nproc}"] if cache else []
        opendino(*distill(setting, out, "--mode", mode, "--nproc", nproc, *own, steps=4))
    for step, loss in losses(one).items():
        assert losses(two)[step] == pytest.approx(loss, abs=2e-4)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_heads_are_trained_first_also_after_a_kill(setting, tmp_path):
    images, teacher = setting
    shape = [*SMALL[2 : SMALL.index("--model.drop-path-rate")], *SMALL[SMALL.index("--crops.global-size") :]]
    student = shape[: shape.index("--model.patch-size") + 2] + STUDENT + shape[shape.index("--crops.global-size") :]

    def arguments(out):
        backbone = teacher / "weights" / "teacher.safetensors"
        place = ["--teacher", str(backbone), "--data", str(images), "--out", str(out), "--steps", "4"]
        return ["distill", *place, "--recipe", "vitt14_demo", *student, "--warm-heads", "6", "--checkpoint-every", "2"]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    opendino(*arguments(whole))
    process = start(*arguments(cut))
    wait_until(lambda: last_step(cut / "warm_heads") >= 3, process)
    assert kill(process)[0] == -9
    opendino("resume", cut)
    for folder in (".", "warm_heads"):
        assert losses(cut / folder) == losses(whole / folder)
        assert same_weights(cut / folder, whole / folder)
    assert "ibot" in json.loads((cut / "metrics.jsonl").read_text().splitlines()[-1])
    report = opendino("report", cut, "--json")
    assert json.loads(report.stdout)["findings"]


@pytest.mark.timeout(300)
def test_mistakes_are_told_in_a_paragraph(setting, tmp_path):
    images, teacher = setting
    done = opendino("distill", "--student", "vitt14", "--data", images, "--out", tmp_path / "a", check=False)
    assert (done.returncode, "--teacher is missing" in done.stderr) == (2, True)
    weights = teacher / "weights" / "teacher.safetensors"
    extra = ["--recipe", "vitt14_demo", "--model.patch-size", "7", "--mode", "paper"]
    done = opendino(*distill((images, weights), tmp_path / "b", *extra), check=False)
    assert done.returncode == 2
    assert "no DINO and iBOT heads" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Example:" in opendino("distill", "--help").stdout
