# SPDX-License-Identifier: Apache-2.0
"""One whole training step, slow and literal, in float64: what the trainer must equal. Written from the formulas alone.

Networks are dicts of tensors: {"backbone": {...}, "dino_head": {...}, "ibot_head": {...}}, the last one missing when
both losses share a head. Crops are lists with one tensor per crop, all of the same B images, so every crop is a pass of
its own. Shapes: B images, L local crops each, P patches, m masked ones of a crop, D width, K prototypes.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

LN_EPS, NORMALIZE_EPS, ADAM_EPS = 1e-6, 1e-12, 1e-8
STUDENT_TEMP, CENTER_MOMENTUM, SINKHORN_ITERATIONS, KOLEO_WEIGHT = 0.1, 0.9, 3, 0.1


@dataclass
class Shape:
    """What state dicts do not say; `antialias` is the position-resize convention of models with registers."""

    patch: int
    heads: int
    antialias: bool = False


@dataclass
class MicroBatch:
    """Crops of B images: `global_crops` 2 × (B, C, g, g), `local_crops` L × (B, C, l, l), `masks` 2 × bool (B, P)."""

    global_crops: list
    local_crops: list
    masks: list


@dataclass
class Rates:
    """Schedules at one step, for AdamW and the moving average."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float


@dataclass
class Result:
    """Losses by name, gradients after clipping, their norms before it, and all state after the step."""

    losses: dict
    norms: dict = field(default_factory=dict)
    gradients: dict = field(default_factory=dict)
    student: dict = field(default_factory=dict)
    teacher: dict = field(default_factory=dict)
    centers: dict = field(default_factory=dict)
    moments: dict = field(default_factory=dict)


# --- networks ------------------------------------------------------------------------------------------------------


def layer_norm(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + LN_EPS) * weight + bias


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def linear(x, p, name):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def normalize(x):
    return x / torch.sqrt((x**2).sum(-1, keepdim=True)).clamp_min(NORMALIZE_EPS)


def positions(table, h, w, antialias):
    """(1, 1 + h·w, D) from the (1, 1 + G·G, D) table: bicubic, by scale (n + 0.1) / G, or by size with antialias."""
    grid = math.isqrt(table.shape[1] - 1)
    if (h, w) == (grid, grid):
        return table
    patches = table[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    if antialias:
        patches = F.interpolate(patches, size=(h, w), mode="bicubic", antialias=True)
    else:
        patches = F.interpolate(patches, scale_factor=((h + 0.1) / grid, (w + 0.1) / grid), mode="bicubic")
    return torch.cat([table[:, :1], patches.permute(0, 2, 3, 1).reshape(1, h * w, -1)], dim=1)


def attention(x, p, prefix, heads):
    queries, keys, values = linear(x, p, f"{prefix}.qkv").chunk(3, dim=-1)
    size = queries.shape[-1] // heads
    mixed = []
    for i in range(heads):
        q, k, v = (t[..., i * size : (i + 1) * size] for t in (queries, keys, values))
        weights = torch.exp(q @ k.transpose(1, 2) / math.sqrt(size))
        mixed.append(weights / weights.sum(-1, keepdim=True) @ v)
    return linear(torch.cat(mixed, dim=-1), p, f"{prefix}.proj")


def feed_forward(x, p, prefix):
    if f"{prefix}.w12.weight" in p:
        gate, value = linear(x, p, f"{prefix}.w12").chunk(2, dim=-1)
        return linear(gate / (1 + torch.exp(-gate)) * value, p, f"{prefix}.w3")
    return linear(gelu(linear(x, p, f"{prefix}.fc1")), p, f"{prefix}.fc2")


def backbone(p, images, shape, mask=None):
    """Normalised cls tokens (B, D) and patch tokens (B, P, D) of one crop of each image."""
    n, channels, height, width = images.shape
    h, w = height // shape.patch, width // shape.patch
    cells = images.reshape(n, channels, h, shape.patch, w, shape.patch).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w, -1)
    kernel = p["patch_embed.proj.weight"]
    tokens = cells @ kernel.reshape(len(kernel), -1).T + p["patch_embed.proj.bias"]
    if mask is not None:
        tokens = torch.where(mask[:, :, None], p["mask_token"][None], tokens)
    x = torch.cat([p["cls_token"].repeat(n, 1, 1), tokens], dim=1)
    x = x + positions(p["pos_embed"], h, w, shape.antialias)
    if "register_tokens" in p:
        x = torch.cat([x[:, :1], p["register_tokens"].repeat(n, 1, 1), x[:, 1:]], dim=1)
    for i in range(depth_of(p)):
        b = f"blocks.{i}"
        normed = layer_norm(x, p[f"{b}.norm1.weight"], p[f"{b}.norm1.bias"])
        x = x + p[f"{b}.ls1.gamma"] * attention(normed, p, f"{b}.attn", shape.heads)
        normed = layer_norm(x, p[f"{b}.norm2.weight"], p[f"{b}.norm2.bias"])
        x = x + p[f"{b}.ls2.gamma"] * feed_forward(normed, p, f"{b}.mlp")
    x = layer_norm(x, p["norm.weight"], p["norm.bias"])
    return x[:, 0], x[:, -h * w :]


