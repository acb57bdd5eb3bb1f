# SPDX-License-Identifier: Apache-2.0
"""DINO, iBOT and KoLeo, all in fp32 (method.md §2).

Shapes: B images, L local crops each, M masked patches, P patches, D width, K prototypes.
Crop order: all first global crops, then all second ones; local crops are crop-major.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from opendino.distributed.collectives import gather_rows, rank, world_size


def dino_loss(
    global_logits: Tensor, local_logits: Tensor | None, teacher_probs: Tensor, student_temp: float = 0.1
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of each global crop's target against the other global crop and all local crops.

    Args:
        global_logits: student, (2B, K).
        local_logits: student, (L·B, K), or None.
        teacher_probs: targets of the global crops, (2B, K).
        student_temp: softmax temperature of the student.

    Returns:
        The mean over the 2 + 2·L pairs and the B images, and its parts "dino_global" and "dino_local", detached.
        (Caron et al. 2021, eq. 3; the iBOT-style handling of both globals in one call.)
    """
    first, second = teacher_probs.float().chunk(2)
    images = len(first)
    num_local = 0 if local_logits is None else len(local_logits) // images
    pairs = 2 + 2 * num_local
    log_global = F.log_softmax(global_logits.float() / student_temp, dim=-1)
    global_term = -(torch.cat([second, first]) * log_global).sum(-1).mean() * 2 / pairs
    local_term = global_term.new_zeros(())
    if local_logits is not None:
        log_local = F.log_softmax(local_logits.float() / student_temp, dim=-1).unflatten(0, (num_local, images))
        local_term = -((first + second) * log_local.sum(0)).sum(-1).mean() / pairs
    return global_term + local_term, {"dino_global": global_term.detach(), "dino_local": local_term.detach()}


def ibot_loss(
    student_logits: Tensor, teacher_probs: Tensor, weights: Tensor, num_crops: int, student_temp: float = 0.1
) -> Tensor:
    """Cross-entropy on masked patches, weighted per image and divided by the number of global crops (iBOT eq. 2).

    Args:
        student_logits: (M, K).
        teacher_probs: (M, K).
        weights: (M,), from `mask_weights`.
        num_crops: number of global crops, masked or not.
        student_temp: softmax temperature of the student.
    """
    log_student = F.log_softmax(student_logits.float() / student_temp, dim=-1)
    per_patch = -(teacher_probs.float() * log_student).sum(-1)
    return (per_patch * weights).sum() / num_crops


def mask_weights(masks: Tensor) -> Tensor:
    """Give each masked patch 1 / (masked patches of its crop): bool (n, P) → (M,), in row-major order."""
    per_crop = 1.0 / masks.sum(1).clamp_min(1)
    return per_crop[:, None].expand_as(masks)[masks]


def koleo_loss(x: Tensor, eps: float = 1e-8) -> Tensor:
    """−mean log distance to the nearest neighbour among L2-normalised rows (Sablayrolles et al. 2018, eq. 1).

    Neighbours are sought among the rows of all processes; the mean is over the rows of this one.

    Finite, with finite gradients, for duplicates and for fp16 input: the distance is computed in fp32, and its square
    is bounded below before the root. Fewer than two rows in all have no neighbour and give 0.

    Args:
        x: (n, D), n the same in every process.
        eps: smallest distance.
    """
    if len(x) * world_size() < 2:
        return x[:0].float().sum()
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x if x.dtype is torch.float64 else x.float(), dim=-1)
        everyone = gather_rows(x)
        with torch.no_grad():
            similarity = x @ everyone.T
            own = torch.arange(len(x), device=x.device)
            similarity[own, own + rank() * len(x)] = -2
            nearest = similarity.argmax(1)
        squared = (x - everyone[nearest]).square().sum(1)
        return -0.5 * torch.log(squared.clamp_min(eps**2)).mean()
