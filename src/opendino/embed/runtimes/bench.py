# SPDX-License-Identifier: Apache-2.0
"""Runtimes × precisions × batches × sizes of a model on this machine, each in its own process, in turn A B C A B C …"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from opendino.embed.runtimes.bench_process import BenchProcess, Plan
from opendino.embed.runtimes.calibration import REFERENCE, pick
from opendino.embed.runtimes.machine import memory
from opendino.embed.runtimes.measure import Closeness, closeness, refusal
from opendino.embed.runtimes.prepared import packs
from opendino.embed.runtimes.remembered import Candidate, Pair
from opendino.embed.runtimes.variants import RUNTIMES
from opendino.errors import ConfigError

PACKAGES = {"onnx": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino")}
POSSIBLE = {
    "torch": ("fp32", "bf16", "fp16"), "torch-prepared": ("fp32", "bf16"), "torch-compiled": ("fp32", "bf16", "fp16"),
    "onnx": ("fp32", "fp16"), "openvino": ("fp32", "bf16", "fp16"),
}  # fmt: skip
PROCESS_BYTES = 700 << 20
"""Of Python, torch and a runtime before any weights."""
COPIES = 2.5
"""fp32 copies of the weights that a process holds at most: the model's, a prepared one's, and some in between."""


@dataclass
class Row:
    """One runtime at one size and batch: its figures, or why there are none.

    Attributes:
        turns: of each, the seconds of its calls.
        peak_memory: bytes, resident in the process; on CUDA allocated on the card.
        cls: 1 − cosine to torch fp32 of the cls token, worst of a few photographs.
        patches: the same of the patch tokens, mean.
        problem: why it was not measured.
        reference: the turns of torch fp32 in the same rounds.
        auto: whether it is what the runtime "auto" would take of these rows.
    """

    model: str
    runtime: str
    precision: str
    batch: int
    size: list[int] | None
    turns: list[list[float]] = field(default_factory=list)
    peak_memory: int | None = None
    cls: float | None = None
    patches: float | None = None
    problem: str | None = None
    reference: list[list[float]] | None = None
    auto: bool = False

    @property
    def rates(self) -> list[float]:
        """Images/s of each turn."""
        return [self.batch * len(t) / sum(t) for t in self.turns]

    def figures(self) -> dict[str, Any]:
        """Give the row JSON-able."""
        calls = [s for turn in self.turns for s in turn]
        ratio = None
        if self.reference and self.turns:
            base = [self.batch * len(t) / sum(t) for t in self.reference]
            ratio = median(a / b for a, b in zip(self.rates, base, strict=False))
        p50, p99 = (float(np.percentile(calls, q)) * 1e3 if calls else None for q in (50, 99))
        return {
            "model": self.model, "runtime": self.runtime, "precision": self.precision, "batch": self.batch,
            "size": self.size, "images_per_s": round(median(self.rates), 3) if calls else None,
            "speedup": None if ratio is None else round(ratio, 3), "latency_p50_ms": _rounded(p50),
            "latency_p99_ms": _rounded(p99), "calls": len(calls), "peak_memory_bytes": self.peak_memory,
            "cls_distance": _finite(self.cls), "patch_distance": _finite(self.patches), "auto": self.auto,
            "problem": self.problem,
        }  # fmt: skip


def _finite(value: float | None) -> float | None:
    """JSON has no infinity; vectors that are not finite have no distance."""
    return value if value is not None and np.isfinite(value) else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def pairs_of(runtimes: Sequence[str], precisions: Sequence[str], device: str) -> tuple[Pair, ...]:
    """Give the runtimes and precisions to measure; what is not named is all that serves on the device.

    Raises:
        ConfigError: for an unknown name.
    """
    for name in runtimes:
        if name not in RUNTIMES:
            raise ConfigError(f"--runtime is {name!r}; give one or more of {', '.join(RUNTIMES)}.")
    on_cpu = device == "cpu"
    some = list(runtimes) or (["torch", "torch-prepared", "onnx", "openvino"] if on_cpu else ["torch"])
    if not runtimes and device.startswith("cuda"):
        some.append("torch-compiled")
    halves = (["bf16"] if packs(torch.bfloat16) else []) if on_cpu else ["bf16", "fp16"]
    usual = {"torch": ["fp32", *halves], "torch-compiled": ["fp32", *halves], "openvino": ["fp32", *halves]}
    found = []
    for runtime in some:
        for precision in precisions or usual.get(runtime, ["fp32"]):
            if runtimes or precision in POSSIBLE[runtime]:
                found.append((runtime, precision))
    return tuple(dict.fromkeys([REFERENCE, *found, *(("torch", p) for p in precisions if not runtimes)]))


class Bench:
    """Measures one model.

    Args:
        plan: what.
        on_step: told after each step what was done, for a progress line.

    Attributes:
        rows: what is known so far, in the order size, batch, runtime.
        about: the model, once a process has loaded it.
        in_turn: whether all processes fitted into memory together; if not, they ran one after the other.
    """

    def __init__(self, plan: Plan, on_step: Callable[[str], None] | None = None) -> None:
        self.plan, self.on_step = plan, on_step or (lambda text: None)
        self.pairs: tuple[Pair, ...] = tuple(dict.fromkeys([REFERENCE, *plan.pairs]))
        self.rows: list[Row] = []
        self.about: dict[str, Any] = {}
        self.in_turn = True
        self._workers: dict[Pair, BenchProcess] = {}
        self._sides: dict[int | tuple[int, int] | None, list[int]] = {}

    @property
    def steps(self) -> int:
        """How often `on_step` is called in all."""
        cells = len(self.plan.sizes) * len(self.plan.batches)
        return len(self.pairs) * (1 + cells * (1 + self.plan.rounds))

    def run(self, on_cell: Callable[[], None] | None = None) -> None:
        """Measure all; what is known lies in `rows` at any time, after a Ctrl-C too.

        Args:
            on_cell: called when a size and batch is done.
        """
        with tempfile.TemporaryDirectory() as folder:
            try:
                self._start(REFERENCE, folder)
                self.on_step(f"{' '.join(REFERENCE)} started")
                self.in_turn = self._fits()
                groups = [list(self.pairs)] if self.in_turn else [[pair] for pair in self.pairs]
                for group in groups:
                    for pair in group:
                        if pair != REFERENCE:
                            self._start(pair, folder)
                            self.on_step(f"{' '.join(pair)} started")
                    for size in self.plan.sizes:
                        for batch in self.plan.batches:
                            self._cell(group, size, batch, folder)
                            self._order()
                            if on_cell:
                                on_cell()
                    self._end(group)
            finally:
                self._order()
                self._end(list(self._workers), kill=True)

    def _fits(self) -> bool:
        """Say whether all processes fit into the memory that is free now."""
        free, parameters = memory()["available"], self.about.get("parameters")
        if free is None or parameters is None or self.plan.device != "cpu":
            return True
        needed: float = len(self.pairs) * (COPIES * 4 * parameters + PROCESS_BYTES)
        return needed < 0.9 * free

    def _start(self, pair: Pair, folder: str) -> None:
        plain = self._workers.get(REFERENCE) if pair != REFERENCE else None
        missing = [p for p in PACKAGES.get(pair[0], ()) if importlib.util.find_spec(p) is None]
        if plain and plain.problem:  # a model that cannot be loaded is not tried again and again
            self._workers[pair] = BenchProcess.absent(plain.problem)
        elif missing:
            self._workers[pair] = BenchProcess.absent(
                f"{' and '.join(missing)} not installed: pip install 'opendino[export]'"
            )
        else:
            process = BenchProcess(self.plan, pair, Path(folder) / f"{pair[0]}-{pair[1]}.log")
            self._workers[pair] = process
            if process.exported:  # it has written the file and ended; a fresh one has a peak memory of its own
                self._workers[pair] = process = BenchProcess(self.plan, pair, process.log)
            if process.about:
                self.about = self.about or process.about

    def _cell(self, group: Sequence[Pair], size: int | tuple[int, int] | None, batch: int, folder: str) -> None:
        rows: dict[Pair, Row] = {}
        if isinstance(size, int | tuple):
            self._sides[size] = [size, size] if isinstance(size, int) else list(size)
        truth = Path(folder) / f"{size}-{batch}-reference.npz"
        for pair in group:
            if self._workers[pair].died:  # in another cell, which may have been too large
                self._start(pair, folder)
            row = rows[pair] = Row(self.plan.model, *pair, batch, self._sides.get(size))
            self.rows.append(row)
            path = truth if pair == REFERENCE else Path(folder) / "vectors.npz"
            answer = self._ask(pair, row, cell={"size": size, "batch": batch, "path": str(path)})
            if answer:
                row.size = self._sides[size] = answer["size"]
                self._compare(row, path, truth)
            self.on_step(f"{' '.join(pair)}, batch {batch}")
        for row in rows.values():  # the model's own size is known when one of them has said it
            row.size = self._sides.get(size)
        for _ in range(self.plan.rounds):
            for pair, row in rows.items():
                answer = self._ask(pair, row, turn=self.plan.seconds / self.plan.rounds)
                if answer:
                    row.turns.append(answer["times"])
                    row.peak_memory = max(row.peak_memory or 0, answer["peak_memory"]) or None
                self.on_step(f"{' '.join(pair)}, batch {batch}")

    def _ask(self, pair: Pair, row: Row, **message: Any) -> dict[str, Any] | None:
        """Ask a process, unless its row has a problem already, which an error becomes."""
        if row.problem is None:
            answer = self._workers[pair].ask(**message)
            if "error" not in answer:
                return answer
            row.problem = str(answer["error"])
        return None

    def _compare(self, row: Row, path: Path, truth: Path) -> None:
        if not truth.exists():
            return
        with np.load(path) as found, np.load(truth) as want:
            close = closeness(*({k: torch.from_numpy(f[k]) for k in ("cls", "patches")} for f in (found, want)))
        row.cls, row.patches = close.cls, close.patches

    def _order(self) -> None:
        """Bring the rows into order, tell each the reference of its rounds, and mark what `auto` would take."""
        cells = list(dict.fromkeys((str(r.size), r.batch) for r in self.rows))
        self.rows.sort(key=lambda r: (cells.index((str(r.size), r.batch)), self.pairs.index((r.runtime, r.precision))))
        for cell in cells:
            rows = [r for r in self.rows if (str(r.size), r.batch) == cell]
            reference = next((r for r in rows if (r.runtime, r.precision) == REFERENCE and r.turns), None)
            for row in rows:
                row.reference, row.auto = (reference.turns if reference else None), False
            best = chosen(rows) if reference else None
            if best:
                best.auto = True

    def _end(self, pairs: Sequence[Pair], kill: bool = False) -> None:
        for pair in pairs:
            process = self._workers.pop(pair, None)
            if process:
                process.close(kill)


def chosen(rows: Sequence[Row]) -> Row | None:
    """Give the row that `auto` would take of those of one size and batch; None before they are measured."""
    candidates = []
    for row in rows:
        figures = row.figures()
        if figures["speedup"] is None:
            continue
        infinite = float("inf")
        close = Closeness(*(infinite if v is None else v for v in (row.cls, row.patches)))
        why = refusal(row.precision, close)
        candidates.append(
            Candidate(runtime=row.runtime, precision=row.precision, speedup=figures["speedup"], refused=why)
        )
    if not candidates:
        return None
    best = pick(candidates, REFERENCE)
    return next((r for r in rows if (r.runtime, r.precision) == best), None)
