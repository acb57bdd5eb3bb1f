# SPDX-License-Identifier: Apache-2.0
"""Figures that tell a healthy run from a collapsing one.

All of them are of one batch, and in a run of several processes of the rows that the calling process holds: the main
process logs its own, without a collective. `UpdateNorm` is the exception and says so.

Shapes: n samples (2B global crops, all first crops of a micro-batch before its second ones), K prototypes, D width,
N = 1 + R + P tokens (cls, registers, patches).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opendino.distributed.collectives import all_sum
from opendino.distributed.sharding import local

OUTLIER_FACTOR = 4.0
"""A token is an outlier when its norm exceeds this multiple of the median of its kind. The artefact tokens of Darcet et
al. 2023 (§2) have about ten times the norm of the rest; 4 lies well between the two."""
NEAR_DUPLICATE = 0.05
"""Distance of unit vectors below which two cls tokens count as equal: a cosine above 0.99875."""


@torch.no_grad()
def entropy(probabilities: Tensor) -> float:
    """Mean entropy of target rows (n, K), nats; ln K when the teacher is undecided, 0 when it is certain."""
    return float(-torch.xlogy(probabilities, probabilities).sum(1).mean())


@torch.no_grad()
def prototypes_won(probabilities: Tensor) -> int:
    """Number of prototypes that are the largest entry of at least one of n target rows (n, K)."""
    return int(probabilities.argmax(1).unique().numel())


@torch.no_grad()
def prototype_use(probabilities: Tensor) -> float:
    """Share of the most prototypes that n rows can win which do win one; 1/min(n, K) after a collapse."""
    return prototypes_won(probabilities) / min(probabilities.shape)


@torch.no_grad()
def rank_me(features: Tensor) -> float:
    """Effective rank of features (n, D): exponential of the entropy of the singular values (Garrido et al. 2023)."""
    values = torch.linalg.svdvals(features.float())
    share = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


@torch.no_grad()
def neighbour_figures(features: Tensor) -> dict[str, float]:
    """Give how far apart cls tokens (n, D) of different images lie.

    Returns:
        "koleo_distance": mean distance to the nearest neighbour of L2-normalised rows, 0 to 2.
        "near_duplicates": share of rows whose nearest neighbour is closer than `NEAR_DUPLICATE`.
        Nothing for fewer than two rows.
    """
    if len(features) < 2:
        return {}
    x = F.normalize(features.float(), dim=1)
    nearest = (x @ x.T).fill_diagonal_(-2).argmax(1)
    distance = (x - x[nearest]).norm(dim=1)  # from the difference: 2 − 2·cos loses small distances to rounding
    return {
        "koleo_distance": float(distance.mean()),
        "near_duplicates": float((distance < NEAR_DUPLICATE).float().mean()),
    }


@torch.no_grad()
def norm_figures(token_norms: Tensor, num_register_tokens: int = 0) -> dict[str, float]:
    """Give how far the largest norms stand out, for cls and patch tokens apart (Darcet et al. 2023, §2).

    Args:
        token_norms: (n, N), norms of the last block's output before the final LayerNorm, which would hide them; from
            the function of this name.
        num_register_tokens: R; registers may be large and are left out.

    Returns:
        "KIND_norm_outliers", share of the tokens above `OUTLIER_FACTOR` × median, and "KIND_norm_max", the largest norm
        as a multiple of the median, for KIND cls and patch.
    """
    kinds = {"cls": token_norms[:, 0], "patch": token_norms[:, 1 + num_register_tokens :].flatten()}
    figures = {}
    for kind, norms in kinds.items():
        norms = norms.float()
        relative = norms / norms.median().clamp_min(1e-12)
        figures[f"{kind}_norm_outliers"] = float((relative > OUTLIER_FACTOR).float().mean())
        figures[f"{kind}_norm_max"] = float(relative.max())
    return figures


@torch.no_grad()
def token_norms(backbone: nn.Module, crops: Tensor, limit: int = 32) -> Tensor:
    """Give the norms (n, N) of all tokens of up to `limit` crops for `norm_figures`, before the final LayerNorm.

    A forward pass of its own, for log steps: the training pass computes only the tokens that a loss reads. In a run of
    several processes whose parameters are sharded every process must call it, because its forward gathers them.
    """
    features: dict[str, Tensor] = backbone.forward_features(crops[:limit])  # type: ignore[operator]
    norms: Tensor = features["x_prenorm"].float().norm(dim=-1)
    return norms


def first_crops(rows: Tensor, micro_batches: int = 1) -> Tensor:
    """Keep one row an image: (2B, …), micro-batch after micro-batch, each first crops before second → (B, …)."""
    by_crop: Tensor = rows.unflatten(0, (micro_batches, 2, -1))  # (micro-batches, crops, images, …)
    return by_crop[:, 0].flatten(0, 1)


def health(
    cls_targets: Tensor | None,
    features: Tensor,
    *,
    token_norms: Tensor | None = None,
    num_register_tokens: int = 0,
    micro_batches: int = 1,
) -> dict[str, float]:
    """Give the figures of one batch, from what the teacher made of the global crops.

    Args:
        cls_targets: (2B, K), micro-batch after micro-batch; None where there are no prototypes.
        features: cls tokens, (2B, D), in the same order.
        token_norms: (any, N) for the norm outliers, see `norm_figures`; None leaves them out.
        num_register_tokens: R of the backbone.
        micro_batches: how many the batch was cut into.
    """
    figures: dict[str, float] = {}
    if cls_targets is not None:
        figures = {
            "teacher_entropy": entropy(cls_targets),
            "prototype_use": prototype_use(cls_targets),
            "prototypes_won": prototypes_won(cls_targets),
        }
    figures |= {"feature_rank": rank_me(features), **neighbour_figures(first_crops(features, micro_batches))}
    return figures if token_norms is None else figures | norm_figures(token_norms, num_register_tokens)


class UpdateNorm:
    """How far one optimiser step moves each network, relative to its size: ‖Δθ‖ / ‖θ‖ before the step.

    `before()` copies the parameters, so use it at log steps only: a copy and a pass over the parameters, and the memory
    of one copy until `after()`.

    The squared norms are summed over the processes of a run: one small collective in `after`, so every process must
    call it at the same steps. That is right both for sharded parameters, whose parts add up, and for replicated ones,
    where both norms grow alike and the ratio stays.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> norm = UpdateNorm({"layer": layer})
        >>> norm.before()
        >>> with torch.no_grad():
        ...     for p in layer.parameters():
        ...         _ = p.mul_(1.5)
        >>> round(norm.after()["update_norm_layer"], 3)
        0.5
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        self.networks = networks
        self._old: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def before(self) -> None:
        """Remember the parameters; call right before `optimizer.step()`."""
        self._old = {k: [p.clone() for p in _local(m.parameters())] for k, m in self.networks.items()}

    @torch.no_grad()
    def after(self) -> dict[str, float]:
        """Give "update_norm_NETWORK" and forget the copy; an empty dict without a `before`."""
        figures = {}
        for name, old in self._old.items():
            delta = torch._foreach_sub(_local(self.networks[name].parameters()), old)
            squares = all_sum(torch.stack([_squared_norm(delta), _squared_norm(old)]))
            figures[f"update_norm_{name}"] = float((squares[0] / squares[1].clamp_min(1e-30)).sqrt())
        self._old = {}
        return figures


def _local(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Give each parameter's part on this process: the shard of a DTensor, the whole of any other."""
    return [local(p).detach() for p in parameters]


def _squared_norm(tensors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).square().sum()
