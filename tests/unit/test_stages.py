# SPDX-License-Identifier: Apache-2.0
"""Stages: what they resolve to, their schedules, the switch, and exact resumes around it."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import opendino
from opendino.cli import main, profiling
from opendino.cli.pretrain import describe, read_arguments
from opendino.errors import ConfigError, DataError
from opendino.pretrain.config import load_recipe, parse_config
from opendino.pretrain.lengths import with_steps
from opendino.pretrain.plan import DEVICES, plan_run
from opendino.pretrain.rules_steps import loss_rose
from opendino.pretrain.stages import stage_after, stage_before, stage_rows, timeline
from opendino.pretrain.switch import move_state, resize_moment
from opendino.pretrain.trainer import Trainer

TWO = """
stages:
  - {name: low, steps: 4}
  - {name: high, steps: 3, compress_schedules: true, crops: {global_size: 42, num_local: 3}, optim: {lr: 5.0e-3}}
"""
STAGED = """
steps: 150
batch_size: 64
crops: {global_size: 28}
optim: {lr: 1.0e-3, lr_rule: sqrt_wrt_1024, min_lr: 1.0e-5, warmup_steps: 20, weight_decay: 0.1, weight_decay_end: 0.3,
        momentum: 0.9, momentum_end: 0.98, freeze_last_layer_steps: 10}
loss: {warmup_teacher_temp: 0.02, teacher_temp: 0.06, warmup_teacher_temp_steps: 40}
stages:
  - {name: a, steps: 60}
  - {name: b, steps: 40, batch_size: 256, optim: {momentum: 0.95}}
  - {name: c, steps: 50, compress_schedules: true, crops: {global_size: 56}, optim: {lr: 5.0e-4},
     loss: {teacher_temp: 0.05}}
"""


class KilledError(Exception):
    pass


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        field = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(field).resize((60, 52), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    return folder


def staged(images, out, extra=TWO, **options):
    text = f"""
