# SPDX-License-Identifier: Apache-2.0
"""What a run will take before it is paid for: parameters, arithmetic, memory, hours, energy (`opendino plan`).

Parameters are counted on the meta device. Memory is counted by building two blocks of the real backbone with tensors
that have shapes and no data, and looking at what autograd keeps for the backward pass; every block keeps the same.

Shapes: B images on a device, L local crops, N tokens, D width, K prototypes, d bottleneck.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from opendino.errors import ConfigError
from opendino.models import layers
from opendino.models.config import ViTConfig
from opendino.models.registry import get_config
from opendino.models.vit import VisionTransformer
from opendino.pretrain.centering import CHUNK_ELEMENTS
from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.flops import flops_by_part, masked_patches
from opendino.pretrain.heads import DINOHead
from opendino.pretrain.stages import timeline
from opendino.pretrain.student_teacher import StudentTeacher, backbone_config

FP32, HALF = 4, 2
ADAM_BYTES = 2 * FP32
"""Two moments for every trained parameter."""


@dataclass(frozen=True)
class Device:
    """What a device can do, by its data sheet.

    Attributes:
        name: as people call it.
        flops: dense bf16 FLOP/s.
        memory: bytes.
        watts: board power at full load.
        mfu: model FLOP utilisation that is assumed when none is given.
    """

    name: str
    flops: float
    memory: float
    watts: float
    mfu: float = 0.35


DEVICES = {
    "a100": Device("NVIDIA A100 SXM 80 GB", 312e12, 80e9, 400),
    "h100": Device("NVIDIA H100 SXM 80 GB", 989e12, 80e9, 700),
    "h200": Device("NVIDIA H200 SXM 141 GB", 989e12, 141e9, 700),
}


@dataclass(frozen=True)
class Plan:
    """What a run takes. Bytes are those of one device; FLOPs are the model's (`model_flops_per_image`).

    Attributes:
        parameters: by part; "trained" is the student, "teacher" its copy.
        flops_per_image: by part; they add up to "total".
        memory: bytes by part, at the fullest moment of a step; they add up to "total".
        images: seen in the whole run.
        steps: of the optimiser.
        seconds: of the run on all devices together, wall-clock.
        device_hours: seconds · devices / 3600.
        kwh: of the devices and what the data centre adds.
        co2_kg: of that energy.
        assumptions: what was assumed, in words.
        stages: in a run of several stages, steps, images a step, side of the global crops, FLOPs of an image, bytes and
            device hours of each. The whole's FLOPs are then means over all images, its memory the fullest stage's, its
            parameters the last's.
    """

    parameters: dict[str, int]
    flops_per_image: dict[str, float]
    memory: dict[str, float]
    images: int
    steps: int
    seconds: float
    device_hours: float
    kwh: float
    co2_kg: float
    assumptions: list[str] = field(default_factory=list)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)


def count_parameters(config: PretrainConfig) -> dict[str, int]:
    """Count parameters on the meta device: backbone and heads of the student, all that is trained, and the teacher."""
    with torch.device("meta"):
        model = StudentTeacher(config)
    parts = {name: _size(module) for name, module in model.student.items()}
    return parts | {"trained": _size(model.student), "teacher": _size(model.teacher)}


def memory_by_part(
    config: PretrainConfig,
    *,
    devices: int = 1,
    sharded: bool = False,
    half: bool = True,
    cpu: bool = False,
    checkpointing: bool | None = None,
) -> dict[str, float]:
    """Give the bytes that one device holds at the fullest moment of a step, by part.

    It is taken as if all gradients were there while all activations still are, which is a little too much: gradients
    come as activations go. CUDA's own context, the Python process and what the allocator loses to fragments (on a CPU
    about a tenth) are not in it.

    Args:
        config: of the run; its batch is that of all devices, and each has batch / devices / accumulate images at once.
        devices: that share the batch.
        sharded: weights, gradients and moments are spread over the devices (FSDP2) instead of copied (DDP).
        half: products run in bf16 or fp16.
        cpu: as the step is computed on a CPU (explicit attention for short sequences, smaller loss chunks).
        checkpointing: recompute activations; None takes the run's setting.

    Raises:
        ConfigError: when the batch cannot be divided.
    """
    shares = devices * config.accumulate
    if config.batch_size % shares:
        raise ConfigError(
            f"batch_size {config.batch_size} cannot be divided over {devices} devices and {config.accumulate} "
            f"micro-batches: give a number of devices that divides {config.batch_size // config.accumulate}."
        )
    images = config.batch_size // shares
    recompute = config.activation_checkpointing if checkpointing is None else checkpointing
    params, spread = count_parameters(config), devices if sharded else 1
    trained, teacher = params["trained"], params["teacher"]
    prototypes = _prototype_parameters(config)
    act = activation_bytes(config, images, half=half, cpu=cpu, checkpointing=recompute)
    product = HALF if half else FP32
    gradients = FP32 * trained / spread
    forward = {
        "activations": images * act["per_image"],
        "backward of one block": images * act["work_per_image"],
        "weight copies for the products": _gathered(config, product) if sharded else act["fixed"],
        "prototypes at unit norm": product * 2 * prototypes,
        "prototype gradients": FP32 * prototypes,
        "loss chunks": _chunk_bytes(config, images, cpu, half),
    }
    static = {
        "student weights": FP32 * trained / spread,
        "teacher weights": FP32 * teacher / spread,
        "optimiser moments": ADAM_BYTES * trained / spread,
        "crops": images * _crop_bytes(config),
    }
    parts = static | {"gradients": gradients} | forward
    return parts | {"total": sum(parts.values())}


def activation_bytes(
    config: PretrainConfig, images: int, *, half: bool, cpu: bool, checkpointing: bool
) -> dict[str, float]:
    """Count what is kept of the student's forward pass for the backward pass.

    Two images and one image are counted; the difference is what an image adds. Stochastic depth keeps the share of
    images that are not dropped; heads and the last block are counted on the rows that losses read.

    Args:
        config: of the run.
        images: in a micro-batch; large ones make GELU again instead of keeping it.
        half: products run in half precision.
        cpu: attention as on a CPU.
        checkpointing: blocks are computed again in the backward pass.

    Returns:
        "per_image" and "fixed" bytes (copies of weights), and "work_per_image": what the backward pass of one block
        has in hand besides, taken as much as that block keeps.
    """
    with _computed_as(cpu, remakes_gelu=_hidden_numbers(config, images) >= layers.RECOMPUTE_GELU_FROM):
        one, two = (_kept_bytes(config, n, half, checkpointing) for n in (1, 2))
    per_image = {name: two[name] - one[name] for name in one}
    depth, kept = _backbone(config).depth, 1 - config.model.drop_path_rate
    blocks = {"block": (depth - 1) * kept, "last block": kept}

    def total(parts: dict[str, float]) -> float:
        return sum(parts[name] * blocks.get(name, 1.0) for name in ("stem", "block", "last block", "heads"))

    return {"per_image": total(per_image), "fixed": total(one) - total(per_image), "work_per_image": per_image["work"]}


def plan_run(
    config: PretrainConfig, *, device: Device, devices: int = 1, mfu: float | None = None, sharded: bool | None = None,
    pue: float = 1.1, grid_kg_per_kwh: float = 0.385, cpu: bool = False,
) -> Plan:  # fmt: skip
    """Put everything together for a run on some devices.

    Args:
        config: of the run.
        device: its data sheet, or measured figures of this machine.
        devices: how many.
        mfu: model FLOP utilisation, 0–1; None takes the device's.
        sharded: None shards from 100 million trained parameters on when there are several devices.
        pue: energy of the data centre over that of the devices.
        grid_kg_per_kwh: CO₂eq of a kWh.
        cpu: the device is a CPU.
    """
    if config.stages:
        parts = [(s, s.config.model_copy(update={"steps": s.end - s.first})) for s in timeline(config)]
        return _together({
            stage.name: (c, plan_run(c, device=device, devices=devices, mfu=mfu, sharded=sharded, pue=pue,
                                     grid_kg_per_kwh=grid_kg_per_kwh, cpu=cpu))
            for stage, c in parts
        })  # fmt: skip
    parameters, flops = count_parameters(config), flops_by_part(config)
    share = device.mfu if mfu is None else mfu
    if not 0 < share <= 1:
        raise ConfigError(f"--mfu is {share}; it must be above 0 and at most 1 (0.35 is usual).")
    spread = sharded if sharded is not None else devices > 1 and parameters["trained"] >= 100_000_000
    memory = memory_by_part(config, devices=devices, sharded=spread, cpu=cpu)
    images = config.steps * config.batch_size
    seconds = images * flops["total"] / (device.flops * share * devices)
    hours = seconds * devices / 3600
    kwh = hours * device.watts / 1000 * pue
    assumptions = [
        f"{devices} × {device.name}: {device.flops / 1e12:.3g} TFLOP/s, {share:.0%} of it used by the model's FLOPs",
        f"{device.watts:.0f} W a device at full load, {pue:.2f} times that for the building",
        f"{grid_kg_per_kwh:.3f} kg CO₂eq a kWh",
        "weights, gradients and moments are "
        + (f"spread over {devices} devices" if spread else "whole on each device"),
        "activations are " + ("recomputed" if config.activation_checkpointing else "kept"),
    ]
    return Plan(
        parameters, flops, memory, images, config.steps, seconds, hours, kwh, kwh * grid_kg_per_kwh, assumptions
    )


def _together(parts: dict[str, tuple[PretrainConfig, Plan]]) -> Plan:
    """Add up the plans of the stages of a run."""
    plans = [plan for _, plan in parts.values()]
    images = sum(p.images for p in plans)
    flops = {k: sum(p.images * p.flops_per_image[k] for p in plans) / images for k in plans[0].flops_per_image}
    memory = max((p.memory for p in plans), key=lambda parts: parts["total"])
    stages = {
        name: {
            "steps": p.steps, "batch_size": c.batch_size, "global_size": c.crops.global_size,
            "flops_per_image": p.flops_per_image["total"], "memory": p.memory["total"], "device_hours": p.device_hours,
        }
        for name, (c, p) in parts.items()
    }  # fmt: skip
    sums = {
        name: sum(getattr(p, name) for p in plans) for name in ("steps", "seconds", "device_hours", "kwh", "co2_kg")
    }
    shared = [line for line in plans[0].assumptions if all(line in p.assumptions for p in plans)]
    said = shared + [f"{n}: {line}" for n, (_, p) in parts.items() for line in p.assumptions if line not in shared]
    return replace(
        plans[-1], flops_per_image=flops, memory=memory, images=images, assumptions=said, stages=stages, **sums
    )


# --- counting what autograd keeps ----------------------------------------------------------------------------------


def _kept_bytes(config: PretrainConfig, images: int, half: bool, checkpointing: bool) -> dict[str, float]:
    """Bytes kept of the student's forward pass over all crops of some images: of the stem, of one block, …"""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        backbone, heads = _two_blocks(config), _heads(config)
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        for module in (backbone, *heads):
            module.train()._apply(lambda p: torch.empty(p.shape, dtype=p.dtype))
        ledger = _Ledger([backbone, *heads])
        c = config.crops
        sides = [(2 * images, c.global_size)] + ([(c.num_local * images, c.local_size)] if c.num_local else [])
        crops = [torch.empty(n, backbone.config.in_chans, side, side) for n, side in sides]
        rows = [images * (2 + c.num_local), round(images * masked_patches(config))]
        with ledger.page("stem"):
            tokens, shapes = backbone._pack(crops, [None] * len(crops))
        with ledger.page("block"):
            tokens = backbone.blocks[0](tokens, shapes)
        with ledger.page("last block"):
            wanted = torch.empty(sum(rows), dtype=torch.long)
            last = backbone.norm(backbone.blocks[1](tokens, shapes, None, wanted))
        with ledger.page("heads"):
            groups = [last] if len(heads) == 1 else last.split(rows)
            for head, group in zip(heads, groups, strict=True):
                head.bottleneck(group)
    found = ledger.bytes
    found["work"] = found["block"]
    if checkpointing:  # a block keeps its input and is computed again
        found["block"] = FP32 * tokens.numel()
    return found


