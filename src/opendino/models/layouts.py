# SPDX-License-Identifier: Apache-2.0
"""The names that others give to the same tensors: the published layout, transformers' and timm's.

The published names are the common tongue: `to_published` reads any of the three, `to_transformers` and `to_timm` write
the other two. What timm's layout has no place for is given back by `timm_leftovers`, so that a way through it and back
loses nothing.

Shapes: D width, R registers, G side of the position table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from opendino.errors import WeightsError
from opendino.models.config import ViTConfig
from opendino.models.memory import give_up
from opendino.models.registry import MODELS

State = dict[str, Tensor]
Layout = Literal["meta", "hf", "timm"]
HEAD_DIM = 64
"""Width of one attention head in all published models; the number of heads is in no weight file."""

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_HEADS = ("dino_head.", "ibot_head.", "dino_loss.", "ibot_patch_loss.", "head.", "classifier.", "fc_norm.")
_TRANSFORMERS_NAMES = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.mask_token", "mask_token"),
    ("embeddings.register_tokens", "register_tokens"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("layernorm.", "norm."),
)
_TRANSFORMERS_BLOCK = (
    ("attention.output.dense.", "attn.proj."),
    ("attention.o_proj.", "attn.proj."),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("mlp.weights_in.", "mlp.w12."),
    ("mlp.weights_out.", "mlp.w3."),
    ("mlp.down_proj.", "mlp.w3."),
)
_QKV = {"query": 0, "key": 1, "value": 2, "q_proj": 0, "k_proj": 1, "v_proj": 2}


@dataclass(frozen=True)
class Reading:
    """Weights under their published names.

    Attributes:
        layout: whose names the file had.
        state: the backbone.
        heads: names of projection and classifier heads that the file holds beside it.
    """

    layout: Layout
    state: State
    heads: list[str]


def to_published(state: State, origin: str, *, consume: bool = False) -> Reading:
    """Recognise the layout of a state dict and give the backbone under its published names.

    Accepts plain and chunked (`blocks.c.i.…`) published files, whole teacher or student–teacher checkpoints,
    transformers' names of versions 4 and 5, and timm's.

    Args:
        state: tensors by name.
        origin: names the file in errors.
        consume: give the memory of tensors back that are copied (transformers' q, k and v into one); for tensors of a
            mapped file that nobody else has.

    Raises:
        WeightsError: when no DINOv2 backbone is in it.
    """
    state = _strip_wrappers(state)
    if any("embeddings.patch_embeddings." in k for k in state):
        backbone, heads = _split_heads({k.removeprefix("dinov2.").removeprefix("dinov2_with_registers."): v
                                        for k, v in state.items()})  # fmt: skip
        return Reading("hf", _from_transformers(backbone, consume), heads)
    backbone, heads = _split_heads(_backbone_of(state))
    if "patch_embed.proj.weight" not in backbone or "cls_token" not in backbone:
        shown = ", ".join(sorted(state)[:4]) or "nothing"
        raise WeightsError(
            f"{origin} holds no DINOv2 backbone: neither cls_token with patch_embed.proj.weight nor transformers' "
            f"embeddings are in it. It begins with {shown}. Give the backbone's weight file."
        )
    if _is_timm(backbone):
        return Reading("timm", _from_timm(backbone), heads)
    return Reading("meta", {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", k): v for k, v in backbone.items()}, heads)


def _strip_wrappers(state: State) -> State:
    def strip(name: str) -> str:
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        return name

    return {strip(k): v for k, v in state.items()}


def _backbone_of(state: State) -> State:
    """Take the backbone out of a checkpoint; the teacher's when there are both, since it is the result of a run."""
    for prefix in ("teacher.backbone.", "backbone.", "student.backbone."):
        if any(k.startswith(prefix) for k in state):
            outside = tuple(k for k in state if not k.startswith(("teacher.", "student.", "backbone.")))
            mine = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            return mine | {k: state[k] for k in outside}
    return state


def _split_heads(state: State) -> tuple[State, list[str]]:
    heads = [k for k in state if k.startswith(_HEADS)]
    return {k: v for k, v in state.items() if k not in heads}, heads


# --- transformers --------------------------------------------------------------------------------------------------


def _from_transformers(state: State, consume: bool) -> State:
    out: State = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        block = re.match(r"encoder\.layer\.(\d+)\.(.+)", name)
        if block is None:
            out[_rename(name, _TRANSFORMERS_NAMES)] = tensor
            continue
        index, rest = block.groups()
        part = re.match(r"attention\.(?:attention\.)?(query|key|value|q_proj|k_proj|v_proj)\.(weight|bias)", rest)
        gate = re.match(r"mlp\.(gate|up)_proj\.(weight|bias)", rest)
        if part:
            thirds.setdefault(f"blocks.{index}.attn.qkv.{part[2]}", {})[_QKV[part[1]]] = tensor
        elif gate:
            thirds.setdefault(f"blocks.{index}.mlp.w12.{gate[2]}", {})[int(gate[1] == "up")] = tensor
        else:
            out[f"blocks.{index}.{_rename(rest, _TRANSFORMERS_BLOCK)}"] = tensor
    return out | {name: _joined([parts[i] for i in sorted(parts)], consume) for name, parts in thirds.items()}


def _joined(parts: list[Tensor], consume: bool) -> Tensor:
    whole = torch.cat(parts)
    for part in parts if consume else ():
        give_up(part)
    return whole


def _rename(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in table:
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return name


def to_transformers(state: State) -> State:
    """Give a published state dict under the names that transformers writes (version 4's, which 5 reads as well)."""
    names = {ours: theirs for theirs, ours in _TRANSFORMERS_NAMES}
    block_names = {ours: theirs for theirs, ours in reversed(_TRANSFORMERS_BLOCK)}
    block_names["attn.proj."], block_names["mlp.w3."] = "attention.output.dense.", "mlp.weights_out."
    out: State = {}
    for name, tensor in state.items():
        block = re.match(r"blocks\.(\d+)\.(.+)", name)
        if block is None:
            out[_rename(name, tuple(names.items()))] = tensor
            continue
        prefix, rest = f"encoder.layer.{block[1]}.", block[2]
        if rest.startswith("attn.qkv."):
            kind = rest.removeprefix("attn.qkv.")
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                out[f"{prefix}attention.attention.{part}.{kind}"] = third.clone()
        else:
            out[prefix + _rename(rest, tuple(block_names.items()))] = tensor
    return out


# --- timm ----------------------------------------------------------------------------------------------------------


def _is_timm(state: State) -> bool:
    """Tell timm's names from the published ones, which have a mask token and no folded position table."""
    if "reg_token" in state:
        return True
    swiglu_as_mlp = "blocks.0.mlp.fc1.weight" in state and _is_gated(state)
    return "mask_token" not in state and (swiglu_as_mlp or "blocks.0.ls1.gamma" in state)


def _is_gated(state: State) -> bool:
    fc1, fc2 = state["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc2.weight"]
    return fc1.shape[0] == 2 * fc2.shape[1]


def _from_timm(state: State) -> State:
    out = dict(state)
    if "reg_token" in out:
        out["register_tokens"] = out.pop("reg_token")
        # With registers timm folds the cls token's position into the token itself.
        out["pos_embed"] = torch.cat([torch.zeros_like(out["cls_token"]), out["pos_embed"]], dim=1)
    out.setdefault("mask_token", torch.zeros_like(out["cls_token"][0]))
    if "blocks.0.mlp.fc1.weight" in out and _is_gated(out):
        out = {k.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): v for k, v in out.items()}
    return out


def to_timm(state: State) -> State:
    """Give a published state dict under timm's names, without what timm has no place for (see `timm_leftovers`)."""
    out = {k.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): v for k, v in state.items()}
    out.pop("mask_token", None)
    if "register_tokens" in out:
        out["reg_token"] = out.pop("register_tokens")
        position = out["pos_embed"]
        out["cls_token"] = out["cls_token"] + position[:, :1]
        out["pos_embed"] = position[:, 1:].clone()
    return out


