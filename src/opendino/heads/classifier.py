# SPDX-License-Identifier: Apache-2.0
"""Classifiers on frozen features as objects: `KNN`, `Logistic`, `Linear`.

    head = Logistic("vits14").fit("photos/")           # one folder of images per class
    head = Logistic().fit(features, labels)            # or arrays, without a backbone
    head.save("photos.safetensors"); Logistic.load("photos.safetensors").predict(["new.jpg"])

Shapes: n items, K classes, D width, F width of a classifier's input.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from opendino.errors import ConfigError
from opendino.evaluate.knn import vote
from opendino.evaluate.linear import AVERAGES, BATCH, BLOCKS, RATES, FixedBatches, grid_settings, train_grid
from opendino.evaluate.linear_grid import Kind, LinearModel
from opendino.evaluate.logistic import DEFAULT_C, LogisticRegression, choose_c, fit_logistic, hold_out
from opendino.evaluate.neighbours import nearest
from opendino.heads.backbone import Backbone, Rows, describe_images, make_pooled_embedder, reference_to
from opendino.heads.classifier_base import Array, Classifier

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger("opendino")

CHUNK = 1024
"""Images compared with all training images at once."""


class KNN(Classifier):
    """Weighted vote of the nearest training images (cosine of final cls tokens).

    Args:
        backbone: a model name, a path, what `opendino.load` gives, or an `opendino.Embedder`; None for arrays.
        k: neighbours.
        temperature: of the softmax over similarities.
        cache: folder where features of image files are kept; None keeps nothing.
        device: where to compute; default: the backbone's.
    """

    _saved = ("k", "temperature")

    def __init__(
        self,
        backbone: Backbone | None = None,
        *,
        k: int = 20,
        temperature: float = 0.07,
        cache: str | Path | None = None,
        device: str | None = None,
    ) -> None:
        self.backbone, self.k, self.temperature, self.cache, self.device = backbone, k, temperature, cache, device

    def _fit(self, rows: Rows, labels: npt.NDArray[np.int64]) -> None:
        if self.k < 1 or self.temperature <= 0:
            raise ConfigError(f"k is {self.k} and temperature {self.temperature}; both must be positive.")
        self.features_, self.labels_ = np.ascontiguousarray(rows.cls[:, -1]), labels
        self.n_features_in_ = self.features_.shape[1]

    def _scores(self, rows: Rows) -> Tensor:
        x = rows.cls[:, -1]
        self._check_width(x)
        train = F.normalize(torch.from_numpy(self.features_).to(self._device), dim=1)
        labels, votes = torch.from_numpy(self.labels_).to(self._device), []
        for part in torch.from_numpy(np.ascontiguousarray(x)).split(CHUNK):
            query = F.normalize(part.to(self._device), dim=1)
            similarity, index = nearest(query, train, min(self.k, len(train)))
            votes.append(vote(similarity, labels[index], len(self.classes_), self.temperature))
        return torch.cat(votes)

    def _tensors(self) -> dict[str, Tensor]:
        return {"features": torch.from_numpy(self.features_), "labels": torch.from_numpy(self.labels_)}

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        self.features_, self.labels_ = tensors["features"].numpy(), tensors["labels"].numpy()
        self.n_features_in_ = self.features_.shape[1]


class _WithWeights(Classifier):
    """A head of one matrix; `coef_` (K, F) and `intercept_` (K,)."""

    coef_: Array
    intercept_: Array

    def _inputs(self, rows: Rows) -> Array:
        return rows.cls[:, -1]

    def decision_function(self, X: Any) -> Array:
        """Give (n, K) logits."""
        self._check_fitted()
        return np.asarray(self._logits(self._rows(X)))

    def _logits(self, rows: Rows) -> Tensor:
        x = self._inputs(rows)
        self._check_width(x)
        weight, bias = torch.from_numpy(self.coef_), torch.from_numpy(self.intercept_)
        return torch.from_numpy(np.ascontiguousarray(x)).to(weight) @ weight.T + bias

    def _scores(self, rows: Rows) -> Tensor:
        return self._logits(rows).softmax(1)

    def _tensors(self) -> dict[str, Tensor]:
        return {"weight": torch.from_numpy(self.coef_), "bias": torch.from_numpy(self.intercept_)}

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        self._set(tensors["weight"], tensors["bias"])

    def _wrap(self, weight: Tensor, bias: Tensor, classes: Sequence[Any], name: str | None) -> None:
        """Take up a classifier that was fitted elsewhere."""
        self.classes_, self.unreadable_ = np.asarray(classes), []
        self._embedder, self._reference, self._images = None, None, None
        if self.backbone is not None:
            self._embedder = make_pooled_embedder(self.backbone, self.device)
            self._reference = reference_to(self.backbone, self._embedder, name)
            self._images = describe_images(self._embedder)
        self._set(weight, bias)

    def _set(self, weight: Tensor, bias: Tensor) -> None:
        self.coef_ = weight.detach().cpu().contiguous().numpy()
        self.intercept_ = bias.detach().cpu().contiguous().numpy()
        self.n_features_in_ = self.coef_.shape[1]


class Logistic(_WithWeights):
    """Logistic regression on final cls tokens, the classifier of scikit-learn's LogisticRegression at the same C.

    Args:
        backbone: a model name, a path, what `opendino.load` gives, or an `opendino.Embedder`; None for arrays.
        C: inverse strength of the penalty; None chooses from 45 values, 1e-6 to 1e5, on a tenth of each class.
        seed: of that tenth.
        cache: folder where features of image files are kept; None keeps nothing.
        device: where to compute; default: the backbone's.

    Attributes after `fit`: C_, the value used; curve_, (C, top-1 %) on the held-out tenth.
    """

    _saved = ("C", "seed")

    def __init__(
        self,
        backbone: Backbone | None = None,
        *,
        C: float | None = None,
        seed: int = 0,
        cache: str | Path | None = None,
        device: str | None = None,
    ) -> None:
        self.backbone, self.C, self.seed, self.cache, self.device = backbone, C, seed, cache, device

    def _fit(self, rows: Rows, labels: npt.NDArray[np.int64]) -> None:
        x, c = rows.cls[:, -1], self.C
        self.curve_: list[tuple[float, float]] = []
        if c is None:
            choice = choose_c(x, labels, DEFAULT_C, seed=self.seed, device=self._device)
            c, self.curve_ = choice.c, choice.curve
            if choice.edge:
                log.warning("C = %g is the %s value of the grid; give C to try others.", c, choice.edge)
        model = fit_logistic(x, labels, c, device=self._device)
        self.C_ = c
        self._set(model.weight, model.bias)

    @classmethod
    def from_model(
        cls,
        model: LogisticRegression,
        classes: Sequence[Any],
        backbone: Backbone | None = None,
        name: str | None = None,
    ) -> Self:
        """Wrap a fitted classifier; arguments as in `Linear.from_model`."""
        head = cls(backbone, C=model.c)
        head.C_, head.curve_ = model.c, []
        head._wrap(model.weight, model.bias, classes, name)
        return head

    def _state(self) -> dict[str, Any]:
        return {"C": self.C_, "curve": self.curve_}

    def _set_state(self, state: dict[str, Any]) -> None:
        self.C_, self.curve_ = state["C"], [tuple(point) for point in state["curve"]]


class Linear(_WithWeights):
    """The best classifier of the published grid: SGD on cls tokens of 1 or 4 blocks, without or with the mean patch.

    The grid is trained on nine tenths of each class, the winner on the held-out tenth is trained again on all. Arrays
    are one kind of input, so only the learning rate is chosen then.

    Args:
        backbone: a model name, a path, what `opendino.load` gives, or an `opendino.Embedder`; None for arrays.
        blocks: numbers of last blocks to try.
        averages: without, with the mean patch token.
        rates: learning rates to try, for a batch of 256.
        steps: of SGD; None is 100 passes, at least 500 and at most 12 500.
        batch_size: items in a step.
        seed: of the held-out tenth, first weights and order.
        cache: folder where features of image files are kept; None keeps nothing.
        device: where to compute; default: the backbone's.

    Attributes after `fit`: kind_ (blocks, average) or None for arrays; rate_; curve_, (name, top-1 %) of the grid.
    """

    _saved = ("blocks", "averages", "rates", "steps", "batch_size", "seed")

    def __init__(
        self,
        backbone: Backbone | None = None,
        *,
        blocks: Sequence[int] = BLOCKS,
        averages: Sequence[bool] = AVERAGES,
        rates: Sequence[float] = RATES,
        steps: int | None = None,
        batch_size: int = BATCH,
        seed: int = 0,
        cache: str | Path | None = None,
        device: str | None = None,
    ) -> None:
        self.backbone, self.blocks, self.averages, self.rates = backbone, blocks, averages, rates
        self.steps, self.batch_size, self.seed, self.cache, self.device = steps, batch_size, seed, cache, device

    def _fit(self, rows: Rows, labels: npt.NDArray[np.int64]) -> None:
        given = rows.mean is None
        mean = rows.cls[:, -1, :0] if rows.mean is None else rows.mean
        blocks, averages = ((1,), (False,)) if given else (tuple(self.blocks), tuple(self.averages))
        train, held_out = hold_out(labels, 0.1, self.seed)
        models = self._train(rows.cls[train], mean[train], labels[train], blocks, averages, self.rates)
        if len(models) > 1:
            right = labels[held_out]
            top1 = [
                100 * float(np.mean(m.logits(rows.cls[held_out], mean[held_out]).argmax(1).cpu().numpy() == right))
                for m in models
            ]
            self.curve_ = [(m.name, share) for m, share in zip(models, top1, strict=True)]
            best = models[int(np.argmax(top1))]
        else:
            self.curve_, best = [], models[0]
        kind = best.kind
        [final] = self._train(rows.cls, mean, labels, (kind.blocks,), (kind.average,), (best.rate,))
        self.kind_, self.rate_ = None if given else kind, best.rate
        self._set(final.weight, final.bias)

    def _train(
        self, cls: Array, mean: Array, labels: Array, blocks: Sequence[int], averages: Sequence[bool],
        rates: Sequence[float],
    ) -> list[LinearModel]:  # fmt: skip
        settings = grid_settings(
            len(labels), cls.shape[1], blocks=blocks, averages=averages, rates=rates, steps=self.steps,
            batch_size=self.batch_size, seed=self.seed,
        )  # fmt: skip
        num_classes = len(self.classes_)
        batches = FixedBatches(cls, mean, labels)
        return train_grid(batches, settings, num_classes, dim=cls.shape[2], device=self._device).models

    @classmethod
    def from_model(
        cls, model: LinearModel, classes: Sequence[Any], backbone: Backbone | None = None, name: str | None = None
    ) -> Self:
        """Wrap a trained classifier.

        Args:
            model: it.
            classes: names in its order.
            backbone: whose features it takes.
            name: what `opendino.load` takes for that backbone, if it is not in `backbone`.
        """
        head = cls(backbone, blocks=(model.kind.blocks,), averages=(model.kind.average,), rates=(model.rate,))
        head.kind_, head.rate_, head.curve_ = model.kind, model.rate, []
        head._wrap(model.weight, model.bias, classes, name)
        return head

    def _inputs(self, rows: Rows) -> Array:
        if self.kind_ is None or rows.mean is None:
            return rows.cls[:, -1]
        return np.asarray(self.kind_.features(torch.from_numpy(rows.cls), torch.from_numpy(rows.mean)))

    def _state(self) -> dict[str, Any]:
        return {"kind": None if self.kind_ is None else list(self.kind_), "rate": self.rate_, "curve": self.curve_}

    def _set_state(self, state: dict[str, Any]) -> None:
        self.kind_ = None if state["kind"] is None else Kind(*state["kind"])
        self.rate_, self.curve_ = state["rate"], [tuple(point) for point in state["curve"]]
