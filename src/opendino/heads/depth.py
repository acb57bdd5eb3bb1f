# SPDX-License-Identifier: Apache-2.0
"""A depth estimator on a frozen backbone, in scikit-learn's manners (DINOv2 §7.4: lin. 1, lin. 4 and DPT).

Shapes: H, W pixels of an image as it was given.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opendino.embed.cache import OnImages
from opendino.embed.resume import weights_fingerprint
from opendino.errors import ConfigError, DataError, OpendinoError, WeightsError
from opendino.evaluate.datasets.types import DepthSet
from opendino.evaluate.depth import DepthScore
from opendino.heads.depth_augment import AugmentedBatches
from opendino.heads.depth_data import (
    ArrayDepth,
    CachedBatches,
    KittiCropped,
    RawTokenSet,
    Truths,
)
from opendino.heads.depth_modules import DPT_CHANNELS, DepthModel, HeadKind, block_tokens, depth_blocks, make_depth_head
from opendino.heads.depth_training import DepthRecipe, OnStep, default_lr, train_head
from opendino.heads.storage import check_backbone, describe_backbone, load_head, save_head
from opendino.heads.tokens import TokenSet, Views, frozen, normalized, resize_pixels
from opendino.models.vit import VisionTransformer
from opendino.models.weights import load as load_backbone

log = logging.getLogger(__name__)

FeatureMode = Literal["cached", "augmented"]
DepthMap = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Prediction:
    """A predicted map and what it is compared with.

    Attributes:
        index: of the image in its set.
        depth: (H, W) metres, at the size of the truth.
        truth: (H, W) metres, 0 where unknown.
    """

    index: int
    depth: DepthMap
    truth: DepthMap


class DepthEstimator:
    """Metric depth from frozen patch tokens.

    Args:
        backbone: a VisionTransformer, or whatever `opendino.load` takes. It is never changed.
        head: "lin1" (last block), "lin4" (four blocks) or "dpt".
        min_depth: metres; the range of predictions and of the truth that is learnt from.
        max_depth: metres.
        size: shorter side that images are resized to, or (height, width); None leaves them, as published.
        flip: mean with the prediction of the mirrored image, as published; also adds mirrored images to `fit`.
        norm: read tokens after the final LayerNorm; the published heads read them without it.
        features: "cached" computes tokens once and trains on them; "augmented" turns, crops and colours images and runs
            the backbone at each step, as published.
        steps: updates of `fit`; 38 400 in the published training, with features="augmented" and lr=1e-4.
        batch_size: images in a step; 16 there.
        lr: highest learning rate; None is 1e-2 for linear heads and 1e-3 for DPT, which suit a short training.
        weight_decay: of AdamW.
        seed: decides `fit` together with data and settings.
        crop: (height, width) of augmented crops; None follows the data set.
        channels: width of the DPT head.
        cache: folder of the feature store; None keeps tokens in memory.
        weights: passed to `opendino.load` when `backbone` is not a VisionTransformer.
        device: None leaves the backbone where it is; for one loaded here CUDA if there is one, else the CPU.
        precision: of the backbone; see `Embedder`. Heads compute in fp32.
        batch: images in a forward pass of the backbone.
        workers: threads that read images.

    Attributes:
        model_: backbone and head as one torch module, after `fit` or `load`.
        losses_: of each step of `fit`.
        left_out_: (name, why) of images that `fit` could not use.

    Example:
        >>> estimator = DepthEstimator("vits14", head="lin4").fit(images, depths)  # doctest: +SKIP
        >>> estimator.predict(["room.jpg"])[0]  # doctest: +SKIP
    """

    KIND = "DepthEstimator"

    def __init__(
        self, backbone: VisionTransformer | str | Path, head: HeadKind = "lin4", *, min_depth: float = 1e-3,
        max_depth: float = 10.0, size: int | tuple[int, int] | None = None, flip: bool = True, norm: bool = False,
        features: FeatureMode = "cached", steps: int = 2000, batch_size: int = 16, lr: float | None = None,
        weight_decay: float = 0.01, seed: int = 0, crop: tuple[int, int] | None = None, channels: int = DPT_CHANNELS,
        cache: str | Path | None = None, weights: str | Path | None = None, device: str | torch.device | None = None,
        precision: str = "auto", batch: int = 8, workers: int | None = None,
    ) -> None:  # fmt: skip
        if features not in ("cached", "augmented"):
            raise ConfigError(f"features is {features!r}; it must be cached or augmented.")
        self.backbone, self.name = as_backbone(backbone, weights, device)
        self.blocks = depth_blocks(self.backbone.n_blocks, head)
        self.head: HeadKind = head
        self.min_depth, self.max_depth, self.size, self.flip, self.norm = min_depth, max_depth, size, flip, norm
        self.features, self.crop, self.channels = features, crop, channels
        self.recipe = DepthRecipe(steps, batch_size, default_lr(head) if lr is None else lr, weight_decay, seed)
        self.cache, self.precision, self.batch = cache, precision, batch
        self.workers = min(os.cpu_count() or 1, 8) if workers is None else workers
        self.model_: DepthModel | None = None
        self.losses_: list[float] = []
        self.left_out_: list[tuple[str, str]] = []
        self._fresh_model()  # so that wrong settings are refused here

    # --- learning ----------------------------------------------------------------------------------------------------

    def fit(
        self, data: DepthSet | Sequence[Any], depths: Sequence[Any] | None = None, *, state: str | Path | None = None,
        on_images: OnImages | None = None, on_step: OnStep | None = None,
    ) -> DepthEstimator:  # fmt: skip
        """Train the head; the same data, settings and seed give the same bits.

        Args:
            data: a DepthSet, or images (paths, PIL images, uint8 arrays (H, W, C)).
            depths: with images: their maps (H, W), metres, 0 where unknown.
            state: file that keeps the training, written every half minute; `fit` goes on from it after a kill.
            on_images: told about tokens computed: images done, errors, images in all.
            on_step: told about steps done, steps in all, and the loss.

        Raises:
            DataError: when no image has a depth to learn from.
            ConfigError: when `state` belongs to another training, or the loss is no longer finite.
        """
        data = self._as_set(data, depths)
        truths = Truths(data, self.workers)
        batches, unreadable = self._batches(data, truths, on_images)
        model = self._fresh_model()
        self.losses_ = train_head(
            model.decode_head, batches, self.recipe, self.max_depth, described=self._described(data),
            state=None if state is None else Path(state), on_step=on_step,
        )  # fmt: skip
        self.left_out_ = [(data.name(i), why) for i, why in sorted((truths.errors | unreadable).items())]
        self.left_out_ += [(data.name(i), "no pixel with a depth in the range") for i in truths.empty]
        self.model_ = model
        return self

    def _batches(
        self, data: DepthSet, truths: Truths, on_images: OnImages | None
    ) -> tuple[CachedBatches | AugmentedBatches, dict[int, str]]:
        recipe = self.recipe
        if self.features == "cached":
            tokens = self._tokens(data).compute(on_images)
            usable = {v.image for v in tokens.views} & set(truths.shapes)
            _check_usable(data, truths, usable)
            return CachedBatches(tokens, truths, recipe.batch_size, recipe.seed), tokens.errors
        _check_usable(data, truths, set(truths.shapes))
        drawn = AugmentedBatches(
            self.backbone, self.blocks, self.norm, truths, sorted(truths.shapes), recipe.batch_size, recipe.seed,
            size=self.size, crop=self.crop, precision=self.precision, workers=self.workers,
        )  # fmt: skip
        return drawn, drawn.errors

    # --- predicting --------------------------------------------------------------------------------------------------

    def predict(self, images: Sequence[Any]) -> list[DepthMap]:
        """Give a depth map (H, W), float32 metres, for each image, at its own size.

        Args:
            images: paths, PIL images or uint8 arrays (H, W, C).

        Raises:
            DataError: for an image that cannot be read.
        """
        if isinstance(images, str | Path | np.ndarray):
            raise DataError(f"predict was given one {type(images).__name__}; it needs a list of images: [image].")
        data, model = ArrayDepth(list(images), None), self._fitted()
        maps = []
        for i in range(len(data)):
            image = data.image(i)
            pixels = normalized(resize_pixels(image, self._views().resized(*image.shape[-2:])), self.backbone)
            views = torch.stack([pixels, pixels.flip(-1)] if self.flip else [pixels])
            where = self.backbone.cls_token
            with frozen(self.backbone, self.precision):
                tokens = block_tokens(self.backbone, views.to(where.device, where.dtype), self.blocks, self.norm)
            maps.append(self._decode(model, *tokens, (image.shape[-2], image.shape[-1])))
        return maps

    def predictions(
        self, data: DepthSet, on_images: OnImages | None = None, errors: dict[int, str] | None = None
    ) -> Iterator[Prediction]:
        """Predict a set's images one by one, with tokens from the store.

        Args:
            data: the set.
            on_images: told about tokens computed.
            errors: gets index → why of images or depth maps that cannot be read; they are left out.
        """
        model, found = self._fitted(), {} if errors is None else errors
        tokens = self._tokens(data).compute(on_images)
        found |= tokens.errors
        rows: dict[int, list[int]] = {}
        for row, view in enumerate(tokens.views):
            rows.setdefault(view.image, []).append(row)
        for index, mine in rows.items():
            try:
                truth = data.depth(index).float()
            except (OpendinoError, OSError) as error:
                found[index] = str(error) or type(error).__name__
                continue
            patches, cls = (t.to(self.backbone.cls_token.device) for t in tokens.tokens(mine))
            parts = list(patches.chunk(len(self.blocks), 1)), list(cls.chunk(len(self.blocks), 1))
            depth = self._decode(model, *parts, (truth.shape[0], truth.shape[1]))
            yield Prediction(index, depth, truth.numpy())

    def score(
        self, data: DepthSet | Sequence[Any], depths: Sequence[Any] | None = None, *,
        on_images: OnImages | None = None, on_prediction: Callable[[Prediction, dict[str, float] | None], None] = (
            lambda prediction, errors: None
        ),
    ) -> dict[str, Any]:  # fmt: skip
        """Give the errors of `opendino.evaluate.depth` on a set, in its range and crop.

        Args:
            data: a DepthSet, or images.
            depths: with images: their maps.
            on_images: told about tokens computed.
            on_prediction: gets each prediction and its errors (None without a valid pixel).

        Returns:
            `DepthScore.result` with "unreadable", a number.

        Raises:
            DataError: when no image could be scored.
        """
        data = self._as_set(data, depths)
        score, errors = DepthScore(data.min_depth, data.max_depth, data.crop), dict[int, str]()
        for prediction in self.predictions(data, on_images, errors):
            on_prediction(prediction, score.add(prediction.depth, prediction.truth, data.name(prediction.index)))
        for index, why in sorted(errors.items()):
            log.warning("Left out %s: %s", data.name(index), why)
        if len(errors) == len(data):
            raise DataError(f"None of {len(data)} images of {data.root} could be read; the first: {errors[0]}")
        return score.result() | {"unreadable": len(errors)}

    def _decode(self, model: DepthModel, patches: list[Tensor], cls: list[Tensor], size: tuple[int, int]) -> DepthMap:
        """Turn the tokens of an image, and of its mirror image if there is one, into a map of (height, width)."""
        with torch.no_grad():
            depth = model.resized(model.decode_head(patches, cls), size)[:, 0]
        mean = depth[0] if len(depth) == 1 else (depth[0] + depth[1].flip(-1)) / 2
        return mean.float().cpu().numpy()

    # --- keeping -----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the head, its settings and a reference to the backbone as one safetensors file."""
        head = self._fitted().decode_head.state_dict()
        save_head(path, self.KIND, head, self._settings(), describe_backbone(self.backbone, self.name))

    @classmethod
    def load(
        cls, path: str | Path, backbone: VisionTransformer | str | Path | None = None, **settings: Any
    ) -> DepthEstimator:
        """Read what `save` wrote.

        Args:
            path: of the file.
            backbone: the one that it was fitted on; None loads it by the name in the file.
            settings: of the constructor that do not belong to the head: cache, weights, device, precision, batch,
                workers.

        Raises:
            WeightsError: for a damaged file, another kind of head, or another backbone.
        """
        tensors, described = load_head(path, cls.KIND)
        found, reference = described["settings"], described["backbone"]
        size = found["size"]
        made = cls(
            reference["name"] if backbone is None else backbone, found["head"], min_depth=found["min_depth"],
            max_depth=found["max_depth"], size=tuple(size) if isinstance(size, list) else size, flip=found["flip"],
            norm=found["norm"], channels=found["channels"], **settings,
        )  # fmt: skip
        check_backbone(made.backbone, reference, f"The head {path}")
        made.blocks = tuple(found["blocks"])
        return made.with_head(tensors, str(path))

    def with_head(self, tensors: dict[str, Tensor], origin: str) -> DepthEstimator:
        """Take a head's weights, strictly.

        Args:
            tensors: by the names of the head's modules.
            origin: for messages.

        Raises:
            WeightsError: naming tensors that are missing, unknown or of another shape.
        """
        model = self._fresh_model()
        wanted = model.decode_head.state_dict()
        missing, unknown = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
        shaped = [
            f"{k} {tuple(tensors[k].shape)} instead of {tuple(wanted[k].shape)}"
            for k in sorted(set(wanted) & set(tensors)) if tensors[k].shape != wanted[k].shape
        ]  # fmt: skip
        if missing or unknown or shaped:
            parts = (("missing", missing), ("unknown", unknown), ("of another shape", shaped))
            what = "; ".join(f"{word}: {', '.join(names[:4])}" for word, names in parts if names)
            raise WeightsError(
                f"{origin} does not fit a {self.head} depth head on {self.name} (width {self.backbone.embed_dim}): "
                f"{what}. Give the head that was made for this backbone."
            )
        model.decode_head.load_state_dict({k: v.float() for k, v in tensors.items()})
        self.model_ = model
        return self

    # --- inside ------------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {
            "head": self.head, "min_depth": self.min_depth, "max_depth": self.max_depth,
            "size": list(self.size) if isinstance(self.size, tuple) else self.size, "flip": self.flip,
            "norm": self.norm, "blocks": list(self.blocks), "channels": self.channels,
        }  # fmt: skip

    def described(self, data: DepthSet) -> str:
        """Give a name (hexadecimal) of the training that `fit` does on a set: settings, weights and list of images."""
        return hashlib.sha256(repr((self.recipe, sorted(self._described(data).items()))).encode()).hexdigest()[:24]

    def _described(self, data: DepthSet) -> dict[str, Any]:
        names = hashlib.sha256("\n".join(data.name(i) for i in range(len(data))).encode()).hexdigest()
        return self._settings() | {
            "weights_sha256": weights_fingerprint(self.backbone), "features": self.features, "images": names,
            "crop": list(self.crop) if self.crop else None, "precision": self.precision,
        }  # fmt: skip

    def _fresh_model(self) -> DepthModel:
        device = self.backbone.cls_token.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            head = make_depth_head(self.head, self.backbone.embed_dim, self.min_depth, self.max_depth, self.channels)
        model = DepthModel(self.backbone, head.to(device), self.blocks, self.min_depth, self.max_depth, norm=self.norm)
        return model.eval()

    def _fitted(self) -> DepthModel:
        if self.model_ is None:
            raise ConfigError("This DepthEstimator has no head yet. Call fit first, or load one.")
        return self.model_

    def _views(self) -> Views:
        return Views(size=self.size, flip=self.flip)

    def _tokens(self, data: DepthSet) -> TokenSet:
        make = TokenSet if self.norm else RawTokenSet
        return make(
            self.backbone, data, self.blocks, self._views(), self.cache, batch_size=self.batch,
            precision=self.precision, workers=self.workers,
        )  # fmt: skip

    def _as_set(self, data: DepthSet | Sequence[Any], depths: Sequence[Any] | None) -> DepthSet:
        if isinstance(data, DepthSet):
            return KittiCropped(data) if data.crop == "garg" and not isinstance(data, KittiCropped) else data
        if depths is None:
            raise DataError("Images were given without depths; give fit(images, depths), or a DepthSet.")
        return ArrayDepth(data, depths, min_depth=self.min_depth, max_depth=self.max_depth)


def as_backbone(
    backbone: VisionTransformer | str | Path, weights: str | Path | None, device: str | torch.device | None
) -> tuple[VisionTransformer, str]:
    """Load a backbone unless it is one, and give it with its name."""
    if isinstance(backbone, VisionTransformer):
        return backbone if device is None else backbone.to(device), backbone.config.arch
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load_backbone(backbone, weights=weights, device=where), str(backbone)


def _check_usable(data: DepthSet, truths: Truths, usable: set[int]) -> None:
    if usable:
        return
    raise DataError(
        f"None of the {len(data)} images of {data.root} can be learnt from: {len(truths.empty)} depth maps have no "
        f"pixel above 0 and up to {data.max_depth:g} m, {len(truths.errors)} cannot be read. Depth files hold 0 where "
        "depth is unknown: check that they are not empty, and their unit (scale in depth.json) and range."
    )