def timm_leftovers(state: State) -> State:
    """Give the small tensors that `to_timm` drops or folds: mask token, and with registers the cls token's position."""
    left = {"mask_token": state["mask_token"]} if "mask_token" in state else {}
    if "register_tokens" in state:
        left |= {"cls_token": state["cls_token"], "cls_position": state["pos_embed"][:, :1].clone()}
    return left


def with_timm_leftovers(state: State, left: State) -> State:
    """Put the leftovers back, unless the tokens have been trained on since."""
    out = dict(state)
    if "mask_token" in left:
        out["mask_token"] = left["mask_token"]
    if "cls_token" in left and torch.equal(left["cls_token"] + left["cls_position"], out["cls_token"]):
        out["cls_token"] = left["cls_token"]
        out["pos_embed"] = torch.cat([left["cls_position"], out["pos_embed"][:, 1:]], dim=1)
    return out


# --- what a file is of ---------------------------------------------------------------------------------------------


def infer_config(state: State, origin: str, num_heads: int | None = None) -> ViTConfig:
    """Read the architecture off the shapes of a published state dict.

    Args:
        state: published names.
        origin: names the file in errors.
        num_heads: where it is known; None takes one head per 64 channels, as all published models have.

    Raises:
        WeightsError: when the shapes do not make a backbone.
    """
    try:
        fields = _read_shapes(state)
    except (KeyError, ValueError) as error:
        raise WeightsError(
            f"{origin} is no whole DINOv2 backbone: {error.args[0]!r} is missing or has no usable shape. Get the file "
            "again, or give the backbone's own weight file."
        ) from error
    dim = fields["embed_dim"]
    if num_heads is None and dim % HEAD_DIM:
        raise WeightsError(
            f"{origin} is {dim} channels wide, and how many heads they make is in no weight file. Give it: "
            "opendino.load(…, num_heads=N)."
        )
    fields["num_heads"] = num_heads or dim // HEAD_DIM
    registers = fields["num_register_tokens"]
    fields["pos_resize"] = "size_antialias" if registers else "scale_offset"
    shape = {k: v for k, v in fields.items() if k != "img_size"}
    names = (n for n, e in MODELS.items() if all(getattr(e.config, k) == v for k, v in shape.items()))
    return ViTConfig(arch=next(names, "custom"), **fields)


