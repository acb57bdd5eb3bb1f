# SPDX-License-Identifier: Apache-2.0
"""Many linear classifiers on the same features, trained together (DINOv2 §7.1; method.md §3).

Classifiers on the same input are one matrix product, and each gradient follows from the formula of softmax and
cross-entropy. SGD with momentum, no weight decay, cosine to 0.

Shapes: B batch, L blocks, D width, R rates, K classes, F width of an input.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opendino.errors import DataError

RATE_BATCH = 256
"""Batch that learning rates are given for."""
MOMENTUM, STD = 0.9, 0.01
CHUNK_NUMBERS = 1 << 25
"""Logits computed at once."""


class Kind(NamedTuple):
    """What a classifier sees: cls tokens of the last `blocks` blocks, and with `average` the mean patch token."""

    blocks: int
    average: bool

    def features(self, cls: Tensor, mean: Tensor) -> Tensor:
        """Put the input together, (B, F), from cls (B, L, D) in the order of the blocks and mean (B, D)."""
        parts = [cls[:, -self.blocks :].flatten(1)]
        return torch.cat([*parts, mean] if self.average else parts, 1)


@dataclass(frozen=True)
class GridSettings:
    """How the classifiers are trained.

    Attributes:
        kinds: inputs.
        rates: learning rates for a batch of 256.
        steps: of SGD.
        batch_size: samples a step; at most N.
        seed: of weights and order.
    """

    kinds: tuple[Kind, ...]
    rates: tuple[float, ...]
    steps: int
    batch_size: int
    seed: int = 0

    def rate(self, index: int, step: int) -> float:
        """Give the learning rate of rate number `index` at a step."""
        scaled = self.rates[index] * self.batch_size / RATE_BATCH
        return scaled * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass(frozen=True, eq=False)
class LinearModel:
    """One linear classifier.

    Attributes:
        kind: its input.
        rate: its learning rate for a batch of 256.
        weight: (K, F).
        bias: (K,).
    """

    kind: Kind
    rate: float
    weight: Tensor
    bias: Tensor

    @property
    def name(self) -> str:
        """Say which one it is."""
        blocks = "1 block" if self.kind.blocks == 1 else f"{self.kind.blocks} blocks"
        return f"cls of {blocks}{' and mean patch' if self.kind.average else ''}, rate {self.rate:g}"

    def logits(self, cls: Any, mean: Any) -> Tensor:
        """Give (M, K) for cls (M, L, D) and mean (M, D)."""
        x = self.kind.features(torch.as_tensor(cls), torch.as_tensor(mean)).to(self.weight)
        return x @ self.weight.T + self.bias


class Grid:
    """All classifiers, in training.

    Args:
        settings: of the grid.
        dim: D.
        num_classes: K.
        device: where they lie.
        dtype: float32 or float64.
    """

    def __init__(
        self,
        settings: GridSettings,
        dim: int,
        num_classes: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.settings, self.num_classes, self.step = settings, num_classes, 0
        self.weights, self.biases = [], []
        rates = len(settings.rates)
        for number, kind in enumerate(settings.kinds):
            width = (kind.blocks + kind.average) * dim
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
            weight = STD * torch.randn(rates, num_classes, width, generator=generator, dtype=torch.float64)
            self.weights.append(weight.to(device, dtype))  # (R, K, F)
            self.biases.append(torch.zeros(rates, num_classes, device=device, dtype=dtype))
        self.moments = [torch.zeros_like(p) for p in (*self.weights, *self.biases)]

    @property
    def models(self) -> list[LinearModel]:
        """The classifiers as they are now, kind by kind."""
        return [
            LinearModel(kind, rate, weight[i], bias[i])
            for kind, weight, bias in zip(self.settings.kinds, self.weights, self.biases, strict=True)
            for i, rate in enumerate(self.settings.rates)
        ]

    def train_step(self, cls: Tensor, mean: Tensor, labels: Tensor) -> None:
        """Take one step of SGD with every classifier on the mean cross-entropy of a batch."""
        where, dtype = self.weights[0].device, self.weights[0].dtype
        cls, mean, labels = cls.to(where, dtype), mean.to(where, dtype), labels.to(where)
        rates = [self.settings.rate(i, self.step) for i in range(len(self.settings.rates))]
        lr = torch.tensor(rates, device=where, dtype=dtype)
        for i, kind in enumerate(self.settings.kinds):
            gradients = self._gradients(i, kind.features(cls, mean), labels)
            parameters = (self.weights[i], self.biases[i])
            moments = (self.moments[i], self.moments[len(self.weights) + i])
            for p, moment, gradient in zip(parameters, moments, gradients, strict=True):
                moment.mul_(MOMENTUM).add_(gradient)
                p.sub_(lr.view(-1, *[1] * (p.ndim - 1)) * moment)
        self.step += 1

    def _gradients(self, number: int, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Give (R, K, F) and (R, K); rows of the batch in chunks, so that the logits need not fit at once."""
        weight, bias = self.weights[number].flatten(0, 1), self.biases[number].flatten()  # (R·K, F), (R·K,)
        of_weight, of_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        rows = max(CHUNK_NUMBERS // len(weight), 1)
        for part, right in zip(x.split(rows), labels.split(rows), strict=True):
            logits = torch.addmm(bias, part, weight.T).unflatten(1, (-1, self.num_classes))  # (b, R, K)
            residual = logits.softmax(2)
            index = right[:, None, None].expand(-1, residual.shape[1], 1)
            residual.scatter_add_(2, index, torch.full_like(residual[..., :1], -1.0))
            flat = residual.flatten(1).div_(len(x))
            of_weight.addmm_(flat.T, part)
            of_bias += flat.sum(0)
        return of_weight.view_as(self.weights[number]), of_bias.view_as(self.biases[number])

    def top1(self, cls: Any, mean: Any, labels: Any) -> Tensor:
        """Score every classifier, percent, (kinds · R,) in the order of `models`."""
        where, right, scores = self.weights[0], torch.as_tensor(labels).to(self.weights[0].device), []
        for kind, weight, bias in zip(self.settings.kinds, self.weights, self.biases, strict=True):
            x = kind.features(torch.as_tensor(cls), torch.as_tensor(mean)).to(where)
            flat, hits = weight.flatten(0, 1), torch.zeros(len(weight), dtype=torch.long, device=where.device)
            rows = max(CHUNK_NUMBERS // len(flat), 1)
            for part, own in zip(x.split(rows), right.split(rows), strict=True):
                logits = torch.addmm(bias.flatten(), part, flat.T).unflatten(1, (-1, self.num_classes))
                hits += (logits.argmax(2) == own[:, None]).sum(0)
            scores.append(100 * hits.double() / len(right))
        return torch.cat(scores).cpu()

    # --- the state on disk ---------------------------------------------------------------------------------------

    def save(self, path: Path, key: str) -> None:
        """Write the state aside and rename it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{i}": p.cpu().contiguous() for i, p in enumerate((*self.weights, *self.biases, *self.moments))}
        aside = path.with_name(f".{path.name}.tmp")
        save_file(tensors, aside, {"key": key, "step": str(self.step)})
        os.replace(aside, path)

    def load(self, path: Path, key: str) -> bool:
        """Take up the state of the same training; False when there is none.

        Raises:
            DataError: for a file that is damaged or of another training.
        """
        if not path.exists():
            return False
        parameters = (*self.weights, *self.biases, *self.moments)
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
                if found.get("key") != key:
                    raise DataError(
                        f"{path} is the state of a training with other features, classes or settings. Delete it to "
                        "start anew, or give another file."
                    )
                for i, p in enumerate(parameters):
                    p.copy_(file.get_tensor(str(i)))
                self.step = int(found["step"])
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read: {error}. Delete it to start the training anew.") from error
        return True
