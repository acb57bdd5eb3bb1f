# SPDX-License-Identifier: Apache-2.0
"""What describes a backbone: its shape, its position-resize convention, and the preprocessing that goes with it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PosResize = Literal["scale_offset", "size_antialias", "size"]
"""How the position table is resized to another grid (see `opendino.models.positions`).

scale_offset: bicubic, no antialias, scale factor (grid + 0.1) / table side; published models without registers.
size_antialias: bicubic, antialias, target size; published models with registers, and timm.
size: bicubic, no antialias, target size; transformers' `Dinov2Model`.
"""


class PreprocessSpec(BaseModel):
    """Evaluation preprocessing that travels with a model (DINOv2 model card; method.md §1).

    The shorter side is resized to `resize`, a centre square of `crop` is cut, values are scaled to 0–1 and
    normalised per channel with `mean` and `std`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize: int = Field(256, ge=1, description="shorter side after resizing, pixels")
    crop: int = Field(224, ge=1, description="side of the centre crop, pixels")
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _check(self) -> PreprocessSpec:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std {len(self.std)}; give one value per channel")
        if any(s <= 0 for s in self.std):
            raise ValueError(f"std must be positive, got {self.std}")
        return self

    @property
    def num_channels(self) -> int:
        """Number of image channels the statistics are for."""
        return len(self.mean)


class ViTConfig(BaseModel):
    """Shape and conventions of one Vision Transformer backbone. Immutable; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    arch: str = Field("custom", description="name of the preset this config came from, e.g. vits14_reg")
    img_size: int = Field(518, ge=1, description="side of the square image the position table is made for, pixels")
    patch_size: int = Field(14, ge=1)
    in_chans: int = Field(3, ge=1)
    embed_dim: int = Field(384, ge=1)
    depth: int = Field(12, ge=1)
    num_heads: int = Field(6, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    ffn: Literal["mlp", "swiglu"] = "mlp"
    num_register_tokens: int = Field(0, ge=0)
    qkv_bias: bool = True
    init_values: float | None = Field(1.0, description="initial LayerScale gamma; None builds no LayerScale")
    drop_path_rate: float = Field(0.0, ge=0, lt=1, description="share of the batch that skips a branch in training")
    pos_resize: PosResize = "scale_offset"

    @model_validator(mode="after")
    def _check(self) -> ViTConfig:
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} must be a multiple of num_heads {self.num_heads}")
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size {self.img_size} must be a multiple of patch_size {self.patch_size}")
        return self

    @property
    def grid(self) -> int:
        """Side of the position table, patches."""
        return self.img_size // self.patch_size

    @property
    def hidden_dim(self) -> int:
        """Width inside the feed-forward branch: mlp_ratio·D, or for SwiGLU 2/3 of it rounded up to a multiple of 8."""
        hidden = int(self.embed_dim * self.mlp_ratio)
        return hidden if self.ffn == "mlp" else (int(hidden * 2 / 3) + 7) // 8 * 8
