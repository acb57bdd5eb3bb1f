# SPDX-License-Identifier: Apache-2.0
"""One peer of `run.py` in its own process: prints {"ready": …}, then the images/s of one sample per line read."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

import torch

SIZE = 224


def forward_opendino(batch: torch.Tensor) -> Callable[[], object]:
    from opendino.models.registry import get_config
    from opendino.models.vit import VisionTransformer

    model = VisionTransformer(get_config("vits14")).eval()
    return lambda: model.forward_features(batch)


def forward_transformers(batch: torch.Tensor) -> Callable[[], object]:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    model = Dinov2Model(config).eval()
    return lambda: model(batch)


def forward_timm(batch: torch.Tensor) -> Callable[[], object]:
    import timm

    model = timm.create_model("vit_small_patch14_dinov2", img_size=SIZE, num_classes=0).eval()
    return lambda: model.forward_features(batch)


def step_opendino(batch: torch.Tensor) -> Callable[[], object]:
    from opendino.pretrain.config import PretrainConfig
    from opendino.pretrain.student_teacher import Crops, StudentTeacher

    torch.manual_seed(0)
    config = PretrainConfig.model_validate({"model": {"arch": "vits14"}, "heads": {"num_prototypes": 65536}})
    model = StudentTeacher(config)
    optimizer = torch.optim.AdamW(model.student.parameters(), 1e-4, fused=True)
    n = len(batch)
    masks = torch.rand(2 * n, 256) < 0.15
    crops = Crops(torch.randn(2 * n, 3, 224, 224), torch.randn(8 * n, 3, 98, 98), masks)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            targets = model.targets([crops], 0.05)[0]
            loss, _ = model.loss(crops, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.student.parameters(), 3.0)
        optimizer.step()
        with torch.no_grad():
            teacher, student = list(model.teacher.parameters()), list(model.student.parameters())
            torch._foreach_lerp_(teacher, student, 0.008)

    return step


PEERS: dict[tuple[str, str], Callable[[torch.Tensor], Callable[[], object]]] = {
    ("forward", "opendino"): forward_opendino,
    ("forward", "transformers"): forward_transformers,
    ("forward", "timm"): forward_timm,
    ("step", "opendino"): step_opendino,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("peer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    batch = torch.randn(args.batch, 3, SIZE, SIZE)
    try:
        call = PEERS[args.task, args.peer](batch)
    except (ImportError, KeyError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    context = torch.inference_mode() if args.task == "forward" else torch.enable_grad()
    repeats = 4 if args.task == "forward" else 1
    with context:
        call()
        print(json.dumps({"ready": args.peer}), flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            seconds = (time.perf_counter() - start) / repeats
            print(json.dumps({"images_per_s": args.batch / seconds}), flush=True)


if __name__ == "__main__":
    main()
