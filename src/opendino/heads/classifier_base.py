# SPDX-License-Identifier: Apache-2.0
"""What classifiers on frozen features share: images or arrays in, class names out, one file on disk.

Shapes: n items, K classes, D width, F width of a classifier's input.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import Tensor

from opendino.embed.embedder import Embedder
from opendino.errors import ConfigError, DataError
from opendino.heads.backbone import (
    Backbone,
    Rows,
    describe_images,
    feature_rows,
    image_rows,
    is_features,
    make_pooled_embedder,
    reference_to,
    reload_embedder,
)
from opendino.heads.storage import load_head, save_head

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger("opendino")
Array = npt.NDArray[Any]


class Classifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """What the classifiers share: images or arrays in, class names out, one file on disk.

    Attributes after `fit`:
        classes_: (K,) class names or numbers, sorted.
        n_features_in_: F.
        unreadable_: (name, reason) of the images that `fit` left out.
    """

    _saved: ClassVar[tuple[str, ...]] = ()
    """Constructor arguments that are kept with the head."""
    backbone: Backbone | None
    cache: str | Path | None
    device: str | None

    # --- to be written by each ------------------------------------------------------------------------------------

    @abstractmethod
    def _fit(self, rows: Rows, labels: npt.NDArray[np.int64]) -> None: ...

    @abstractmethod
    def _scores(self, rows: Rows) -> Tensor:
        """Give (n, K) probabilities."""

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def _restore(self, tensors: dict[str, Tensor]) -> None: ...

    def _state(self) -> dict[str, Any]:
        """Give what else was learned, JSON-able."""
        return {}

    def _set_state(self, state: dict[str, Any]) -> None:
        pass

    # --- scikit-learn's manners -----------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn from labelled images or features.

        Args:
            X: a folder with one folder of images per class (or whatever `open_source` reads with labels), or a list of
                images (paths, PIL images, uint8 arrays), or features (n, D).
            y: n class names or numbers; None takes the labels that a folder has.

        Raises:
            DataError: for images without classes, fewer than two classes, or features that cannot be used.
            ConfigError: for images without a backbone.
        """
        self._embedder = None if self.backbone is None else make_pooled_embedder(self.backbone, self.device)
        self._reference: dict[str, Any] | None = None
        self._images: dict[str, Any] | None = None
        rows = self._rows(X)
        names = self._labels(rows, y)
        good = rows.readable()
        self.unreadable_ = _unreadable(rows)
        for name, why in self.unreadable_:
            log.warning("Left out %s: %s", name, why)
        if not good.any():
            raise DataError(f"None of the {len(good)} images could be read; the first: {self.unreadable_[0][1]}")
        self.classes_, numbers = np.unique(names[good], return_inverse=True)
        if len(self.classes_) < 2:
            raise DataError(
                f"All images are of the class {self.classes_[0]!r}; a classifier needs at least two. Give a folder "
                "with one folder of images per class."
            )
        kept = _take(rows, good)
        if self._embedder is not None and rows.mean is not None:
            assert self.backbone is not None
            self._reference = reference_to(self.backbone, self._embedder)
            self._images = describe_images(self._embedder)
        self._fit(kept, numbers.astype(np.int64))
        return self

    def predict_proba(self, X: Any) -> Array:
        """Give (n, K) float64, the share of each class in the order of `classes_`.

        Raises:
            DataError: for images that cannot be read, naming them.
        """
        self._check_fitted()
        rows = self._rows(X)
        bad = _unreadable(rows)
        if bad:
            raise DataError(
                f"{len(bad)} of {len(rows.errors)} images cannot be read: {bad[0][0]} ({bad[0][1]})"
                f"{' and others' if len(bad) > 1 else ''}. Leave them out."
            )
        return np.asarray(self._scores(rows).double().cpu())

    def predict(self, X: Any) -> Array:
        """Give the class of each image or feature row, (n,)."""
        best = self.predict_proba(X).argmax(1)
        found: Array = self.classes_[best]
        return found

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Give the share of correct predictions, 0-1; images that cannot be read are left out with a warning."""
        self._check_fitted()
        rows = self._rows(X)
        names, good = self._labels(rows, y), rows.readable()
        for name, why in _unreadable(rows):
            log.warning("Left out %s: %s", name, why)
        if not good.any():
            raise DataError(f"None of the {len(good)} images could be read.")
        predicted = self.classes_[np.asarray(self._scores(_take(rows, good)).cpu()).argmax(1)]
        weights = None if sample_weight is None else np.asarray(sample_weight)[good]
        return float(np.average(predicted == names[good], weights=weights))

    def __sklearn_clone__(self) -> Self:
        """Make an unfitted copy that shares the frozen backbone, which may be gigabytes."""
        return type(self)(**self.get_params(deep=False))

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "classes_")

    # --- on disk --------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the head to one safetensors file, with a reference to its backbone but without the backbone."""
        self._check_fitted()
        numeric = self.classes_.dtype.kind in "iub"
        settings = {
            "params": {name: getattr(self, name) for name in self._saved},
            "classes": [int(c) if numeric else str(c) for c in self.classes_],
            "images": self._images,
            "state": self._state(),
        }
        save_head(path, type(self).__name__, self._tensors(), settings, self._reference)

    @classmethod
    def load(cls, path: str | Path, backbone: Backbone | None = None) -> Self:
        """Read what `save` wrote.

        Args:
            path: of the file.
            backbone: the one that the head was fitted on; None loads it by its reference when images come.

        Raises:
            WeightsError: for a file that is no such head, or another backbone.
        """
        tensors, described = load_head(path, cls.__name__)
        settings = described["settings"]
        head = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings["params"].items()})
        head.backbone, head.classes_, head.unreadable_ = backbone, np.array(settings["classes"]), []
        head._reference, head._images, head._embedder = described["backbone"], settings["images"], None
        if backbone is not None:
            head._embedder = (
                make_pooled_embedder(backbone)
                if head._reference is None
                else reload_embedder(backbone, head._reference, head._images or {}, str(path))
            )
        head._set_state(settings["state"])
        head._restore(tensors)
        return head

    # --- between --------------------------------------------------------------------------------------------------

    def _rows(self, x: Any) -> Rows:
        if is_features(x):
            return feature_rows(x)
        if self._embedder is None and self._reference is not None:
            self._embedder = reload_embedder(self.backbone, self._reference, self._images or {}, "This head")
        if self._embedder is None:
            raise ConfigError(
                f"{type(self).__name__} was given images but has no backbone. Give one, "
                f'{type(self).__name__}("vits14"), or an array of features (n, D).'
            )
        return image_rows(self._embedder, x, self.cache)

    def _labels(self, rows: Rows, y: Any) -> Array:
        if y is None and rows.labels is None:
            raise DataError("The images have no classes: give y, or a folder with one folder of images per class.")
        names = rows.labels if y is None else np.asarray(y.cpu() if hasattr(y, "cpu") else y)
        assert names is not None
        if names.shape != (len(rows.errors),) or names.dtype.kind == "f":
            raise DataError(
                f"y is {names.dtype} {names.shape}; {len(rows.errors)} items need as many class names or whole numbers."
            )
        return names.astype(str) if names.dtype.kind == "O" else names

    def _check_fitted(self) -> None:
        if not hasattr(self, "classes_"):
            raise ConfigError(f"This {type(self).__name__} is not fitted yet. Call fit, or load a saved one.")

    def _check_width(self, x: Array) -> None:
        if x.shape[1] != self.n_features_in_:
            raise DataError(
                f"The head was fitted on {self.n_features_in_} features and was given {x.shape[1]}. Give features of "
                "the same backbone and kind."
            )

    @property
    def _device(self) -> torch.device:
        embedder: Embedder | None = self._embedder
        return torch.device(self.device or (embedder.device if embedder is not None else "cpu"))


def _take(rows: Rows, good: npt.NDArray[np.bool_]) -> Rows:
    names = [n for n, keep in zip(rows.names, good, strict=True) if keep]
    mean = None if rows.mean is None else rows.mean[good]
    return Rows(rows.cls[good], mean, None, [None] * len(names), names)


def _unreadable(rows: Rows) -> list[tuple[str, str]]:
    return [(name, why) for name, why in zip(rows.names, rows.errors, strict=True) if why is not None]
