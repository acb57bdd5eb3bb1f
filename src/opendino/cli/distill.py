# SPDX-License-Identifier: Apache-2.0
"""`opendino distill`: train a small student against a frozen teacher."""

from __future__ import annotations

import os
import sys

import tyro
from pydantic import Field

from opendino.cli.launching import start_processes
from opendino.cli.pretrain import run, value_of, with_long_init
from opendino.errors import ConfigError
from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.distill.config import TIMM, DistillConfig
from opendino.pretrain.distill.defaults import distill_defaults
from opendino.pretrain.lengths import with_steps

EXAMPLE = """Train a small student against a frozen teacher, without labels.

Example:
  opendino distill --teacher runs/large --student vits14 --data photos/ --out runs/small
  opendino distill --teacher vitl14 --student timm:resnet18 --data photos/ --out runs/resnet
  opendino distill --teacher vitl14 --warm-heads 5000 --student vits14 --data photos/ --out runs/small
  opendino distill --teacher runs/large --student vitt14 --data photos/ --views 4 --cache-teacher cache/ --out runs/tiny

--mode paper needs a teacher with heads (a run, or --teacher-heads FILE); --mode features needs none; auto takes paper
where it can. Without --recipe the settings are those of the teacher's run, or the student's recipe; any of them can be
given as a flag. The run folder is like that of `opendino pretrain`: opendino.load("runs/small") gives the moving
average of the student, `opendino resume runs/small` goes on after a kill. docs/distillation.md tells more."""


class DistillArguments(DistillConfig):
    """Settings of the distillation, and how it is computed."""

    nproc: int = Field(1, description="local processes to compute with; each gets its share of the cores or a GPU")


def read_arguments(argv: list[str]) -> tuple[DistillConfig, DistillArguments]:
    """Resolve recipe, teacher and student, and the flags that override them."""
    argv = with_long_init(argv)
    teacher, student = value_of("--teacher", argv) or "", value_of("--student", argv) or "vits14"
    mode = value_of("--mode", argv)
    helping = "-h" in argv or "--help" in argv
    base = DistillConfig()
    if teacher and not helping:
        base = distill_defaults(
            teacher,
            student,
            recipe=value_of("--recipe", argv),
            heads=value_of("--teacher-heads", argv),
            mode=mode if mode in ("paper", "features") else "auto",  # type: ignore[arg-type]
            warm=(value_of("--warm-heads", argv) or "0") != "0",
        )
    steps = value_of("--steps", argv)
    if steps is not None and steps.isdigit() and int(steps) > 0:
        resized = with_steps(base, int(steps))
        assert isinstance(resized, DistillConfig)
        base = resized
    arguments = tyro.cli(
        DistillArguments, args=argv, default=DistillArguments(**dict(base)),
        prog="opendino distill", description=EXAMPLE, config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )  # fmt: skip
    for flag in ("teacher", "data", "out"):
        if not getattr(arguments, flag):
            raise ConfigError(
                f"--{flag} is missing. Example: opendino distill --teacher runs/large --student vits14 --data photos/ "
                "--out runs/small"
            )
    config = DistillConfig(**{name: getattr(arguments, name) for name in DistillConfig.model_fields})
    if not config.student.startswith(TIMM):
        config = config.model_copy(update={"student": config.model.arch})
    return config, arguments


def main(argv: list[str]) -> int:
    """Start a distillation, or continue the one that --out holds with the same settings."""
    config, arguments = read_arguments(argv)
    code = start_processes("distill", argv, arguments.nproc)
    if code is None:
        run(config)
    return code or 0


def warm_heads(config: PretrainConfig, quiet: bool = False) -> None:
    """Train heads for the frozen teacher first, in RUN/warm_heads, or go on with that; nothing when they are there."""
    from opendino.distributed.process import place_of
    from opendino.pretrain.distill.warm_heads import is_trained, warm_heads_config
    from opendino.pretrain.run_folder import RunFolder

    assert isinstance(config, DistillConfig)
    warm = warm_heads_config(config)
    if is_trained(warm):
        return
    if place_of(os.environ).rank == 0:
        # So that `opendino resume` knows what this folder is. With heads of its own the teacher gives prototypes.
        RunFolder(config.model_copy(update={"mode": "paper"}))
        if not quiet:
            print(f"Training heads for {config.teacher} over {warm.steps} steps in {warm.out} first.", file=sys.stderr)
    run(warm, quiet, stay=True)
