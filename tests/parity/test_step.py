# SPDX-License-Identifier: Apache-2.0
"""The trainer in fp32 does the same step as a slow float64 reference: losses, gradients, optimiser, teacher, centres.

The reference gets the crops and masks of the trainer's last step, and all state from before it.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opendino.pretrain.config import parse_config
from opendino.pretrain.trainer import Trainer

spec = importlib.util.spec_from_file_location("step_reference", Path(__file__).with_name("step_reference.py"))
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)

WIDTH, HEADS, BATCH, LOCAL, LR = 32, 4, 6, 3, 4e-3
LOSS, GRADIENT, STATE, MOVE = 1e-5, 1e-4, 1e-6, 1e-3
CASES = {
    "shared head, moving centre": "",
    "separate heads, Sinkhorn": "{heads: {separate: true}, loss: {centering: sinkhorn}}",
    "separate heads, moving centre": "{heads: {separate: true}}",
    "shared head, Sinkhorn, registers": "{model: {arch: vits14_reg}, loss: {centering: sinkhorn}}",
    "patch 14": "{model: {patch_size: 14}, crops: {global_size: 56, local_size: 28}}",
    "SwiGLU, wider DINO bottleneck": "{model: {arch: vitg14}, heads: {separate: true, dino_bottleneck_dim: 24}}",
    "two micro-batches, Sinkhorn": "{accumulate: 2, heads: {separate: true}, loss: {centering: sinkhorn}}",
    "two micro-batches, moving centre": "{accumulate: 2}",
    "clipped": "{optim: {clip_grad: 0.1}, heads: {separate: true}}",
    "no local crops": "{crops: {num_local: 0}}",
    "third of three steps": "{steps: 3, optim: {warmup_steps: 1}, loss: {warmup_teacher_temp_steps: 4}}",
    "last layer moves": "{steps: 2, optim: {freeze_last_layer_steps: 1}}",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(BATCH + 2):
        field = rng.integers(0, 255, (6, 5, 3), dtype=np.uint8)
        Image.fromarray(field).resize((60, 66), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=95)
    return folder


def config_of(images, out, changes):
    base = parse_config(
        f"""
        {{data: "{images}", out: "{out}", steps: 1, batch_size: {BATCH}, num_workers: 0, device: cpu, precision: fp32,
        model: {{arch: vits14, patch_size: 7, embed_dim: {WIDTH}, depth: 2, num_heads: {HEADS}, init_values: 1.0}},
        crops: {{global_size: 28, local_size: 14, num_local: {LOCAL}}},
        heads: {{num_prototypes: 40, hidden_dim: 48, bottleneck_dim: 16, separate: false}},
        loss: {{centering: moving, warmup_teacher_temp_steps: 4}},
        optim: {{lr: {LR}, warmup_steps: 0, freeze_last_layer_steps: 100}}}}
        """,
        "base",
    ).model_dump()
    for key, value in parse_config(changes or "{}", "changes").model_dump(exclude_unset=True).items():
        base[key] = base[key] | value if isinstance(value, dict) else value
    return parse_config(str(base).replace("'", '"').replace("None", "null").replace("(", "[").replace(")", "]"), "all")


@torch.no_grad()
def randomise(networks, seed):
    """Move every tensor away from its start: norms, biases, LayerScale, mask token and registers too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in networks.named_parameters():
        size = 0.3 if parameter.ndim == 1 or "token" in name or "last_layer" in name else 0.1
        parameter += size * torch.randn(parameter.shape, generator=generator)


def doubles(networks):
    return {n: {k: v.detach().double().clone() for k, v in net.state_dict().items()} for n, net in networks.items()}


class Recorder:
    """Runs a trainer and keeps what went into its last step and what came out."""

    def __init__(self, config):
        self.records = []
        self.trainer = trainer = Trainer(config, on_step=self.records.append)
        randomise(trainer.model.student, 1)
        randomise(trainer.model.teacher, 2)
        self.targets, trainer.model.targets = trainer.model.targets, self.before
        trainer.optimizer.register_step_pre_hook(self.clipped)
        trainer.train()
        self.record = self.records[-1]
        self.after = {"student": doubles(trainer.model.student), "teacher": doubles(trainer.model.teacher)}
        self.after["centers"] = self.centers()

    def centers(self):
        return {n: module.center.double().clone() for n, module in self.trainer.model.centers.items()}

    def parameters(self):
        student = self.trainer.model.student
        return [(n, k, p) for n, net in student.items() for k, p in net.named_parameters()]

    def before(self, micro_batches, *args, **kwargs):
        """The step's crops and masks, and the state it starts from."""
        model, state = self.trainer.model, self.trainer.optimizer.state
        self.student, self.teacher, self.start_centers = doubles(model.student), doubles(model.teacher), self.centers()
        self.micro_batches, self.moments = [cut(m) for m in micro_batches], {}
        for n, k, p in self.parameters():
            if "exp_avg" in state[p]:
                moments = state[p]["exp_avg"].double().clone(), state[p]["exp_avg_sq"].double().clone()
                self.moments.setdefault(n, {})[k] = moments
        return self.targets(micro_batches, *args, **kwargs)

    def clipped(self, *_):
        self.gradients = {(n, k): p.grad.double().clone() for n, k, p in self.parameters()}


