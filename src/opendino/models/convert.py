# SPDX-License-Identifier: Apache-2.0
"""Write a backbone in the layouts of others: the published .pth, a transformers folder, timm's safetensors."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file

from opendino.errors import ConfigError, WeightsError
from opendino.models.files import LEFTOVERS, pack_tensors
from opendino.models.layouts import Layout, State, timm_leftovers, to_timm, to_transformers
from opendino.models.vit import VisionTransformer
from opendino.models.weights import load, own_metadata

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TIMM_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1536: "giant"}


def convert(source: str | Path, target: str | Path, to: str, precision: str = "fp32") -> VisionTransformer:
    """Read weights in any layout and write them in another.

    Args:
        source: whatever `opendino.load` takes.
        target: file to write ("meta": .pth or .safetensors; "timm": .safetensors or .pth), or folder ("hf", and "timm"
            without a suffix).
        to: "meta", "hf" or "timm".
        precision: "fp32", "fp16" or "bf16".

    Returns:
        The model that was written, in fp32.

    Raises:
        ConfigError: for another layout or precision, or when the target exists.
        WeightsError: when the source cannot be read, or the layout cannot hold the model.
    """
    if to not in get_args(Layout):
        raise ConfigError(f"--to is {to!r}; it must be meta, hf or timm.")
    if precision not in DTYPES:
        raise ConfigError(f"--precision is {precision!r}; it must be fp32, fp16 or bf16.")
    target = Path(target)
    if target.exists():
        raise ConfigError(f"{target} exists already. Give another name, or remove it first.")
    model = load(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to(DTYPES[precision]).contiguous() for k, v in model.state_dict().items()}
    {"meta": _write_meta, "hf": _write_transformers, "timm": _write_timm}[to](model, state, target, precision)
    return model


def _write_meta(model: VisionTransformer, state: State, target: Path, precision: str) -> None:
    _write_file(state, target, own_metadata(model))


def _write_transformers(model: VisionTransformer, state: State, target: Path, precision: str) -> None:
    if model.config.init_values is None or not model.config.qkv_bias:
        raise WeightsError("transformers' Dinov2Model always has LayerScale and qkv biases; this model has not both.")
    aside = _aside(target)
    aside.mkdir()
    save_file(to_transformers(state), aside / "model.safetensors", {"format": "pt"})
    _write_json(aside / "config.json", transformers_config(model, precision))
    _write_json(aside / "preprocessor_config.json", transformers_preprocessor(model))
    aside.rename(target)


def _write_timm(model: VisionTransformer, state: State, target: Path, precision: str) -> None:
    metadata = own_metadata(model) | {LEFTOVERS: pack_tensors(timm_leftovers(state))}
    if target.suffix:
        _write_file(to_timm(state), target, metadata)
        return
    aside = _aside(target)
    aside.mkdir()
    save_file(to_timm(state), aside / "model.safetensors", metadata)
    _write_json(aside / "config.json", timm_config(model))
    aside.rename(target)


def _write_file(state: State, target: Path, metadata: dict[str, str]) -> None:
    aside = _aside(target)
    if target.suffix == ".safetensors":
        save_file(state, aside, metadata)
    elif target.suffix in (".pth", ".pt", ".bin"):
        torch.save(state, aside)
    else:
        raise ConfigError(f"{target} has the ending {target.suffix!r}; it must be .pth or .safetensors.")
    aside.rename(target)


def _aside(target: Path) -> Path:
    aside = target.with_name(f".{target.name}.part")
    if aside.is_dir():
        shutil.rmtree(aside)
    return aside


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def transformers_config(model: VisionTransformer, precision: str = "fp32") -> dict[str, Any]:
    """Describe a model as transformers' config.json; the key `opendino` keeps what transformers has no field for.

    Raises:
        WeightsError: when transformers' model cannot have this shape.
    """
    c = model.config
    ratio = math.ceil(c.hidden_dim * 1.5 / c.embed_dim) if c.ffn == "swiglu" else c.mlp_ratio
    if ratio != int(ratio):
        raise WeightsError(
            f"transformers' Dinov2Model needs a whole number as mlp_ratio; this model has {c.mlp_ratio}."
        )
    registers = {"num_register_tokens": c.num_register_tokens} if c.num_register_tokens else {}
    family = "Dinov2WithRegistersModel" if registers else "Dinov2Model"
    return {
        "architectures": [family],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": c.embed_dim,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads,
        "mlp_ratio": int(ratio),
        "use_swiglu_ffn": c.ffn == "swiglu",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "image_size": c.img_size,
        "patch_size": c.patch_size,
        "num_channels": c.in_chans,
        "qkv_bias": True,
        "torch_dtype": str(DTYPES[precision]).removeprefix("torch."),
        **registers,
        "opendino": {"pos_resize": c.pos_resize, "arch": c.arch, "mlp_ratio": c.mlp_ratio},
    }


def transformers_preprocessor(model: VisionTransformer) -> dict[str, Any]:
    """Describe a model's preprocessing as transformers' preprocessor_config.json."""
    p = model.preprocess
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": p.num_channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": p.resize},
        "resample": 3 if p.interpolation == "bicubic" else 2,
        "do_center_crop": True,
        "crop_size": {"height": p.crop, "width": p.crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(p.mean),
        "image_std": list(p.std),
    }


def timm_config(model: VisionTransformer) -> dict[str, Any]:
    """Describe a model as timm's config.json, which `timm.create_model("local-dir:FOLDER")` reads.

    Raises:
        WeightsError: when timm has no model of this shape.
    """
    c = model.config
    size = TIMM_SIZES.get(c.embed_dim)
    if size is None or c.patch_size != 14 or size == "tiny":
        raise WeightsError(
            f"timm has no DINOv2 model {c.embed_dim} channels wide with patch {c.patch_size}. Write a file instead of "
            "a folder (--to timm OUT.safetensors) and load it into a timm model of your own shape."
        )
    name = f"vit_{size}_patch14_{'reg4_' if c.num_register_tokens else ''}dinov2"
    side, p = c.img_size, model.preprocess
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": c.embed_dim,
        "global_pool": "token",
        "model_args": {"img_size": side, "depth": c.depth, "num_heads": c.num_heads, "in_chans": c.in_chans},
        "pretrained_cfg": {
            "input_size": [c.in_chans, side, side], "fixed_input_size": True, "interpolation": p.interpolation,
            "crop_pct": 1.0, "mean": list(p.mean), "std": list(p.std), "num_classes": 0, "pool_size": None,
            "first_conv": "patch_embed.proj", "classifier": "head", "license": "apache-2.0",
        },
    }  # fmt: skip
