# SPDX-License-Identifier: Apache-2.0
"""A list of images, a tiny model, runs of `opendino embed` in processes of their own, and what they leave."""

import contextlib
import io
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from runs import start

from opendino.cli import main
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone

BATCH, SHARD_ROWS = 2, 6


def write_inputs(root, count):
    """Write images of which no two are equal, one that is damaged, and a list that names one thrice and one in vain."""
    photos = root / "photos"
    photos.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(photos / f"{i:05d}.png")
    (photos / "00005.png").write_bytes(b"no image")
    names = [f"photos/{i:05d}.png" for i in range(count)]
    names[9] = names[count // 2] = names[3]
    names[count // 3] = "photos/missing.png"
    (root / "list.txt").write_text("\n".join(names) + "\n")
    torch.manual_seed(0)
    config = ViTConfig(img_size=14, patch_size=7, embed_dim=16, depth=2, num_heads=2)
    save_backbone(VisionTransformer(config, PreprocessSpec(resize=14, crop=14)), root / "model.safetensors")
    return [str(root / name) for name in names]


def embed(root, out, *extra):
    """Arguments of an extraction of the list."""
    return ["embed", root / "list.txt", "--model", root / "model.safetensors", "--out", out, "--batch", BATCH,
            "--workers", "1", "--shard-rows", SHARD_ROWS, "--device", "cpu", "--json", *extra]  # fmt: skip


def here(*arguments):
    """Run the command line in this process, with one thread like the others; give exit code and what --json prints."""
    threads, text = torch.get_num_threads(), io.StringIO()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(text):
            code = main([str(a) for a in arguments])
    finally:
        torch.set_num_threads(threads)
    return code, json.loads(text.getvalue())


def shards(out):
    """Names of the shards."""
    return sorted(p.name for p in out.glob("part-*.parquet"))


def rows(out):
    """All rows in the order of the shards' names."""
    return pa.concat_tables([pq.read_table(out / name) for name in shards(out)])


def check_whole(out, whole, names):
    """See that a folder has one row for every entry of the list, and the values of an undisturbed run, bit for bit."""
    found, wanted = rows(out), rows(whole)
    assert found["path"].to_pylist() == names
    for column in ("path", "sha256", "error"):
        assert found[column].to_pylist() == wanted[column].to_pylist()
    for column in ("cls", "mean"):
        assert found[column].combine_chunks().equals(wanted[column].combine_chunks())
    assert sum(e is None for e in found["error"].to_pylist()) == len(names) - 2
    code, verdict = here("embed", "--verify", out, "--json", "--device", "cpu")
    assert (code, verdict["ok"]) == (0, True), verdict
    assert (verdict["rows"], verdict["errors"]) == (len(names), 2)
    assert not list(out.glob("*.tmp"))


def kill_at_random(arguments, out, rng):
    """Start a run and kill it after some shards; every other time while a shard is written.

    Returns:
        Whether a shard was being written; None when the run was finished before.
    """
    process = start(*arguments)
    goal, during = len(shards(out)) + rng.randint(1, 8), rng.random() < 0.5
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if len(shards(out)) >= goal and (not during or any(out.glob("*.tmp"))):
            break
        time.sleep(0 if during else 0.002)
    if not during:
        time.sleep(rng.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    writing = any(out.glob("*.tmp"))
    _, messages = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL), messages
    return writing if process.returncode else None


def children(pid):
    """Processes that a process has started, and those that they have (Linux)."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(text.rsplit(")", 1)[1].split()[1])
    found, layer = [], [pid]
    while layer:
        layer = [child for child, parent in parents.items() if parent in layer]
        found += layer
    return found


def command_of(pid):
    """A process's command line, "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def kill_worker(pid):
    """Kill a process that may be gone."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