data: {images}
out: {out}
batch_size: 4
num_workers: 0
device: cpu
precision: fp32
log_every: 1
keep_checkpoints: 9
{"" if "checkpoint_every" in extra else "checkpoint_every: 100"}
model: {{patch_size: 7, embed_dim: 12, depth: 1, num_heads: 2, init_values: 1.0, drop_path_rate: 0.1}}
crops: {{global_size: 28, local_size: 14, num_local: 2}}
heads: {{num_prototypes: 8, hidden_dim: 8, bottleneck_dim: 4, batch_norm: true}}
optim: {{lr: 1.0e-2, lr_rule: none, warmup_steps: 2, freeze_last_layer_steps: 1}}
{extra}
"""
    return Trainer(parse_config(text, "test"), **options)


def records(run):
    return [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]


# --- what stages resolve to ------------------------------------------------------------------------------------------


def test_a_run_without_stages_is_one():
    config = load_recipe("vits14")
    (only,) = timeline(config)
    assert (only.first, only.end, only.name, only.label, only.schedule_first) == (0, 125_000, "", {}, 0)
    assert only.config is config


def test_steps_are_added_up_and_stages_resolved():
    config = parse_config(STAGED.replace("steps: 150\n", "", 1), "test")
    assert config.steps == 150
    a, b, c = timeline(config)
    assert [(s.first, s.end, s.schedule_first, s.config.steps) for s in (a, b, c)] == [
        (0, 60, 0, 100), (60, 100, 0, 100), (100, 150, 100, 50),
    ]  # fmt: skip
    assert [s.config.batch_size for s in (a, b, c)] == [64, 256, 64]
    assert [s.config.crops.global_size for s in (a, b, c)] == [28, 28, 56]
    assert (a.config.optim.momentum, b.config.optim.momentum, c.config.optim.momentum) == (0.9, 0.95, 0.9)
    # The warm-ups are those of the first stretch of 100 steps, compressed into 50.
    assert (b.config.optim.warmup_steps, c.config.optim.warmup_steps) == (20, 10)
    assert (c.config.optim.freeze_last_layer_steps, c.config.loss.warmup_teacher_temp_steps) == (5, 20)
    assert all(s.config.stages == () for s in (a, b, c))
    assert c.config.optim.weight_decay_end == 0.3
    assert c.label == {"stage": "c"}


def test_an_explicit_warm_up_of_a_stage_is_not_compressed():
    text = STAGED.replace("optim: {lr: 5.0e-4}", "optim: {warmup_steps: 7}")
    assert timeline(parse_config(text, "test"))[2].config.optim.warmup_steps == 7


def test_which_stage_a_step_is_in():
    stages = timeline(parse_config(STAGED, "test"))
    assert [stage_after(stages, s).name for s in (0, 59, 60, 99, 100, 149, 150)] == list("aabbccc")
    assert [stage_before(stages, s).name for s in (0, 1, 60, 61, 100, 101, 150)] == list("aaabbcc")


def test_another_length_shares_its_steps_out_over_the_stages():
    config = with_steps(parse_config(STAGED, "test"), 30)
    assert [s.steps for s in config.stages] == [12, 8, 10]
    assert (config.steps, config.optim.warmup_steps) == (30, 4)
    assert [s.steps for s in with_steps(config, 3).stages] == [1, 1, 1]
    with pytest.raises(ConfigError, match="2 steps are too few for 3 stages"):
        with_steps(config, 2)
    parse_config(json.dumps(config.model_dump(mode="json")), "again")  # it still adds up


def test_the_settings_survive_being_written():
    config = parse_config(STAGED, "test")
    assert parse_config(json.dumps(config.model_dump(mode="json")), "again") == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{steps: 5, stages: [{name: a, steps: 6}]}", "steps is 5 and the stages add up to 6; leave steps out"),
        ("stages: [{name: a, steps: 6}, {name: a, steps: 6}]", "names of their own, got a, a"),
        ("stages: [{name: a, steps: 6, compress_schedules: true}]", "stage 'a' is the first"),
        ("stages: [{name: a, steps: 6, crops: {globl_size: 8}}]",
         "stage 'a': unknown setting 'crops.globl_size', did you mean 'crops.global_size'"),
        ("stages: [{name: a, steps: 6, optim: {lr: fast}}]", "stage 'a': optim.lr: .*number.*got 'fast'"),
        ("stages: [{name: a, steps: 6, crops: {global_scale: [2, 1]}}]", "stage 'a': .*rising shares"),
        ("{accumulate: 2, stages: [{name: a, steps: 6, batch_size: 3}]}", "stage 'a': .*multiple of accumulate 2"),
        ("stages: [{name: a, steps: 0}]", "stages.0.steps: .*greater than or equal to 1"),
        ("stages: [{name: a, steps: 1, model: {depth: 3}}]", "unknown setting 'stages.0.model'"),
        ("stages: [{name: a/b, steps: 1}]", "stages.0.name: .*match pattern.*got 'a/b'"),
        ("stages: [{steps: 1}]", "stages.0.name: Field required"),
        ("stages: {name: a, steps: 3}", "stages: .*valid (tuple|list)"),
        ("stages: [3]", "stages.0: "),
        ("stages: [{name: a, steps: many}]", "stages.0.steps: .*integer"),
    ],
)  # fmt: skip
def test_wrong_stages_are_one_paragraph(text, words):
    with pytest.raises(ConfigError, match=words) as caught:
        parse_config(text, "recipe.yaml")
    assert "\n" not in str(caught.value)


def test_a_stage_that_the_data_cannot_feed_is_named_before_the_run_begins(images, tmp_path):
    wrong = "stages: [{name: low, steps: 4}, {name: high, steps: 3, batch_size: 16}]"
    with pytest.raises(DataError, match="Stage 'high': .*8 images and a batch is 16"):
        staged(images, tmp_path / "run", wrong)
    wrong = f"stages: [{{name: low, steps: 4}}, {{name: high, steps: 3, data: {tmp_path / 'nowhere'}}}]"
    with pytest.raises(DataError, match="Stage 'high': .*nowhere"):
        staged(images, tmp_path / "run2", wrong)


# --- schedules -------------------------------------------------------------------------------------------------------


def cosine(start, end, progress):
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def literal(step):
    """What STAGED's schedules are at a step, computed for each stage by hand."""
    if step < 100:
        lr = 1e-3 * math.sqrt((64 if step < 60 else 256) / 1024)
        lr = lr * step / 20 if step < 20 else cosine(lr, 1e-5, (step - 20) / 80)
        return {
            "lr": lr, "last_layer_lr": 0.0 if step < 10 else lr, "weight_decay": cosine(0.1, 0.3, step / 100),
            "momentum": cosine(0.9 if step < 60 else 0.95, 0.98, step / 100),
            "teacher_temp": 0.02 + 0.04 * step / 40 if step < 40 else 0.06,
        }  # fmt: skip
    t = step - 100
    lr = 5e-4 * math.sqrt(64 / 1024)
    lr = lr * t / 10 if t < 10 else cosine(lr, 1e-5, (t - 10) / 40)
    return {
        "lr": lr, "last_layer_lr": 0.0 if t < 5 else lr, "weight_decay": cosine(0.1, 0.3, t / 50),
        "momentum": cosine(0.9, 0.98, t / 50), "teacher_temp": 0.02 + 0.03 * t / 20 if t < 20 else 0.05,
    }  # fmt: skip


