# SPDX-License-Identifier: Apache-2.0
"""The whole DINOv2 system in one package.

    model = opendino.load("vits14")            # name, Meta .pth, transformers folder, timm file, run folder
    vectors = opendino.Embedder(model)(["a.jpg", "b.jpg"]).cls

Names are imported on first use, so `import opendino` costs nothing beyond itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opendino._version import __version__

if TYPE_CHECKING:
    from opendino import heads
    from opendino.embed.embedder import Embedder
    from opendino.models.registry import list_models
    from opendino.models.weights import load

__all__ = ["Embedder", "__version__", "heads", "list_models", "load"]

_HOMES = {
    "load": "opendino.models.weights",
    "list_models": "opendino.models.registry",
    "Embedder": "opendino.embed.embedder",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "heads":
        return importlib.import_module("opendino.heads")
    if name not in _HOMES:
        raise AttributeError(f"module 'opendino' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