class _Ledger:
    """Adds up the storages that autograd saves, each once, parameters left out."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.bytes: dict[str, float] = {}
        self._kept: dict[int, Any] = {}  # storages are held, so that no other gets the same identity
        self._weights = {p.untyped_storage()._cdata for m in modules for p in m.parameters()}

    @contextmanager
    def page(self, name: str) -> Iterator[None]:
        """Count what is saved inside under a name."""
        self.bytes[name] = 0.0

        def save(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._weights and key not in self._kept:
                self._kept[key] = storage
                self.bytes[name] += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            yield


@contextmanager
def _computed_as(cpu: bool, remakes_gelu: bool) -> Iterator[None]:
    """Choose attention and feed-forward as the run will: only a CPU computes short sequences by explicit products."""
    before = layers.EXPLICIT_ATTENTION_MAX_TOKENS, layers.RECOMPUTE_GELU_FROM
    layers.EXPLICIT_ATTENTION_MAX_TOKENS = before[0] if cpu else 0
    layers.RECOMPUTE_GELU_FROM = 0 if remakes_gelu else 2**62
    try:
        yield
    finally:
        layers.EXPLICIT_ATTENTION_MAX_TOKENS, layers.RECOMPUTE_GELU_FROM = before


def _hidden_numbers(config: PretrainConfig, images: int) -> int:
    """Numbers in the hidden layer of one block's feed-forward."""
    backbone, c = _backbone(config), config.crops
    first = 1 + backbone.num_register_tokens
    sides = [c.global_size] * 2 + [c.local_size] * c.num_local
    return images * sum(first + (side // backbone.patch_size) ** 2 for side in sides) * backbone.hidden_dim


def _two_blocks(config: PretrainConfig) -> VisionTransformer:
    small = backbone_config(config) | {"depth": 2, "drop_path_rate": 0.0}
    return VisionTransformer(get_config(config.model.arch, **small))


def _backbone(config: PretrainConfig) -> ViTConfig:
    return get_config(config.model.arch, **backbone_config(config))


def _heads(config: PretrainConfig) -> list[DINOHead]:
    width, heads = _backbone(config).embed_dim, config.heads
    dims = [heads.dino_bottleneck_dim or heads.bottleneck_dim, *([heads.bottleneck_dim] if heads.separate else [])]
    return [
        DINOHead(width, 2, heads.hidden_dim, dim, heads.num_layers, heads.batch_norm) for dim in dims
    ]  # prototypes are counted by themselves


def _prototype_parameters(config: PretrainConfig) -> int:
    heads = config.heads
    dims = heads.dino_bottleneck_dim or heads.bottleneck_dim
    return heads.num_prototypes * (dims + (heads.bottleneck_dim if heads.separate else 0))


def _chunk_bytes(config: PretrainConfig, images: int, cpu: bool, half: bool) -> float:
    """Logits, targets and their gradient of the rows that are worked off at a time."""
    k = config.heads.num_prototypes
    at_once = max(CHUNK_ELEMENTS["cpu" if cpu else "cuda"] // k, 16)
    masked = masked_patches(config)
    rows = min(at_once, images * max(config.crops.num_local, 2, masked))
    return rows * k * (3 * FP32 + (2 * HALF if half else 0))


def _gathered(config: PretrainConfig, product: int) -> float:
    """The blocks that FSDP2 holds whole at a time: the one at work and the next."""
    with torch.device("meta"):
        block = _two_blocks(config).blocks[0]
    return 2 * product * _size(block)


def _crop_bytes(config: PretrainConfig) -> float:
    """Crops of an image, as they come (8 bits) and normalised (fp32)."""
    c = config.crops
    return config.model.in_chans * (2 * c.global_size**2 + c.num_local * c.local_size**2) * (1 + FP32)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