def test_schedules_of_every_stage_equal_a_literal_computation(images, tmp_path):
    config = parse_config(STAGED, "test")
    run = staged(images, tmp_path / "run")
    run.stages = timeline(config)
    for step in range(150):
        found = run.schedules(step)
        assert found == pytest.approx(literal(step), rel=1e-12), step


def test_a_trained_run_used_the_schedules_of_its_stages(images, tmp_path):
    run = staged(images, tmp_path / "run")
    run.train()
    found = records(run)
    assert [r["stage"] for r in found] == ["low"] * 4 + ["high"] * 3
    # low: warm-up of 2 steps, then a cosine to 1e-6 over 4; high: the warm-up is 2·3/4 rounded to 2, lr 5e-3 over 3.
    expected = [0, 0.005, 0.01, cosine(0.01, 1e-6, 1 / 2), 0, 0.0025, 0.005]
    assert [r["lr"] for r in found] == pytest.approx(expected, rel=1e-12)
    assert [r["momentum"] for r in found[4:]] == pytest.approx([cosine(0.992, 1, t / 3) for t in range(3)])


# --- the switch ------------------------------------------------------------------------------------------------------


def test_the_switch_keeps_the_features_of_the_new_size_and_saves_its_preprocessing(images, tmp_path):
    run = staged(images, tmp_path / "run")
    x = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    seen = {}

    def on_step(record):
        if record["step"] == 4:
            run.teacher.eval()
            seen["before"] = run.teacher(x).detach()
            run.checkpointer.finish()
            seen["saved"] = opendino.load(tmp_path / "run").preprocess.crop

    run.on_step = on_step
    switch = run._switch

    def observed():
        switch()
        seen["after"] = run.teacher.eval()(x).detach()
        seen["centers"] = {k: v.clone() for k, v in run.model.centers.state_dict().items()}
        run.teacher.train()

    run._switch = observed
    assert run.teacher.pos_embed.shape == (1, 1 + 4 * 4, 12)
    run.train()
    assert torch.equal(seen["before"], seen["after"])
    assert run.teacher.pos_embed.shape == (1, 1 + 6 * 6, 12)
    assert run.model.student["backbone"].pos_embed.shape == (1, 1 + 6 * 6, 12)
    model = opendino.load(tmp_path / "run")
    assert (seen["saved"], model.preprocess.crop, model.preprocess.resize) == (28, 42, 48)
    assert model.pos_embed.shape == (1, 37, 12)
    assert torch.equal(model.pos_embed, run.teacher.pos_embed)
    kept = opendino.load(tmp_path / "run" / "weights" / "teacher_low.safetensors")
    assert (kept.preprocess.crop, kept.pos_embed.shape) == (28, (1, 17, 12))
    assert torch.equal(kept.eval()(x), seen["before"])


