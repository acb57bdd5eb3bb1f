# SPDX-License-Identifier: Apache-2.0
"""torch.hub entry points under the published names.

    model = torch.hub.load("path/to/opendino", "dinov2_vits14", source="local")

Each takes `pretrained` (False: random initialisation), `weights` (a file in any layout instead of the published one)
and the fields of opendino.models.config.ViTConfig, e.g. img_size=224.
"""

import sys
from functools import partial
from pathlib import Path

dependencies = ["torch", "torchvision", "numpy", "PIL", "pydantic", "safetensors", "huggingface_hub"]


def _backbone(name, *, pretrained=True, weights="LVD142M", **settings):
    try:
        import opendino
    except ImportError:  # a clone that is not installed
        sys.path.insert(0, str(Path(__file__).parent / "src"))
        import opendino
    if not pretrained:
        return opendino.load(name, weights="random", **settings)
    return opendino.load(name, weights=None if weights == "LVD142M" else weights, **settings)


def _entry(name):
    entry = partial(_backbone, name)
    entry.__doc__ = f"DINOv2 backbone {name}: images (B, 3, H, W) to cls tokens (B, D)."
    return entry


dinov2_vits14 = _entry("vits14")
dinov2_vitb14 = _entry("vitb14")
dinov2_vitl14 = _entry("vitl14")
dinov2_vitg14 = _entry("vitg14")
dinov2_vits14_reg = _entry("vits14_reg")
dinov2_vitb14_reg = _entry("vitb14_reg")
dinov2_vitl14_reg = _entry("vitl14_reg")
dinov2_vitg14_reg = _entry("vitg14_reg")


# --- linear classifiers: dinov2_vit*14[_reg]_lc(layers=1 or 4) -------------------------------------------------------


def _linear_classifier(name, *, layers=4, pretrained=True, weights="IMAGENET1K", backbone_weights=None, **settings):
    try:
        from opendino.heads.hub import linear_classifier
    except ImportError:  # a clone that is not installed
        sys.path.insert(0, str(Path(__file__).parent / "src"))
        from opendino.heads.hub import linear_classifier
    return linear_classifier(
        name, layers, pretrained=pretrained, weights=weights, backbone_weights=backbone_weights, **settings
    )


def _classifier_entry(name):
    entry = partial(_linear_classifier, name)
    entry.__doc__ = (
        f"DINOv2 {name} with its ImageNet-1k linear classifier on 1 or 4 layers: images (B, 3, H, W) to logits "
        "(B, 1000). `weights` is the head's file, `backbone_weights` the backbone's; by default the released ones."
    )
    return entry


dinov2_vits14_lc = _classifier_entry("vits14")
dinov2_vitb14_lc = _classifier_entry("vitb14")
dinov2_vitl14_lc = _classifier_entry("vitl14")
dinov2_vitg14_lc = _classifier_entry("vitg14")
dinov2_vits14_reg_lc = _classifier_entry("vits14_reg")
dinov2_vitb14_reg_lc = _classifier_entry("vitb14_reg")
dinov2_vitl14_reg_lc = _classifier_entry("vitl14_reg")
dinov2_vitg14_reg_lc = _classifier_entry("vitg14_reg")


# --- depth: dinov2_vit*14_ld(layers=1 or 4) and _dd (DPT) -------------------------------------------------------------


def _depth(name, kind=None, *, layers=4, pretrained=True, weights="NYU", backbone_weights="LVD142M", **settings):
    ranges = {k: settings.pop(k) for k in ("min_depth", "max_depth") if k in settings}
    backbone = _backbone(name, pretrained=pretrained, weights=backbone_weights, **settings)
    from opendino.heads.hub_depth import depth_model

    return depth_model(backbone, name, kind or f"lin{layers}", pretrained=pretrained, weights=weights, **ranges)


def _depth_entry(name, kind=None):
    entry = partial(_depth, name, kind)
    what = "a DPT head" if kind else "a linear head on 1 or 4 `layers`"
    entry.__doc__ = (
        f"Depth by {name} and {what}; `weights`: NYU, KITTI or a file. Images (B, 3, H, W) to metres (B, 1, H, W)."
    )
    return entry


dinov2_vits14_ld, dinov2_vits14_dd = _depth_entry("vits14"), _depth_entry("vits14", "dpt")
dinov2_vitb14_ld, dinov2_vitb14_dd = _depth_entry("vitb14"), _depth_entry("vitb14", "dpt")
dinov2_vitl14_ld, dinov2_vitl14_dd = _depth_entry("vitl14"), _depth_entry("vitl14", "dpt")
dinov2_vitg14_ld, dinov2_vitg14_dd = _depth_entry("vitg14"), _depth_entry("vitg14", "dpt")
