# SPDX-License-Identifier: Apache-2.0
"""The same run over another number of steps."""

from __future__ import annotations

from opendino.errors import ConfigError
from opendino.pretrain.config import PretrainConfig, StageSettings


def with_steps(config: PretrainConfig, steps: int) -> PretrainConfig:
    """Give the same run over another number of steps, its warm-ups and stages compressed in proportion.

    Raises:
        ConfigError: when there are more stages than steps.
    """
    factor = steps / config.steps
    optim = config.optim.model_copy(
        update={
            "warmup_steps": round(config.optim.warmup_steps * factor),
            "freeze_last_layer_steps": round(config.optim.freeze_last_layer_steps * factor),
        }
    )
    warmup = round(config.loss.warmup_teacher_temp_steps * factor)
    loss = config.loss.model_copy(update={"warmup_teacher_temp_steps": warmup})
    stages = _shared_out(config.stages, steps, factor) if config.stages else ()
    warm = config.init.warm_heads_steps
    init = config.init.model_copy(update={"warm_heads_steps": None if warm is None else round(warm * factor)})
    changed = {"steps": steps, "optim": optim, "loss": loss, "init": init, "stages": stages}
    return config.model_copy(update=changed)


def _shared_out(stages: tuple[StageSettings, ...], steps: int, factor: float) -> tuple[StageSettings, ...]:
    """Give stages over another number of steps together, each of at least one."""
    if steps < len(stages):
        raise ConfigError(f"{steps} steps are too few for {len(stages)} stages. Give at least one step to each.")
    found, done, planned = [], 0, 0
    for number, stage in enumerate(stages):
        planned += stage.steps
        left = len(stages) - number - 1
        end = min(max(round(planned * factor), done + 1), steps - left)
        shorter = {
            group: {k: round(v * factor) if k.endswith("_steps") else v for k, v in getattr(stage, group).items()}
            for group in ("optim", "loss")
        }
        found.append(stage.model_copy(update={"steps": end - done, **shorter}))
        done = end
    return tuple(found)