def test_everything_but_tables_is_carried_over_unchanged(images, tmp_path):
    run = staged(images, tmp_path / "run", TWO.replace("{name: low", "{name: low, loss: {centering: moving}"))
    batches = run.batches()
    for _ in range(4):
        run.advance(batches)
    old = {k: v.clone() for k, v in run.engine.tensors().items()}
    run._switch()
    new = run.engine.tensors()
    assert old.keys() == new.keys()
    tables = {k for k in old if old[k].shape != new[k].shape}
    assert tables == {
        "model.student.backbone.pos_embed", "model.teacher.backbone.pos_embed",
        "optimizer.backbone.pos_embed.exp_avg", "optimizer.backbone.pos_embed.exp_avg_sq",
    }  # fmt: skip
    assert all(torch.equal(old[k], new[k]) for k in old.keys() - tables)
    assert new["optimizer.backbone.cls_token.step"] == 4
    assert new["optimizer.backbone.pos_embed.exp_avg_sq"].min() >= 0
    assert new["optimizer.backbone.pos_embed.exp_avg"].abs().max() > 0
    assert run.engine.first_image == 0
    assert run.engine.config.crops.num_local == 3


def test_the_optimizer_begins_at_zero_where_it_is_told_to(images, tmp_path):
    run = staged(
        images, tmp_path / "run", TWO.replace("compress_schedules", "resume_optimizer: false, compress_schedules")
    )
    batches = run.batches()
    for _ in range(4):
        run.advance(batches)
    weights = run.model.student["backbone"].cls_token.detach().clone()
    run._switch()
    moments = {k: v for k, v in run.engine.tensors().items() if k.startswith("optimizer.")}
    assert moments
    assert all(not v.any() for v in moments.values())
    assert torch.equal(run.model.student["backbone"].cls_token, weights)


def slow_linear(table, grid):
    """Linear interpolation between centres of cells, one entry at a time, in float64."""
    side = len(table)
    out = torch.zeros(grid, grid, table.shape[2], dtype=torch.float64)
    for y in range(grid):
        for x in range(grid):
            v, u = ((i + 0.5) * side / grid - 0.5 for i in (y, x))
            for j in range(side):
                for i in range(side):
                    wy, wx = (max(0.0, 1 - abs(min(max(c, 0.0), side - 1.0) - k)) for c, k in ((v, j), (u, i)))
                    out[y, x] += wy * wx * table[j, i]
    return out


def test_moments_are_resized_by_weights_that_are_not_negative():
    torch.manual_seed(0)
    m, v = torch.randn(1, 17, 3), torch.rand(1, 17, 3) ** 4
    m = m.sign() * m.abs().minimum(v.sqrt())  # |m| / √v is at most one
    big_m, big_v = (resize_moment(x, 9) for x in (m, v))
    assert torch.equal(big_m[:, 0], m[:, 0])
    for small, big in ((m, big_m), (v, big_v)):
        expected = slow_linear(small[0, 1:].reshape(4, 4, 3).double(), 9)
        torch.testing.assert_close(big[0, 1:].reshape(9, 9, 3).double(), expected, rtol=0, atol=1e-6)
    assert big_v.min() >= v.min()
    assert (big_m.abs() <= big_v.sqrt() * (1 + 1e-6)).all()
    down = resize_moment(v, 2)
    assert down.shape == (1, 5, 3)
    assert down.min() >= v.min()


def test_only_tables_may_change_their_shape():
    a = {"model.student.backbone.cls_token": torch.zeros(1, 1, 4)}
    with pytest.raises(AssertionError, match="cls_token"):
        move_state(a, {"model.student.backbone.cls_token": torch.zeros(1, 1, 5)}, "size")


# --- resumes ---------------------------------------------------------------------------------------------------------


def ends(run):
    run.checkpointer.finish()
    same = {k: v.clone() for k, v in run.engine.tensors().items()}
    kept = ("step", "stage", "loss", "dino", "ibot", "koleo", "lr", "grad_norm_backbone", "teacher_entropy")
    return same, [{k: r[k] for k in kept if k in r} for r in records(run) if r["step"]]


