# SPDX-License-Identifier: Apache-2.0
"""Peak memory of `opendino embed` for few and for many images: it must not grow with their number.

    python benchmarks/extraction_memory.py --work work            # 5 000 and 100 000 images, every kind of source
    python benchmarks/extraction_memory.py --work work --sources tar --images 5000 20000

Each row is one command in a process of its own, on tiny PNGs and a tiny model; the figure is the largest resident
memory of that process (VmHWM, read by the process itself when it ends). "resumed" is a command that was killed in the
middle and then run again; the figure is that of the second.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

SOURCES = ("folder", "list", "csv", "tar", "parquet")
PER_FOLDER = 1000
SIDE = 28


def picture(number: int) -> bytes:
    """Make a PNG that no other number has."""
    import numpy as np
    from PIL import Image

    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(7, 0).repeat(7, 1)
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()


def name_of(number: int) -> str:
    """Name of an image, 1000 in a folder."""
    return f"{number // PER_FOLDER:04d}/{number:07d}.png"


def prepare(work: Path, count: int, sources: list[str]) -> dict[str, str]:
    """Write the sources that are missing; give what `embed` is to be called with."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    base = work / str(count)
    photos, done = base / "photos", base / "done"
    if not done.exists():
        for number in range(count):
            path = photos / name_of(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(number))
        done.write_text("")
    places = {"folder": photos, "list": base / "list.txt", "csv": base / "table.csv", "tar": base / "tars",
              "parquet": base / "parquet"}  # fmt: skip
    names = [name_of(i) for i in range(count)]
    if "list" in sources:
        places["list"].write_text("".join(f"photos/{n}\n" for n in names))
    if "csv" in sources:
        places["csv"].write_text("path,label\n" + "".join(f"photos/{n},{i % 7}\n" for i, n in enumerate(names)))
    for kind in ("tar", "parquet"):
        if kind not in sources or places[kind].exists():
            continue
        places[kind].mkdir()
        for part in range(0, count, PER_FOLDER):
            inside = names[part : part + PER_FOLDER]
            if kind == "tar":
                with tarfile.open(places[kind] / f"{part:07d}.tar", "w") as tar:
                    for name in inside:
                        tar.add(photos / name, name.split("/")[1])
            else:
                table = pa.table({"image": [(photos / n).read_bytes() for n in inside]})
                pq.write_table(table, places[kind] / f"{part:07d}.parquet", row_group_size=500)
    return {kind: str(places[kind]) for kind in sources}


def save_model(path: Path) -> None:
    """Save a tiny model."""
    import torch

    from opendino.models.config import PreprocessSpec, ViTConfig
    from opendino.models.vit import VisionTransformer
    from opendino.models.weights import save_backbone

    torch.manual_seed(0)
    config = ViTConfig(img_size=SIDE, patch_size=14, embed_dim=64, depth=1, num_heads=2)
    save_backbone(VisionTransformer(config, PreprocessSpec(resize=SIDE, crop=SIDE)).eval(), path)


def child(words: list[str]) -> int:
    """Run the command line in this process and print its peak."""
    from opendino.cli import main

    code = main(words)
    # Not getrusage, whose figure begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    print(json.dumps({"peak_mib": peak / 1024}))
    return code


def embed(words: list[str], kill_at: Path | None = None, shards: int = 0) -> dict[str, Any]:
    """Run `embed` in a fresh process; kill it when a folder has so many shards."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, __file__, "--child", *words],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while kill_at and process.poll() is None:
        if len(list(kill_at.glob("part-*.parquet"))) >= shards:
            process.kill()
        time.sleep(0.05)
    text, _ = process.communicate()
    if kill_at:
        return {}
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return lines[0] | lines[1] | {"seconds": time.perf_counter() - start}


def measure(kind: str, place: str, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """Embed one source, disturbed or not, and give the peak of the process that finished it."""
    out = args.work / f"out-{kind}-{count}"
    shutil.rmtree(out, ignore_errors=True)
    words = ["embed", place, "--model", str(args.work / "model.safetensors"), "--out", str(out), "--json"]
    words += ["--batch", "64", "--workers", "1", "--shard-rows", str(args.shard_rows), *args.flags.split()]
    if args.resumed:
        embed(words, out, max(1, count // args.shard_rows // 2))
    found = embed(words)
    assert found["count"] == count, found
    return found


def main() -> None:
    """Measure every source at every size and print a table; Linux only."""
    if sys.argv[1:2] == ["--child"]:
        raise SystemExit(child(sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for images and features; kept for the next call")
    add("--images", type=int, nargs="+", default=[5000, 100_000])
    add("--sources", nargs="+", default=list(SOURCES), choices=SOURCES)
    add("--shard-rows", type=int, default=1024)
    add("--resumed", action="store_true", help="kill each command in the middle and measure the one that goes on")
    add("--flags", default="", help="further words for embed, such as '--dtype float16'")
    args = parser.parse_args()
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    save_model(args.work / "model.safetensors")
    print("| source | images | peak MiB | of the fewest | images/s |\n| --- | --- | --- | --- | --- |")
    places = {count: prepare(args.work, count, args.sources) for count in args.images}
    for kind in args.sources:
        first = 0.0
        for count in args.images:
            found = measure(kind, places[count][kind], count, args)
            first = first or found["peak_mib"]
            print(
                f"| {kind} | {count} | {found['peak_mib']:.1f} | {found['peak_mib'] / first:.3f} | "
                f"{found['images_per_s']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
