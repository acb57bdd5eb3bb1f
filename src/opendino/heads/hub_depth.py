# SPDX-License-Identifier: Apache-2.0
"""What stands behind `dinov2_vit*14_ld` and `_dd` of hubconf.py: backbone and depth head as one torch module."""

from __future__ import annotations

from pathlib import Path

from opendino.errors import ConfigError
from opendino.heads.depth import DepthEstimator
from opendino.heads.depth_modules import DepthModel, HeadKind, depth_blocks, make_depth_head
from opendino.heads.published_depth import MAX_DEPTHS, MIN_DEPTH, fetch_head, load_published_depth
from opendino.models.vit import VisionTransformer


def depth_model(
    backbone: VisionTransformer, name: str, kind: str, *, pretrained: bool = True, weights: str | Path = "NYU",
    min_depth: float = MIN_DEPTH, max_depth: float | None = None,
) -> DepthModel:  # fmt: skip
    """Give normalised images (B, 3, H, W) to depth (B, 1, H, W), metres, in evaluation mode.

    Args:
        backbone: with its weights.
        name: of the backbone, such as "vits14"; names the file of the head.
        kind: "lin1", "lin4" or "dpt".
        pretrained: False draws the head from torch's global generator.
        weights: "NYU" or "KITTI" for the published head, or the path of a head: a released .pth or what
            `DepthEstimator.save` wrote.
        min_depth: metres.
        max_depth: metres; None is that of the data set, 10 for an untrained head.

    Raises:
        WeightsError: when the head is missing, does not fit, or is of another kind than asked for.
    """
    head: HeadKind = kind  # type: ignore[assignment]  # depth_blocks refuses other words
    if kind.startswith("lin") and kind not in ("lin1", "lin4"):
        raise ConfigError(f"layers is {kind[3:]}; linear depth heads read 1 or 4 layers.")
    blocks = depth_blocks(backbone.n_blocks, head)
    if not pretrained:
        deepest = max_depth or MAX_DEPTHS["NYU"]
        made = make_depth_head(head, backbone.embed_dim, min_depth, deepest)
        return DepthModel(backbone, made, blocks, min_depth, deepest).eval()
    path = fetch_head(name, head, str(weights)) if str(weights) in MAX_DEPTHS else Path(weights)
    estimator = open_depth_head(
        path, backbone, max_depth=max_depth or MAX_DEPTHS.get(str(weights)), min_depth=min_depth
    )
    if estimator.head != head:
        raise ConfigError(
            f"{path} holds a {estimator.head} head, but {head} was asked for. Linear heads are loaded by _ld with "
            "layers=1 or layers=4, DPT heads by _dd."
        )
    assert estimator.model_ is not None
    return estimator.model_


def open_depth_head(
    path: str | Path, backbone: VisionTransformer | str | Path, *, max_depth: float | None = None,
    min_depth: float = MIN_DEPTH, **settings: object,
) -> DepthEstimator:  # fmt: skip
    """Load a head that `DepthEstimator.save` wrote, which knows its range, or a released .pth.

    Args:
        path: of the file.
        backbone: the one it belongs to.
        max_depth: metres, for a released file whose name does not tell.
        min_depth: metres, for a released file.
        settings: of the constructor of `DepthEstimator`.
    """
    if Path(path).suffix not in (".pth", ".pt", ".bin"):
        return DepthEstimator.load(path, backbone, **settings)
    return load_published_depth(path, backbone, max_depth=max_depth, min_depth=min_depth, **settings)