@pytest.mark.parametrize(("stop", "keep"), [(3, "true"), (4, "true"), (5, "true"), (4, "false")])
def test_a_resume_is_exact_at_any_step_and_at_the_switch(stop, keep, images, tmp_path):
    extra = TWO.replace("compress_schedules", f"resume_optimizer: {keep}, batch_size: 2, compress_schedules")
    whole = staged(images, tmp_path / "whole", extra)
    whole.train()

    def kill(record):
        if record["step"] == stop:
            raise KilledError

    run = staged(images, tmp_path / "run", extra + "checkpoint_every: 1", on_step=kill)
    with pytest.raises(KilledError):
        run.train()
    run.checkpointer.finish()
    again = staged(images, tmp_path / "run", extra + "checkpoint_every: 1")
    assert again.step == stop
    assert again.stage.name == ("low" if stop <= 4 else "high")
    again.train()
    (a, x), (b, y) = ends(whole), ends(again)
    assert x == y
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_switch_is_saved_whatever_checkpoint_every_says(images, tmp_path):
    run = staged(images, tmp_path / "run", TWO)
    run.train()
    assert [f.name for f in sorted((run.run / "checkpoints").iterdir())] == ["step_00000004", "step_00000007"]


def test_a_run_goes_back_over_a_switch(images, tmp_path):
    """Two bad steps, the first before the switch: back to step 2 of the stage before, and over the switch again."""
    run = staged(images, tmp_path / "run", TWO + "checkpoint_every: 2\nmax_bad_steps: 2")
    advance = run.advance

    def poisoned(batches, signal=0):
        real, bad = run.model.loss, run.step in (3, 4) and run.lr_factor == 1

        def loss(*args):
            total, parts = real(*args)
            return (total * float("nan") if bad else total), parts

        run.model.loss = loss
        try:
            return advance(batches, signal)
        finally:
            run.model.loss = real

    run.advance = poisoned
    last = run.train()
    assert (last["step"], last["rollbacks"], last["stage"]) == (7, 1, "high")
    assert [r["step"] for r in records(run)] == [1, 2, 3, 4, 5, 6, 7]
    assert [r["stage"] for r in records(run)] == ["low"] * 4 + ["high"] * 3
    assert run.teacher.pos_embed.shape == (1, 37, 12)


def test_a_damaged_checkpoint_after_the_switch_falls_back_over_it(images, tmp_path, caplog):
    run = staged(images, tmp_path / "run", TWO)
    run.train()
    (run.run / "checkpoints" / "step_00000007" / ".metadata").unlink()
    again = staged(images, tmp_path / "run", TWO)
    assert (again.step, again.stage.name) == (4, "low")
    assert "trying the one before" in caplog.text
    again.train()
    assert all(torch.equal(a, b) for a, b in zip(ends(run)[0].values(), ends(again)[0].values(), strict=True))


