# SPDX-License-Identifier: Apache-2.0
"""What a distillation starts from, before flags: a recipe, and what follows from teacher and student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opendino.errors import ConfigError
from opendino.models.registry import MODELS, get_config
from opendino.pretrain.config import PretrainConfig, list_recipes, load_recipe, parse_config
from opendino.pretrain.distill.config import TIMM, DistillConfig, Mode
from opendino.pretrain.distill.teacher import read_heads

GENERAL = "vits14"
"""Recipe of students that have none of their own."""


def distill_defaults(
    teacher: str,
    student: str,
    *,
    recipe: str | None = None,
    heads: str | None = None,
    mode: Mode = "auto",
    warm: bool = False,
) -> DistillConfig:
    """Give the settings of a distillation before flags change them.

    The recipe is the one that was named; else, for a teacher that is a run, the settings of that run, because the same
    loop goes on with a frozen teacher; else the recipe of the student's name. From the paper: no masks, no stochastic
    depth. From the teacher: number of prototypes, and for a run how its targets are made (centring, final temperature)
    and the mean and std of pixels.

    Args:
        teacher: model name, weight file or run folder.
        student: architecture, or timm:NAME.
        recipe: name or YAML file.
        heads: file with the teacher's heads.
        mode: as asked for.
        warm: heads will be trained for the teacher.

    Raises:
        ConfigError: for an unknown recipe or student.
    """
    run = run_settings(teacher)
    if recipe is not None:
        base = load_recipe(recipe)
    else:
        base = run or load_recipe(student if student in list_recipes() else GENERAL)
    values: dict[str, Any] = {k: v for k, v in base.model_dump().items() if k in PretrainConfig.model_fields}
    values |= {"teacher": teacher, "teacher_heads": heads, "student": student, "mode": mode}
    values |= {"recipe": recipe or base.recipe, "data": "", "out": "", "probe": None}
    values["model"] |= _student_shape(student, base, run) | {"drop_path_rate": 0.0}
    values["masks"] |= {"share": 0.0}
    state = read_heads(teacher, heads)
    if state and mode != "features":
        values["heads"] |= {"num_prototypes": len(state["dino_head.last_layer.weight"])}
    if run is not None:
        temp = run.loss.teacher_temp
        values["loss"] |= {"centering": run.loss.centering, "teacher_temp": temp, "warmup_teacher_temp": temp}
        values["crops"] |= {"mean": run.crops.mean, "std": run.crops.std}
        values["model"] |= {"in_chans": run.model.in_chans}
    if mode == "features" or not (state or warm):
        values["loss"] |= {"koleo_weight": 0.0}  # the teacher's features keep the student's apart
    if student.startswith(TIMM):
        values["optim"] |= {"layerwise_decay": 1.0, "patch_embed_lr_mult": 1.0}
        values["sharding"] = "ddp"
    return DistillConfig.model_validate(values)


def run_settings(teacher: str) -> PretrainConfig | None:
    """Give the settings of the run that a teacher comes from, or None when it is no run folder."""
    path = Path(teacher).expanduser() / "config.yaml"
    return parse_config(path.read_text(), str(path)) if path.is_file() else None


def _student_shape(student: str, base: PretrainConfig, run: PretrainConfig | None) -> dict[str, Any]:
    """Give the shape fields of the student: none of the teacher's own, except its patch size in a run of its kind."""
    shape: dict[str, Any] = {"patch_size": None, "embed_dim": None, "depth": None, "num_heads": None}
    if student.startswith(TIMM):
        return shape
    if student.removeprefix("dinov2_") not in MODELS:
        raise ConfigError(
            f"{student!r} is no student; known are {', '.join(MODELS)}, or timm:NAME for a model of timm, such as "
            "timm:resnet18."
        )
    patch = run.model.patch_size if run is not None else None
    if patch is not None and patch != get_config(student).patch_size:
        shape["patch_size"] = patch
    if base is not run and base.model.arch == student:  # a recipe may say more of its own architecture
        shape |= {k: v for k, v in base.model.model_dump().items() if k in shape}
    return shape | {"arch": student.removeprefix("dinov2_")}
