# SPDX-License-Identifier: Apache-2.0
"""One file for a head: safetensors with its settings and a reference to the backbone that its features came from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opendino.embed.resume import weights_fingerprint
from opendino.errors import WeightsError
from opendino.models.vit import VisionTransformer

FORMAT = "1"


def save_head(
    path: str | Path, kind: str, tensors: dict[str, Tensor], settings: dict[str, Any], backbone: dict[str, Any] | None
) -> None:
    """Write a head aside and rename it.

    Args:
        path: of the file.
        kind: class of the head, such as "Logistic".
        tensors: its arrays.
        settings: JSON-able.
        backbone: what `describe_backbone` gives; None for a head on features that were given as arrays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    described = {"kind": kind, "settings": settings, "backbone": backbone}
    aside = path.with_name(f".{path.name}.tmp")
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, aside, metadata={"opendino.head": json.dumps(described), "opendino.head_format": FORMAT})
    os.replace(aside, path)


def load_head(path: str | Path, kind: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a head: its tensors, and {"kind", "settings", "backbone"}.

    Raises:
        WeightsError: for a file that is missing, damaged or no head, or of another kind than the one wanted.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read as a head: {error}. Give a file that `save` wrote.") from error
    if "opendino.head" not in metadata:
        raise WeightsError(f"{path} is a safetensors file, but no head of opendino. Give a file that `save` wrote.")
    described: dict[str, Any] = json.loads(metadata["opendino.head"])
    if kind is not None and described["kind"] != kind:
        raise WeightsError(f"{path} holds a {described['kind']}, not a {kind}. Load it with {described['kind']}.load.")
    return tensors, described


def describe_backbone(model: VisionTransformer, name: str) -> dict[str, Any]:
    """Give the reference to a backbone that is kept with a head: name, weights' hash and shape."""
    return {
        "name": name,
        "weights_sha256": weights_fingerprint(model),
        "config": model.config.model_dump(mode="json"),
        "preprocess": model.preprocess.model_dump(mode="json"),
    }


def check_backbone(model: VisionTransformer, backbone: dict[str, Any] | None, what: str) -> None:
    """Refuse a backbone other than the one a head was made on.

    Raises:
        WeightsError: naming both.
    """
    if backbone is None:
        return
    found = weights_fingerprint(model)
    if found != backbone["weights_sha256"]:
        raise WeightsError(
            f"{what} was fitted on features of {backbone['name']} (weights {backbone['weights_sha256'][:12]}…), but "
            f"the backbone given has the weights {found[:12]}…. Give the same backbone, or fit the head again."
        )


def as_float32(state: dict[str, Any]) -> dict[str, Tensor]:
    """Give the tensors of a state dict in fp32."""
    return {name: value.to(torch.float32) for name, value in state.items() if isinstance(value, Tensor)}
