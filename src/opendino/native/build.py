# SPDX-License-Identifier: Apache-2.0
"""The package's C kernels: compiled once by the machine's own C compiler, kept in the user's cache.

Crops and colours of pre-training and the attention of an Embedder use them on a CPU where they can be had, and torch's
operations elsewhere, with the same results but for rounding. OPENDINO_NATIVE=0 turns them off; CC names the compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import multiprocessing
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock

log = logging.getLogger("opendino")

SOURCES = tuple(Path(__file__).with_name(name) for name in ("attention.c", "colours.c", "crops.c", "int8.c"))
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-Wno-psabi")
MATH = ("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math")
"""What loops need to become vector code. -ffast-math would also, as gcc links it, change how the whole process treats
the smallest numbers."""
TUNED = (("-march=native",), ("-mcpu=native",), ())
"""For this processor, in the words of x86 and of others; without where a compiler knows neither."""
TIMEOUT_S = 120
INSTEAD = "Crops and colours run as torch's operations, which take about three times as long."
OF_PROCESSOR = ("model name", "flags", "features", "cpu implementer", "cpu part")
"""Lines of /proc/cpuinfo that say what code a processor can run."""


class BuildError(Exception):
    """Why there are no kernels."""


@dataclass(frozen=True)
class Kernels:
    """The compiled kernels, or why there are none.

    Attributes:
        library: its functions run without Python's lock; None without kernels.
        about: a sentence or two for the user.
    """

    library: ctypes.CDLL | None
    about: str


_lock = Lock()


def kernels() -> Kernels:
    """Give the kernels, compiling them at the first call on a machine, which takes a second or two."""
    with _lock:
        return _kernels()


@cache
def _kernels() -> Kernels:
    if os.environ.get("OPENDINO_NATIVE") == "0":
        return Kernels(None, f"OPENDINO_NATIVE=0 turns the native kernels off. {INSTEAD}")
    try:
        library, where = _from_cache(f"kernels-{_key()}.so")
        return Kernels(library, f"Crops and colours run as native kernels ({where}).")
    except (BuildError, OSError) as error:
        found = Kernels(None, f"There are no native kernels: {error} {INSTEAD}")
    if multiprocessing.parent_process() is None:  # once, and not in every worker
        log.warning("%s", found.about)
    return found


def _key() -> str:
    """Digest all that the compiled code depends on, so that a cache shared by several machines serves each its own."""
    parts = [path.read_bytes() for path in SOURCES]
    words = (*FLAGS, *MATH, platform.system(), platform.machine(), _processor(), os.environ.get("CC", ""))
    return hashlib.sha256(b"\0".join([*parts, *(w.encode() for w in words)])).hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.lower().startswith(OF_PROCESSOR))


def _from_cache(name: str) -> tuple[ctypes.CDLL, str]:
    """Load a library from the user's cache, and say where it lies; one that is missing or damaged is made.

    It is made aside and renamed; processes that make it at the same time write the same. Where there is no cache to
    write to, it is made for this process alone.
    """
    with suppress(OSError, RuntimeError):  # a user may have no home
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opendino" / "native"
        path = folder / name
        with suppress(OSError):
            return ctypes.CDLL(str(path)), str(path)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside) / name
            _compile(made)
            made.replace(path)
        return ctypes.CDLL(str(path)), str(path)
    with tempfile.TemporaryDirectory() as aside:
        made = Path(aside) / name
        _compile(made)
        return ctypes.CDLL(str(made)), "made for this process alone, as the user's cache cannot be written"


def _compile(path: Path) -> None:
    """Compile the sources to a library.

    Raises:
        BuildError: when no compiler does.
    """
    wanted = [os.environ["CC"]] if os.environ.get("CC") else COMPILERS
    found = [c for c in map(shutil.which, wanted) if c]
    if not found:
        raise BuildError(f"no C compiler ({', '.join(wanted)}) was found; install one, for example gcc.")
    log.info("Compiling the native kernels, once.")
    said = ""
    for compiler in found:
        for tuned in TUNED:
            command = [compiler, *FLAGS, *MATH, *tuned, *map(str, SOURCES), "-o", str(path)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                said = f"it took more than {TIMEOUT_S} s"
                break
            if done.returncode == 0:
                return
            said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[0]
    raise BuildError(f"{found[-1]} could not compile them ({said}).")
