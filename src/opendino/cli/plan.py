# SPDX-License-Identifier: Apache-2.0
"""`opendino plan`: what a run will take, before it is paid for."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console
from rich.table import Table

from opendino.errors import ConfigError

if TYPE_CHECKING:
    from opendino.pretrain.plan import Device, Plan

EXAMPLE = """Say what a pre-training run will take: parameters, FLOPs, memory of a device, hours, energy, CO2eq.

Example:
  opendino plan --recipe vitg14 --gpus 64 --device a100
  opendino plan --recipe vits14 --device this --batch-size 16 --steps 1000 --json

Parameters are counted on the meta device, memory from what the backward pass of the real blocks keeps; nothing is
downloaded or trained. Hours follow from the model's FLOPs and --mfu, the share of the data sheet's speed that they
reach: 0.3 to 0.45 on GPUs. --device this measures this machine's speed and memory."""
CPU_WATTS = 65
"""Of a machine that computes on its CPU; an assumption, not a measurement."""
THIS_MFU = 0.7
"""On a CPU, whose peak is measured by a matrix product and not read off a data sheet (benchmarks/RESULTS.md)."""


@dataclass(frozen=True)
class Args:
    """Arguments of `opendino plan`."""

    recipe: str = "vits14"
    """Recipe by name, or a YAML file."""
    gpus: int = 1
    """Devices that share the batch."""
    device: str = "a100"
    """a100, h100, h200, or this."""
    mfu: float | None = None
    """Model FLOP utilisation, 0 to 1; default: 0.35, for a CPU 0.7 of its measured speed."""
    batch_size: int | None = None
    """Images per optimiser step; default: the recipe's."""
    accumulate: int | None = None
    """Micro-batches per optimiser step; default: the recipe's."""
    steps: int | None = None
    """Optimiser steps; default: the recipe's."""
    activation_checkpointing: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Recompute activations: less memory, about a third more arithmetic, which --mfu has to cover."""
    watts: float | None = None
    """Power of a device at full load; default: its data sheet's, 65 for this."""
    pue: float = 1.1
    """Energy of the data centre over that of its devices."""
    grid: float = 0.385
    """Kilograms of CO2eq a kWh; 0.385 is what the published card used for the USA."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object."""


def main(argv: list[str]) -> int:
    """Print the plan."""
    from opendino.pretrain.config import load_recipe
    from opendino.pretrain.lengths import with_steps
    from opendino.pretrain.plan import plan_run

    args = tyro.cli(Args, args=argv, prog="opendino plan", description=EXAMPLE)
    config = load_recipe(args.recipe)
    if args.steps:
        config = with_steps(config, args.steps)
    given = {"batch_size": args.batch_size, "accumulate": args.accumulate}
    update = {k: v for k, v in given.items() if v is not None}
    update["activation_checkpointing"] = config.activation_checkpointing or args.activation_checkpointing
    config = type(config).model_validate(config.model_dump() | update)
    if args.gpus < 1:
        raise ConfigError(f"--gpus is {args.gpus}; it must be at least 1.")
    device, cpu = find_device(args)
    plan = plan_run(
        config, device=device, devices=args.gpus, mfu=args.mfu, pue=args.pue, grid_kg_per_kwh=args.grid, cpu=cpu
    )
    if args.json:
        print(json.dumps({"recipe": args.recipe, "devices": args.gpus, "device": device.name, **asdict(plan)}))
    else:
        show(plan, device, f"{args.recipe}: {config.steps:,} steps of {config.batch_size} images")
    return 0


def find_device(args: Args) -> tuple[Device, bool]:
    """Give the device's figures, and whether it is a CPU.

    Raises:
        ConfigError: for an unknown name.
    """
    from dataclasses import replace

    from opendino.pretrain.plan import DEVICES

    if args.device == "this":
        found, cpu = this_device()
    elif args.device in DEVICES:
        found, cpu = DEVICES[args.device], False
    else:
        raise ConfigError(f"--device is {args.device!r}; it must be {', '.join(DEVICES)} or this.")
    return (replace(found, watts=args.watts) if args.watts else found), cpu


def this_device() -> tuple[Device, bool]:
    """Measure this machine: the speed of a large matrix product, and its memory."""
    import torch

    from opendino.pretrain.device import choose_precision
    from opendino.pretrain.flops import measured_peak_flops
    from opendino.pretrain.plan import Device

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speed = measured_peak_flops(device, choose_precision("auto", device) or torch.float32)
    if device.type == "cuda":
        return Device("this GPU", speed, torch.cuda.get_device_properties(device).total_memory, 400), False
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(f"this CPU, {torch.get_num_threads()} threads", speed, memory, CPU_WATTS, THIS_MFU), True


def show(plan: Plan, device: Device, title: str) -> None:
    """Print the plan for people."""
    console = Console()
    console.print(f"[bold]{title}[/bold], {plan.images:,} images seen", highlight=False)
    tables = {
        "parameters, millions": {k: f"{v / 1e6:,.1f}" for k, v in plan.parameters.items()},
        "GFLOP an image and step": {k: f"{v / 1e9:,.1f}" for k, v in plan.flops_per_image.items()},
        "memory of a device, GB": {k: f"{v / 1e9:,.2f}" for k, v in plan.memory.items()},
    }
    for heading, rows in tables.items():
        table = Table(heading, "", box=None, show_header=True, header_style="bold")
        for name, value in rows.items():
            table.add_row(f"  {name}", value, style="bold" if name == "total" else "")
        console.print(table)
    if plan.stages:
        table = Table("stage", "steps", "batch", "px", "GFLOP an image", "GB", "device hours", box=None)
        for name, s in plan.stages.items():
            numbers = [f"{s['steps']:,}", f"{s['batch_size']:,}", f"{s['global_size']}"]
            numbers += [f"{s['flops_per_image'] / 1e9:,.1f}", f"{s['memory'] / 1e9:,.2f}", f"{s['device_hours']:,.0f}"]
            table.add_row(name, *numbers)
        console.print(table)
    if plan.memory["total"] > device.memory:
        console.print(
            f"That is more than the {device.memory / 1e9:.0f} GB of {device.name}: more devices, a smaller "
            "--batch-size, --accumulate, or --activation-checkpointing.",
            style="yellow",
        )
    console.print(
        f"{plan.seconds / 86400:,.1f} days, {plan.device_hours:,.0f} device hours, {plan.kwh:,.0f} kWh, "
        f"{plan.co2_kg:,.0f} kg CO2eq",
        style="bold", highlight=False,
    )  # fmt: skip
    for line in plan.assumptions:
        console.print(f"  assumed: {line}", highlight=False)
