# SPDX-License-Identifier: Apache-2.0
"""What all peers of a run share: one set of weights, opendino's fp32 features of two images, JPEG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness import Spec
from opendino.models.config import PosResize, ViTConfig
from opendino.models.registry import get_config
from opendino.models.vit import VisionTransformer
from worker import Turns

TABLE_SIZE = 518
"""Image side of the position table, as in the published weights."""
CONVENTIONS: dict[str, PosResize] = {
    "opendino": "scale_offset",
    "lightly-train": "scale_offset",
    "transformers": "size",
    "timm": "size_antialias",
}
"""How each peer resizes the position table; opendino knows all three, so each is compared with its own."""
JPEG_SIZE = (500, 375)


def model_config(spec: Spec, pos_resize: PosResize = "scale_offset") -> ViTConfig:
    """Give the backbone of a spec as a config of opendino."""
    dim, depth, heads = spec.shape
    return get_config("vits14", embed_dim=dim, depth=depth, num_heads=heads, img_size=TABLE_SIZE, pos_resize=pos_resize)


def weights_path(spec: Spec) -> Path:
    """Say where the shared weights lie."""
    return Path(spec.work) / "weights.safetensors"


def load_weights(spec: Spec) -> dict[str, Tensor]:
    """Read the shared weights, under the published key names."""
    return load_file(weights_path(spec))


def reference_path(spec: Spec, pos_resize: PosResize) -> Path:
    """Say where opendino's features lie that a peer must reproduce."""
    return Path(spec.work) / f"features-{spec.size}-{pos_resize}.npy"


def images(spec: Spec) -> Tensor:
    """Give the input batch (B, 3, size, size) fp32, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(spec.batch, 3, spec.size, spec.size, generator=generator)


def serve(spec: Spec, turns: Turns) -> None:
    """Write everything, say so, and wait for the end."""
    if not weights_path(spec).exists():
        save_file(draw_weights(spec), weights_path(spec))
    for pos_resize in sorted(set(CONVENTIONS.values())):
        np.save(reference_path(spec, pos_resize), reference(spec, pos_resize).numpy())
    write_jpegs(Path(spec.work) / "images", spec.num_images)
    turns.done()


def draw_weights(spec: Spec) -> dict[str, Tensor]:
    """Draw weights under which every part of the network matters: no LayerScale near 0, uneven attention, biases."""
    generator = torch.Generator().manual_seed(0)
    state = VisionTransformer(model_config(spec)).state_dict()
    for name, value in state.items():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("gamma"):
            state[name] = 0.5 * (0.5 * noise).exp()
        elif value.ndim == 1:
            state[name] = 0.05 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        elif value.ndim == 4:
            state[name] = noise * value[0].numel() ** -0.5
        else:
            state[name] = noise * (0.1 if "qkv" in name else 0.02)
    return state


@torch.inference_mode()
def reference(spec: Spec, pos_resize: PosResize) -> Tensor:
    """Give opendino's fp32 features (2, 1 + P, D) of the first two images: cls token, then patches."""
    model = VisionTransformer(model_config(spec, pos_resize)).eval()
    model.load_state_dict(load_weights(spec))
    return tokens(model.forward_features(images(spec)[:2]))


def tokens(features: dict[str, Tensor]) -> Tensor:
    """Put cls and patch tokens of the published dict together, (B, 1 + P, D)."""
    return torch.cat([features["x_norm_clstoken"][:, None], features["x_norm_patchtokens"]], dim=1)


def write_jpegs(folder: Path, count: int) -> None:
    """Write `count` files of one photograph's size and detail: smooth fields with noise, about 50 KiB each."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    width, height = JPEG_SIZE
    for i in range(count):
        coarse = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
        noisy = smooth + rng.normal(0, 9, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i:04d}.jpg", quality=90)
