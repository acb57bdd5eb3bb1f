# SPDX-License-Identifier: Apache-2.0
"""Each rule of the verdict on records made for it, and the verdict on real runs that were spoilt on purpose."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from opendino.pretrain.config import parse_config
from opendino.pretrain.health import UpdateNorm
from opendino.pretrain.history import read_metrics, series, since, smooth
from opendino.pretrain.verdict import RULES, figures_line, verdict

K, BATCH = 64, 16
LOG_K = math.log(K)


def settings(extra="{}"):
    base = {
        "steps": 400, "batch_size": BATCH, "num_workers": 2, "precision": "fp32",
        "model": {"embed_dim": 32, "patch_size": 7, "num_heads": 2, "depth": 2, "init_values": 1.0},
        "crops": {"global_size": 28, "local_size": 14}, "heads": {"num_prototypes": K, "batch_norm": True},
        "optim": {"lr": 1e-3, "warmup_steps": 20},
    }  # fmt: skip
    import yaml

    for key, value in yaml.safe_load(extra).items():
        base[key] = base.get(key, {}) | value if isinstance(value, dict) else value
    return parse_config(yaml.safe_dump(base), "test")


def sound(step):
    """What a run that learns records at a step."""
    record = {
        "step": step, "loss": 6.5 - 0.002 * step, "dino": 4.0 - 0.002 * step, "ibot": 2.0, "koleo": 0.5,
        "teacher_temp": 0.04, "grad_norm_backbone": 1.5, "grad_norm_dino_head": 1.0, "images_per_s": 100.0,
        "data_wait": 0.05, "bad_steps": 0, "image_errors": 0, "rollbacks": 0,
    }  # fmt: skip
    if step % 10 == 0:
        record |= {
            "teacher_entropy": 3.5, "prototype_use": 0.75, "prototypes_won": 24, "feature_rank": 8.0 + 0.01 * step,
            "near_duplicates": 0.0, "koleo_distance": 0.6, "cls_norm_outliers": 0.0, "cls_norm_max": 1.5,
            "patch_norm_outliers": 0.0, "patch_norm_max": 2.0, "update_norm_backbone": 0.002,
        }  # fmt: skip
    if step % 100 == 0:
        record["probe"] = {"knn20_top1": 30.0 + 0.02 * step, "knn20_mean": 20.0}
    return record


def run_of(change=None, steps=400, start=None):
    """A sound run; from `start` (else the first step) on, `change(step)` replaces figures that the record has."""
    records = [{"step": 0, "probe": {"knn20_top1": 30.0, "knn20_mean": 20.0}}]
    for step in range(1, steps + 1):
        record = sound(step)
        if change and step >= (start or 0):
            record |= {k: v for k, v in change(step).items() if k in record}
        records.append(record)
    return records


def only(records, config=None):
    """The single finding of a verdict."""
    found = verdict(records, config or settings())
    assert len(found) == 1, found
    return found[0]


def test_a_sound_run_is_one_line_with_its_figures():
    finding = only(run_of())
    assert finding.level == "ok"
    for part in ("step 400 of 400", "24 of 32 prototypes", "feature rank 11.9 of at most 32", "k-NN 30.0 → 38.0"):
        assert part in finding.text
    assert f"{LOG_K:.2f}" in finding.text
    json.dumps(finding.as_dict())


def test_the_rank_is_measured_against_the_rows_of_one_process():
    text = only(run_of(lambda s: {"prototypes_won": 12, "prototype_use": 0.75})).text  # 16 rows a process
    assert "12 of 16 prototypes" in text
    assert "of at most 16" in text


def test_too_few_records_and_missing_figures_say_nothing_wrong():
    assert "Too early" in only(run_of(steps=2)).text
    assert "Too early" in only([]).text
    assert only([{"step": s, "loss": 1.0} for s in range(1, 30)]).level == "ok"


def test_nan_and_null_figures_are_left_out():
    records = run_of(lambda s: {"feature_rank": math.nan, "dino": None, "probe": None, "teacher_entropy": math.inf})
    assert only(records).level == "ok"


def test_collapse_names_its_first_step_and_the_flags():
    records = run_of(lambda s: {"prototypes_won": 1, "prototype_use": 1 / 32, "teacher_entropy": 0.01}, start=155)
    finding = only(records, settings("loss: {centering: moving, koleo_weight: 0.0}"))
    assert (finding.level, finding.since_step) == ("bad", 160)
    for part in ("one prototype", "since step 160", "--loss.centering sinkhorn", "lower --optim.lr", "raise --loss."):
        assert part in finding.text


def test_collapse_is_seen_from_the_share_alone_and_not_after_it_ended():
    old = run_of(lambda s: {"prototype_use": 1 / 32}, start=155)
    for record in old:
        record.pop("prototypes_won", None)
    assert "collapsed to one prototype" in only(old).text
    ended = run_of(lambda s: {"prototypes_won": 1, "prototype_use": 1 / 32} if s < 300 else {}, start=155)
    assert only(ended).level == "ok"


def test_a_certain_teacher_is_to_be_watched():
    finding = only(run_of(lambda s: {"teacher_entropy": 0.02}, start=200))
    assert (finding.level, finding.since_step) == ("watch", 200)
    assert "Raise --loss.teacher-temp" in finding.text


@pytest.mark.parametrize(
    ("start", "level"), [(50, "bad"), (280, "bad"), (330, None)], ids=["long", "a quarter", "too short"]
)
def test_the_plateau_at_ln_k(start, level):
    records = run_of(lambda s: {"dino": LOG_K * 1.002, "teacher_entropy": 0.995 * LOG_K}, start=start)
    found = [f for f in verdict(records, settings()) if "ln K" in f.text and f.level != "ok"]
    assert [f.level for f in found] == ([level] if level else [])
    if level:
        assert "uniform" in found[0].text
        assert "lower --loss.teacher-temp" in found[0].text


def test_the_plateau_of_a_long_run_is_first_watched():
    records = run_of(lambda s: {"dino": LOG_K, "update_norm_backbone": 0.03})
    found = [f for f in verdict(records, settings("{steps: 4000}")) if "by more than 1 %" in f.text]
    assert found[0].level == "watch"
    assert "lower --optim.lr (now 0.001): a step moved the backbone by up to 3.0%" in found[0].text


def test_falling_rank_names_koleo_or_the_learning_rate():
    finding = only(run_of(lambda s: {"feature_rank": 12 - 0.025 * s}))
    assert finding.level == "bad"
    assert "Lower --optim.lr" in finding.text
    finding = only(run_of(lambda s: {"feature_rank": 12 - 0.02 * s}), settings("loss: {koleo_weight: 0.0}"))
    assert finding.level == "watch"
    assert "Raise --loss.koleo-weight (now 0) to 0.1" in finding.text


def test_a_low_rank_at_the_start_only_is_by_design():
    assert only(run_of(lambda s: {"feature_rank": 1.2 + s / 50})).level == "ok"
    assert "collapse to few directions" in only(run_of(lambda s: {"feature_rank": 1.2})).text


def test_near_duplicates_are_the_data_or_the_features():
    finding = only(run_of(lambda s: {"near_duplicates": 0.1}))
    assert finding.level == "watch"
    assert "remove them" in finding.text
    finding = only(run_of(lambda s: {"near_duplicates": 0.9}))
    assert finding.level == "bad"
    assert "Raise --loss.koleo-weight" in finding.text


def test_outlier_norms_recommend_registers():
    finding = only(run_of(lambda s: {"patch_norm_outliers": 0.02, "patch_norm_max": 11.0}, start=250))
    assert (finding.level, finding.since_step) == ("watch", 260)  # the median of three sees it one log point later
    assert "--model.arch vits14_reg" in finding.text
    assert "11 times" in finding.text
    assert "blank or broken" in only(run_of(lambda s: {"cls_norm_outliers": 0.1})).text


def test_gradients_clipped_at_every_step_or_exploding():
    finding = only(run_of(lambda s: {"grad_norm_dino_head": 5.0}, start=101))
    assert finding.level == "watch"
    assert "dino_head is clipped at every step" in finding.text
    assert abs(finding.since_step - 101) < 10
    finding = only(run_of(lambda s: {"grad_norm_backbone": 900.0}, start=340))
    assert finding.level == "bad"
    assert "600 times its median" in finding.text
    assert only(run_of(lambda s: {"grad_norm_dino_head": 5.0}), settings("optim: {clip_grad: 0.0}")).level == "ok"


def test_large_updates_mean_a_high_learning_rate():
    finding = only(run_of(lambda s: {"update_norm_backbone": 0.2}, start=100))
    assert (finding.level, finding.since_step) == ("bad", 110)
    assert "lower --optim.lr (now 0.001" in finding.text


def test_a_rising_loss_counts_only_at_a_constant_temperature():
    rising = {"ibot": lambda s: 2 + max(0, s - 200) * 0.01}
    finding = only(run_of(lambda s: {"ibot": rising["ibot"](s)}))
    assert finding.level == "watch"
    assert "has risen" in finding.text
    warming = run_of(lambda s: {"ibot": rising["ibot"](s), "teacher_temp": 0.04 + s * 1e-4})
    assert only(warming).level == "ok"


def test_skipped_steps_and_rollbacks():
    few = run_of(lambda s: {"bad_steps": 1}, start=100)
    assert only(few).level == "ok"
    finding = only(run_of(lambda s: {"bad_steps": 7}, start=100))
    assert (finding.level, finding.since_step) == ("watch", 100)
    finding = only(run_of(lambda s: {"bad_steps": s - 380}, start=381))
    assert (finding.level, finding.since_step) == ("bad", 381)
    assert "Lower --optim.lr" in finding.text
    scaler = run_of(lambda s: {"bad_steps": min(s, 15)})
    assert only(scaler, settings("{precision: fp16}")).level == "ok"
    back = run_of(lambda s: {"rollbacks": 1}, start=300)
    back[-1]["rollback_reason"] = "20 steps in a row were not finite"
    finding = only(back)
    assert (finding.level, finding.since_step) == ("watch", 300)
    assert "once (20 steps in a row were not finite)" in finding.text


def test_knn_that_falls_while_the_loss_falls():
    below = only(run_of(lambda s: {"probe": {"knn20_top1": 30 - s / 50}}))
    assert below.level == "bad"
    assert "below the 30.0 % before training, while the loss falls" in below.text
    peak = {100: 36.0, 200: 41.0, 300: 38.0, 400: 37.0}
    finding = only(run_of(lambda s: {"probe": {"knn20_top1": peak.get(s)}}))
    assert (finding.level, finding.since_step) == ("watch", 200)
    assert "from 41.0 % (step 200) to 37.0 %" in finding.text
    flat = only(run_of(lambda s: {"probe": {"knn20_top1": 30.2}}))
    assert "has not risen" in flat.text


def test_the_loader_is_the_limit():
    finding = only(run_of(lambda s: {"data_wait": 0.4}, start=100))
    assert finding.level == "watch"
    assert "40%" in finding.text
    assert "--num-workers (now 2)" in finding.text
    assert "--cache-images True" in finding.text
    assert only(run_of(lambda s: {"data_wait": 0.9} if s == 1 else {})).level == "ok"


def test_unreadable_images():
    finding = only(run_of(lambda s: {"image_errors": s}, start=2))
    assert (finding.level, finding.since_step) == ("watch", 2)
    assert "6% of the images" in finding.text


def test_bad_comes_before_watch_and_every_rule_is_in_the_list():
    records = run_of(lambda s: {"data_wait": 0.4, "prototypes_won": 1, "prototype_use": 1 / 32, "feature_rank": 1.0})
    assert [f.level for f in verdict(records, settings())] == ["bad", "watch"]
    assert len(RULES) == len(set(RULES)) == 15


def test_series_and_since():
    records = [{"step": s, "x": s % 4, "probe": {"knn": 2 * s}} for s in range(1, 8)]
    assert series(records, "probe/knn")[-1] == (7, 14.0)
    assert since(series(records, "x"), lambda v: v > 0) == 5
    assert since(series(records, "x"), lambda v: v > 9) is None
    assert smooth([(1, 0.0), (2, 9.0), (3, 0.0)])[-1] == (3, 0.0)


def test_a_line_cut_by_a_kill_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    assert read_metrics(tmp_path / "none") == []


def test_the_reason_of_a_rollback_comes_from_the_events(tmp_path):
    lines = [json.dumps(sound(s) | {"rollbacks": int(s > 10)}) for s in range(1, 31)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    event = {"event": "rollback", "from": 25, "step": 10, "reason": "20 steps were not finite."}
    (tmp_path / "events.jsonl").write_text(json.dumps({"event": "start"}) + "\n" + json.dumps(event) + "\n")
    finding = only(read_metrics(tmp_path))
    assert (finding.level, finding.since_step) == ("watch", 11)
    assert "once (20 steps were not finite). For the next run lower --optim.lr" in finding.text


def test_the_figures_line_of_a_run_without_figures():
    assert figures_line([{"step": 3}], settings()) == "step 3 of 400."


# --- real runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(64):
        field = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(field).resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.jpg")
    return folder


def train(images, out, extra, spoil=lambda trainer: None):
    """Train a tiny network for 200 steps and give its verdict on everything but the loader."""
    from opendino.pretrain.trainer import Trainer

    torch.set_num_threads(1)
    config = settings(extra)
    base = settings("""
    {steps: 200, num_workers: 0, cache_images: true, device: cpu, log_every: 5, checkpoint_every: 100000}
    """).model_copy(update={"data": str(images), "out": str(out)})
    small = {
        "crops": base.crops.model_copy(update={"num_local": 2, "global_scale": (0.4, 1.0)}),
        "heads": config.heads.model_copy(update={"hidden_dim": 64, "bottleneck_dim": 16}),
        "loss": config.loss.model_copy(update={"warmup_teacher_temp": config.loss.teacher_temp}),
        "optim": config.optim.model_copy(
            update={"lr_rule": "none", "freeze_last_layer_steps": 0, "layerwise_decay": 1.0, "patch_embed_lr_mult": 1.0}
        ),
    }
    config = base.model_copy(update=small)
    trainer = Trainer(config)
    spoil(trainer)
    update, records, last = UpdateNorm(trainer.engine.networks), [], {}
    trainer.optimizer.register_step_pre_hook(lambda *_: update.before())
    trainer.optimizer.register_step_post_hook(lambda *_: last.update(update.after()))
    trainer.on_step = lambda record: records.append(last | record | {"data_wait": 0.0})
    trainer.train()
    return verdict(records, config)


@pytest.mark.slow
def test_real_runs_that_were_spoilt_are_named(images, tmp_path):
    def no_centring(trainer):
        for center in trainer.model.centers.values():
            center.momentum = 1.0

    text = "{loss: {centering: moving, teacher_temp: 0.02, koleo_weight: 0.0}, heads: {batch_norm: false}, "
    text += "optim: {lr: 5.0e-3, momentum: 0.9}}"
    found = train(images, tmp_path / "collapse", text, no_centring)
    assert (found[0].level, found[0].since_step <= 30) == ("bad", True), found
    assert "collapsed to one prototype" in found[0].text
    assert "--loss.centering sinkhorn" in found[0].text

    found = train(images, tmp_path / "fast", "{optim: {lr: 0.3, momentum: 0.98}, loss: {teacher_temp: 0.04}}")
    assert found[0].level == "bad", found
    assert any("lower --optim.lr (now 0.3)" in f.text for f in found), found

    found = train(images, tmp_path / "koleo", "{optim: {lr: 3.0e-3}, loss: {teacher_temp: 0.04, koleo_weight: 0.0}}")
    assert any("aise --loss.koleo-weight" in f.text for f in found), found

    text = "{optim: {lr: 3.0e-3, momentum: 0.98, clip_grad: 10.0}, loss: {teacher_temp: 0.02}}"
    found = train(images, tmp_path / "sound", text)
    assert [f.level for f in found] == ["ok"], found
