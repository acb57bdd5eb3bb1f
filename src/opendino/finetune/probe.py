# SPDX-License-Identifier: Apache-2.0
"""The score to beat: a linear classifier on the frozen backbone's features, fitted on the same images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opendino.evaluate.datasets.types import IGNORE
from opendino.evaluate.logistic import fit_logistic
from opendino.finetune.storage import read_linear
from opendino.finetune.tasks import Segmentation, read_pair
from opendino.heads.storage import check_backbone
from opendino.models.vit import VisionTransformer

PENALTIES = (0.01, 0.1, 1.0, 10.0)
"""C of the logistic regressions of which the best on the validation images is taken, as the best epoch is later."""
MAX_PATCHES = 100_000
RIDGES = (1e-4, 1e-3, 1e-2)


@dataclass(frozen=True)
class Probe:
    """A linear classifier of frozen features.

    Attributes:
        weight: (C, D).
        bias: (C,).
        score: on the validation images, percent.
        chosen: the strength of the penalty that was chosen.
    """

    weight: Tensor
    bias: Tensor
    score: float
    chosen: float

    def head(self) -> nn.Linear:
        """Give it as a layer, fp32."""
        layer = nn.Linear(self.weight.shape[1], self.weight.shape[0])
        with torch.no_grad():
            layer.weight.copy_(self.weight)
            layer.bias.copy_(self.bias)
        return layer


def saved_probe(path: Path, model: VisionTransformer, num_classes: int) -> Probe | None:
    """Read the probe that an earlier start of the same run wrote; None when there is none for this model."""
    if not path.is_file():
        return None
    weight, bias, described = read_linear(path)
    check_backbone(model, described["backbone"], str(path))
    figures = described["settings"].get("finetune", {})
    if len(bias) != num_classes or "score" not in figures:
        return None
    return Probe(weight, bias, figures["score"], figures["chosen"])


def probe_classes(train_x: Any, train_y: Any, val_x: Any, val_y: Any, num_classes: int) -> Probe:
    """Fit logistic regressions on frozen features (n, D) and keep the best on the validation images."""
    best: Probe | None = None
    for c in PENALTIES:
        fitted = fit_logistic(np.asarray(train_x), np.asarray(train_y), c, num_classes=num_classes)
        found = fitted.logits(np.asarray(val_x)).argmax(1).numpy()
        score = 100 * float((found == np.asarray(val_y)).mean())
        if best is None or score > best.score:
            best = Probe(fitted.weight.float(), fitted.bias.float(), score, c)
    assert best is not None
    return best


def probe_pixels(
    model: VisionTransformer, task: Segmentation, batch_size: int, seed: int,
    on_image: Callable[[int, int], None] | None = None,
) -> Probe:  # fmt: skip
    """Fit a linear classifier of frozen patch tokens, whose targets are the shares of the classes in each patch.

    The ridge is the best of RIDGES on a fifth of the patches that is held out of the fit; at most MAX_PATCHES patches
    are drawn, evenly over the images.
    """
    tokens, shares = _patches(model, task, batch_size, seed, on_image)
    held = torch.arange(len(tokens)) % 5 == 4
    losses = []
    for ridge in RIDGES:
        weight, bias = fit_shares(tokens[~held], shares[~held], ridge)
        losses.append(float(_share_loss(tokens[held] @ weight.T + bias, shares[held])))
    ridge = RIDGES[int(np.argmin(losses))]
    probe = Probe(*fit_shares(tokens, shares, ridge), 0.0, ridge)
    score = task.score(model, probe.head().to(model.cls_token.device), batch_size)
    return Probe(probe.weight, probe.bias, score, ridge)


def fit_shares(x: Tensor, shares: Tensor, ridge: float, steps: int = 200) -> tuple[Tensor, Tensor]:
    """Minimise the cross-entropy to `shares` plus ridge · |weight of standardised x|² / 2, by L-BFGS.

    Args:
        x: (n, D).
        shares: (n, C), not negative; rows need not sum to 1 and weigh what they sum to.
        ridge: strength of the penalty.
        steps: of L-BFGS at most.

    Returns:
        weight (C, D) and bias (C,) for x as given.
    """
    mean, std = x.mean(0), x.std(0, unbiased=False).clamp(min=1e-6)
    scaled = (x - mean) / std
    weight = torch.zeros(shares.shape[1], x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(shares.shape[1], dtype=x.dtype, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = _share_loss(scaled @ weight.T + bias, shares) + 0.5 * ridge * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    plain = weight.detach() / std
    return plain, bias.detach() - plain @ mean


def _share_loss(logits: Tensor, shares: Tensor) -> Tensor:
    return -(shares * F.log_softmax(logits, dim=1)).sum() / shares.sum()


@torch.no_grad()
def _patches(
    model: VisionTransformer,
    task: Segmentation,
    batch_size: int,
    seed: int,
    on_image: Callable[[int, int], None] | None,
) -> tuple[Tensor, Tensor]:
    """Give tokens (n, D) of patches of the training images and the shares of the classes in each, (n, C)."""
    model.eval()
    device, kept_tokens, kept_shares = model.cls_token.device, [], []
    each = max(MAX_PATCHES // max(len(task.train), 1), 1)
    for index in range(len(task.train)):
        pixels, mask = read_pair(task.train, index)
        image = task.preprocess.of_file(pixels)[None].to(device)
        tokens = model.forward_features(image)["x_norm_patchtokens"][0].float().cpu()
        shares = class_shares(mask, model.grid_of(image), len(task.classes))
        rng = np.random.default_rng([seed, 2, index])
        chosen = torch.from_numpy(rng.permutation(len(tokens))[:each])
        chosen = chosen[shares[chosen].sum(1) > 0]
        kept_tokens.append(tokens[chosen])
        kept_shares.append(shares[chosen])
        if on_image is not None:
            on_image(index + 1, len(task.train))
    return torch.cat(kept_tokens), torch.cat(kept_shares)


def class_shares(mask: Tensor, grid: tuple[int, int], num_classes: int) -> Tensor:
    """Give (h·w, C), the share of each class among the pixels of each patch; ignored pixels are in no class."""
    known = mask != IGNORE
    planes = F.one_hot(torch.where(known, mask, 0).long(), num_classes).permute(2, 0, 1).float() * known
    return F.adaptive_avg_pool2d(planes[None], grid)[0].flatten(1).T
