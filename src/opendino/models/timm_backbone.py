# SPDX-License-Identifier: Apache-2.0
"""Any image model of timm behind the interface of our backbones: one pooled token and the last spatial map as patches.

Shapes: B images, C channels, P = h·w positions of the last map, D its width.
"""

from __future__ import annotations

import copy
import difflib
from typing import Any

import torch
from torch import Tensor, nn

from opendino.errors import ConfigError, MissingExtraError
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.vit import VisionTransformer

PREFIX = "timm:"
_SIZE_OPTIONS: tuple[dict[str, bool] | None, ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {}, None)
"""How families of timm take images of several sizes; None: the family has no image size at all."""


class TimmBackbone(VisionTransformer):
    """A model of timm as a backbone.

    Sides that are no multiple of a transformer's patch are cropped at the bottom and right, as ours are. The cls token
    is the model's own where it has one, else the mean of the last map. Further prefix tokens are left out. Masks are
    not supported: these models have no mask token.

    Args:
        name: timm's name of the architecture.
        img_size: side of the images that it is made for, pixels; others may be given where the family allows.
        in_chans: number of channels.
        preprocess: the evaluation preprocessing.

    Attributes:
        net: timm's model without classifier.

    Raises:
        MissingExtraError: without timm.
        ConfigError: for a name that timm does not know, or a model that gives no map.
    """

    def __init__(
        self, name: str, *, img_size: int = 224, in_chans: int = 3, preprocess: PreprocessSpec | None = None
    ) -> None:
        nn.Module.__init__(self)  # the parts of a VisionTransformer are not wanted
        self.preprocess = preprocess or PreprocessSpec()
        self.net = _create(name, img_size, in_chans)
        self._multiple = _patch_of(self.net)
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        self.embed_dim = self.num_features = int(self.net.num_features)
        side = self._grid(img_size, img_size, in_chans)[0]
        self.patch_size = self._multiple if self._multiple > 1 else max(1, round(img_size / side))
        self.config = ViTConfig(
            arch=PREFIX + name, img_size=self.patch_size * max(1, img_size // self.patch_size),
            patch_size=self.patch_size, in_chans=in_chans, embed_dim=self.embed_dim, depth=1, num_heads=1,
        )  # fmt: skip
        self.num_register_tokens, self.num_heads, self.n_blocks = 0, 1, 1
        self.register_tokens = None
        self.blocks = nn.ModuleList([_Chosen()])
        self.norm = nn.Identity()  # type: ignore[assignment]
        self.head = nn.Identity()

    @property
    def cls_token(self) -> Tensor:  # type: ignore[override]
        """Some parameter, for device and dtype."""
        parameter: Tensor = next(self.net.parameters())
        return parameter

    def grid_of(self, x: Tensor) -> tuple[int, int]:
        """Give the size (h, w) of the last map of images (B, C, H, W)."""
        return self._grid(x.shape[-2], x.shape[-1], x.shape[1])

    def prepare_tokens(self, x: Tensor, masks: Tensor | None = None) -> Tensor:
        """Compute everything: (B, C, H, W) → (B, 1 + P, D).

        Raises:
            ConfigError: when a patch is masked.
        """
        if masks is not None and bool(masks.any()):
            raise ConfigError(f"{self.config.arch} has no mask token; it cannot be shown masked crops.")
        cls, picture = self._maps(self.net, x)
        return torch.cat([cls.unsqueeze(1), picture.flatten(2).transpose(1, 2)], dim=1)

    def _grid(self, height: int, width: int, channels: int) -> tuple[int, int]:
        key = (height, width)
        if key not in self._grids:
            shadow = copy.deepcopy(self.net).to("meta").eval()
            with torch.no_grad():
                picture = self._maps(shadow, torch.empty(1, channels, height, width, device="meta"))[1]
            self._grids[key] = (picture.shape[-2], picture.shape[-1])
        return self._grids[key]

    def _maps(self, net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give the pooled token (B, D) and the last map (B, D, h, w)."""
        m = self._multiple
        if min(x.shape[-2:]) < m:
            raise ConfigError(
                f"The image is {x.shape[-2]}×{x.shape[-1]} pixels, less than one patch of {m}. Enlarge it."
            )
        x = x[..., : x.shape[-2] // m * m, : x.shape[-1] // m * m]
        found: Tensor = net.forward_features(x)
        width, prefix = self.embed_dim, int(getattr(net, "num_prefix_tokens", 0) or 0)
        if found.ndim == 3:  # a transformer's tokens
            patches = found[:, prefix:]
            grid = _token_grid(x, patches.shape[1])
            picture = patches.transpose(1, 2).unflatten(2, grid)
            return found[:, 0] if prefix else patches.mean(1), picture
        if found.ndim == 4 and found.shape[1] != width and found.shape[-1] == width:  # channels last
            found = found.permute(0, 3, 1, 2)
        if found.ndim != 4 or found.shape[1] != width:
            raise ConfigError(
                f"The timm model gives features of shape {tuple(found.shape)}, not (batch, {width}, height, width) or "
                "(batch, tokens, width); it has no spatial map that could be compared. Take another model."
            )
        return found.mean((2, 3)), found


class _Chosen(nn.Module):
    """Stands for the blocks: everything is computed before; only the tokens that are asked for are passed on."""

    drop_path_rate = 0.0

    def forward(self, tokens: Tensor, shapes: Any = None, subsets: Any = None, keep: Tensor | None = None) -> Tensor:
        return tokens if keep is None else tokens[keep]


def _token_grid(x: Tensor, patches: int) -> tuple[int, int]:
    """Give the grid (h, w) of patch tokens, of the proportions of the image."""
    height, width = x.shape[-2:]
    h = max(1, round((patches * height / width) ** 0.5))
    while patches % h:
        h -= 1
    return h, patches // h


def _create(name: str, img_size: int, in_chans: int) -> Any:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm", "timm", f"The student {PREFIX}{name}") from error
    if name not in timm.list_models():
        close = difflib.get_close_matches(name, timm.list_models(), n=4)
        hint = f" Like it are {', '.join(close)}." if close else ""
        raise ConfigError(f"{name!r} is no model of timm {timm.__version__}.{hint}")
    problem: Exception | None = None
    for options in _SIZE_OPTIONS:
        sizes: dict[str, Any] = {} if options is None else {"img_size": img_size, **options}
        try:
            net = timm.create_model(name, pretrained=False, num_classes=0, in_chans=in_chans, **sizes)
            fitting = max(1, img_size // _patch_of(net)) * _patch_of(net)
            if sizes and fitting != img_size:
                sizes["img_size"] = fitting
                net = timm.create_model(name, pretrained=False, num_classes=0, in_chans=in_chans, **sizes)
            return net
        except TypeError as error:  # the family has no such option
            problem = error
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"timm cannot make {name} for images of {img_size} px: {error}") from error
    raise ConfigError(f"timm cannot make {name}: {problem}")


def _patch_of(net: Any) -> int:
    """Give the side of a transformer's patches, or 1 for what pads by itself."""
    size = getattr(getattr(net, "patch_embed", None), "patch_size", 1)
    return int(size[0] if isinstance(size, tuple | list) else size)
