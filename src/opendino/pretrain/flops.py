# SPDX-License-Identifier: Apache-2.0
"""What a step costs in arithmetic, and how much of the machine's peak and memory a run uses.

Shapes: B images, L local crops each, P patches and N = 1 + R + P tokens of a crop, D width, H feed-forward width,
K prototypes. One multiply-add is two FLOPs.
"""

from __future__ import annotations

import functools
import itertools
import sys
import time

import torch

from opendino.models.config import ViTConfig
from opendino.models.registry import get_config
from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.student_teacher import backbone_config

PEAK_BUDGET_S = 0.3
"""Time that the measurement of the peak may take."""


def block_flops(config: ViTConfig, tokens: int) -> float:
    """Give the FLOPs of one block's forward over one crop: linear layers 2·N·(4·D² + F), attention products 4·N²·D.

    F is 2·D·H for the plain feed-forward and 3·D·H for the gated one.
    """
    d = config.embed_dim
    feed_forward = (2 if config.ffn == "mlp" else 3) * d * config.hidden_dim
    return 2 * tokens * (4 * d * d + feed_forward) + 4 * tokens * tokens * d


def embed_flops(config: ViTConfig, patches: int) -> float:
    """Give the FLOPs of embedding the patches of one crop: 2·P·C·p²·D."""
    return 2 * patches * config.in_chans * config.patch_size**2 * config.embed_dim


def head_flops(config: PretrainConfig, width: int, bottleneck: int) -> float:
    """Give the FLOPs of a head's forward for one token: twice the weights of its MLP and of the prototypes."""
    heads = config.heads
    dims = [width, *[heads.hidden_dim] * (heads.num_layers - 1), bottleneck, heads.num_prototypes]
    return 2 * sum(a * b for a, b in itertools.pairwise(dims))


def flops_by_part(config: PretrainConfig) -> dict[str, float]:
    """Count the FLOPs of one optimiser step per image: matrix products of teacher and student, by part.

    With b the blocks' forward over one crop, e the patch embedding, h_d and h_i one token through the DINO and the iBOT
    head, m = 2 · share · mean(ratio) · P masked patches an image, and k = 1 − drop_path_rate:

        teacher backbone = 2·(e_global + b_global)              teacher heads = 2·h_d + m·h_i              (forward)
        student, global crops = 3·k·2·b_global + 2·2·e_global   student, local crops = 3·k·L·b_local + 2·L·e_local
        student heads = 3·((2 + L)·h_d + m·h_i)

    Backward costs twice the forward, except at the patch embedding, which needs no gradient of the pixels. The model's
    FLOPs are counted, not the hardware's: recomputation (activation checkpointing, chunked losses) is not added, nor
    are normalisations, softmax, Sinkhorn, KoLeo, augmentation and the optimiser.
    Every block counts over every token; what an implementation leaves out because nothing reads it (most tokens of the
    last block) is not subtracted.

    Returns:
        The parts, and their sum as "total".
    """
    backbone = get_config(config.model.arch, **backbone_config(config))
    crops, heads = config.crops, config.heads
    large, small = (s // backbone.patch_size for s in (crops.global_size, crops.local_size))

    def blocks(side: int) -> float:
        return backbone.depth * block_flops(backbone, 1 + backbone.num_register_tokens + side * side)

    both, local = 2 * blocks(large), crops.num_local * blocks(small)
    embed, embed_local = 2 * embed_flops(backbone, large**2), crops.num_local * embed_flops(backbone, small**2)
    masked = masked_patches(config)
    dino_head = head_flops(config, backbone.embed_dim, heads.dino_bottleneck_dim or heads.bottleneck_dim)
    ibot_head = head_flops(config, backbone.embed_dim, heads.bottleneck_dim) if heads.separate else dino_head
    kept = 1 - backbone.drop_path_rate
    asked = config.loss.asks_teacher  # else neither teacher nor heads are computed
    dino_head *= asked
    parts = {
        "teacher backbone": asked * (embed + both),
        "teacher heads": 2 * dino_head + masked * ibot_head,
        "student, global crops": 3 * kept * both + 2 * embed,
        "student, local crops": 3 * kept * local + 2 * embed_local,
        "student heads": 3 * ((2 + crops.num_local) * dino_head + masked * ibot_head),
    }
    return parts | {"total": sum(parts.values())}


def masked_patches(config: PretrainConfig) -> float:
    """Give the mean number of masked patches an image, both global crops together."""
    masks, patch = config.masks, get_config(config.model.arch, **backbone_config(config)).patch_size
    side = config.crops.global_size // patch
    return 2 * masks.share * sum(masks.ratio) / 2 * side**2 if config.loss.ibot_weight else 0.0


def model_flops_per_image(config: PretrainConfig) -> float:
    """Give the FLOPs of one optimiser step per image, all parts of `flops_by_part` together."""
    return flops_by_part(config)["total"]


@functools.lru_cache(maxsize=8)
def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a large square matrix product, the best of several; once per process, under half a second.

    It is the speed that torch reaches here with the threads and settings of this process, not the data sheet's: so the
    utilisation means the same on every machine. Other work beside it makes it too low.
    """
    side = 256 if device.type == "cpu" else 2048
    best = 0.0
    began = time.perf_counter()
    _matmul_seconds(side, device, dtype)  # the first call loads kernels
    while time.perf_counter() - began < PEAK_BUDGET_S:
        seconds = _matmul_seconds(side, device, dtype)
        best = max(best, 2 * side**3 / seconds)
        if seconds < 0.005 and side < 8192:
            side *= 2
    return best


def _matmul_seconds(side: int, device: torch.device, dtype: torch.dtype) -> float:
    a = torch.ones(side, side, device=device, dtype=dtype)
    out = torch.empty_like(a)
    _synchronize(device)
    began = time.perf_counter()
    torch.mm(a, a, out=out)
    _synchronize(device)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_gb(device: torch.device) -> float | None:
    """Give the most memory used so far, 10⁹ bytes: of torch on a CUDA device, of this process elsewhere.

    The process's does not contain the loader's workers. None where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest * (1 if sys.platform == "darwin" else 1024) / 1e9


def speed_figures(
    config: PretrainConfig,
    *,
    seconds: float,
    waited: float,
    device: torch.device,
    dtype: torch.dtype | None = None,
    processes: int = 1,
    flops_per_image: float | None = None,
) -> dict[str, float]:
    """Give images/s, the share of a step spent waiting for data, TFLOP/s and its share of the peak, and peak memory.

    Args:
        config: of the run; its batch is that of all processes together.
        seconds: wall-clock time of one step.
        waited: part of it that waited for the loader, seconds.
        device: of this process.
        dtype: of the autocast; None for fp32.
        processes: of the run; each is taken to have this one's peak.
        flops_per_image: of one step; None counts those of the configured pre-training.
    """
    rate = config.batch_size / seconds
    flops = rate * (model_flops_per_image(config) if flops_per_image is None else flops_per_image)
    peak = processes * measured_peak_flops(device, dtype or torch.float32)
    figures = {"images_per_s": rate, "data_wait": waited / seconds, "tflops": flops / 1e12, "mfu": flops / peak}
    memory = peak_memory_gb(device)
    return figures if memory is None else figures | {"peak_memory_gb": memory}
