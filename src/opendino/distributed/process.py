# SPDX-License-Identifier: Apache-2.0
"""Who this process is among the processes of a run, and how it joins them.

One process needs no process group. Several are described by the environment: torchrun's variables, or those of a SLURM
job step; `opendino.distributed.launch` starts local ones with torchrun's variables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from opendino.distributed.launch import end_with_launcher

TIMEOUT = timedelta(hours=2)
"""How long a process waits for the others. Long, because process 0 scores the probe while the others wait; a process
that dies is noticed by the launcher at once."""
FIRST_PORT, PORTS = 20_000, 20_000
"""Where the port of a SLURM job lies; it follows from the job's number, so that jobs on one node do not collide."""


@dataclass(frozen=True)
class Place:
    """This process among all of a run.

    Attributes:
        rank: 0 to world_size − 1.
        local_rank: number on this machine, which is also the number of its GPU.
        world_size: how many processes there are.
        address: host and port of process 0; None for a single process.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    address: tuple[str, int] | None = None


def place_of(environment: Mapping[str, str]) -> Place:
    """Read torchrun's variables, or those of a SLURM job step of several tasks; a single process without either.

    A batch script outside `srun` sees the job's task count as well but is no task itself: only the variables of a step
    count.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        host, port = environment.get("MASTER_ADDR", "localhost"), int(environment.get("MASTER_PORT", FIRST_PORT))
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", 0))
    elif int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        host = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
        port = int(environment.get("MASTER_PORT", FIRST_PORT + int(environment["SLURM_JOB_ID"]) % PORTS))
        rank, world_size = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
        local_rank = int(environment["SLURM_LOCALID"])
    else:
        return Place()
    return Place(rank, local_rank, world_size, (host, port) if world_size > 1 else None)


def first_host(nodes: str) -> str:
    """Give the first host of a SLURM node list: "gpu[03-05,9],login" → "gpu03"."""
    match = re.match(r"([^,\[]+)(?:\[(\w+))?", nodes)
    assert match, nodes
    return match[1] + (match[2] or "")


def join(device: torch.device) -> None:
    """Join the other processes of the run that the environment describes; alone, nothing happens.

    gloo on a CPU; on CUDA, NCCL for the device and gloo for what is said between CPUs.
    """
    place = place_of(os.environ)
    if place.address is None or dist.is_initialized():
        return
    end_with_launcher()
    nccl = device.type == "cuda" and dist.is_nccl_available()
    host, port = place.address
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if nccl else "gloo",
        init_method=f"tcp://{host}:{port}",
        rank=place.rank,
        world_size=place.world_size,
        timeout=TIMEOUT,
    )


def leave() -> None:
    """Leave the process group if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def local_device(name: str) -> torch.device:
    """Resolve "auto" to CUDA, MPS or CPU, in this order, and "cuda" to the GPU of this process; select it.

    Args:
        name: "auto" or a torch device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{place_of(os.environ).local_rank}"
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