def depth_of(p):
    return 1 + max(int(name.split(".")[1]) for name in p if name.startswith("blocks."))


def head(p, x):
    """(n, D) → logits (n, K): three linear layers with GELU between, unit length, prototypes of unit length."""
    x = gelu(linear(x, p, "mlp.0"))
    x = gelu(linear(x, p, "mlp.2"))
    return normalize(linear(x, p, "mlp.4")) @ normalize(p["last_layer.weight"]).T


def ibot_head_of(network):
    return network.get("ibot_head", network["dino_head"])


# --- targets -------------------------------------------------------------------------------------------------------


def teacher_outputs(teacher, micro, shape):
    """Cls logits of both global crops, 2 × (B, K), and logits of the masked patches, 2 × (m, K), nothing masked."""
    cls_logits, patch_logits = [], []
    for crop, mask in zip(micro.global_crops, micro.masks):
        cls, patches = backbone(teacher["backbone"], crop, shape)
        cls_logits.append(head(teacher["dino_head"], cls))
        patch_logits.append(head(ibot_head_of(teacher), patches[mask]))
    return cls_logits, patch_logits


def sinkhorn(logits, temp):
    q = torch.exp((logits - logits.max()) / temp).T  # (K, n)
    q = q / q.sum()
    for _ in range(SINKHORN_ITERATIONS):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def centred(parts, temp, center):
    """Targets of logits that lie in parts, taken over all of them, in the same parts; and the centre afterwards."""
    everything = torch.cat(parts)
    if center is None:
        targets = sinkhorn(everything, temp)
    else:
        targets = torch.softmax((everything - center) / temp, dim=1)
        center = CENTER_MOMENTUM * center + (1 - CENTER_MOMENTUM) * everything.mean(0, keepdim=True)
    return targets.split([len(p) for p in parts]), center


# --- losses --------------------------------------------------------------------------------------------------------


def cross_entropy(targets, logits):
    """−Σ t · log softmax(s / 0.1), one value a row."""
    s = logits / STUDENT_TEMP
    return -(targets * (s - torch.log(torch.exp(s - s.max()).sum(-1, keepdim=True)) - s.max())).sum(-1)


def micro_batch_losses(student, micro, cls_targets, patch_targets, shape):
    """dino_global, dino_local, dino, ibot and koleo of one micro-batch."""
    masked = [backbone(student["backbone"], crop, shape, mask) for crop, mask in zip(micro.global_crops, micro.masks)]
    local = [backbone(student["backbone"], crop, shape)[0] for crop in micro.local_crops]
    pairs = 2 + 2 * len(local)
    parts = {"dino_global": 0, "dino_local": 0, "ibot": 0, "koleo": 0}
    for i, target in enumerate(cls_targets):
        for j, (cls, _) in enumerate(masked):
            if i != j:  # a crop is not compared with its own target
                logits = head(student["dino_head"], cls)
                # Two pairs of global crops stand for four: 2 / 18 with 8 local crops.
                parts["dino_global"] = parts["dino_global"] + cross_entropy(target, logits).mean() / pairs
        for cls in local:
            logits = head(student["dino_head"], cls)
            parts["dino_local"] = parts["dino_local"] + cross_entropy(target, logits).mean() / pairs
    parts["dino"] = parts["dino_global"] + parts["dino_local"]
    num_crops = sum(len(crop) for crop in micro.global_crops)
    for (_, patches), mask, targets in zip(masked, micro.masks, patch_targets):
        start = 0
        for tokens, here in zip(patches, mask):
            if here.any():
                count = int(here.sum())
                losses = cross_entropy(targets[start : start + count], head(ibot_head_of(student), tokens[here]))
                parts["ibot"] = parts["ibot"] + losses.sum() / count / num_crops
                start += count
    for cls, _ in masked:
        parts["koleo"] = parts["koleo"] + koleo(cls)
    return parts


def koleo(cls):
    """−mean log distance to the nearest other row, rows of unit length."""
    x = normalize(cls)
    total = 0
    for i in range(len(x)):
        others = [torch.sqrt(((x[i] - x[j]) ** 2).sum()) for j in range(len(x)) if j != i]
        total = total - torch.log(min(others)) / len(x)
    return total


# --- schedules -----------------------------------------------------------------------------------------------------


def cosine(start, end, step, steps):
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def rates_at(step, steps, batch, *, lr, warmup, freeze, temp_warmup):
    """`Rates` of the short recipe at a step counted from 0, with the lengths of a test."""
    peak = lr * math.sqrt(batch / 1024)
    now = peak * step / warmup if step < warmup else cosine(peak, 1e-6, step - warmup, steps - warmup)
    return Rates(
        lr=now,
        last_layer_lr=0.0 if step < freeze else now,
        weight_decay=cosine(0.04, 0.4, step, steps),
        momentum=cosine(0.992, 1.0, step, steps),
        teacher_temp=0.04 + (0.07 - 0.04) * min(step / temp_warmup, 1.0),
    )