def cut(crops):
    """Crop-major tensors of the trainer → one tensor a crop."""
    local = crops.local_crops
    num_local = 0 if local is None else len(local) // crops.num_images
    return reference.MicroBatch(
        global_crops=list(crops.global_crops.double().chunk(2)),
        local_crops=[] if local is None else list(local.double().chunk(num_local)),
        masks=list(crops.masks.chunk(2)),
    )


def expected(recorder, config):
    step = config.steps - 1
    rates = reference.rates_at(
        step,
        config.steps,
        BATCH,
        lr=LR,
        warmup=config.optim.warmup_steps,
        freeze=config.optim.freeze_last_layer_steps,
        temp_warmup=4,
    )
    return reference.training_step(
        recorder.student,
        recorder.teacher,
        recorder.start_centers,
        recorder.moments,
        recorder.micro_batches,
        reference.Shape(config.model.patch_size, HEADS, antialias=config.model.arch.endswith("_reg")),
        rates,
        t=config.steps,
        sinkhorn_targets=config.loss.centering == "sinkhorn",
        clip=config.optim.clip_grad,
    )


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-").replace(",", ""))
def pair(request, images, tmp_path_factory):
    config = config_of(images, tmp_path_factory.mktemp("run"), CASES[request.param])
    recorder = Recorder(config)
    return recorder, expected(recorder, config)


def distance(ours, truth):
    return float((ours - truth).norm() / truth.norm())


def test_every_loss_part_agrees(pair):
    recorder, truth = pair
    apart = {k: abs(recorder.record[k] - v) / abs(v) for k, v in truth.losses.items() if v}
    assert {"loss", "dino", "ibot", "koleo", "dino_global"} <= set(apart)
    assert max(apart.values()) < LOSS, apart


def test_every_gradient_agrees(pair):
    recorder, truth = pair
    apart = {f"{n}.{k}": distance(g, truth.gradients[n][k]) for (n, k), g in recorder.gradients.items()}
    assert set(apart) == {f"{n}.{k}" for n, p in truth.gradients.items() for k in p}
    worst = max(apart, key=apart.get)
    assert apart[worst] < GRADIENT, (worst, apart[worst])
    for name, norm in truth.norms.items():
        assert recorder.record[f"grad_norm_{name}"] == pytest.approx(norm, rel=GRADIENT)


def test_every_student_parameter_moves_alike(pair):
    """Stricter than the student itself to 1e-6, which a step that changes nothing could pass."""
    recorder, truth = pair
    for n, network in truth.student.items():
        for k, after in network.items():
            ours, wanted = recorder.after["student"][n][k] - recorder.student[n][k], after - recorder.student[n][k]
            # AdamW's first step is g / (|g| + 1e-8): elements far below their tensor's gradient step along round-off.
            gradient = recorder.gradients[n, k].abs()
            sure = gradient >= 1e-3 * gradient.square().mean().sqrt()
            assert sure.double().mean() > 0.6, (n, k)
            if k.endswith("qkv.bias"):
                # A shift of all keys changes no softmax: their bias has no gradient, and AdamW steps along round-off.
                keys = slice(WIDTH, 2 * WIDTH)
                assert recorder.gradients[n, k][keys].norm() < GRADIENT * recorder.gradients[n, k].norm()
                sure[keys] = False
            if k == "last_layer.weight" and not recorder.record["last_layer_lr"]:
                assert not ours.any()
                assert not wanted.any()
            else:
                found = distance(ours[sure], wanted[sure])
                assert found < MOVE, (n, k, found)


def test_teacher_and_centres_agree_after_the_step(pair):
    recorder, truth = pair
    for n, network in truth.teacher.items():
        for k, after in network.items():
            assert (recorder.after["teacher"][n][k] - after).abs().max() < STATE, (n, k)
    for name, center in truth.centers.items():
        assert (recorder.after["centers"][name] - center).abs().max() < STATE, name


def test_cases_reach_what_they_are_for(pair):
    recorder, truth = pair
    c = recorder.trainer.config
    masked = torch.cat([m.sum(1) for micro in recorder.micro_batches for m in micro.masks])
    assert masked.eq(0).any()
    assert masked.unique().numel() > 2
    assert max(truth.norms.values()) > c.optim.clip_grad
    if c.loss.centering == "moving":
        assert all((truth.centers[n] - recorder.start_centers[n]).abs().max() > 1000 * STATE for n in truth.centers)
