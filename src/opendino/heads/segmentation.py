# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation from frozen patch tokens: BatchNorm and a 1×1 convolution, as published.

Shapes: B images, L blocks, D width of the backbone, C classes, (h, w) patch grid, H × W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opendino.embed.cache import FeatureStore
from opendino.embed.resume import weights_fingerprint
from opendino.errors import ConfigError, DataError
from opendino.evaluate.datasets.types import SegmentationSet
from opendino.evaluate.segmentation import Counts, PixelConfusion, SegmentationScores, scores_of
from opendino.heads.augment import Augmentation
from opendino.heads.segmentation_head import Protocol, SegmentationHead, changed, named, protocol_from
from opendino.heads.segmentation_samples import (
    AugmentedSamples,
    CachedSamples,
    GivenMasks,
    MaskWindows,
    as_pixels,
)
from opendino.heads.sliding import image_probabilities, merge_windows
from opendino.heads.storage import check_backbone, describe_backbone, load_head, save_head
from opendino.heads.tokens import TokenSet, Views, frozen, last_blocks, patch_tokens
from opendino.heads.training import Training, fingerprint, train_head
from opendino.models.vit import VisionTransformer

Features = Literal["cached", "augmented"]
OnProgress = Callable[[str, int, int, str], None]
"""Called with the stage ("masks", "tokens", "train", "score"), what is done, what there is in all, and a remark."""
LOSS_SCALE = 4
"""Finer than the patches and not the image: as good and a tenth of the time (docs/evaluation-segmentation.md)."""
KEEP_SECONDS = 60.0


@dataclass(frozen=True)
class Evaluation:
    """What a segmenter reaches on a set.

    Attributes:
        scores: over all pixels.
        images: indices of the images that were scored.
        image_miou: mIoU of each of them alone, percent; NaN where no pixel counts.
        errors: index of an image → why it cannot be read.
    """

    scores: SegmentationScores
    images: list[int]
    image_miou: list[float]
    errors: dict[int, str]


