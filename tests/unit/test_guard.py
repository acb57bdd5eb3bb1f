# SPDX-License-Identifier: Apache-2.0
"""A run that began with good features: ruin is noticed, undone and explained; a kill changes nothing of that."""

import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from opendino.cli.pretrain import read_arguments
from opendino.cli.probing import knn_probe
from opendino.cli.report import judge_run, report_run
from opendino.errors import DataError
from opendino.images.sources import open_source
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone
from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.guard import FeaturesError, FixedImages, Guard
from opendino.pretrain.health import rank_me
from opendino.pretrain.interrupts import TrainingStopped
from opendino.pretrain.trainer import Trainer

SMALL = [
    "--recipe", "vitt14_continue", "--batch-size", "4", "--num-workers", "0", "--precision", "fp32", "--device", "cpu",
    "--crops.global-size", "28", "--crops.local-size", "14", "--crops.num-local", "2", "--heads.num-prototypes", "8",
    "--heads.hidden-dim", "8", "--heads.bottleneck-dim", "4", "--guard.images", "8", "--guard.every", "1",
    "--guard.patience", "2", "--max-rollbacks", "1", "--checkpoint-every", "100", "--optim.warmup-steps", "0",
    "--init.warm-heads-steps", "2", "--async-checkpoints", "False", "--optim.momentum", "0.5", "--log-every", "5",
]  # fmt: skip
RUINOUS = ("--optim.lr", "20", "--optim.clip-grad", "0", "--init.backbone-lr", "1")


