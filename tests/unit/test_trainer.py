# SPDX-License-Identifier: Apache-2.0
"""What a training step does when things go wrong, and in every precision."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from opendino.errors import ConfigError, DataError
from opendino.pretrain.config import parse_config
from opendino.pretrain.trainer import Trainer


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        field = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(field).resize((40, 36), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    return folder


def trainer(images, out, extra="", **options):
    text = f"""
    data: {images}
    out: {out}
    steps: 6
    batch_size: 4
    num_workers: 0
    device: cpu
    precision: fp32
    log_every: 1
    checkpoint_every: 100
    model: {{patch_size: 7, embed_dim: 12, depth: 1, num_heads: 2, init_values: 1.0}}
    crops: {{global_size: 28, local_size: 14, num_local: 2}}
    heads: {{num_prototypes: 8, hidden_dim: 8, bottleneck_dim: 4}}
    optim: {{lr: 1.0e-2, lr_rule: none, warmup_steps: 2, freeze_last_layer_steps: 1}}
    """
    config = parse_config(text, "test")
    changes = parse_config(extra or "{}", "test").model_dump(exclude_unset=True)
    merged = config.model_dump()
    for key, value in changes.items():
        merged[key] = merged[key] | value if isinstance(value, dict) else value
    return Trainer(type(config).model_validate(merged), **options)


def records(run):
    return [json.loads(line) for line in (run.run / "metrics.jsonl").read_text().splitlines()]


def poison(run, steps):
    """Make the loss NaN at some steps by a weight that is put back after the step."""
    real = run.model.loss

    def loss(*args):
        total, parts = real(*args)
        return (total * float("nan") if run.step in steps else total), parts

    run.model.loss = loss


def test_a_step_that_is_not_finite_is_skipped_and_counted(images, tmp_path):
    run = trainer(images, tmp_path / "run", "loss: {centering: moving}")
    poison(run, {2, 4})
    states = []
    run.on_step = lambda record: states.append(
        {k: v.clone() for k, v in run.model.state_dict().items() if "num_batches" not in k}
    )
    run.train()
    assert [r["bad_steps"] for r in records(run)] == [0, 0, 1, 1, 2, 2]
    for before, after, same in zip(states, states[1:], [False, True, False, True, False]):
        changed = [k for k in before if not torch.equal(before[k], after[k])]
        assert (not changed) is same, changed[:3]


def test_too_many_bad_steps_in_a_row_stop_the_run(images, tmp_path):
    run = trainer(images, tmp_path / "run", "max_bad_steps: 3")
    poison(run, {1, 2, 3, 4})
    with pytest.raises(ConfigError, match="3 steps in a row.*Lower --optim.lr"):
        run.train()
    assert run.step == 4


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("centering", ["sinkhorn", "moving"])
def test_every_precision_trains(precision, centering, images, tmp_path):
    # The fp16 scaler starts high: it skips its first steps and halves itself at each.
    steps = 24 if precision == "fp16" else 6
    text = f"{{precision: {precision}, steps: {steps}, max_bad_steps: 20, loss: {{centering: {centering}}}}}"
    run = trainer(images, tmp_path / "run", text)
    before = run.teacher.cls_token.detach().clone()
    last = run.train()
    assert last["step"] == steps
    assert all(np.isfinite(r["loss"]) for r in records(run))
    assert not torch.equal(run.teacher.cls_token, before)
    assert all(p.dtype is torch.float32 for p in run.model.parameters())
    assert last["bad_steps"] == 0 if precision != "fp16" else last["bad_steps"] < 20


def test_accumulation_trains_and_records_the_mean(images, tmp_path):
    one = trainer(images, tmp_path / "one", "loss: {koleo_weight: 0.0}")
    two = trainer(images, tmp_path / "two", "{accumulate: 2, loss: {koleo_weight: 0.0}}")
    one.train()
    two.train()
    for a, b in zip(records(one), records(two)):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-3)
    assert records(one)[0]["loss"] == pytest.approx(records(two)[0]["loss"], abs=1e-5)


def test_the_record_has_schedules_health_and_each_step_once(images, tmp_path):
    run = trainer(images, tmp_path / "run", probe=lambda model: {"knn20_top1": 50.0})
    run.train()
    found = records(run)
    assert [r["step"] for r in found] == [0, 1, 2, 3, 4, 5, 6]
    assert found[0]["probe"] == {"knn20_top1": 50.0}
    assert [r["lr"] for r in found[1:4]] == pytest.approx([0.0, 0.005, 0.01])
    assert found[1]["last_layer_lr"] == 0.0
    assert found[3]["last_layer_lr"] == found[3]["lr"]
    for key in ("dino", "ibot", "koleo", "teacher_entropy", "feature_rank", "momentum", "weight_decay", "images_per_s"):
        assert key in found[1]


def test_unreadable_images_are_counted_and_limited(images, tmp_path, caplog):
    (images / "3.jpg").write_text("no image")
    run = trainer(images, tmp_path / "run")
    run.train()
    assert records(run)[-1]["image_errors"] >= 1
    assert "3.jpg" in caplog.text
    with pytest.raises(DataError, match="more than --max-errors 0"):
        trainer(images, tmp_path / "strict", "max_errors: 0").train()


def test_a_finished_run_is_left_alone(images, tmp_path):
    run = trainer(images, tmp_path / "run")
    run.train()
    again = trainer(images, tmp_path / "run")
    assert again.step == 6
    assert again.train() == {}
    assert len(records(again)) == 6


def test_freed_memory_is_kept_where_the_c_library_can():
    import platform

    from opendino.pretrain.memory import keep_freed_memory

    assert keep_freed_memory() is (platform.libc_ver()[0] == "glibc" and platform.system() == "Linux")


def test_one_image_a_micro_batch_leaves_koleo_out_and_says_so(images, tmp_path, caplog):
    run = trainer(images, tmp_path / "run", "{batch_size: 1, steps: 2}")
    assert "KoLeo is left out" in caplog.text
    assert run.train()["koleo"] == 0


def test_a_run_that_diverges_goes_back_to_its_last_good_checkpoint(images, tmp_path, caplog):
    run = trainer(images, tmp_path / "run", "{checkpoint_every: 2, max_bad_steps: 2}")
    real = run.model.loss

    def loss(*args):  # the steps with index 3 and 4 fail at the first learning rate
        total, parts = real(*args)
        return (total * float("nan") if run.step in (3, 4) and run.lr_factor == 1 else total), parts

    run.model.loss = loss
    last = run.train()
    found = records(run)
    assert [r["step"] for r in found] == [1, 2, 3, 4, 5, 6]
    assert [r["rollbacks"] for r in found] == [0, 0, 1, 1, 1, 1]
    assert found[2]["lr"] == pytest.approx(run.schedules(2)["lr"])
    assert run.schedules(2)["lr"] == pytest.approx(0.005)  # half of what the recipe says
    assert (last["bad_steps"], last["rollbacks"]) == (2, 1)
    (event,) = [json.loads(line) for line in (run.run / "events.jsonl").read_text().splitlines()]
    assert (event["from"], event["step"]) == (5, 2)
    assert "learning rate × 0.5" in event["reason"]
    assert event["reason"] in caplog.text
    again = trainer(images, tmp_path / "run", "{checkpoint_every: 2, max_bad_steps: 2}")
    assert (again.step, again.rollbacks, again.lr_factor) == (6, 1, 0.5)


def test_going_back_in_vain_ends_with_what_to_do(images, tmp_path):
    run = trainer(images, tmp_path / "run", "{checkpoint_every: 2, max_bad_steps: 1, max_rollbacks: 2}")
    poison(run, {3})
    with pytest.raises(ConfigError, match="going back 2 times did not help. Lower --optim.lr"):
        run.train()
    assert len((run.run / "events.jsonl").read_text().splitlines()) == 2


def test_settings_that_define_nothing_may_change_on_the_way_and_others_may_not(images, tmp_path):
    trainer(images, tmp_path / "run").train()
    again = trainer(images, tmp_path / "run", "{checkpoint_every: 1, num_workers: 1, log_every: 3}")
    assert again.step == 6
    assert "log_every: 3" in (again.run / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"other settings \(seed\)"):
        trainer(images, tmp_path / "run", "seed: 1")


def test_a_request_to_stop_saves_and_says_where(images, tmp_path):
    import os
    import signal

    from opendino.pretrain.interrupts import TrainingStopped

    run = trainer(images, tmp_path / "run")
    run.on_step = lambda record: os.kill(os.getpid(), signal.SIGTERM) if record["step"] == 2 else None
    with pytest.raises(TrainingStopped, match="Stopped at step 3"):
        run.train()
    again = trainer(images, tmp_path / "run")
    assert again.step == 3
    assert again.train()["step"] == 6


def test_a_list_of_images_that_changed_is_not_continued_unseen(images, tmp_path):
    trainer(images, tmp_path / "run", "{checkpoint_every: 3}").train()
    (images / "3.jpg").unlink()
    with pytest.raises(ConfigError, match=r"8 images and has 7, 1 fewer.*--data-may-change"):
        trainer(images, tmp_path / "run")
    assert trainer(images, tmp_path / "run", "data_may_change: true").step == 6


def test_the_same_images_in_another_place_are_the_same(images, tmp_path):
    trainer(images, tmp_path / "run").train()
    moved = images.rename(tmp_path / "elsewhere")
    assert trainer(moved, tmp_path / "run").step == 6


def test_a_second_run_in_the_same_folder_is_refused(images, tmp_path):
    run = trainer(images, tmp_path / "run")
    other = trainer(images, tmp_path / "run")
    with run.folder.held(), pytest.raises(ConfigError, match="Another process is training in"):
        other.train()
    assert other.train()["step"] == 6


def test_a_run_writes_to_the_loggers_that_it_names(images, tmp_path):
    pytest.importorskip("tensorboard")
    run = trainer(images, tmp_path / "run", "loggers: [tensorboard]")
    run.train()
    (file,) = (run.run / "tensorboard").glob("events.out.*")
    assert b"grad_norm_backbone" in file.read_bytes()
