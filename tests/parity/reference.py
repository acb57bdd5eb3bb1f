# SPDX-License-Identifier: Apache-2.0
"""A slow Vision Transformer in numpy float64, written from the formulas alone: what the backbone must equal.

One image at a time, one head at a time, positions resampled one output cell at a time.
"""

import math

import numpy as np

EPS = 1e-6


def cubic(x, a):
    """Keys' kernel with parameter a."""
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * (x**3 - 5 * x**2 + 8 * x - 4)
    return 0.0


def row_plain(length, out, scale):
    """(out, length) weights of bicubic resampling without antialias (a = -0.75), source step 1/scale, edge repeated."""
    weights = np.zeros((out, length))
    for i in range(out):
        source = (i + 0.5) / scale - 0.5
        base = math.floor(source)
        for k in range(-1, 3):
            weights[i, min(max(base + k, 0), length - 1)] += cubic(source - (base + k), -0.75)
    return weights


def row_antialias(length, out):
    """(out, length) weights of bicubic resampling with antialias (a = -0.5): the kernel widens when shrinking."""
    weights = np.zeros((out, length))
    step = length / out
    width = max(step, 1.0)
    for i in range(out):
        centre = (i + 0.5) * step
        for j in range(length):
            weights[i, j] = cubic((j + 0.5 - centre) / width, -0.5)
        weights[i] /= weights[i].sum()
    return weights


def positions(table, h, w, convention):
    """(1 + h·w, D) from the (1 + G·G, D) table."""
    grid = round(math.sqrt(len(table) - 1))
    if (h, w) == (grid, grid):
        return table
    patches = table[1:].reshape(grid, grid, -1)
    if convention == "scale_offset":
        down, across = (row_plain(grid, n, (n + 0.1) / grid) for n in (h, w))
    elif convention == "size":
        down, across = (row_plain(grid, n, n / grid) for n in (h, w))
    else:
        down, across = row_antialias(grid, h), row_antialias(grid, w)
    resized = np.einsum("ij,jkd->ikd", down, patches)
    resized = np.einsum("ij,kjd->kid", across, resized)
    return np.concatenate([table[:1], resized.reshape(h * w, -1)])


def layer_norm(x, weight, bias):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + EPS) * weight + bias


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attention(x, p, prefix, heads):
    qkv = x @ p[f"{prefix}.qkv.weight"].T + p[f"{prefix}.qkv.bias"]
    q, k, v = np.split(qkv, 3, axis=-1)
    size = q.shape[-1] // heads
    mixed = []
    for i in range(heads):
        part = slice(i * size, (i + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
    return np.concatenate(mixed, -1) @ p[f"{prefix}.proj.weight"].T + p[f"{prefix}.proj.bias"]


def feed_forward(x, p, prefix):
    if f"{prefix}.w12.weight" in p:
        gate, value = np.split(x @ p[f"{prefix}.w12.weight"].T + p[f"{prefix}.w12.bias"], 2, axis=-1)
        return (gate / (1 + np.exp(-gate)) * value) @ p[f"{prefix}.w3.weight"].T + p[f"{prefix}.w3.bias"]
    hidden = gelu(x @ p[f"{prefix}.fc1.weight"].T + p[f"{prefix}.fc1.bias"])
    return hidden @ p[f"{prefix}.fc2.weight"].T + p[f"{prefix}.fc2.bias"]


def forward(state, image, *, patch, depth, heads, convention, mask=None):
    """Normalised tokens (1 + R + P, D) of one image (C, H, W): cls, registers, patches."""
    p = {k: v.double().numpy() for k, v in state.items()}
    image = image.double().numpy()
    h, w = image.shape[1] // patch, image.shape[2] // patch
    kernel = p["patch_embed.proj.weight"].reshape(len(p["patch_embed.proj.bias"]), -1)
    tokens = []
    for i in range(h):
        for j in range(w):
            cell = image[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            tokens.append(kernel @ cell.ravel() + p["patch_embed.proj.bias"])
    tokens = np.stack(tokens)
    if mask is not None:
        tokens[mask.numpy()] = p["mask_token"][0]
    x = np.concatenate([p["cls_token"][0], tokens]) + positions(p["pos_embed"][0], h, w, convention)
    if "register_tokens" in p:
        x = np.concatenate([x[:1], p["register_tokens"][0], x[1:]])
    for i in range(depth):
        b = f"blocks.{i}"
        normed = layer_norm(x, p[f"{b}.norm1.weight"], p[f"{b}.norm1.bias"])
        x = x + p[f"{b}.ls1.gamma"] * attention(normed, p, f"{b}.attn", heads)
        normed = layer_norm(x, p[f"{b}.norm2.weight"], p[f"{b}.norm2.bias"])
        x = x + p[f"{b}.ls2.gamma"] * feed_forward(normed, p, f"{b}.mlp")
    return layer_norm(x, p["norm.weight"], p["norm.bias"])