class Segmenter:
    """A linear segmentation head on a frozen backbone, in scikit-learn's manners.

    Args:
        backbone: a VisionTransformer, or whatever `opendino.load` takes.
        protocol: "linear", "ms" (+ms of the paper) or a Protocol.
        blocks: in place of the protocol's.
        size: in place of the protocol's; crop and stride change in proportion.
        scales: in place of the protocol's.
        flip: in place of the protocol's.
        training: steps, batch size, rates, seed.
        features: "cached" computes the tokens of fixed windows once and trains on them: no random scale, crop or
            colours. "augmented" is the published recipe: each step goes through the backbone.
        mirror: with cached features, train on the mirrored images too, which doubles the work of the backbone.
        loss_scale: the loss compares logits and mask on a grid this many times finer than the patches.
        balance: 0 is the published head. With much background, 0.25 to 0.5 favours rare classes, as mIoU does: that
            times the log of a class's share of the training pixels is taken from its logit after training.
        cache: folder of the token stores; None keeps tokens in memory while fitting.
        batch_size: windows in one forward pass of the backbone.
        precision: of the backbone, as for `Embedder`.
        workers: threads that read images.
        name: of the backbone in saved files; default: what was given, if it was a name.

    Attributes:
        head: the fitted SegmentationHead.
        classes: names.
        class_pixels: (C,) training pixels of each class; None for a head from elsewhere.
        losses: of every training step.
        errors: index of a training image → why it cannot be read.

    Example:
        >>> Segmenter("vits14").fit(images, masks).predict(["a.jpg"])[0].shape  # doctest: +SKIP
    """

    head: SegmentationHead
    classes: tuple[str, ...]
    class_pixels: Counts | None
    losses: list[float]
    errors: dict[int, str]

    def __init__(
        self,
        backbone: VisionTransformer | str | Path,
        protocol: str | Protocol = "linear",
        *,
        blocks: int | None = None,
        size: int | None = None,
        scales: Sequence[float] | None = None,
        flip: bool | None = None,
        training: Training | None = None,
        features: Features = "cached",
        mirror: bool = False,
        loss_scale: int = LOSS_SCALE,
        balance: float = 0.0,
        cache: str | Path | None = None,
        batch_size: int = 8,
        precision: str = "auto",
        workers: int | None = None,
        name: str | None = None,
    ) -> None:
        self.model = _load(backbone)
        self.name = name or (str(backbone) if not isinstance(backbone, VisionTransformer) else "a model in memory")
        self.protocol = changed(named(protocol), blocks=blocks, size=size, scales=scales, flip=flip)
        self.training = training or Training()
        if features not in ("cached", "augmented"):
            raise ConfigError(f"features is {features!r}; it must be cached or augmented.")
        if not 1 <= loss_scale <= self.model.patch_size:
            raise ConfigError(f"loss_scale is {loss_scale}; give 1 to the patch size of {self.model.patch_size}.")
        if not 0 <= balance <= 1:
            raise ConfigError(f"balance is {balance}; give 0 (the published head) to 1.")
        self.features, self.mirror, self.loss_scale, self.balance = features, mirror, loss_scale, balance
        self.cache, self.batch_size, self.precision, self.workers = cache, batch_size, precision, workers
        self.blocks = last_blocks(self.model, self.protocol.blocks)

    @property
    def fitted(self) -> bool:
        """Whether there is a head."""
        return hasattr(self, "head")

    def fit(
        self,
        data: SegmentationSet | Sequence[Any],
        masks: Sequence[Any] | None = None,
        *,
        classes: Sequence[str] | None = None,
        state: str | Path | None = None,
        on_progress: OnProgress | None = None,
    ) -> Segmenter:
        """Train a fresh head.

        Args:
            data: a SegmentationSet, or images: paths, PIL images or uint8 arrays (H, W, C).
            masks: with images: paths or integer arrays (H, W) of class indices, 255 where a pixel does not count.
            classes: with images: names.
            state: file from which a killed training goes on; default: one in the cache, if there is a cache.
            on_progress: told about progress.

        Raises:
            DataError: for a mask with unknown values or another size than its image, or no readable image.
        """
        tell = on_progress or _silent
        given = data if isinstance(data, SegmentationSet) else GivenMasks(data, masks or [], classes)
        tokens = self._token_set(given, self.protocol.views(flip=self.mirror))
        windows = MaskWindows(
            given, tokens.how if self.features == "cached" else None, tokens.grid, self.loss_scale, tokens.workers,
            lambda done, total: tell("masks", done, total, ""),
        )  # fmt: skip
        samples: CachedSamples | AugmentedSamples
        if self.features == "cached":
            tokens.compute(lambda done, errors, total: tell("tokens", done, total, _unreadable(errors)))
            samples, self.errors = CachedSamples(tokens, windows, given, self.training), tokens.errors
        else:
            way = Augmentation(self.protocol.size, self.protocol.crop, self.protocol.ratios)
            samples = AugmentedSamples(
                self.model, given, self.blocks, way, self.training, self.loss_scale, masks=windows,
                precision=self.precision, workers=tokens.workers,
            )  # fmt: skip
            self.errors = samples.errors
        head = SegmentationHead(len(self.blocks) * self.model.embed_dim, len(given.classes), self.training.seed)
        head = head.to(self.model.cls_token.device)
        key = fingerprint(samples.key, weights_fingerprint(self.model), self._settings(), list(given.classes))
        if state is None and self.cache is not None:
            kept = fingerprint(key, asdict(self.training))
            state = Path(self.cache).expanduser() / "heads" / f"{kept[:24]}.pt"
        self.losses = train_head(
            head, lambda step: samples.loss(head, step), self.training, state=state, key=key,
            on_step=lambda done, total, loss: tell("train", done, total, f"loss {loss:.3f}"),
        )  # fmt: skip
        head.balance(windows.pixels, self.balance)
        head.silence(windows.pixels == 0)
        return self.adopt(head, given.classes, windows.pixels)

    def adopt(self, head: SegmentationHead, classes: Sequence[str], class_pixels: Counts | None = None) -> Segmenter:
        """Take a head that was made elsewhere."""
        self.head = head.to(self.model.cls_token.device).eval()
        self.classes, self.class_pixels = tuple(classes), class_pixels
        return self

    def predict(self, images: Sequence[Any]) -> list[npt.NDArray[np.uint8]]:
        """Give the class of every pixel, uint8 (H, W) an image; paths, PIL images or uint8 arrays (H, W, C)."""
        if isinstance(images, str | Path | np.ndarray):
            raise DataError(f"predict was given one {type(images).__name__}; it needs a list of images: [image].")
        found = (self.probabilities(image).argmax(0) for image in images)
        return [f.astype(np.uint8) for f in found]

    def probabilities(self, image: Any) -> npt.NDArray[np.float32]:
        """Give the class probabilities of one image, (C, H, W), averaged as the protocol says."""
        return self._probabilities(as_pixels(image)).numpy()

    def score(self, data: SegmentationSet | Sequence[Any], masks: Sequence[Any] | None = None) -> float:
        """Give the mIoU on a set, or on images and masks, in percent."""
        self._need_head()
        given = data if isinstance(data, SegmentationSet) else GivenMasks(data, masks or [], self.classes)
        return self.evaluate(given).scores.miou

    def evaluate(self, data: SegmentationSet, on_progress: OnProgress | None = None) -> Evaluation:
        """Score the head on a set.

        With a cache, the tokens of single-scale protocols and the counts of each image are kept there, and an
        evaluation that was stopped goes on.

        Raises:
            DataError: for a set with another number of classes, a mask with unknown values, or no readable image.
        """
        self._need_head()
        if len(data.classes) != len(self.classes):
            raise DataError(
                f"{data.root} has {len(data.classes)} classes and the head {len(self.classes)}. Score a head on the "
                "classes that it was fitted on."
            )
        tell = on_progress or _silent
        total = np.zeros((len(self.classes), len(self.classes)), np.int64)
        images, miou, errors = [], [], {}
        for index, result in enumerate(self._confusions(data, tell)):
            if isinstance(result, str):
                errors[index] = result
            else:
                total += result
                images.append(index)
                miou.append(scores_of(result).miou if result.any() else float("nan"))
            tell("score", index + 1, len(data), _unreadable(len(errors)))
        if not images:
            raise DataError(f"No image of {data.root} could be read: {next(iter(errors.values()))}")
        return Evaluation(scores_of(total), images, miou, errors)

    def save(self, path: str | Path) -> None:
        """Write the head with its settings and a reference to the backbone."""
        self._need_head()
        settings = self._settings() | {"classes": list(self.classes), "training": asdict(self.training)}
        settings["balance"] = self.balance
        settings["class_pixels"] = None if self.class_pixels is None else self.class_pixels.tolist()
        save_head(path, "Segmenter", self.head.state_dict(), settings, describe_backbone(self.model, self.name))

    @classmethod
    def load(
        cls, path: str | Path, backbone: VisionTransformer | str | Path | None = None, **settings: Any
    ) -> Segmenter:
        """Read a head that `save` wrote.

        Args:
            path: of the file.
            backbone: default: load the one that the file names.
            settings: cache, batch_size, precision, workers, size, scales or flip, as for a new Segmenter.

        Raises:
            WeightsError: for a damaged file, another kind of head, or another backbone.
        """
        tensors, described = load_head(path, "Segmenter")
        saved, reference = described["settings"], described["backbone"]
        model = _load(reference["name"] if backbone is None else backbone)
        check_backbone(model, reference, str(path))
        settings.setdefault("name", reference["name"])
        made = cls(
            model, protocol_from(saved["protocol"]), training=Training(**saved["training"]),
            features=saved["features"], mirror=saved["mirror"], loss_scale=saved["loss_scale"],
            balance=saved["balance"], **settings,
        )  # fmt: skip
        head = SegmentationHead(tensors["bn.weight"].shape[0], len(saved["classes"]))
        head.load_state_dict(tensors)
        pixels = saved["class_pixels"]
        return made.adopt(head, saved["classes"], None if pixels is None else np.array(pixels, np.int64))

    # --- from here on not for users ----------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        names = ("features", "mirror", "loss_scale")
        return {"protocol": asdict(self.protocol)} | {name: getattr(self, name) for name in names}

    def _need_head(self) -> None:
        if not self.fitted:
            raise ConfigError("This Segmenter has no head yet. Call fit, or load one.")

    def _token_set(self, data: SegmentationSet, views: Views) -> TokenSet:
        return TokenSet(
            self.model, data, self.blocks, views, self.cache, batch_size=self.batch_size, precision=self.precision,
            workers=self.workers,
        )  # fmt: skip

    def _logits(self, windows: Tensor) -> Tensor:
        where = self.model.cls_token
        with frozen(self.model, self.precision):
            patches, _ = patch_tokens(self.model, windows.to(where.device, where.dtype), self.blocks)
        with torch.no_grad():
            return self.head(torch.cat(patches, dim=1))  # type: ignore[no-any-return]

    def _probabilities(self, image: Tensor) -> Tensor:
        self._need_head()
        views = [self.protocol.views(scale) for scale in self.protocol.scales]
        return image_probabilities(self._logits, image, self.model, views, self.batch_size)

    def _confusions(self, data: SegmentationSet, tell: OnProgress) -> Iterator[Counts | str]:
        """Give (C, C) pixel counts of each image, or why it cannot be read."""
        kept = self._kept()
        tokens = rows = None
        if self.cache is not None and self.protocol.scales == (1.0,):
            tokens = self._token_set(data, self.protocol.views())
            tokens.compute(lambda done, errors, total: tell("tokens", done, total, _unreadable(errors)))
            rows = _rows_by_image(tokens)
        flushed = monotonic()
        try:
            for index in range(len(data)):
                try:
                    image = data.image(index)
                except (DataError, OSError) as error:
                    yield str(error) or type(error).__name__
                    continue
                mask = data.mask(index)
                key = hashlib.sha256(image.numpy().tobytes() + mask.numpy().tobytes()).hexdigest()
                if kept is not None and key in kept and image.shape[-2:] == mask.shape:
                    yield kept.rows([key]).reshape(len(self.classes), -1).astype(np.int64)
                    continue
                if tokens is None or rows is None:
                    found = self._probabilities(image)
                else:
                    found = self._from_tokens(tokens, rows[index], (image.shape[-2], image.shape[-1]))
                added = PixelConfusion(len(self.classes)).add(found.argmax(0), mask, data.name(index))
                if kept is not None:
                    kept.add([key], added.reshape(1, -1))
                    if monotonic() - flushed > KEEP_SECONDS:
                        kept.flush()
                        flushed = monotonic()
                yield added
        finally:
            if kept is not None:
                kept.flush()

    def _from_tokens(self, tokens: TokenSet, rows: list[int], original: tuple[int, int]) -> Tensor:
        patches, _ = tokens.tokens(rows)
        with torch.no_grad():
            logits = self.head(patches.to(self.model.cls_token.device)).cpu()
        return merge_windows(
            logits, [(tokens.views[r].box, tokens.views[r].flip) for r in rows], tokens.how.resized(*original), original
        )

    def _kept(self) -> FeatureStore | None:
        """Pixel counts of images that this head has been scored on."""
        if self.cache is None:
            return None
        settings = {
            "kind": "confusions",
            "weights_sha256": weights_fingerprint(self.model),
            "preprocess": self.model.preprocess.model_dump(mode="json"),
            "head_sha256": weights_fingerprint(self.head),
            "protocol": asdict(self.protocol),
            "precision": self.precision,
            "device": self.model.cls_token.device.type,
        }
        return FeatureStore(self.cache, settings, len(self.classes) ** 2, np.int32)


def _load(backbone: VisionTransformer | str | Path) -> VisionTransformer:
    if isinstance(backbone, VisionTransformer):
        return backbone
    from opendino.models.weights import load

    return load(backbone)


def _rows_by_image(tokens: TokenSet) -> dict[int, list[int]]:
    rows: dict[int, list[int]] = {}
    for row, view in enumerate(tokens.views):
        rows.setdefault(view.image, []).append(row)
    return rows


def _unreadable(errors: int) -> str:
    return f"unreadable {errors}" if errors else ""


def _silent(stage: str, done: int, total: int, note: str) -> None:
    pass
