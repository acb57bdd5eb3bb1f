# SPDX-License-Identifier: Apache-2.0
"""The forward pass of each peer: images (B, 3, H, W) to all final tokens, on the same weights.

Every peer runs in inference mode with its model cast to the dtype, at its fastest documented setting without a
compiler; none of them is compiled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from harness import Spec
from prepare import CONVENTIONS, TABLE_SIZE, images, load_weights, model_config, reference_path, tokens
from worker import Turns, versions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Forward = tuple[Callable[[Tensor], object], Callable[[Tensor], Tensor], str]
"""The call that is timed, the same call followed by picking cls and patch tokens (B, 1 + P, D), and what it is."""


def opendino(spec: Spec) -> Forward:
    from opendino.models.vit import VisionTransformer

    model = VisionTransformer(model_config(spec)).eval()
    model.load_state_dict(load_weights(spec))
    model.to(DTYPES[spec.dtype])
    return model.forward_features, lambda x: tokens(model.forward_features(x)), "VisionTransformer.forward_features"


def transformers(spec: Spec) -> Forward:
    from transformers import Dinov2Config, Dinov2Model

    dim, depth, heads = spec.shape
    folder = Path(spec.work) / "transformers"
    Dinov2Config(
        hidden_size=dim, num_hidden_layers=depth, num_attention_heads=heads, image_size=TABLE_SIZE, patch_size=14
    ).save_pretrained(folder)
    save_file(to_transformers(load_weights(spec)), folder / "model.safetensors", {"format": "pt"})
    model = Dinov2Model.from_pretrained(folder, attn_implementation="sdpa", dtype=DTYPES[spec.dtype]).eval()
    setting = f"Dinov2Model, {model.config._attn_implementation} attention"
    return model, lambda x: model(x).last_hidden_state, setting


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published keys to those of transformers' published files, and split q, k, v."""
    names = {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "blocks": "encoder.layer",
        "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
    }
    out = {}
    for name, value in state.items():
        key = f"layernorm.{name[5:]}" if name.startswith("norm.") else name
        for old, new in names.items():
            key = key.replace(old, new)
        if "attn.qkv" in key:
            for part, piece in zip(("query", "key", "value"), value.chunk(3)):
                out[key.replace("attn.qkv", f"attention.attention.{part}")] = piece.contiguous()
        else:
            out[key] = value
    return out


def timm(spec: Spec) -> Forward:
    from timm import create_model
    from timm.layers import use_fused_attn
    from timm.models.vision_transformer import checkpoint_filter_fn

    dim, depth, heads = spec.shape
    model = create_model(
        "vit_small_patch14_dinov2", img_size=spec.size, num_classes=0, embed_dim=dim, depth=depth, num_heads=heads
    ).eval()
    state = load_weights(spec)
    model.load_state_dict(checkpoint_filter_fn(state, model))
    model.to(DTYPES[spec.dtype])
    fused = "fused attention" if use_fused_attn() else "no fused attention"
    setting = f"vit_small_patch14_dinov2, img_size={spec.size} (position table resized once), {fused}"
    return model.forward_features, model.forward_features, setting


def lightly_train(spec: Spec) -> Forward:
    from lightly_train._models.package_helpers import get_wrapped_model

    # The library has no public call from tensors to tokens; this is the model that its `pretrain` trains.
    wrapped = get_wrapped_model(
        "dinov2/vits14-noreg-notpretrained",
        num_input_channels=3,
        model_args={"img_size": TABLE_SIZE, "interpolate_offset": 0.1, "interpolate_antialias": False},
    )
    model = wrapped.get_model().eval()
    model.load_state_dict(load_weights(spec))
    model.to(DTYPES[spec.dtype])
    return model.forward_features, lambda x: tokens(model.forward_features(x)), "its dinov2/vits14 without xFormers"


PEERS: dict[str, Callable[[Spec], Forward]] = {
    "opendino": opendino,
    "transformers": transformers,
    "timm": timm,
    "lightly-train": lightly_train,
}


@torch.inference_mode()
def serve(spec: Spec, turns: Turns) -> None:
    """Check the features of two images against opendino's in fp32, then time whole batches in turn."""
    call, features, setting = PEERS[spec.peer](spec)
    batch = images(spec).to(DTYPES[spec.dtype])
    expected = torch.from_numpy(np.load(reference_path(spec, CONVENTIONS[spec.peer])))
    distance = relative_distance(features(batch[:2]).float(), expected)
    call(batch)
    started = time.perf_counter()
    call(batch)
    repeats = max(1, round(spec.seconds / (time.perf_counter() - started)))
    turns.about = {
        "versions": versions(spec.peer),
        "setting": setting,
        "distance": distance,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
    turns.done()
    while True:
        for _ in range(repeats):
            call(batch)
        turns.done(images=repeats * spec.batch, seconds=time.perf_counter() - turns.started)


def relative_distance(given: Tensor, expected: Tensor) -> float:
    """Give ‖given − expected‖ / ‖expected‖; infinite when the shapes differ."""
    if given.shape != expected.shape:
        return float("inf")
    return float((given - expected).norm() / expected.norm())
