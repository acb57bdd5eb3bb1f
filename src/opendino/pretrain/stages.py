# SPDX-License-Identifier: Apache-2.0
"""Stages of a run: which one a step belongs to, and the settings and schedules that it has there.

A run without `stages` is one stage. Steps are counted over the whole run, so every draw stays a function of (seed,
step, sample). Schedules are functions of the step inside a *stretch*: the stages from the first, or from one with
`compress_schedules`, up to the next such one. The warm-ups of a recipe are meant for its first stretch; in a later one
they are compressed in proportion ("all the schedules are kept the same, but compressed", DINOv2 §B.2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from opendino.errors import ConfigError, DataError
from opendino.images.sources import ImageSource, open_source
from opendino.pretrain.config import PretrainConfig, overridden
from opendino.pretrain.lengths import with_steps


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        number: from 0.
        name: empty in a run without stages.
        first: its first step, counted from 0 over the whole run.
        end: the step after its last.
        config: its settings, without a list of stages; `steps` is the length of its schedules.
        schedule_first: the step at which its schedules begin.
        resume_optimizer: whether AdamW's moments come along from the stage before.
    """

    number: int
    name: str
    first: int
    end: int
    config: PretrainConfig
    schedule_first: int
    resume_optimizer: bool = True

    @property
    def label(self) -> dict[str, str]:
        """What a record says about the stage."""
        return {"stage": self.name} if self.name else {}


def timeline(config: PretrainConfig) -> tuple[Stage, ...]:
    """Resolve the stages of a run; without any, the whole run is one."""
    if not config.stages:
        return (Stage(0, "", 0, config.steps, config, 0),)
    begins, position = [0], 0  # of the stretches
    for s in config.stages:
        if s.compress_schedules:
            begins.append(position)
        position += s.steps
    lengths = [end - begin for begin, end in zip(begins, [*begins[1:], config.steps], strict=True)]
    base = config.model_copy(update={"steps": lengths[0], "stages": ()})
    found: list[Stage] = []
    stretch, first = -1, 0
    for number, s in enumerate(config.stages):
        stretch += first in begins
        settings = overridden(with_steps(base, lengths[stretch]), s)
        if bool(settings.loss.hog_weight) is not bool(config.loss.hog_weight):
            raise ConfigError(
                f"Stage {s.name!r} has loss.hog_weight {settings.loss.hog_weight:g} and the recipe "
                f"{config.loss.hog_weight:g}; its targets are kept in the run, so all stages must have them or none."
            )
        if settings.loss.hog_identity != config.loss.hog_identity:
            raise ConfigError(
                f"Stage {s.name!r} has loss.hog_identity {settings.loss.hog_identity} and the recipe "
                f"{config.loss.hog_identity}; tokens keep their parts, so all stages must have the same."
            )
        found.append(Stage(number, s.name, first, first + s.steps, settings, begins[stretch], s.resume_optimizer))
        first += s.steps
    return tuple(found)


def stage_after(stages: Sequence[Stage], step: int) -> Stage:
    """Give the stage that does a step, counted from 0; at a switch the one that begins."""
    return next((s for s in stages if step < s.end), stages[-1])


def stage_before(stages: Sequence[Stage], step: int) -> Stage:
    """Give the stage that a state after so many steps comes from; at a switch the one that ends."""
    return next(s for s in stages if step <= s.end)


@contextlib.contextmanager
def naming(stage: Stage) -> Iterator[None]:
    """Put the name of a stage before what is said to be wrong inside."""
    try:
        yield
    except (ConfigError, DataError) as error:
        if not stage.name:
            raise
        raise type(error)(f"Stage {stage.name!r}: {error}") from error


def open_sources(stages: Sequence[Stage]) -> dict[str, ImageSource]:
    """Open the images of every stage, each once, before the first one begins; by the setting that names them.

    Raises:
        DataError: when the images of a stage cannot be found; it names the stage.
    """
    found: dict[str, ImageSource] = {}
    for stage in stages:
        if stage.config.data not in found:
            with naming(stage):
                found[stage.config.data] = open_source(stage.config.data)
    return found


def stage_rows(config: PretrainConfig) -> list[dict[str, str]]:
    """Say what the stages of a run are in, a row each, for people; nothing for a run without stages."""
    rows = []
    for stage in timeline(config) if config.stages else ():
        c, o = stage.config, stage.config.optim
        rows.append(
            {
                "stage": stage.name,
                "steps": f"{stage.first + 1}–{stage.end}",
                "images a step": str(c.batch_size),
                "crops": f"2 × {c.crops.global_size} px, {c.crops.num_local} × {c.crops.local_size} px",
                "learning rate": f"{o.lr:g}",
                "schedules": f"{c.steps} steps from step {stage.schedule_first + 1}, warm-up {o.warmup_steps}",
                "optimiser": "" if not stage.number else "goes on" if stage.resume_optimizer else "begins anew",
                "data": c.data,
            }
        )
    return rows
