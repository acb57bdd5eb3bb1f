# SPDX-License-Identifier: Apache-2.0
"""The named architectures: ViT-T/S/B/L/g with patch 14, each with and without four registers (method.md §1).

One name more is a model of our own, whose weights are in the package: `vitt14_open`, in the shape of `vitt14`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from opendino.errors import ConfigError
from opendino.models.config import ViTConfig

HUB = "https://dl.fbaipublicfiles.com/dinov2"
NUM_REGISTERS = 4

_SIZES: dict[str, dict[str, Any]] = {
    "vitt14": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vits14": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vitb14": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vitl14": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "vitg14": {"embed_dim": 1536, "depth": 40, "num_heads": 24, "ffn": "swiglu"},
}


@dataclass(frozen=True)
class ModelEntry:
    """A named architecture and, when its weights are published, where they are; those of `packaged` come with us."""

    name: str
    config: ViTConfig
    published: bool
    licence: str | None
    packaged: bool = False

    @property
    def url(self) -> str | None:
        """Official address of the weight file, or None for an architecture without published weights."""
        if not self.published:
            return None
        stem = f"dinov2_{self.name.removesuffix('_reg')}"
        return f"{HUB}/{stem}/{stem}{'_reg4' if self.name.endswith('_reg') else ''}_pretrain.pth"

    @property
    def file_name(self) -> str | None:
        """File name of the published weights, as it lies in torch.hub's cache."""
        return self.url.rsplit("/", 1)[1] if self.url else None

    @property
    def hf_repo(self) -> str | None:
        """Identifier of the same weights in transformers' layout on the Hugging Face hub."""
        if not self.published:
            return None
        size = {"s": "small", "b": "base", "l": "large", "g": "giant"}[self.name[3]]
        suffix = "-with-registers" if self.name.endswith("_reg") else ""
        return f"facebook/dinov2{suffix}-{size}"


def _entries() -> dict[str, ModelEntry]:
    found = {}
    for size, shape in _SIZES.items():
        for registers in (0, NUM_REGISTERS):
            name = f"{size}_reg" if registers else size
            config = ViTConfig(
                arch=name,
                num_register_tokens=registers,
                # The published models with registers were made with the antialiased convention (method.md §1).
                pos_resize="size_antialias" if registers else "scale_offset",
                **shape,
            )
            published = size != "vitt14"
            found[name] = ModelEntry(name, config, published, "Apache-2.0" if published else None)
    ours = found["vitt14"].config.model_copy(update={"arch": "vitt14_open"})
    return found | {"vitt14_open": ModelEntry("vitt14_open", ours, False, "Apache-2.0", packaged=True)}


MODELS: dict[str, ModelEntry] = _entries()


def list_models() -> list[str]:
    """Name every architecture that `opendino.load` can build."""
    return list(MODELS)


def get_config(name: str, **overrides: Any) -> ViTConfig:
    """Give the config of a named architecture, with fields replaced.

    Args:
        name: one of `list_models()`; a leading `dinov2_` is accepted.
        overrides: fields of `ViTConfig`, e.g. img_size=224, in_chans=1.

    Raises:
        ConfigError: for an unknown name or field, naming the closest match.
    """
    key = name.removeprefix("dinov2_")
    if key not in MODELS:
        close = difflib.get_close_matches(key, MODELS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{name!r} is no model name; known are {', '.join(MODELS)}.{hint}")
    unknown = set(overrides) - set(ViTConfig.model_fields)
    if unknown:
        raise ConfigError(f"Unknown model settings {sorted(unknown)}; known are {', '.join(ViTConfig.model_fields)}.")
    return ViTConfig(**{**MODELS[key].config.model_dump(), **overrides})