def noise(folder, name, rng, tint=None):
    folder.mkdir(parents=True, exist_ok=True)
    field = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    if tint is not None:
        field = (field * 0.7 + 60 * np.eye(3)[tint]).astype(np.uint8)
    Image.fromarray(field).resize((40, 36), Image.Resampling.BICUBIC).save(folder / name)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, a labelled probe of three tints, and weights."""
    folder = tmp_path_factory.mktemp("guard")
    rng = np.random.default_rng(0)
    for i in range(8):
        noise(folder / "images", f"{i}.png", rng)
    for part in ("train", "test"):
        for i in range(12):
            noise(folder / "probe" / part / "rgb"[i % 3], f"{i}.png", rng, i % 3)
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(img_size=56, embed_dim=64, depth=2, num_heads=1))
    save_backbone(model, folder / "weights.safetensors")
    return folder


def trainer(place, out, *more, probe=True, **options):
    words = ["--data", place / "images", "--out", out, "--steps", "10", "--init", place / "weights.safetensors", *more]
    config = read_arguments([*SMALL, *map(str, words)])[0]
    return Trainer(config, probe=knn_probe(place / "probe", k=1) if probe else None, **options)


def lines(run, name):
    path = run.run / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- judging ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def guard(place):
    config = PretrainConfig(
        data=str(place / "images"), steps=100, init={"weights": "x"},
        guard={"images": 8, "knn_drop": 2.0, "rank_drop": 0.25, "patience": 2},
    )  # fmt: skip
    return Guard(config, open_source(config.data))


def record(step, rank, knn=None):
    probe = {} if knn is None else {"probe": {"knn20_top1": knn, "knn20_mean_per_class": 0.0}}
    return {"step": step, "guard": {"feature_rank": rank}, **probe}


def test_answers_by_hand(guard):
    answers = [
        guard.check(record(*x))
        for x in [
            (0, 8.0, 50.0),
            (5, 8.0, 50.0),
            (10, 6.0, 48.0),
            (15, 7.0, 51.0),
            (20, 7.0, 47.9),
            (25, 5.9, 55.0),
        ]
    ]
    assert answers == ["best", "best", "fine", "best", "bad", "back"]
    assert guard.best_step == 15
    text = guard.worse()
    assert "in 2 checks in a row (steps 20, 25)" in text
    assert "the feature rank of 8 images of your own is 5.9, at the start 8.0" in text
    assert "k-NN" not in text  # at the last check it was the rank alone
    other = Guard(guard.config, guard.images.source)
    other.restore(json.loads(json.dumps(guard.state())))
    assert (other.start, other.best, other.bad, other.last) == (guard.start, guard.best, guard.bad, guard.last)


def test_one_good_check_between_bad_ones_counts_anew(guard):
    checks = [(0, 8.0), (5, 1.0), (10, 8.0), (15, 1.0), (20, math.nan)]
    assert [guard.check(record(*x)) for x in checks] == ["best", "bad", "best", "bad", "back"]


def test_when_it_is_due_and_when_it_sleeps(guard):
    assert [s for s in range(101) if guard.due(s)] == list(range(0, 101, 5))
    plain = Guard(guard.config.model_copy(update={"init": PretrainConfig().init}), guard.images.source)
    assert not any(plain.due(s) for s in range(101))


def test_every_fall_of_the_score_is_said_at_the_end(guard):
    guard.check(record(0, 8.0, 50.0))
    assert guard.compared() == ""
    guard.check(record(50, 8.0, 52.0))
    guard.check(record(100, 7.0, 49.9))
    assert guard.below_start()
    assert guard.compared().startswith("From step 0 to step 100: k-NN 50.0 → 49.9 %, feature rank 8.0 → 7.0 (best k-NN")
    assert "BELOW its start. checkpoints/step_00000050 is the best one" in guard.compared()
    guard.check(record(100, 7.0, 50.0))
    assert not guard.below_start()


def test_the_rank_of_fixed_images_by_hand(place):
    config = PretrainConfig(data=str(place / "images"), guard={"images": 5})
    fixed = FixedImages(config, open_source(config.data))
    assert fixed.indices == [0, 1, 3, 4, 6]
    torch.manual_seed(3)
    spec = PreprocessSpec(resize=28, crop=28)
    model = VisionTransformer(ViTConfig(img_size=28, embed_dim=64, depth=1, num_heads=1), spec).eval()
    rows = []
    for i in fixed.indices:
        image = Image.open(place / "images" / f"{i}.png").resize((31, 28), Image.Resampling.BICUBIC)
        left = (image.width - 28) // 2
        pixels = np.asarray(image.crop((left, 0, left + 28, 28)), dtype=np.float32) / 255
        x = (pixels - np.array(spec.mean, dtype=np.float32)) / np.array(spec.std, dtype=np.float32)
        with torch.no_grad():
            rows.append(model(torch.tensor(x.transpose(2, 0, 1))[None]))
    share = np.linalg.svd(torch.cat(rows).numpy(), compute_uv=False)
    share /= share.sum()
    by_hand = math.exp(-(share * np.log(share + 1e-12)).sum())
    assert rank_me(torch.cat(rows)) == pytest.approx(by_hand, abs=1e-3)
    assert fixed.rank(model) == pytest.approx(by_hand, rel=0.03)  # another program resized the images


def test_unreadable_images_are_left_out_and_too_few_are_an_error(place, tmp_path):
    shutil.copytree(place / "images", tmp_path / "images")
    (tmp_path / "images" / "3.png").write_text("no image")
    model = VisionTransformer(ViTConfig(img_size=28, embed_dim=64, depth=1, num_heads=1)).eval()

    def rank():
        config = PretrainConfig(data=str(tmp_path / "images"), guard={"images": 8})
        return FixedImages(config, open_source(config.data)).rank(model)

    assert 1 <= rank() <= 7
    for i in range(7):
        (tmp_path / "images" / f"{i}.png").write_text("no image")
    with pytest.raises(DataError, match="Of 8 images of .* fewer than two can be read"):
        rank()


# --- runs -------------------------------------------------------------------------------------------------------------


def test_step_0_is_measured_and_kept_before_anything_is_trained(place, tmp_path):
    run = trainer(place, tmp_path / "run")
    seen = []
    run.on_step = lambda r: seen.append(load_file(run.run / "weights" / "teacher.safetensors")) if len(seen) < 1 else 0
    run.train()
    first = lines(run, "metrics.jsonl")[0]
    expected = knn_probe(place / "probe", k=1)
    model = VisionTransformer(ViTConfig(img_size=28, embed_dim=64, depth=2, num_heads=1))
    source = trainer(place, tmp_path / "other")
    model.load_state_dict(source.teacher.state_dict())
    model.preprocess = source.teacher.preprocess
    assert first["step"] == 0
    assert first["probe"] == expected(model.eval())
    assert first["guard"]["feature_rank"] == source.guard.images.rank(model)
    start = source.teacher.state_dict()
    assert all(torch.equal(start[k], v) for k, v in seen[0].items())  # step 1 is in the warm-up


def test_a_ruinous_rate_is_noticed_undone_and_explained(place, tmp_path, caplog):
    run = trainer(place, tmp_path / "run", *RUINOUS)
    with pytest.raises(FeaturesError) as stop:
        run.train()
    text = str(stop.value)
    assert "The features got worse than they began, in 2 checks in a row" in text
    assert "Going back once with a lower learning rate did not help. The run is stopped" in text
    assert "--optim.lr (now 20) or --init.backbone-lr (now 1)" in text
    events = lines(run, "events.jsonl")
    assert [e["event"] for e in events] == ["start", "rollback", "stopped"]
    assert "the best, with the learning rate × 0.3" in events[1]["reason"]
    assert len(events[1]["checks"]) == 2
    assert all(e["reason"] in caplog.text for e in events)
    # the result is what it was at the best check, in the warm-up: the weights it began with
    start = trainer(place, tmp_path / "other").teacher.state_dict()
    saved = load_file(run.run / "weights" / "teacher.safetensors")
    assert all(torch.equal(start[k], v) for k, v in saved.items())
    assert [r["step"] for r in lines(run, "metrics.jsonl")] == list(range(run.guard.best_step + 1))
    assert [f.level for f in judge_run(run.run)] == ["bad"]
    assert judge_run(run.run)[0].text == text
    page = report_run(run.run)[0].read_text()
    assert "did not help. The run is stopped" in page
    again = trainer(place, tmp_path / "run", *RUINOUS)
    with pytest.raises(FeaturesError, match="The run is stopped"):
        again.train()
    more = trainer(place, tmp_path / "run", *RUINOUS, "--max-rollbacks", "9", "--guard.enabled", "False")
    assert more.train()["step"] == 10


def test_without_labels_the_rank_alone_notices(place, tmp_path):
    run = trainer(place, tmp_path / "run", *RUINOUS, "--guard.rank-drop", "0.2", probe=False)
    with pytest.raises(FeaturesError, match="the feature rank of 8 images of your own is"):
        run.train()


RECOVERS = (*RUINOUS, "--guard.lr-factor", "1e-5")


def test_a_run_that_went_back_ends_well_and_is_continued_bit_for_bit(place, tmp_path):
    killed = []

    def copy(record):  # what a kill right after this step would leave
        if (run.rollbacks, record["step"]) in ((0, 3), (0, 4), (1, 3), (1, 7)):
            killed.append(shutil.copytree(run.run, tmp_path / f"{run.rollbacks}-{record['step']}"))

    run = trainer(place, tmp_path / "run", *RECOVERS, on_step=copy)
    last = run.train()
    assert (last["rollbacks"], run.lr_factor) == (1, 1e-5)
    assert not run.guard.below_start()
    finding = next(f for f in judge_run(run.run) if "went back" in f.text)
    assert "The features got worse than they began" in finding.text
    whole = load_file(run.run / "weights" / "teacher.safetensors"), lines(run, "metrics.jsonl")
    assert len(killed) == 4
    for folder in killed:
        again = trainer(place, folder, *RECOVERS)
        assert again.step < 8
        again.train()
        weights = load_file(folder / "weights" / "teacher.safetensors")
        assert all(torch.equal(whole[0][k], v) for k, v in weights.items())
        assert figures(whole[1]) == figures(lines(again, "metrics.jsonl"))


def test_stopped_between_two_bad_checks_it_still_counts_them(place, tmp_path):
    whole = trainer(place, tmp_path / "whole", *RECOVERS)
    whole.train()
    run = trainer(place, tmp_path / "run", *RECOVERS)
    run.on_step = lambda r: os.kill(os.getpid(), signal.SIGTERM) if run.guard.bad and not run.rollbacks else None
    with pytest.raises(TrainingStopped):
        run.train()
    again = trainer(place, tmp_path / "run", *RECOVERS)
    again.train()
    a, b = (load_file(r.run / "weights" / "teacher.safetensors") for r in (whole, again))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert figures(lines(whole, "metrics.jsonl")) == figures(lines(again, "metrics.jsonl"))


def figures(records):
    timing = ("images_per_s", "data_wait", "tflops", "mfu", "peak_memory_gb")
    return [{k: v for k, v in r.items() if k not in timing} for r in records]


def test_a_run_that_ends_below_its_start_says_so(place, tmp_path, caplog):
    run = trainer(place, tmp_path / "run", *RUINOUS, "--guard.patience", "99")
    run.train()
    start, *_, end = lines(run, "metrics.jsonl")
    assert end["probe"]["knn1_top1"] < start["probe"]["knn1_top1"]
    assert "The result is BELOW its start" in caplog.text
    assert lines(run, "events.jsonl")[-1]["event"] == "below_start"
    texts = [f.text for f in judge_run(run.run) if "The run ended below its start" in f.text]
    assert len(texts) == 1
    assert f"it was {start['probe']['knn1_top1']:.1f} % in the weights it began with" in texts[0]
