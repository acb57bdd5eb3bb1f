# SPDX-License-Identifier: Apache-2.0
"""RUN/sessions.jsonl: on what a run was computed, and how long; two lines for each time it was started.

The model card (`opendino card`) takes hardware, software, precision and hours from here. No name of a machine, user or
folder is written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opendino._version import __version__
from opendino.distributed.collectives import world_size

if TYPE_CHECKING:
    from opendino.images.sources import ImageSource
    from opendino.pretrain.engine import Engine

log = logging.getLogger("opendino")
FILE = "sessions.jsonl"


@contextlib.contextmanager
def recorded_session(run: Path | None, about: Callable[[], dict[str, Any]], step: Callable[[], int]) -> Iterator[None]:
    """Write a line when training begins and one when it ends, however it ends; after SIGKILL the second is missing.

    Args:
        run: the run folder; None writes nothing (all processes but the first).
        about: gives what `describe_session` does.
        step: gives the number of steps done.
    """
    if run is None:
        yield
        return
    began, cpu = time.time(), time.process_time()
    _append(run, {"event": "start", "time": round(began, 3), "step": step(), **about()})
    try:
        yield
    finally:
        spent = {"wall_s": round(time.time() - began, 3), "cpu_s": round(time.process_time() - cpu, 3)}
        _append(run, {"event": "end", "time": round(time.time(), 3), "step": step(), **spent})


def _append(run: Path, record: dict[str, Any]) -> None:
    try:
        with (run / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:  # a full disk is no reason to stop here; checkpoints tell of it
        log.warning("%s was not written (%s): the model card will not know this session.", run / FILE, error)


def describe_session(engine: Engine, source: ImageSource) -> dict[str, Any]:
    """Give hardware, software, precision and the list of images of a session.

    Returns:
        "device" ("cpu", "cuda", …), "device_name", "processes", "machines", "cores" that may be used on this machine,
        "threads" of this process, "memory_gb" of this machine, "precision", "software" (name → version), "images" and
        "names" of the source's fingerprint.
    """
    dtype = engine.amp_dtype or torch.float32
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    software = {"opendino": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if engine.device.type == "cuda" and torch.version.cuda:
        software["CUDA"] = torch.version.cuda
    given = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or ""
    local = int(given) if given.isdigit() and int(given) else world_size()
    return {
        "device": engine.device.type,
        "device_name": device_name(engine.device),
        "processes": world_size(),
        "machines": max(1, -(-world_size() // local)),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": memory_gb(),
        "system": f"{platform.system()} {platform.machine()}",
        "precision": precision,
        "software": software,
        "images": len(source),
        "names": source.names_hash(),
    }


def device_name(device: torch.device) -> str | None:
    """Give the name that a GPU or the processor has for itself; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def memory_gb() -> float | None:
    """Give the memory of this machine, 10⁹ bytes; None where the system does not tell."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return None
