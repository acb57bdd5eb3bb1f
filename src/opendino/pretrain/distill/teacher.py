# SPDX-License-Identifier: Apache-2.0
"""The frozen teacher: a backbone and, where there are any, its heads."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

from opendino.errors import WeightsError
from opendino.models.files import read_weights
from opendino.models.packaged import packaged_heads
from opendino.models.vit import VisionTransformer
from opendino.models.weights import load
from opendino.pretrain.heads import BatchNorm, DINOHead

HEADS_FILE = "heads.safetensors"
HEAD_NAMES = ("dino_head", "ibot_head")
State = dict[str, Tensor]


class FrozenTeacher:
    """A teacher that nothing changes. No module, so that it is in no checkpoint, optimiser or wrapper of the student.

    Args:
        name: model name, weight file or run folder.
        heads: file with heads; None looks for some beside the weights.

    Attributes:
        backbone: in eval mode.
        heads: "dino_head" and perhaps "ibot_head", or None without any.
        fingerprint: of all weights, by which another teacher is noticed.

    Raises:
        WeightsError: when the weights cannot be read, or heads do not fit.
    """

    def __init__(self, name: str, heads: str | Path | None = None) -> None:
        self.name = name
        self.backbone: VisionTransformer = load(name).requires_grad_(False)
        state = read_heads(name, heads)
        self.heads = build_heads(state, self.backbone.embed_dim, str(heads or name)) if state else None
        self.fingerprint = fingerprint_of(self.state())

    def to(self, device: torch.device) -> FrozenTeacher:
        """Move to a device."""
        self.backbone.to(device)
        if self.heads is not None:
            self.heads.to(device)
        return self

    def state(self) -> State:
        """Give all weights by name."""
        heads = {} if self.heads is None else self.heads.state_dict()
        return {f"backbone.{k}": v for k, v in self.backbone.state_dict().items()} | heads

    @torch.no_grad()
    def tokens(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Give cls tokens (n, D) and patch tokens (n, P, D) of crops, fp32 or wider."""
        found = self.backbone.forward_features(crops)
        cls, patches = found["x_norm_clstoken"], found["x_norm_patchtokens"]
        return (cls, patches) if cls.dtype is torch.float64 else (cls.float(), patches.float())


def find_heads(name: str, heads: str | Path | None = None) -> Path | None:
    """Give the file in which heads of a teacher are looked for, or None when there is none."""
    if heads is not None:
        path = Path(heads).expanduser()
        return path / HEADS_FILE if path.is_dir() else path
    if ours := packaged_heads(name):
        return ours
    path = Path(name).expanduser()
    if path.is_dir():
        return path / HEADS_FILE if (path / HEADS_FILE).is_file() else None
    return path if path.is_file() else None


def read_heads(name: str, heads: str | Path | None = None) -> State:
    """Read the tensors of a teacher's heads, by our names; empty when there are none.

    Raises:
        WeightsError: when a file that was named holds no DINO head.
    """
    path = find_heads(name, heads)
    found = _published_names(read_weights(path).state) if path else {}
    if heads is not None and not any(k.startswith("dino_head.") for k in found):
        raise WeightsError(
            f"{path} holds no DINO head; needed are tensors named dino_head.… (and ibot_head.… where iBOT has its "
            "own). Give the heads.safetensors of a run, or train heads for this teacher with --warm-heads 5000."
        )
    return found if any(k.startswith("dino_head.") for k in found) else {}


def _published_names(state: State) -> State:
    """Keep the heads; weight-normalised prototypes become plain ones, whose norm is not used."""
    found = {}
    for key, value in state.items():
        if key.split(".")[0] not in HEAD_NAMES or key.endswith(("weight_g", "weight.original0")):
            continue
        short = key.replace("parametrizations.weight.original1", "weight").replace("weight_v", "weight")
        found[short] = value.float() if value.is_floating_point() else value
    return found


def build_heads(state: State, width: int, origin: str) -> nn.ModuleDict:
    """Build heads of the shape that their tensors have.

    They are used as in training: a head with BatchNorm normalises over the batch, as when it learned. Their running
    statistics stay as they are.

    Raises:
        WeightsError: when they are for a backbone of another width, or are no heads.
    """
    heads = nn.ModuleDict()
    for name in HEAD_NAMES:
        own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
        if own:
            heads[name] = _build_head(own, width, f"{name} of {origin}")
    prototypes = {name: num_prototypes(head) for name, head in heads.items()}
    if len(set(prototypes.values())) > 1:
        raise WeightsError(
            f"The heads of {origin} have different numbers of prototypes ({prototypes}); both losses need the same "
            "number. Give heads that have it."
        )
    return heads.requires_grad_(False)


def num_prototypes(head: nn.Module) -> int:
    """Give K of a head."""
    assert isinstance(head, DINOHead)
    return len(head.last_layer.weight)


def _build_head(state: State, width: int, origin: str) -> DINOHead:
    linear = sorted((int(k.split(".")[1]), v) for k, v in state.items() if k.startswith("mlp.") and v.ndim == 2)
    weight = state.get("last_layer.weight")
    if not linear or weight is None:
        raise WeightsError(f"{origin} has no mlp or no last_layer, so it is no DINO head. Give the file of its run.")
    if linear[0][1].shape[1] != width:
        raise WeightsError(
            f"{origin} is for a backbone of width {linear[0][1].shape[1]}, and the teacher's is {width}. Give the "
            "heads that were trained with this teacher."
        )
    with torch.device("meta"):
        head = DINOHead(
            width,
            weight.shape[0],
            hidden_dim=linear[0][1].shape[0],
            bottleneck_dim=weight.shape[1],
            num_layers=len(linear),
            batch_norm=any("running_mean" in k for k in state),
        )
    try:
        head.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise WeightsError(f"{origin} cannot be read as a DINO head: {' '.join(str(error).split())[:300]}") from error
    for module in head.modules():
        if isinstance(module, BatchNorm):
            module.momentum, module.num_batches_tracked = 0.0, None
    return head


def fingerprint_of(state: State) -> int:
    """Give a checksum of weights, a number below 2³²."""
    total = 0
    for key in sorted(state):
        total = zlib.crc32(key.encode(), total)
        value = state[key].detach().cpu().contiguous()
        total = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, total)
    return total
