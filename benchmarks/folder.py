# SPDX-License-Identifier: Apache-2.0
"""From a folder of JPEG files to cls vectors of a ViT-S/14: opendino, and the scripts that people write.

    python benchmarks/folder.py                    # 256 files of 500 × 375 pixels, 64 of 2000 × 1500; 5 rounds
    python benchmarks/folder.py --quick            # does it run? its figures mean nothing

One process each, asked in turn; a sample is the whole folder once, with the files in the page cache and the model
loaded. All have the same weights, and their vectors are compared with those of plain fp32 on Pillow's pixels.

opendino: `Embedder.stream` of the folder, bf16.
opendino, scaled: the same with decode="scaled".
opendino, forward alone: its runtime on one batch of ready pixels, again and again; no reading.
transformers: one image at a time, Pillow, its image processor, its model, fp32.
timm: what a script around torch.hub does: a Dataset of Pillow pictures with torchvision's transforms, a DataLoader with
    two workers and batches of 32, an eager model, in fp32 and cast to bf16. Starting the workers counts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harness import Result, Spec, compare, paired_ratio, run_once, spread
from worker import Turns, versions

SIZES = {500: (500, 375, 51), 2000: (2000, 1500, 455)}
"""Width: width, height, and KiB that a file aims at."""
CHECKED = 16
"""Files of each folder whose vectors are compared."""
CONVENTION = {"transformers": "size", "timm": "size_antialias"}
NAMES = {"opendino-scaled": "opendino, scaled", "opendino-forward": "opendino, forward alone"}
HEAD = "| pixels | who | images/s, median [min..max] | opendino ÷ this | CPU ms/image | peak MiB | cls 1−cos, mean |"


# --- in the workers --------------------------------------------------------------------------------------------------


def serve(spec: Spec, turns: Turns) -> None:
    """Write files and reference vectors, or embed a folder at each turn."""
    if spec.task == "folder-files":
        write_files(spec)
        turns.done()
    import numpy as np

    paths = sorted(folder_of(spec).glob("*.jpg"))
    embed, setting = PEERS[spec.peer](spec, paths)
    found = embed(paths[:CHECKED])
    away = None
    if found is not None:
        want = np.load(reference_of(spec))
        away = float(np.mean(1 - (found * want).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(want, axis=1)))
    package = spec.peer.split("-")[0]
    turns.about = {"versions": versions(package), "setting": setting, "away": away}
    turns.done()
    while True:
        embed(paths)
        turns.done(images=len(paths), seconds=time.perf_counter() - turns.started)


def folder_of(spec: Spec) -> Path:
    """Say where the files of one size lie."""
    return Path(spec.work) / f"photographs-{spec.size}"


def reference_of(spec: Spec) -> Path:
    """Say where the vectors lie that a peer must give: with its own way to resize the position table."""
    return Path(spec.work) / f"cls-{spec.size}-{CONVENTION.get(spec.peer, 'scale_offset')}.npy"


def write_files(spec: Spec) -> None:
    """Write the weights, a folder of photographs, and the vectors of the first of them."""
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    from augment import write_photographs
    from opendino.models.vit import VisionTransformer
    from prepare import draw_weights, load_weights, model_config, weights_path

    if not weights_path(spec).exists():
        save_file(draw_weights(spec), weights_path(spec))
    folder = folder_of(spec)
    width, height, kib = SIZES[spec.size]
    distinct = min(spec.num_images, 64)
    write_photographs(folder, distinct, (width, height), kib * 1024)
    for i in range(distinct, spec.num_images):
        shutil.copyfile(folder / f"{i % distinct:04d}.jpg", folder / f"{i:04d}.jpg")
    pictures = []
    for path in sorted(folder.glob("*.jpg"))[:CHECKED]:
        with Image.open(path) as picture:
            small = picture.convert("RGB").resize((341, 256), Image.Resampling.BICUBIC)
        left = round((341 - 224) / 2)
        pictures.append(np.asarray(small.crop((left, 16, left + 224, 240))))
    model = VisionTransformer(model_config(spec))
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(model.preprocess.mean).view(3, 1, 1)) / torch.tensor(model.preprocess.std).view(3, 1, 1)
    for convention in ("scale_offset", *CONVENTION.values()):
        model = VisionTransformer(model_config(spec, convention)).eval()
        model.load_state_dict(load_weights(spec))
        with torch.inference_mode():
            cls = model.forward_features(x)["x_norm_clstoken"]
        np.save(Path(spec.work) / f"cls-{spec.size}-{convention}.npy", cls.numpy())


Embed = Callable[[list[Path]], object]
"""From paths to cls vectors (n, D) as a NumPy array; None where nothing is read."""


def opendino(spec: Spec, paths: list[Path]) -> tuple[Embed, str]:
    """The Embedder over the folder."""
    import numpy as np

    embedder = _embedder(spec)

    def embed(some: list[Path]) -> object:
        source = folder_of(spec) if len(some) == len(paths) else some
        return np.concatenate([features.cls for features in embedder.stream(source)])

    how = f"{embedder.precision}, batches of {embedder.batch_size}, {embedder.workers} reading threads"
    return embed, f"Embedder.stream, {how}, decode={embedder.decode}"


def opendino_forward(spec: Spec, paths: list[Path]) -> tuple[Embed, str]:
    """The forward pass of the same Embedder, without reading."""
    import torch

    embedder = _embedder(spec)
    channels_last = torch.randint(0, 256, (spec.batch, 224, 224, 3), dtype=torch.uint8)
    batch = channels_last.permute(0, 3, 1, 2)
    batch = batch if embedder.runtime.takes_pixels else embedder.preprocess.normalise(batch)

    def forward(some: list[Path]) -> None:
        for start in range(0, len(some), spec.batch):
            embedder.runtime.vectors(batch[: len(some) - start], 1, ("cls",))

    return forward, "runtime.vectors of one batch"


def _embedder(spec: Spec):
    from opendino.embed.embedder import Embedder
    from opendino.models.vit import VisionTransformer
    from prepare import load_weights, model_config

    model = VisionTransformer(model_config(spec)).eval()
    model.load_state_dict(load_weights(spec))
    decode = "scaled" if spec.peer == "opendino-scaled" else "exact"
    return Embedder(model, precision=spec.dtype, what=("cls",), batch_size=spec.batch, decode=decode)


def transformers(spec: Spec, paths: list[Path]) -> tuple[Embed, str]:
    """One image after the other, as the model card of most models shows it."""
    import numpy as np
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor

    import forward

    _, tokens, setting = forward.transformers(spec)
    folder = Path(spec.work) / "transformers"
    about = {
        "image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": 256}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225], "do_convert_rgb": True,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)

    @torch.inference_mode()
    def embed(some: list[Path]) -> object:
        rows = []
        for path in some:
            pixels = processor(images=Image.open(path), return_tensors="pt")["pixel_values"]
            rows.append(tokens(pixels)[:, 0].float().numpy())
        return np.concatenate(rows)

    return embed, f"{type(processor).__name__}, {setting}, one image at a time"


def timm(spec: Spec, paths: list[Path]) -> tuple[Embed, str]:
    """A Dataset with torchvision's transforms, a DataLoader, an eager model."""
    from dataclasses import replace

    import numpy as np
    import torch
    from torch.utils.data import DataLoader
    from torchvision import transforms as T

    import forward

    _, tokens, setting = forward.timm(replace(spec, size=224))
    transform = T.Compose(
        [
            T.Resize(256, interpolation=T.InterpolationMode.BICUBIC), T.CenterCrop(224), T.ToTensor(),
            T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )  # fmt: skip
    dtype = forward.DTYPES[spec.dtype]

    @torch.inference_mode()
    def embed(some: list[Path]) -> object:
        loader = DataLoader(Photographs(some, transform), batch_size=spec.batch, num_workers=2)
        return np.concatenate([tokens(batch.to(dtype))[:, 0].float().numpy() for batch in loader])

    return embed, f"DataLoader with 2 workers, batches of {spec.batch}, {setting}"


class Photographs:
    """What a script has as its Dataset."""

    def __init__(self, paths: list[Path], transform: Callable[..., object]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> object:
        from PIL import Image

        with Image.open(self.paths[index]) as picture:
            return self.transform(picture.convert("RGB"))


PEERS: dict[str, Callable[[Spec, list[Path]], tuple[Embed, str]]] = {
    "opendino": opendino,
    "opendino-scaled": opendino,
    "opendino-forward": opendino_forward,
    "transformers": transformers,
    "timm": timm,
}


# --- in the parent ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Write the folders, time everybody in turn, print the table."""
    args = parse()
    work = Path(args.work or tempfile.mkdtemp(prefix="opendino-folder-"))
    work.mkdir(parents=True, exist_ok=True)
    try:
        results = measure(args, work)
        print(report(results))
        if args.json:
            rows = [{"spec": json.loads(r.spec.dumps()), "ready": r.ready, "samples": r.samples} for r in results]
            Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    finally:
        if not args.work:
            shutil.rmtree(work)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="files of 500 x 375; a quarter of them of 2000 x 1500")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of opendino")
    parser.add_argument("--peers", default=",".join(PEERS), help="with commas")
    parser.add_argument("--work", help="folder that is kept and used again")
    parser.add_argument("--json", help="file for every sample")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.images, args.rounds = 32, 1
    return args


def measure(args: argparse.Namespace, work: Path) -> list[Result]:
    """Run everybody."""

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def spec(peer: str, dtype: str, size: int, task: str = "folder") -> Spec:
        count = args.images if size == 500 else max(args.images // 4, CHECKED)
        return Spec(task, peer, str(work), dtype=dtype, threads=args.threads, batch=32, size=size, num_images=count)

    for size in SIZES:
        files = spec("opendino", "fp32", size, "folder-files")
        if len(list(folder_of(files).glob("*.jpg"))) != files.num_images:
            say(f"writing {files.num_images} files {size} pixels wide")
            shutil.rmtree(folder_of(files), ignore_errors=True)
            ready = run_once(files)
            if "error" in ready:
                raise SystemExit(ready["error"])
    wanted = [
        spec("opendino", args.dtype, 500), spec("opendino-forward", args.dtype, 500),
        spec("transformers", "fp32", 500), spec("timm", "fp32", 500), spec("timm", "bf16", 500),
        spec("opendino", args.dtype, 2000), spec("opendino-scaled", args.dtype, 2000), spec("timm", "bf16", 2000),
    ]  # fmt: skip
    peers = args.peers.split(",")
    return compare([s for s in wanted if s.peer in peers], args.rounds, 1, say)


def report(results: list[Result]) -> str:
    """Give the table, what each does, and how the two sizes and the bare forward compare."""
    lines = [HEAD, "| --- " * HEAD.count(" |") + "|"]
    by_key = {(r.spec.peer, r.spec.dtype, r.spec.size): r for r in results if r.problem is None and r.samples}
    ours = {size: next((r for (p, _, s), r in by_key.items() if (p, s) == ("opendino", size)), None) for size in SIZES}
    for result in results:
        spec = result.spec
        width, height, _ = SIZES[spec.size]
        who = f"{width} × {height} | {NAMES.get(spec.peer, spec.peer)}, {spec.dtype}"
        if result.problem or not result.samples:
            lines.append(f"| {who} | {result.problem or 'no samples'} | | | | |")
            continue
        middle, low, high = spread(result.rates())
        cpu = spread([1000 * s["cpu"] / s["images"] for s in result.samples])[0]
        own = ours[spec.size]
        ratio = f"{paired_ratio(own.rates(), result.rates()):.2f}" if own else ""
        peak = f"{max(s['rss_mib'] for s in result.samples):.0f}{' + 2 workers' if spec.peer == 'timm' else ''}"
        away = result.ready["away"]
        away = "" if away is None else f"{away:.1e}"
        lines.append(f"| {who} | {middle:.1f} [{low:.1f}..{high:.1f}] | {ratio} | {cpu:.1f} | {peak} | {away} |")
    lines.append("")
    forward = next((r for (p, _, _), r in by_key.items() if p == "opendino-forward"), None)
    small, large = ours[500], ours[2000]
    if small and forward:
        lines.append(f"Folder ÷ forward alone, 500 × 375: {paired_ratio(small.rates(), forward.rates()):.3f}")
    if small and large:
        lines.append(f"2000 × 1500 ÷ 500 × 375: {paired_ratio(large.rates(), small.rates()):.3f}")
    for (peer, dtype, size), result in by_key.items():
        lines.append(f"- {peer}, {dtype}, {size}: {result.ready['setting']} ({result.ready['versions']})")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
