# SPDX-License-Identifier: Apache-2.0
"""The ways of `inference.py`: images (B, 3, H, W) fp32 in memory to all final tokens, on the same weights.

A peer's name is its package, its precision and, for OpenVINO, its performance hint: "openvino-bf16-throughput". Each is
called as its users are told to for speed; none is compiled by torch. A copy or cast of the images counts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import forward
from harness import Spec
from opendino.models.positions import resize_pos_embed
from opendino.models.vit import VisionTransformer
from prepare import CONVENTIONS, images, load_weights, model_config, reference_path
from worker import Turns, versions

Call = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) to cls and patch tokens (B, 1 + P, D)."""
REFERENCE_BATCH = 8
"""Of the reference features, of which there are two."""
MICRO_BATCH = 8
"""Images of one request of OpenVINO's throughput mode."""


def backbone(spec: Spec) -> VisionTransformer:
    """Give opendino's backbone with its position table at the size of the images, as an export bakes it in."""
    state, config = load_weights(spec), model_config(spec)
    grid = spec.size // config.patch_size
    state["pos_embed"] = resize_pos_embed(state["pos_embed"], grid, grid, config.pos_resize)
    model = VisionTransformer(config.model_copy(update={"img_size": spec.size})).eval()
    model.load_state_dict(state)
    return model


class Tokens(nn.Module):
    """All final tokens of a backbone at the size of its position table, without what tracers stumble over."""

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        patches = model.patch_embed(x)
        stream = torch.cat([model.cls_token.expand(x.shape[0], -1, -1), patches], 1) + model.pos_embed
        for block in model.blocks:
            stream = block(stream)
        return model.norm(stream)


def opendino(spec: Spec, dtype: str) -> tuple[Call, str]:
    from opendino.embed.runtimes.prepared import PreparedViT

    model = VisionTransformer(model_config(spec)).eval()
    model.load_state_dict(load_weights(spec))
    ready = PreparedViT(model, "bf16" if dtype == "bf16" else "fp32")
    return ready.tokens, "PreparedViT, what an Embedder in bf16 runs" if dtype == "bf16" else "PreparedViT"


def eager(spec: Spec, dtype: str) -> tuple[Call, str]:
    """The official model's operations in eager mode: our plain backbone, cast."""
    _, features, setting = forward.opendino(replace(spec, dtype=dtype))
    return cast_to(dtype, features), f"{setting}, eager, the official model's operations"


def transformers(spec: Spec, dtype: str) -> tuple[Call, str]:
    _, features, setting = forward.transformers(replace(spec, dtype=dtype, work=own_folder(spec)))
    return cast_to(dtype, features), setting


def timm(spec: Spec, dtype: str) -> tuple[Call, str]:
    _, features, setting = forward.timm(replace(spec, dtype=dtype))
    return cast_to(dtype, features), setting


def cast_to(dtype: str, features: Call) -> Call:
    """Cast the images first."""
    wanted = forward.DTYPES[dtype]
    return lambda x: features(x.to(wanted))


def own_folder(spec: Spec) -> str:
    """Give a copy of the shared folder in which a peer can write its own layout beside others that do."""
    folder = Path(spec.work) / f"own-{spec.peer}"
    folder.mkdir(exist_ok=True)
    target = folder / "weights.safetensors"
    if not target.exists():
        os.link(Path(spec.work) / "weights.safetensors", target)
    return str(folder)


def onnxruntime(spec: Spec, dtype: str) -> tuple[Call, str]:
    """The file that `opendino export onnx` writes."""
    import onnxruntime as ort

    from opendino.export.exporter import describe_export, export_backbone

    path = Path(spec.work) / f"{spec.size}.onnx"
    if not path.exists():
        info = describe_export(backbone(spec), outputs=["cls", "patches"], size=(spec.size, spec.size))
        export_backbone(backbone(spec), path, info=info)
    options = ort.SessionOptions()
    options.intra_op_num_threads = spec.threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def call(x: Tensor) -> Tensor:
        cls, patches = session.run(["cls", "patches"], {"images": x.numpy()})
        return torch.cat([torch.from_numpy(cls)[:, None], torch.from_numpy(patches)], 1)

    return call, "fp32 file of opendino export onnx"


