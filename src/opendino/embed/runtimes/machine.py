# SPDX-License-Identifier: Apache-2.0
"""What the machine is: its processor and what that can do, cores, memory, accelerators, and the user's cache folder."""

from __future__ import annotations

import os
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

FEATURES = {
    "avx2": "avx2", "avx512f": "avx512f", "avx512_vnni": "avx512_vnni", "avx_vnni": "avx_vnni",
    "avx512_bf16": "avx512_bf16", "amx_bf16": "amx_bf16", "amx_int8": "amx_int8",
    "asimd": "asimd", "sve": "sve", "bf16": "bf16", "i8mm": "i8mm", "asimddp": "asimddp",
}  # fmt: skip
"""Instructions that decide how fast a precision is, as Linux names them; the last six are those of ARM."""


def cache_folder(name: str, variable: str = "") -> Path:
    """Give a folder of the user's cache: that of an environment variable, else one under `cache_root`."""
    given = os.environ.get(variable) if variable else None
    return Path(given).expanduser() if given else cache_root() / name


def cache_root() -> Path:
    """Give the folder that holds this package's caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "opendino"


@cache
def cpu_name() -> str:
    """Give the processor's name as the system says it."""
    found = _cpuinfo().get("model name", "")
    return found or platform.processor() or platform.machine() or "unknown"


@cache
def cpu_features() -> list[str]:
    """Give those of FEATURES that the processor has; empty where the system does not say."""
    words = set(_cpuinfo().get("flags", _cpuinfo().get("features", "")).split())
    return [name for name, word in FEATURES.items() if word in words]


def usable_cores() -> int:
    """Give the number of logical cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota() -> float | None:
    """Give the share of cores that a container grants, such as 1.5; None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def memory() -> dict[str, int | None]:
    """Give bytes of memory: `total`, `available` now, and the container's `limit`; None where the system is silent."""
    info = _meminfo()
    total: int | None = info.get("MemTotal")
    if total is None and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, free = _cgroup("memory.max"), info.get("MemAvailable")
    if limit is not None and total is not None and limit >= total:
        limit = None
    if limit is not None and (used := _cgroup("memory.current")) is not None:
        # Pages of files count as used there and are given up when memory is wanted.
        left = limit - used + _cgroup_stat("inactive_file")
        free = left if free is None else min(free, left)
    return {"total": total, "available": free, "limit": limit}


def accelerators() -> list[dict[str, Any]]:
    """Give name, bytes of memory and bf16 support of each CUDA device, or of Apple's GPU."""
    found: list[dict[str, Any]] = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(number)
        with torch.cuda.device(number):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        found.append({"device": f"cuda:{number}", "name": about.name, "memory_bytes": about.total_memory, "bf16": bf16})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU", "memory_bytes": None, "bf16": None})
    return found


def device_name(device: torch.device) -> str:
    """Give what computes on a device, by name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name() if device.type == "cpu" else f"{device.type} {cpu_name()}"


def resident_memory() -> int:
    """Give the resident memory of this process now, in bytes; its peak where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory()
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> int:
    """Give the largest resident memory of this process so far, or since `forget_peak`, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        return 0
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def forget_peak() -> bool:
    """Count `peak_memory` from what is used now; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.splitlines())
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _meminfo() -> dict[str, int]:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


def _cgroup(name: str) -> int | None:
    try:
        text = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cgroup_stat(name: str) -> int:
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)
