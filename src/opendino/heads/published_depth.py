# SPDX-License-Identifier: Apache-2.0
"""Meta's released depth heads: their names and addresses, and their files as a `DepthEstimator`.

A file is {"meta": …, "state_dict": {"decode_head.…": tensor}}. Linear heads hold `conv_depth.{weight,bias}`, DPT heads
`reassemble_blocks`, `convs`, `fusion_blocks`, `project` and `conv_depth.head.{0,2,4}`. The depth range is not in the
file but follows from the data set that the head was trained on.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from opendino.errors import ConfigError, WeightsError
from opendino.heads import released
from opendino.heads.depth import DepthEstimator, as_backbone
from opendino.heads.depth_modules import DPT_CHANNELS, NUM_BINS, HeadKind
from opendino.models.files import read_weights
from opendino.models.registry import HUB
from opendino.models.vit import VisionTransformer

log = logging.getLogger(__name__)

PREFIX, BACKBONE_PREFIX = "decode_head.", "backbone."
MIN_DEPTH = 1e-3
MAX_DEPTHS = {"NYU": 10.0, "KITTI": 80.0}
"""Metres. The published hub code gives linear heads 10 for KITTI too, though they were trained with 80."""
_WORDS: dict[HeadKind, str] = {"lin1": "linear", "lin4": "linear4", "dpt": "dpt"}


def head_url(backbone: str, kind: HeadKind, dataset: str) -> str:
    """Give the official address of a head, such as …/dinov2_vits14/dinov2_vits14_nyu_linear4_head.pth.

    Raises:
        ConfigError: for a data set other than NYU and KITTI.
    """
    if dataset not in MAX_DEPTHS:
        raise ConfigError(f"weights is {dataset!r}; depth heads are published for {' and '.join(MAX_DEPTHS)}.")
    stem = f"dinov2_{backbone.removeprefix('dinov2_')}"
    return f"{HUB}/{stem}/{stem}_{dataset.lower()}_{_WORDS[kind]}_head.pth"


def fetch_head(backbone: str, kind: HeadKind, dataset: str) -> Path:
    """Give a published head's file from torch.hub's cache, downloaded when it is not there.

    Raises:
        WeightsError: when there is no network, saying which file is wanted, from where, and where to put it.
    """
    folder, file_name = head_url(backbone, kind, dataset).rsplit("/", 2)[1:]
    return released.fetch_head(folder, file_name)


def load_published_depth(
    path: str | Path, backbone: VisionTransformer | str | Path, *, max_depth: float | None = None,
    min_depth: float = MIN_DEPTH, **settings: Any,
) -> DepthEstimator:  # fmt: skip
    """Load a released depth head, strictly; the kind of head follows from its tensors.

    Args:
        path: of the .pth file.
        backbone: a VisionTransformer, or whatever `opendino.load` takes; the head's own.
        max_depth: metres; None is 10 for a file with "nyu" in its name and 80 for one with "kitti".
        min_depth: metres.
        settings: of `DepthEstimator`.

    Raises:
        WeightsError: when the file is missing, damaged, unsafe, no depth head, or made for another backbone.
        ConfigError: when neither the name nor `max_depth` tells the range.
    """
    path = Path(path)
    tensors = _head_tensors(path)
    device = settings.pop("device", None)
    model, name = as_backbone(backbone, settings.pop("weights", None), device)
    kind, channels = _kind(tensors, path, model.embed_dim)
    if max_depth is None:
        max_depth = next((m for name, m in MAX_DEPTHS.items() if name.lower() in path.name.lower()), None)
    if max_depth is None:
        raise ConfigError(
            f"The depth range of {path} cannot be told: a head file does not hold it, and neither nyu nor kitti is in "
            "its name. Give max_depth, 10 m for NYU and 80 m for KITTI."
        )
    estimator = DepthEstimator(model, kind, min_depth=min_depth, max_depth=max_depth, channels=channels, **settings)
    estimator.name = name
    return estimator.with_head(tensors, str(path))


def _head_tensors(path: Path) -> dict[str, Tensor]:
    state = read_weights(path).state
    ours = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    others = [k for k in state if not k.startswith((PREFIX, BACKBONE_PREFIX))]
    if not ours or others:
        found = ", ".join((others or list(state))[:3])
        raise WeightsError(
            f"{path} holds {found}, which no released depth head has: its tensors are named decode_head.…. Give a file "
            "such as dinov2_vits14_nyu_linear_head.pth."
        )
    if len(ours) < len(state):
        log.warning("%s also holds a backbone (%d tensors); it is left aside.", path, len(state) - len(ours))
    return ours


def _kind(tensors: dict[str, Tensor], path: Path, embed_dim: int) -> tuple[HeadKind, int]:
    """Tell the kind of a head and the channels of a DPT head by its tensors."""
    if "conv_depth.head.0.weight" in tensors:
        return "dpt", tensors["conv_depth.head.0.weight"].shape[1]
    weight = tensors.get("conv_depth.weight")
    if weight is None or weight.ndim != 4 or weight.shape[0] != NUM_BINS:
        shape = "none" if weight is None else str(tuple(weight.shape))
        raise WeightsError(
            f"{path} is no known depth head: conv_depth.weight is {shape}. It needs ({NUM_BINS}, 2·width, 1, 1) "
            "for one layer, four times as wide for four, or conv_depth.head.… for DPT. Segmentation and "
            "classifier heads have loaders of their own."
        )
    layers = {2 * embed_dim: "lin1", 8 * embed_dim: "lin4"}
    if weight.shape[1] not in layers:
        raise WeightsError(
            f"{path} takes {weight.shape[1]} values at each patch; one layer of a backbone {embed_dim} wide gives "
            f"{2 * embed_dim} with its cls token and four give {8 * embed_dim}. Give the head that was made for this "
            "backbone."
        )
    return cast(HeadKind, layers[weight.shape[1]]), DPT_CHANNELS
