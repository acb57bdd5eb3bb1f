# SPDX-License-Identifier: Apache-2.0
"""Short measurements of the ledger that no command of the package prints: one JSON object on the last line.

python benchmarks/ledger_measures.py step
python benchmarks/ledger_measures.py demo-start --out DIR     # fetches packages
python benchmarks/ledger_measures.py sets --out DIR           # counts what real_sets/build.py made
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from opendino.cli import demo
from opendino.pretrain.config import load_recipe
from opendino.pretrain.flops import flops_by_part
from opendino.pretrain.trainer import Trainer
from opendino.sample_data.demo import build_demo_data


def step() -> dict[str, Any]:
    """GFLOP of matrix products in the benchmark's step: ViT-S/14, 16 images, without stochastic depth."""
    recipe = load_recipe("vits14")
    parts = flops_by_part(recipe.model_copy(update={"model": recipe.model.model_copy(update={"drop_path_rate": 0.0})}))
    return {name: 16 * value / 1e9 for name, value in parts.items()}


def demo_start(out: Path) -> dict[str, Any]:
    """Scores of the demo before any training, percent: raw pixels, and the network as two seeds draw it."""
    data = build_demo_data(out / "data")
    update = {"data": str(demo.training_list(data, out))}
    rows = {"raw": demo.score_all(data, demo.raw_pixels)}
    for seed in (0, 1):
        with tempfile.TemporaryDirectory() as folder:
            config = load_recipe("vitt14_demo").model_copy(update=update | {"out": folder, "seed": seed})
            rows[f"seed{seed}"] = demo.score_all(data, demo.describe_with(Trainer(config).teacher))
    return rows | {"fallback": int(data.fallback)}


def sets(out: Path) -> dict[str, Any]:
    """Numbers of images and queries of the real sets that are there."""
    found: dict[str, Any] = {}
    for folder in sorted(p for p in out.iterdir() if p.is_dir()):
        splits = {s.name: sum(1 for p in s.rglob("*") if p.is_file()) for s in sorted(folder.iterdir()) if s.is_dir()}
        lists = folder / "retrieval.json"
        queries = {"queries": len(json.loads(lists.read_text())["queries"])} if lists.is_file() else {}
        found[folder.name] = splits | queries
    return found


def main() -> None:
    """Print one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "demo-start", "sets"))
    parser.add_argument("--out", type=Path, default=Path("demo"))
    args = parser.parse_args()
    found = {"step": step, "demo-start": lambda: demo_start(args.out), "sets": lambda: sets(args.out)}[args.what]()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
