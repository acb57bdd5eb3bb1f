# SPDX-License-Identifier: Apache-2.0
"""One number that tells two models' weights apart."""

from __future__ import annotations

import hashlib

import torch

from opendino.models.memory import give_up


def weights_fingerprint(model: torch.nn.Module, *, dtype: torch.dtype | None = None, consume: bool = False) -> str:
    """Give the sha256 over the names, shapes, dtypes and bytes of every tensor of a model.

    Args:
        model: its tensors may lie in a mapped file.
        dtype: floating-point tensors count as if they were cast to it, one at a time; None takes them as they are.
        consume: give each tensor's memory back after it; for a model that nobody else has and nobody reads again.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        counted = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        digest.update(f"{name} {tuple(counted.shape)} {counted.dtype}\n".encode())
        flat = counted.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
        if consume:
            give_up(tensor)
    return digest.hexdigest()
