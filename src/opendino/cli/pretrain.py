# SPDX-License-Identifier: Apache-2.0
"""`opendino pretrain`: train a backbone on a user's images without labels."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from opendino.cli.launching import start_processes
from opendino.errors import ConfigError, DataError, MissingExtraError
from opendino.pretrain.config import PretrainConfig, StageSettings, load_recipe
from opendino.pretrain.initialise import fitted, with_start
from opendino.pretrain.lengths import with_steps

log = logging.getLogger("opendino")
EXAMPLE = """Train a backbone on your images without labels.

Example:
  opendino pretrain --recipe vitt14_demo --data photos/ --out runs/first --steps 500 --optim.lr 1e-3
  opendino pretrain --recipe vitl14_short --data photos/ --out runs/large --nproc 8
  opendino pretrain --recipe vits14_continue --data photos/ --out runs/own --init vits14 --probe labelled/
  opendino pretrain --recipe vits14_staged --data photos/ --out runs/staged --nproc 8      # then 10 000 steps at 518 px
  opendino pretrain --recipe vits14 --data photos/ --batch-size 16 --profile 5

--init starts from weights (a name, a file, a folder, a run; docs/adaptation.md): the architecture comes from them.
Any setting of the recipe can be given as a flag. --steps compresses the recipe's warm-ups in proportion.
The run folder then holds config.yaml, metrics.jsonl, report.html, card.md, checkpoints/ and
weights/teacher.safetensors, which opendino.load("runs/first") reads. Ctrl-C, SIGTERM and SIGUSR1 save and leave;
`opendino resume` continues."""


class PretrainArguments(PretrainConfig):
    """Settings of the run, and how it is computed."""

    stages: Annotated[tuple[StageSettings, ...], tyro.conf.Suppress] = ()  # too nested for flags
    nproc: int = Field(1, description="local processes to compute with; each gets its share of the cores or a GPU")
    profile: int = Field(0, description="time so many steps, say where the time goes, and leave no run behind")


def read_arguments(argv: list[str]) -> tuple[PretrainConfig, PretrainArguments]:
    """Resolve a recipe and the flags that override it; give the settings, and all that was asked for."""
    argv = with_long_init(argv)
    base = load_recipe(value_of("--recipe", argv) or "vits14")
    steps = value_of("--steps", argv)
    if steps is not None and steps.isdigit() and int(steps) > 0:
        base = with_steps(base, int(steps))
    weights = value_of("--init.weights", argv)
    if weights is not None:
        base = base.model_copy(update={"init": base.init.model_copy(update={"weights": weights})})
    if base.init.weights and not {"-h", "--help"} & set(argv):
        heads = value_of("--model.num-heads", argv) or ""
        base = with_start(base, int(heads) if heads.isdigit() else None)
    arguments = tyro.cli(
        PretrainArguments, args=argv, default=PretrainArguments(**dict(base)),
        prog="opendino pretrain", description=EXAMPLE, config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )  # fmt: skip
    for flag in ("data",) if arguments.profile else ("data", "out"):
        if not getattr(arguments, flag):
            raise ConfigError(f"--{flag} is missing. Example: opendino pretrain --data photos/ --out runs/first")
    config = PretrainConfig(**{name: getattr(arguments, name) for name in PretrainConfig.model_fields})
    return (fitted(config) if config.init.weights else config), arguments


def with_long_init(argv: list[str]) -> list[str]:
    """Write --init as what it stands for, --init.weights."""
    return [f"--init.weights{word[6:]}" if word.split("=")[0] == "--init" else word for word in argv]


def value_of(flag: str, argv: list[str]) -> str | None:
    """Give what follows a flag, before the command line is read as a whole; None without the flag."""
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(flag + "="):
            return word.split("=", 1)[1]
    return None


def main(argv: list[str]) -> int:
    """Start a run, or continue the one that --out holds with the same settings."""
    config, arguments = read_arguments(argv)
    if arguments.profile:
        from opendino.cli.profiling import profile_steps

        return profile_steps(config, arguments.profile)
    code = start_processes("pretrain", argv, arguments.nproc)
    if code is None:
        run(config)
    return code or 0


def run(config: PretrainConfig, quiet: bool = False, stay: bool = False) -> dict[str, Any]:
    """Train under a progress line, which the first of several processes shows, and give the last record.

    Args:
        config: of the run.
        quiet: print nothing.
        stay: keep the processes joined, because another run follows.
    """
    if getattr(config, "warm_heads", 0):
        from opendino.cli.distill import warm_heads

        warm_heads(config, quiet)
    from opendino.cli.probing import knn_probe
    from opendino.distributed.process import leave, place_of
    from opendino.pretrain.trainer import Trainer

    probe = knn_probe(Path(config.probe)) if config.probe else None
    main_process = place_of(os.environ).rank == 0
    console = Console(stderr=True, quiet=quiet or not main_process)
    progress = Progress(
        TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[line]}"), TimeRemainingColumn(),
        console=console, refresh_per_second=2, disable=not (sys.stderr.isatty() and main_process),
    )  # fmt: skip
    task = progress.add_task("", total=config.steps, line="")

    def on_step(record: dict[str, Any]) -> None:
        progress.update(task, completed=record["step"], line=describe(record))
        if "probe" in record or (not sys.stderr.isatty() and record["step"] % (10 * config.log_every) == 0):
            console.print(f"step {record['step']}/{config.steps} {describe(record)}", highlight=False)

    trainer = Trainer(config, probe=probe, on_step=on_step)
    if trainer.engine.about:
        console.print(trainer.engine.about, highlight=False)
    if trainer.step:
        console.print(f"Continuing {config.out} at step {trainer.step}.")
    try:
        with progress:
            record = trainer.train()
    finally:
        if not stay:
            leave()
        if main_process:
            explain(Path(config.out), quiet)
    if (compared := trainer.guard.compared()) and not trainer.guard.below_start():  # else it has been logged
        console.print(compared, highlight=False)
    console.print(f"Done: {config.out}/weights/teacher.safetensors; opendino.load({config.out!r}) reads it.")
    return record


def explain(run: Path, quiet: bool = False) -> None:
    """Write the run's page and print its verdict, as far as it has come; nothing before its first step."""
    from opendino.cli.card import automatic_card
    from opendino.cli.report import judge_run, report_run, show

    if not (run / "metrics.jsonl").is_file():
        return
    try:
        path, findings = report_run(run)
    except MissingExtraError as error:
        findings, path = judge_run(run), None
        log.warning("%s", error)
    except DataError:  # it ended before its first step, for a reason that is told anyway
        return
    automatic_card(run)
    if not quiet:
        show(findings, stderr=True)
        if path:
            print(f"{path} has the curves.", file=sys.stderr)


def describe(record: dict[str, Any]) -> str:
    """Put the figures of a step on one line."""
    parts = [f"stage {record['stage']}"] if "stage" in record else []
    losses = ("loss", "dino", "ibot", "hog_cls", "hog_patch", "hog_identity", "feature_cls", "feature_patch", "koleo")
    parts += [f"{k} {record[k]:.3f}" for k in losses if k in record]
    parts += [f"{record['images_per_s']:.3g} images/s", f"waiting for data {100 * record['data_wait']:.0f} %"]
    figures = {**record.get("probe", {}), **{f"own {k}": v for k, v in record.get("guard", {}).items()}}
    parts += [f"{k} {v:.1f}" for k, v in figures.items()]
    if record["bad_steps"]:
        parts.append(f"{record['bad_steps']} steps skipped")
    return "  ".join(parts)