# --- the step ------------------------------------------------------------------------------------------------------


def clipped(gradients, max_norm):
    """Gradients of one network at a joint norm of at most `max_norm`, and the norm before."""
    norm = math.sqrt(sum(float((g**2).sum()) for g in gradients.values()))
    return {name: g * min(1.0, max_norm / norm) for name, g in gradients.items()}, norm


def multipliers(network, name, tensor, depth, layerwise_decay, patch_embed_lr):
    """Factors on the learning rate and on the weight decay of one parameter."""
    lr = 1.0
    if network == "backbone":
        layer = 0  # patch embedding, positions, tokens
        if name.startswith("blocks."):
            layer = 1 + int(name.split(".")[1])
        elif name.startswith("norm."):
            layer = depth + 1
        lr = layerwise_decay ** (depth + 1 - layer)
        if name.startswith("patch_embed."):
            lr *= patch_embed_lr
    return lr, 0.0 if name.endswith("bias") or tensor.ndim == 1 else 1.0


def adamw(p, g, m, v, t, lr, weight_decay, betas):
    """One update of decoupled weight decay (Loshchilov & Hutter 2019); t counts from 1. Gives p, m and v after it."""
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g**2
    p = p - lr * weight_decay * p
    return p - lr * (m / (1 - betas[0] ** t)) / (torch.sqrt(v / (1 - betas[1] ** t)) + ADAM_EPS), m, v


def training_step(
    student,
    teacher,
    centers,
    moments,
    micro_batches,
    shape,
    rates,
    *,
    t=1,
    sinkhorn_targets,
    clip=3.0,
    layerwise_decay=0.9,
    patch_embed_lr=0.2,
    betas=(0.9, 0.999),
):
    """Do one step and give a `Result`; nothing that is given is changed.

    Args:
        student, teacher: networks, float64.
        centers: {"dino": (1, K), "ibot": (1, K)}.
        moments: {network: {parameter: (m, v)}} of AdamW before this step; empty before the first.
        micro_batches: each loss is their mean, teacher targets are centred over all of them.
        t: number of this update, from 1.
        sinkhorn_targets: else the moving centre.
    """
    student = {n: {k: v.detach().clone().requires_grad_() for k, v in p.items()} for n, p in student.items()}
    with torch.no_grad():
        cls_targets, patch_targets, centers = targets_of(
            teacher, centers, micro_batches, shape, rates.teacher_temp, sinkhorn_targets
        )
    losses = {}
    for i, micro in enumerate(micro_batches):
        pair = slice(2 * i, 2 * i + 2)
        parts = micro_batch_losses(student, micro, cls_targets[pair], patch_targets[pair], shape)
        parts["loss"] = parts["dino"] + parts["ibot"] + KOLEO_WEIGHT * parts["koleo"]
        losses = {k: losses.get(k, 0) + v / len(micro_batches) for k, v in parts.items()}
    result = Result({k: float(torch.as_tensor(v).detach()) for k, v in losses.items()}, centers=centers)
    names = [(n, k) for n, p in student.items() for k in p]
    gradients = dict(zip(names, torch.autograd.grad(losses["loss"], [student[n][k] for n, k in names])))
    depth = depth_of(student["backbone"])
    for n, p in student.items():
        own = {k: gradients[n, k] for k in p}
        result.gradients[n], result.norms[n] = clipped(own, clip)
        result.student[n], result.teacher[n], result.moments[n] = {}, {}, {}
        for k, before in p.items():
            g, before = result.gradients[n][k], before.detach()
            m, v = moments[n][k] if moments else (torch.zeros_like(g), torch.zeros_like(g))
            lr_factor, decay_factor = multipliers(n, k, before, depth, layerwise_decay, patch_embed_lr)
            lr = lr_factor * (rates.last_layer_lr if "last_layer" in k else rates.lr)
            after, m, v = adamw(before, g, m, v, t, lr, rates.weight_decay * decay_factor, betas)
            result.student[n][k], result.moments[n][k] = after, (m, v)
            result.teacher[n][k] = rates.momentum * teacher[n][k] + (1 - rates.momentum) * after
    return result


def targets_of(teacher, centers, micro_batches, shape, temp, sinkhorn_targets):
    """Cls targets and patch targets, each 2 entries a micro-batch, and the centres after the step."""
    outputs = [teacher_outputs(teacher, micro, shape) for micro in micro_batches]
    found, after = [], dict(centers)
    for i, name in enumerate(("dino", "ibot")):
        parts = [logits for output in outputs for logits in output[i]]
        targets, center = centred(parts, temp, None if sinkhorn_targets else centers[name])
        found.append(targets)
        after[name] = centers[name] if sinkhorn_targets else center
    return *found, after
