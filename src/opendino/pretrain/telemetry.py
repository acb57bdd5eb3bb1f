# SPDX-License-Identifier: Apache-2.0
"""What a step says about itself: health figures at log steps, pictures of crops and masks at probe steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from opendino.distributed.collectives import is_main
from opendino.models.vit import VisionTransformer
from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.health import UpdateNorm, health, token_norms
from opendino.pretrain.samples import sample_pictures
from opendino.pretrain.student_teacher import Crops, Targets

NORM_CROPS = 8
"""Global crops whose token norms are looked at: two thousand tokens at 224 px, and little work."""


class Telemetry:
    """Watches the steps of one run; every process has one and calls it alike, process 0 looks and writes.

    Args:
        config: of the run.
        networks: the student's, for the update norms.
    """

    def __init__(self, config: PretrainConfig, networks: Mapping[str, nn.Module]) -> None:
        self.config = config
        self.update_norm = UpdateNorm(networks)

    def is_log_step(self, step: int) -> bool:
        """Whether the health figures of a step, counted from 0, are wanted."""
        return step % self.config.log_every == 0

    def before_update(self, step: int) -> None:
        """Call right before the optimiser's step."""
        if self.is_log_step(step):
            self.update_norm.before()

    def after_update(self, step: int) -> dict[str, float]:
        """Call after the optimiser's step; gives the update norms of a log step."""
        return self.update_norm.after() if self.is_log_step(step) else {}

    @torch.no_grad()
    def figures(
        self,
        step: int,
        teacher: VisionTransformer,
        micro_batches: Sequence[Crops],
        targets: Sequence[Targets],
        autocast: torch.autocast,
    ) -> dict[str, float]:
        """Give the health figures of a log step, else nothing; draw the crops of a probe step.

        Args:
            step: from 0.
            teacher: backbone; its token norms cost a forward pass over a few crops.
            micro_batches: of the step.
            targets: what the teacher said about them.
            autocast: context of that forward pass.
        """
        if step == 0 or (step + 1) % self.config.probe_every == 0:
            self._draw(step, micro_batches[0])
        if not self.is_log_step(step):
            return {}
        with autocast:
            norms = token_norms(teacher, micro_batches[0].global_crops, NORM_CROPS)
        if not is_main():
            return {}
        cls_targets = [t.cls for t in targets if t.cls is not None]
        return health(
            torch.cat(cls_targets) if cls_targets else None,
            torch.cat([t.features for t in targets]),
            token_norms=norms,
            num_register_tokens=teacher.num_register_tokens,
            micro_batches=len(micro_batches),
        )

    def _draw(self, step: int, crops: Crops) -> None:
        """Draw crops and masks of a few images into RUN/samples/step_<step>.png."""
        if not is_main():
            return
        settings = self.config.crops
        picture = sample_pictures(crops.global_crops, crops.local_crops, crops.masks, settings.mean, settings.std)
        path = Path(self.config.out) / "samples" / f"step_{step + (step > 0):08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}")
        picture.save(aside, format="png")
        aside.rename(path)
