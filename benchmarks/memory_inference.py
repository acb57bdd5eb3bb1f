# SPDX-License-Identifier: Apache-2.0
"""Memory and speed of a large backbone in bf16 at batch 1, each way in a process of its own, timed in turn.

    python benchmarks/memory_inference.py --work DIR        # ViT-g/14; draws 9 GB of weights into DIR and removes it
    python benchmarks/memory_inference.py --work DIR --arch vitb14 --file bf16 --rounds 5

- "opendino": `Embedder(FILE, precision="bf16")`; loading, preparing and one forward pass.
- "eager bf16": the published kind of use, `load(FILE).to(torch.bfloat16)` and the forward pass with torch's
  scaled_dot_product_attention, by our plain VisionTransformer, which has the official model's operations.
- "transformers": `Dinov2Model.from_pretrained(..., dtype=torch.bfloat16)`, with the file in its own layout.

Peak memory is the largest resident memory (VmHWM) from before loading to after the first forward pass, less what the
process had before with its libraries in use, so it counts pages of the mapped file too; "÷ weights" divides it by
2 bytes a parameter. The promise is at most 1.2 times weights and activations.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WAYS = ("opendino", "eager bf16", "transformers")
PROMISE = 1.2
MIB = 2**20


def draw(args: argparse.Namespace) -> None:
    """Write random weights, tensor by tensor, and the same under transformers' names."""
    import torch
    from safetensors.torch import save_file

    from opendino.models.config import PreprocessSpec
    from opendino.models.convert import transformers_config
    from opendino.models.layouts import to_transformers
    from opendino.models.registry import get_config
    from opendino.models.vit import VisionTransformer
    from opendino.models.weights import own_metadata

    with torch.device("meta"):
        model = VisionTransformer(get_config(args.arch), PreprocessSpec())
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in model.state_dict().items():
        value = torch.randn(tensor.shape, generator=generator)
        if name.endswith("gamma"):
            value = 0.5 * (0.5 * value).exp()
        elif value.ndim == 1:
            value = 0.05 * value + float("norm" in name and name.endswith("weight"))
        else:
            value *= 0.02
        state[name] = value.to(torch.bfloat16 if args.file == "bf16" else torch.float32)
    folder = args.work / "transformers"
    folder.mkdir(parents=True)
    if "transformers" in args.ways:
        (folder / "config.json").write_text(json.dumps(transformers_config(model)))
        save_file(to_transformers(state), folder / "model.safetensors", {"format": "pt"})
    save_file(state, args.work / "model.safetensors", own_metadata(model))


def call_of(way: str, work: Path) -> Any:
    """Give the forward pass of one way: an image (1, 3, H, W) to all its final tokens."""
    import torch

    if way == "opendino":
        from opendino.embed.embedder import Embedder

        embedder = Embedder(work / "model.safetensors", precision="bf16", device="cpu")
        return lambda x: embedder.runtime.vectors(x, 1, ("cls", "patches"))["cls"]
    if way == "transformers":
        from transformers import Dinov2Model

        model = Dinov2Model.from_pretrained(
            work / "transformers", attn_implementation="sdpa", dtype=torch.bfloat16
        ).eval()
        return lambda x: model(x.bfloat16()).last_hidden_state[:, 0]
    import opendino

    plain = opendino.load(work / "model.safetensors").to(torch.bfloat16)
    return lambda x: plain.forward_features(x.bfloat16())["x_norm_clstoken"]


def serve(args: argparse.Namespace) -> None:
    """Load, run once, say what it took; then time one sample for each line read."""
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    image = torch.randn(1, 3, args.size, args.size)
    with torch.inference_mode():
        warm = torch.nn.Linear(256, 256).bfloat16()  # the libraries' own memory
        warm(torch.randn(64, 256).bfloat16())
        if args.serve == "transformers":
            import transformers.models.dinov2.modeling_dinov2  # noqa: F401
        else:
            import opendino.embed.embedder  # noqa: F401
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before, started = resident("VmRSS"), time.perf_counter()
        call = call_of(args.serve, args.work)
        loaded = time.perf_counter() - started
        cls = call(image).float()
        answer = {
            "grown_mib": resident("VmHWM") - before, "whole_mib": resident("VmHWM"), "before_mib": before,
            "load_s": loaded, "first_s": time.perf_counter() - started - loaded, "cls": cls[0, :8].tolist(),
            "norm": float(cls.norm()),
        }  # fmt: skip
        print(json.dumps(answer), flush=True)
        while sys.stdin.readline():
            started, cpu, count = time.perf_counter(), time.process_time(), 0
            while count == 0 or time.perf_counter() - started < args.seconds:
                call(image)
                count += 1
            sample = {"wall": (time.perf_counter() - started) / count, "cpu": (time.process_time() - cpu) / count}
            print(json.dumps(sample), flush=True)


