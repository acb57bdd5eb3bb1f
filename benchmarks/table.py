# SPDX-License-Identifier: Apache-2.0
"""Results as Markdown, with the machine and the versions that they hold for. Standard library only."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from harness import OURS, TOLERANCE, Result, differs, paired_ratio, spread

BF16_FLAGS = {"amx_bf16", "avx512_bf16", "avx_ne_convert", "bf16"}
COLUMNS = {
    "forward": ["peak MiB", "distance"],
    "step": ["with data, images/s", "opendino ÷ peer", "peak MiB"],
    "augment": ["ms/image, median [min..max]", "CPU ms/image", "opendino ÷ peer", "peak MiB"],
}
VECTOR_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16")


def cpu_facts() -> dict[str, str]:
    """Give the processor's name and flags as the system names them; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def has_bf16() -> bool:
    """Say whether the processor has instructions for bf16; without them it is many times slower than fp32."""
    facts = cpu_facts()
    return bool(BF16_FLAGS & set((facts.get("flags") or facts.get("Features") or "").split()))


def machine() -> str:
    """Describe the machine in one line, without its name."""
    facts = cpu_facts()
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    vectors = [f for f in VECTOR_FLAGS if f in flags]
    parts = [
        facts.get("model name") or platform.processor() or platform.machine(),
        f"{os.cpu_count()} cores ({', '.join(vectors) or 'vector units unknown'})",
        f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    ]
    return "; ".join(parts)


def commit() -> str:
    """Give the commit that is measured, with a mark when files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def markdown(title: str, results: list[Result], rounds: int) -> str:
    """Give one comparison as a heading, a table and what to know about it."""
    task = results[0].spec.task
    ours = next((r for r in results if r.spec.peer == OURS and r.samples), None)
    head = ["peer", "version", "images/s, median [min..max]", "opendino ÷ peer"]
    head += COLUMNS[task]
    lines = [f"### {title}", "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    lines += [f"| {' | '.join(_cells(r, ours, len(head)))} |" for r in results]
    return "\n".join([*lines, "", *_notes(results, rounds)])


def _cells(result: Result, ours: Result | None, width: int) -> list[str]:
    peer, ready = result.spec.peer, result.ready
    if not result.samples:
        reason = f"**not measured: {result.problem or 'no samples'}**".replace("|", "/").replace("\n", " ")
        return [peer, ready.get("versions", {}).get(peer, "–"), reason] + [""] * (width - 3)
    clocks = ["seconds", "with_data"] if result.spec.task == "step" else ["seconds"]
    cells = [peer, ready["versions"][peer]]
    for clock in clocks:
        median, low, high = spread(result.rates(clock))
        ratio = f"{paired_ratio(ours.rates(clock), result.rates(clock)):.2f}" if ours else "–"
        cells += [f"{median:.2f} [{low:.2f}..{high:.2f}]", ratio]
    if result.spec.task == "augment":
        for clock in ("seconds", "cpu"):
            cells.append("{:.2f} [{:.2f}..{:.2f}]".format(*spread([1e3 / rate for rate in result.rates(clock)])))
        cells.append(f"{paired_ratio(ours.rates('cpu'), result.rates('cpu')):.2f}" if ours else "–")
    cells.append(f"{max(s['rss_mib'] for s in result.samples):.0f}")
    if result.spec.task == "forward":
        cells.append(f"{ready['distance']:.1e}" + (" **differs**" if differs(result) else ""))
    return cells


def _notes(results: list[Result], rounds: int) -> list[str]:
    measured = [r for r in results if r.samples]
    if not measured:
        return ["Nothing was measured."]
    spec, ready = measured[0].spec, measured[0].ready
    others = [s["others"] for r in measured for s in r.samples]
    notes = [
        f"- {rounds} rounds in turn, {ready['threads']} threads, torch {ready['versions']['torch']} ({ready['cpu']}). "
        f"Other processes used {spread(others)[0]:.0%} of the machine during the samples (at most {max(others):.0%}).",
        *(f"- {r.spec.peer}: {r.ready['setting']}." for r in measured),
    ]
    if spec.task == "step":
        counts = ", ".join(f"{r.spec.peer} {r.ready['parameters']:,}" for r in measured)
        notes.append(f"- Trained parameters: {counts}.")
        notes += [f"- **{r.spec.peer} trains another network.**" for r in different_networks(results)]
    elif spec.task == "augment":
        notes.append(f"- {spec.num_images} photographs of {ready['file_kib']:.0f} KiB on average in each sample.")
        notes += [f"- {r.spec.peer}, stages in ms/image: {text}." for r in measured if (text := stages(r))]
    else:
        notes.append(
            "- distance: ‖features − opendino's in fp32‖ / ‖the latter‖ over all tokens of two images, same weights "
            f"in all, each with the peer's own resizing of the position table; at most {TOLERANCE[spec.dtype]:g}."
        )
    return notes


def stages(result: Result) -> str:
    """Give the median milliseconds per image of the stages that a peer tells apart; "" when it tells none."""
    names = [n for n in result.samples[0] if n not in ("images", "seconds", "cpu", "rss_mib", "others")]
    return ", ".join(f"{n} {spread([1e3 * s[n] / s['images'] for s in result.samples])[0]:.2f}" for n in names)


def different_networks(results: list[Result]) -> list[Result]:
    """Give the peers whose number of trained parameters is more than 1 % from opendino's."""
    counts = {r.spec.peer: r.ready["parameters"] for r in results if "parameters" in r.ready}
    ours = counts.get(OURS)
    if ours is None:
        return []
    return [r for r in results if abs(counts.get(r.spec.peer, ours) / ours - 1) > 0.01]


def as_json(title: str, results: list[Result]) -> dict[str, Any]:
    """Give everything about one comparison, with every sample."""
    keep = ("dtype", "threads", "batch", "size", "shape", "local_size", "num_local", "prototypes")
    spec = results[0].spec
    return {
        "title": title,
        "task": spec.task,
        "spec": {k: getattr(spec, k) for k in keep},
        "peers": {r.spec.peer: {"ready": r.ready, "samples": r.samples} for r in results},
    }
