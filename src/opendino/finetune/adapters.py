# SPDX-License-Identifier: Apache-2.0
"""Which weights of a backbone train: none, LoRA matrices beside them, the last blocks, or all with layer-wise rates."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from opendino.errors import ConfigError, MissingExtraError
from opendino.finetune.settings import FinetuneSettings
from opendino.models.vit import VisionTransformer

ATTENTION = ["attn.qkv", "attn.proj"]
FEED_FORWARD = ["mlp.fc1", "mlp.fc2", "mlp.w12", "mlp.w3"]


def prepare(model: VisionTransformer, settings: FinetuneSettings) -> None:
    """Set, in place, what of the backbone trains; adapters are drawn from the seed.

    Raises:
        ConfigError: for more blocks than there are.
        MissingExtraError: for LoRA without peft.
    """
    model.requires_grad_(False)
    for block in model.blocks:
        block.drop_path_rate = 0.0  # type: ignore[assignment]
    if settings.mode == "lora":
        add_lora(model, settings)
    elif settings.mode == "last-k":
        if settings.last_k > len(model.blocks):
            raise ConfigError(f"--last-k is {settings.last_k}, but the model has {len(model.blocks)} blocks.")
        for part in (*model.blocks[-settings.last_k :], model.norm):
            part.requires_grad_(True)
    elif settings.mode == "full":
        model.requires_grad_(True)
        model.mask_token.requires_grad_(False)  # no image is masked here
    for block in model.blocks:
        if any(p.requires_grad for p in block.parameters()):
            block.drop_path_rate = settings.drop_path  # type: ignore[assignment]


def add_lora(model: VisionTransformer, settings: FinetuneSettings) -> None:
    """Put LoRA matrices (Hu et al. 2021) beside the attention's weights; they start at no effect."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtraError("peft", "finetune", "LoRA") from error
    targets = ATTENTION + FEED_FORWARD * settings.lora_mlp
    here = {name.split(".", 2)[2] for name, module in model.blocks.named_modules(prefix="blocks")
            if isinstance(module, nn.Linear)}  # fmt: skip
    config = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, lora_dropout=0.0,  # type: ignore[arg-type]
        target_modules=[t for t in targets if t in here],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        inject_adapter_in_model(config, model)


def merge_lora(model: VisionTransformer) -> VisionTransformer:
    """Add the LoRA matrices into the weights and take them away, in place; other models stay as they are."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "get_delta_weight") and hasattr(child, "base_layer"):
                base: Any = child.base_layer
                with torch.no_grad():
                    for adapter in child.active_adapters:  # type: ignore[union-attr]
                        base.weight += child.get_delta_weight(adapter).to(base.weight.dtype)  # type: ignore[operator]
                setattr(module, name, base)
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Give the parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def parameter_groups(model: VisionTransformer, head: nn.Module, settings: FinetuneSettings) -> list[dict[str, Any]]:
    """Sort what trains by its multiples of learning rate and weight decay.

    Layer 0 is the embeddings, block i is layer i + 1, the final norm is depth + 1. Only "full" has layer-wise rates.
    Vectors (biases, norms, LayerScale) have no weight decay.

    Returns:
        One dict for each pair of multiples: "params", "names", "lr_multiplier" and "weight_decay".
    """
    depth = len(model.blocks)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    named = [(f"backbone.{n}", p, _layer_rate(n, depth, settings)) for n, p in trainable(model).items()]
    named += [(f"head.{n}", p, settings.head_lr_mult) for n, p in head.named_parameters()]
    for name, parameter, rate in named:
        decay = settings.weight_decay if parameter.ndim > 1 and not name.endswith("pos_embed") else 0.0
        group = groups.setdefault(
            (rate, decay), {"params": [], "names": [], "lr_multiplier": rate, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _layer_rate(name: str, depth: int, settings: FinetuneSettings) -> float:
    if settings.mode != "full":
        return 1.0
    block = re.match(r"blocks\.(\d+)\.", name)
    layer = int(block[1]) + 1 if block else depth + 1 if name.startswith("norm.") else 0
    return float(settings.layer_decay ** (depth + 1 - layer))