def openvino(spec: Spec, dtype: str, mode: str) -> tuple[Call, str]:
    """OpenVINO's own conversion of the plain backbone."""
    import openvino as ov

    path = Path(spec.work) / f"{spec.size}.xml"
    if not path.exists():
        shape = [ov.PartialShape([-1, 3, spec.size, spec.size])]
        example = torch.zeros(1, 3, spec.size, spec.size)
        converted = ov.convert_model(Tokens(backbone(spec)), example_input=example, input=shape)
        ov.save_model(converted, path, compress_to_fp16=False)
    core = ov.Core()
    model = core.read_model(path)
    batch = spec.batch if mode == "latency" else max(1, min(MICRO_BATCH, spec.batch // 2))
    setting = {
        "INFERENCE_NUM_THREADS": spec.threads,
        "INFERENCE_PRECISION_HINT": {"bf16": "bf16", "fp32": "f32"}[dtype],
        "PERFORMANCE_HINT": mode.upper(),
    }
    model.reshape([batch, 3, spec.size, spec.size])
    compiled = core.compile_model(model, "CPU", setting)
    if mode == "latency":
        request = compiled.create_infer_request()
        return lambda x: _latency(request, x), "its own conversion, LATENCY hint, fixed shape, one request a batch"
    count = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    requests = [compiled.create_infer_request() for _ in range(count)]
    said = f"its own conversion, THROUGHPUT hint, {count} requests of {batch} images"
    return lambda x: _throughput(requests, batch, x), said


def _latency(request: Any, x: Tensor) -> Tensor:
    size = request.get_input_tensor(0).shape[0]
    if len(x) != size:  # only the two images that are compared
        parts = [_filled(part, size) for part in x.split(size)]
        return torch.cat([_latency(request, part).clone() for part in parts])[: len(x)]
    request.infer({0: x.numpy()}, share_inputs=True)
    return torch.from_numpy(request.get_output_tensor(0).data)


def _filled(part: Tensor, size: int) -> Tensor:
    """Give a whole batch, the first image again where there are too few."""
    fill = size - len(part)
    return torch.cat([part, part[:1].expand(fill, -1, -1, -1)]) if fill else part.contiguous()


def _throughput(requests: list[Any], size: int, x: Tensor) -> Tensor:
    """Hand micro-batches to the requests in turn, each as soon as it is free."""
    parts = [x[i : i + size] for i in range(0, len(x), size)]
    found: list[Tensor] = []

    def collect(request: Any) -> None:
        request.wait()
        found.append(torch.from_numpy(request.get_output_tensor(0).data.copy()))

    for number, part in enumerate(parts):
        request = requests[number % len(requests)]
        if number >= len(requests):
            collect(request)
        request.start_async({0: _filled(part, size).numpy()}, share_inputs=True)
    first = max(0, len(parts) - len(requests))
    for number in range(first, len(parts)):
        collect(requests[number % len(requests)])
    return torch.cat(found)[: len(x)]


def embedder(spec: Spec, dtype: str) -> tuple[Call, str]:
    """Pictures in memory through a whole Embedder; its own images, so that preparing them counts."""
    from opendino.embed.embedder import Embedder

    model = VisionTransformer(model_config(spec)).eval()
    model.load_state_dict(load_weights(spec))
    made = Embedder(model, precision="bf16", size=spec.size, batch_size=spec.batch, what=["cls"], workers=1)
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 256, (spec.batch, 256, 256, 3), dtype=np.uint8))
    return lambda _: torch.from_numpy(made(pictures).cls), "Embedder on uint8 arrays of 256 × 256, what=cls"


WAYS: dict[str, Callable[[Spec], tuple[Call, str]]] = {
    "opendino-bf16": lambda s: opendino(s, "bf16"),
    "opendino-fp32": lambda s: opendino(s, "fp32"),
    "eager-fp32": lambda s: eager(s, "fp32"),
    "eager-bf16": lambda s: eager(s, "bf16"),
    "transformers-fp32": lambda s: transformers(s, "fp32"),
    "transformers-bf16": lambda s: transformers(s, "bf16"),
    "timm-fp32": lambda s: timm(s, "fp32"),
    "timm-bf16": lambda s: timm(s, "bf16"),
    "openvino-bf16-latency": lambda s: openvino(s, "bf16", "latency"),
    "openvino-bf16-throughput": lambda s: openvino(s, "bf16", "throughput"),
    "openvino-fp32-latency": lambda s: openvino(s, "fp32", "latency"),
    "onnxruntime-fp32": lambda s: onnxruntime(s, "fp32"),
    "embedder-bf16": lambda s: embedder(s, "bf16"),
}


@torch.inference_mode()
def serve(spec: Spec, turns: Turns) -> None:
    """Compare the tokens of two images with opendino's in fp32, then time whole batches in turn."""
    package = spec.peer.split("-")[0]
    call, setting = WAYS[spec.peer](spec)
    batch = images(spec)
    about = {"setting": setting, "threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}
    about["versions"] = versions("opendino" if package in ("eager", "embedder") else package)
    if package != "embedder":
        expected = torch.from_numpy(np.load(reference_path(spec, CONVENTIONS.get(package, "scale_offset"))))
        two = images(replace(spec, batch=REFERENCE_BATCH))[:2]
        about |= closeness(call(two).float(), expected)
    turns.about = about
    call(batch)
    started = time.perf_counter()
    call(batch)
    repeats = max(1, round(spec.seconds / (time.perf_counter() - started)))
    turns.done()
    while True:
        for _ in range(repeats):
            call(batch)
        turns.done(images=repeats * spec.batch, seconds=time.perf_counter() - turns.started)


def closeness(given: Tensor, expected: Tensor) -> dict[str, float]:
    """Give 1 − cosine of the worst cls token and the mean over patches, the largest difference, the relative distance.

    Args:
        given: (2, 1 + P, D).
        expected: the same by opendino in fp32, with the peer's convention of resizing positions.
    """
    if given.shape != expected.shape:
        return dict.fromkeys(("cls", "patches", "largest", "distance"), float("inf"))
    away = 1 - nn.functional.cosine_similarity(given.double(), expected.double(), dim=-1)
    return {
        "cls": float(away[:, 0].max()),
        "patches": float(away[:, 1:].mean()),
        "largest": float((given - expected).abs().max()),
        "distance": forward.relative_distance(given, expected),
    }
