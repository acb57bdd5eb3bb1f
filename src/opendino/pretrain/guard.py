# SPDX-License-Identifier: Apache-2.0
"""Watches that a run which began with good features does not end with worse ones.

Two figures are followed from step 0 on: the k-NN score of the probe, when there is one, and the effective rank of the
teacher's cls tokens on a fixed set of the user's own images, which needs no labels. When one of them is too far below
its start in several checks in a row, the run goes back to the best check.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch

from opendino.errors import DataError, OpendinoError
from opendino.images.arrays import read_image
from opendino.images.preprocess import Preprocess
from opendino.images.sources import ImageSource
from opendino.models.vit import VisionTransformer
from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.health import rank_me

log = logging.getLogger("opendino")
Figures = dict[str, float]
Answer = Literal["fine", "best", "bad", "back"]
"""Of a check: "best" so far, "bad" but not for long enough, or "back": it has been bad for `patience` checks."""
BATCH = 32
EVERY_SHARE = 20
"""A run is checked at least so often, however short it is."""


class FeaturesError(OpendinoError):
    """A run was stopped because its features kept getting worse than they began."""


class Guard:
    """Follows the features of one run. Process 0 measures and decides; every process holds the same state.

    Args:
        config: of the run.
        source: its images; `config.guard.images` of them, evenly spread over the list, are looked at.

    Attributes:
        active: whether the run is watched.
        start: figures at step 0, "knn" and "rank"; empty before.
        best: figures of the best check, and its "step".
        bad: the latest checks in a row that were too bad, oldest first.
        last: figures of the latest check.
        stopped: why the run was ended for good, or "".
    """

    def __init__(self, config: PretrainConfig, source: ImageSource) -> None:
        self.config, self.settings = config, config.guard
        self.active = bool(config.init.weights) if self.settings.enabled is None else self.settings.enabled
        self.every = self.settings.every or min(config.probe_every, max(config.steps // EVERY_SHARE, 1))
        self.images = FixedImages(config, source)
        self.start: Figures = {}
        self.best: Figures = {}
        self.last: Figures = {}
        self.bad: list[Figures] = []
        self.stopped = ""

    def due(self, step: int) -> bool:
        """Whether a check belongs to a step."""
        return self.active and (step % self.every == 0 or step == self.config.steps)

    # --- figures -----------------------------------------------------------------------------------------------------

    def measure(self, teacher: VisionTransformer) -> Figures:
        """Give the feature rank of the fixed images."""
        return {"feature_rank": self.images.rank(teacher)}

    def check(self, record: Mapping[str, Any]) -> Answer:
        """Judge a record with figures of `measure` and perhaps of a probe.

        Args:
            record: with "step", "guard" and maybe "probe".
        """
        figures = {"step": record["step"], **figures_of(record)}
        self.last = figures
        if not self.start:
            self.start = self.best = figures
            return "best"
        if self.reasons(figures):
            self.bad = [*self.bad, figures]
            return "back" if len(self.bad) >= self.settings.patience else "bad"
        self.bad = []
        if _score(figures) >= _score(self.best):  # equal while the heads are warmed: the later one has warmer heads
            self.best = figures
            return "best"
        return "fine"

    def reasons(self, figures: Mapping[str, float]) -> list[str]:
        """Say in which figures a check is too far below the start."""
        s, found = self.settings, []
        if "knn" in self.start and not figures.get("knn", -math.inf) >= self.start["knn"] - s.knn_drop:
            found.append(f"k-NN is {figures.get('knn', math.nan):.1f} %, at the start {self.start['knn']:.1f} %")
        if not figures["rank"] >= self.start["rank"] * (1 - s.rank_drop):
            found.append(
                f"the feature rank of {len(self.images)} images of your own is {figures['rank']:.1f}, at the start "
                f"{self.start['rank']:.1f}"
            )
        return found

    @property
    def best_step(self) -> int:
        """Step of the best check; 0 before there is one."""
        return int(self.best.get("step", 0))

    # --- words -------------------------------------------------------------------------------------------------------

    def worse(self) -> str:
        """Say that the run has become worse than it began, and since when."""
        steps = ", ".join(f"{f['step']:.0f}" for f in self.bad)
        return (
            f"The features got worse than they began, in {len(self.bad)} checks in a row (steps {steps}): "
            f"{' and '.join(self.reasons(self.bad[-1]))}."
        )

    def stop(self, what: str, rollbacks: int, step: int) -> str:
        """Remember that the run is ended for good, and give the reason.

        Args:
            what: of `worse`.
            rollbacks: how often it went back before.
            step: of the checkpoint that stands now.
        """
        tries = {0: "", 1: " Going back once with a lower learning rate did not help."}
        many = f" Going back {rollbacks} times with lower learning rates did not help."
        where = "what it began with" if step == 0 else f"the best, of step {step}"
        self.stopped = (
            f"{what}{tries.get(rollbacks, many)} The run is stopped; {self.config.out}/weights/teacher.safetensors is "
            f"{where}. Start a run with a lower --optim.lr (now {self.config.optim.lr:g}) or --init.backbone-lr (now "
            f"{self.config.init.backbone_lr:g}), or longer --init.warm-heads-steps."
        )
        return self.stopped

    def below_start(self) -> bool:
        """Whether the latest check is below the start: k-NN at all, or the rank by more than is allowed."""
        if not self.last or self.last["step"] == 0:
            return False
        return self.last.get("knn", 0.0) < self.start.get("knn", 0.0) or bool(self.reasons(self.last))

    def compared(self) -> str:
        """Compare start and latest check in words; "" before there are two."""
        if not self.last or self.last["step"] == 0:
            return ""
        parts = [
            f"{name} {self.start[key]:.1f} → {self.last[key]:.1f}{unit}"
            for key, name, unit in (("knn", "k-NN", " %"), ("rank", "feature rank", ""))
            if key in self.start and key in self.last
        ]
        text = f"From step 0 to step {self.last['step']:.0f}: {', '.join(parts)}"
        best = self.best
        if "knn" in best and best["step"] != self.last["step"]:
            text += f" (best k-NN {best['knn']:.1f} % at step {best['step']:.0f})"
        if not self.below_start():
            return text + "."
        kept = f"checkpoints/step_{self.best_step:08d} is the best one"
        if not self.best_step:
            kept = "Nothing was better than the weights it began with: keep those"
        return (
            f"{text}. The result is BELOW its start. {kept}; for another run lower --init.backbone-lr or --optim.lr, "
            "or take fewer --steps."
        )

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Give everything that a checkpoint must hold, as JSON."""
        return {k: getattr(self, k) for k in ("start", "best", "last", "bad", "stopped")}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave."""
        for key, value in state.items():
            setattr(self, key, value)


class FixedImages:
    """Some images of a source, as a model sees them in evaluation; the same ones at each call.

    Args:
        config: of the run.
        source: its images.
    """

    def __init__(self, config: PretrainConfig, source: ImageSource) -> None:
        count = min(config.guard.images, len(source))
        self.config, self.source = config, source
        self.indices = [i * len(source) // count for i in range(count)]

    def __len__(self) -> int:
        return len(self.indices)

    @torch.no_grad()
    def rank(self, model: VisionTransformer) -> float:
        """Give the effective rank of the model's cls tokens (RankMe, Garrido et al. 2023), 1 to the number of images.

        Unreadable images are left out, at every call alike.

        Raises:
            DataError: when fewer than two can be read.
        """
        preprocess = Preprocess(model.preprocess, patch_size=model.patch_size)
        device, rows, pixels = model.cls_token.device, [], []
        for position, index in enumerate(self.indices):
            try:
                image = read_image(
                    self.source.read(index), channels=self.config.model.in_chans, name=self.source.name(index)
                )
                pixels.append(preprocess.of_file(image))
            except (DataError, OSError) as error:
                log.debug("%s is left out of the feature rank: %s", self.source.name(index), error)
            if pixels and (len(pixels) == BATCH or position == len(self.indices) - 1):
                rows.append(model(torch.stack(pixels).to(device)).float().cpu())
                pixels = []
        features = torch.cat(rows) if rows else torch.empty(0, 1)
        if len(features) < 2:
            raise DataError(f"Of {len(self.indices)} images of {self.config.data} fewer than two can be read.")
        return rank_me(features) if bool(features.isfinite().all()) else math.nan


def figures_of(record: Mapping[str, Any]) -> Figures:
    """Read "rank" and, with a probe, "knn" (its first k-NN figure, percent) from a record."""
    figures = {"rank": float(record["guard"]["feature_rank"])}
    knn = next((v for k, v in (record.get("probe") or {}).items() if k.startswith("knn")), None)
    return figures if knn is None else {"knn": float(knn), **figures}


def _score(figures: Mapping[str, float]) -> float:
    """Which check is better: by k-NN when there is one, else by rank."""
    return figures["knn"] if "knn" in figures else figures["rank"]