def resident(field: str) -> float:
    """Give a line of /proc/self/status, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


class Way:
    """One way in its own process."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        words = ["--serve", name, "--work", args.work, "--size", args.size, "--threads", args.threads]
        words += ["--seconds", args.seconds]
        threads = str(args.threads)
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, __file__, *map(str, words)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )  # fmt: skip
        self.ready = self._answer()
        self.samples: list[dict[str, float]] = []

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}; its message is above.")
        return json.loads(line)

    def sample(self) -> None:
        """Have one sample taken."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.samples.append(self._answer())

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def parameters(arch: str) -> int:
    """Count the parameters of an architecture."""
    import torch

    from opendino.models.registry import get_config
    from opendino.models.vit import VisionTransformer

    with torch.device("meta"):
        return sum(p.numel() for p in VisionTransformer(get_config(arch)).parameters())


def report(ways: list[Way], args: argparse.Namespace) -> bool:
    """Print the table; say whether the promise was kept."""
    weights = parameters(args.arch) * 2 / MIB
    print(f"{args.arch}, {args.size} px, batch 1, file in {args.file}, {args.threads} threads, {args.rounds} rounds in")
    print(f"turn. Weights in bf16: {weights:.0f} MiB.\n")
    head = ["way", "load s", "peak MiB of load and forward", "÷ weights", "whole process MiB"]
    head += ["ms/image, median [min..max]", "CPU ms", "opendino ÷ way, speed"]
    print(f"| {' | '.join(head)} |\n{'| --- ' * len(head)}|")
    ours = next((w for w in ways if w.name == "opendino"), None)
    for way in ways:
        r, walls = way.ready, [1e3 * s["wall"] for s in way.samples]
        cells = [way.name, f"{r['load_s']:.1f}", f"{r['grown_mib']:.0f}", f"{r['grown_mib'] / weights:.3f}"]
        cells.append(f"{r['whole_mib']:.0f}")
        if walls:
            cpu = statistics.median(1e3 * s["cpu"] for s in way.samples)
            cells += [f"{statistics.median(walls):.0f} [{min(walls):.0f}..{max(walls):.0f}]", f"{cpu:.0f}"]
            pairs = zip(way.samples, ours.samples if ours else [], strict=False)
            ratios = [a["wall"] / b["wall"] for a, b in pairs]
            cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
        print(f"| {' | '.join(cells)} |")
    kept = ours is None or ours.ready["grown_mib"] <= PROMISE * weights
    print(f"\nThe promise of {PROMISE} × weights is {'kept' if kept else 'NOT kept'}.")
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for the weights; it must not exist, and is removed")
    add("--arch", default="vitg14")
    add("--file", choices=["fp32", "bf16"], default="fp32", help="dtype of the weights in the file")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--size", type=int, default=224)
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=5, help="0: memory alone")
    add("--seconds", type=float, default=1.0, help="a sample runs at least so long")
    add("--json", type=Path, metavar="OUT")
    add("--serve", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args)
        return 0
    if args.work.exists():
        raise SystemExit(f"{args.work} exists already; give a folder that is made and removed.")
    ways: list[Way] = []
    try:
        draw(args)
        for name in args.ways:  # one after the other: each has the memory to itself while it loads
            ways.append(Way(name, args))
        for _ in range(args.rounds):
            for way in ways:
                way.sample()
        kept = report(ways, args)
        if args.json:
            args.json.write_text(json.dumps({w.name: {"ready": w.ready, "samples": w.samples} for w in ways}, indent=1))
        return 0 if kept else 1
    finally:
        for way in ways:
            way.close()
        shutil.rmtree(args.work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