def test_stages_may_have_images_of_their_own(images, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in sorted(images.iterdir())[:5]:
        (other / path.name).write_bytes(path.read_bytes())
    extra = TWO.replace("compress_schedules", f"data: {other}, compress_schedules")
    run = staged(images, tmp_path / "run", extra + "checkpoint_every: 1")
    sizes = []
    run.on_step = lambda record: sizes.append((record["step"], len(run.source)))
    run.train()
    assert [n for _, n in sizes] == [8, 8, 8, 8, 5, 5, 5]
    assert staged(images, tmp_path / "run", extra + "checkpoint_every: 1").step == 7  # its fingerprint is of those


def test_what_defines_nothing_may_change_in_a_stage_and_the_rest_may_not(images, tmp_path):
    staged(images, tmp_path / "run", TWO.replace("steps: 4}", "steps: 4, activation_checkpointing: true}"))
    staged(images, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"other settings \(stages\)"):
        staged(images, tmp_path / "run", TWO.replace("num_local: 3", "num_local: 4"))


# --- what is said about stages ----------------------------------------------------------------------------------------


def test_the_plan_adds_up_the_stages():
    config = parse_config(STAGED, "test")
    whole = plan_run(config, device=DEVICES["a100"], devices=2)
    parts = [
        plan_run(s.config.model_copy(update={"steps": s.end - s.first}), device=DEVICES["a100"], devices=2)
        for s in timeline(config)
    ]
    assert [p.steps for p in parts] == [60, 40, 50]
    assert (whole.steps, whole.images) == (150, 60 * 64 + 40 * 256 + 50 * 64)
    for name in ("seconds", "device_hours", "kwh", "co2_kg"):
        assert getattr(whole, name) == pytest.approx(sum(getattr(p, name) for p in parts))
    flops = sum(p.images * p.flops_per_image["total"] for p in parts)
    assert whole.images * whole.flops_per_image["total"] == pytest.approx(flops)
    assert whole.memory == parts[1].memory  # the largest batch
    assert whole.parameters == parts[2].parameters  # the largest table
    assert parts[2].parameters["backbone"] - parts[0].parameters["backbone"] == (16 - 4) * 384
    assert list(whole.stages) == ["a", "b", "c"]
    assert whole.stages["c"]["global_size"] == 56
    assert whole.stages["b"]["device_hours"] == parts[1].device_hours


def test_the_command_prints_the_stages_of_a_plan(capsys):
    assert main(["plan", "--recipe", "vits14_staged", "--gpus", "8", "--device", "a100"]) == 0
    printed = capsys.readouterr().out
    assert "135,000 steps" in printed
    assert "highres" in printed
    assert "518" in printed
    said = " ".join(printed.split())
    assert "main: activations are kept" in said
    assert "highres: activations are recomputed" in said
    assert said.count("400 W") == 1


def test_a_loss_that_rises_at_a_switch_is_no_finding():
    config = parse_config("{steps: 800, heads: {num_prototypes: 64}}", "test")

    def record(step, level, stage):
        return {"step": step, "dino": level, "ibot": level, "teacher_temp": 0.04} | stage

    def judge(stages):
        return loss_rose([record(s, 1.0 if s < 400 else 3.0, stages[s >= 400]) for s in range(1, 801)], config)

    assert judge([{"stage": "low"}, {"stage": "high"}]) is None
    assert "has risen" in judge([{"stage": "low"}, {"stage": "low"}]).text
    assert "has risen" in judge([{}, {}]).text


def test_the_page_and_the_progress_line_name_the_stages(images, tmp_path, capsys):
    run = staged(images, tmp_path / "run")
    record = run.train()
    assert describe(record).startswith("stage high  loss")
    assert main(["report", str(run.run)]) == 0
    page = (run.run / "report.html").read_text()
    assert "Step 7 of 7, stage high" in page
    for words in ("2 × 42 px, 3 × 14 px", "<td>5–7</td>", "3 steps from step 5, warm-up 2", "goes on"):
        assert words in page
    assert stage_rows(load_recipe("vits14")) == []


def test_the_command_line_takes_a_staged_recipe_and_another_length():
    flags = ["--recipe", "vits14_staged", "--data", "x", "--out", "y", "--steps", "1350", "--crops.num-local", "4"]
    config, _ = read_arguments(flags)
    assert [s.steps for s in config.stages] == [1250, 100]
    assert (config.steps, config.optim.warmup_steps) == (1350, 125)
    first, second = timeline(config)
    assert (first.config.optim.warmup_steps, second.config.optim.warmup_steps) == (125, 10)
    assert (second.config.crops.global_size, second.config.crops.num_local) == (518, 4)
    assert type(config).__name__ == "PretrainConfig"


def test_profiling_takes_the_first_stage(images, tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "LOADER_BATCHES", 4)
    monkeypatch.setattr(profiling, "show_profile", lambda profile: profiles.append(profile))
    profiles = []
    config = staged(images, tmp_path / "run").config
    assert profiling.profile_steps(config.model_copy(update={"out": ""}), 1) == 0
    assert profiles[0].batch_size == 4