def _read_shapes(state: State) -> dict[str, Any]:
    dim = state["cls_token"].shape[-1]
    patch = state["patch_embed.proj.weight"].shape[-1]
    numbers = {int(m[1]) for k in state if (m := re.match(r"blocks\.(\d+)\.", k))}
    grid = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    if grid < 1 or grid * grid + 1 != state["pos_embed"].shape[1]:
        raise ValueError("pos_embed")
    if not numbers:
        raise KeyError("blocks.0")
    gated = "blocks.0.mlp.w12.weight" in state
    hidden = state["blocks.0.mlp.w3.weight"].shape[1] if gated else state["blocks.0.mlp.fc1.weight"].shape[0]
    ratio = 4.0 if gated and (int(4 * dim * 2 / 3) + 7) // 8 * 8 == hidden else hidden * (1.5 if gated else 1) / dim
    gamma = state.get("blocks.0.ls1.gamma")
    return {
        "img_size": grid * patch,
        "patch_size": patch,
        "in_chans": state["patch_embed.proj.weight"].shape[1],
        "embed_dim": dim,
        "depth": max(numbers) + 1,
        "mlp_ratio": ratio,
        "ffn": "swiglu" if gated else "mlp",
        "num_register_tokens": state["register_tokens"].shape[1] if "register_tokens" in state else 0,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "init_values": None if gamma is None else 1.0,
    }
