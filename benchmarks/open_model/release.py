# SPDX-License-Identifier: Apache-2.0
"""Put a stage's teacher and heads into the package as `vitt14_open`, in half precision, and say how near they stay.

python benchmarks/open_model/release.py --runs RUNS --stage 8 --size 98
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import opendino
from open_model.train import NAME, released_stages
from opendino.errors import DataError, OpendinoError
from opendino.models.packaged import packaged_heads, packaged_weights
from opendino.models.vit import VisionTransformer
from opendino.models.weights import own_metadata
from opendino.pretrain.config import parse_config
from opendino.pretrain.initialise import HEADS_FILE

MARGIN = 8 / 7
"""Short side before the centre crop, of its side: 256 to 224 as published."""
CHECKED = 64


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the stages' run folders")
    parser.add_argument("--stage", type=int, required=True, help="whose teacher is released")
    parser.add_argument("--size", type=int, required=True, help="side that images are shown at, pixels")
    args = parser.parse_args()
    run = args.runs / f"stage{args.stage}"
    model = opendino.load(str(run), device="cpu")
    spec = model.preprocess.model_copy(update={"crop": args.size, "resize": round(args.size * MARGIN)})
    config = model.config.model_copy(update={"arch": NAME})
    history = json.dumps(stages_until(args.stage, args.runs))
    released = VisionTransformer(config, spec)
    released.load_state_dict(model.state_dict())
    metadata = own_metadata(released) | {"opendino.training": history, "license": "Apache-2.0"}
    write({k: v.half() for k, v in model.state_dict().items()}, packaged_weights(NAME), metadata)
    heads = {k: v.half() for k, v in load_file(run / HEADS_FILE).items()}
    write(heads, packaged_heads(NAME), {"format": "pt", "license": "Apache-2.0"})
    images = torch.randn(CHECKED, 3, args.size, args.size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        near = torch.cosine_similarity(model.eval()(images), opendino.load(NAME)(images)).min()
    print(f"{NAME}: {history}; cls tokens of {CHECKED} images of noise at least {near:.6f} like those in fp32")


def stages_until(last: int, runs: Path) -> list[dict[str, Any]]:
    """Give the facts of all stages; of those whose run folders are elsewhere, what the released file says.

    Raises:
        DataError: when neither knows a stage.
    """
    before = {stage["recipe"]: stage for stage in released_stages()}
    found = []
    for number in range(1, last + 1):
        run, recipe = runs / f"stage{number}", f"{NAME}_{number}"
        if not run.is_dir() and recipe not in before:
            raise DataError(f"{run} is not there, and the released {NAME} does not know {recipe}. Give its --runs.")
        found.append(stage_facts(run) if run.is_dir() else before[recipe])
    return found


def stage_facts(run: Path) -> dict[str, float | int | str]:
    """Say what a stage saw: its recipe, steps done, images, and hours by the clock and by processor time."""
    config = parse_config((run / "config.yaml").read_text(), str(run))
    steps = sum(1 for line in (run / "metrics.jsonl").open() if '"loss"' in line)
    sessions = [json.loads(p.read_text()) for p in (run / "sessions").glob("*.json")]
    return {
        "recipe": config.recipe, "steps": steps, "images": steps * config.batch_size,
        "hours": round(sum(s["wall_s"] for s in sessions) / 3600, 2),
        "core_hours": round(sum(s["cpu_s"] for s in sessions) / 3600, 2),
    }  # fmt: skip


def write(tensors: dict[str, torch.Tensor], path: Path | None, metadata: dict[str, str]) -> None:
    """Write a safetensors file aside and rename it."""
    assert path is not None
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f".{path.name}")
    save_file({k: v.contiguous() for k, v in tensors.items()}, aside, metadata)
    aside.chmod(0o644)
    aside.rename(path)
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    try:
        main()
    except OpendinoError as error:
        raise SystemExit(f"Error: {error}") from None
