# SPDX-License-Identifier: Apache-2.0
"""Small runs of the real command line in processes of their own, and what they leave."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

SMALL = [
    "--recipe", "vitt14_demo", "--batch-size", "8", "--num-workers", "0", "--precision", "fp32", "--device", "cpu",
    "--model.patch-size", "7", "--model.embed-dim", "32", "--model.depth", "2", "--model.num-heads", "2",
    "--model.drop-path-rate", "0.2", "--crops.global-size", "28", "--crops.local-size", "14", "--crops.num-local", "2",
    "--heads.num-prototypes", "64", "--heads.hidden-dim", "64", "--heads.bottleneck-dim", "16",
]  # fmt: skip
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def write_images(folder, count=24):
    """Write small JPEGs of smooth noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        field = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(field).resize((48, 40), Image.Resampling.BICUBIC).save(folder / f"{i:02d}.jpg")
    return folder


def pretrain(images, out, steps, *extra):
    """Arguments of a small run."""
    return ["pretrain", *SMALL, "--data", str(images), "--out", str(out), "--steps", str(steps), *map(str, extra)]


def opendino(*args, check=True, timeout=300):
    """Run the command line to its end."""
    command = [sys.executable, "-m", "opendino", *map(str, args)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    assert not check or done.returncode == 0, done.stderr[-2000:]
    return done


def start(*args):
    """Start the command line; its messages are kept."""
    command = [sys.executable, "-m", "opendino.cli", *map(str, args)]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_until(condition, process, seconds=120):
    """Wait for a condition, or for the process to end."""
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.002)


def kill(process, number=signal.SIGKILL):
    """Send a signal and give the exit code."""
    process.send_signal(number)
    _, messages = process.communicate(timeout=120)
    return process.returncode, messages


def records(run):
    """The lines of metrics.jsonl that are whole."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    whole = []
    for line in lines:
        try:
            whole.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return whole


def last_step(run):
    """Step of the last whole line, 0 without one; reads only the end of the file."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode().split("\n")[:-1]
    return json.loads(lines[-1])["step"] if lines and lines[-1].startswith("{") else 0


def losses(run):
    """Loss of each step."""
    return {r["step"]: r["loss"] for r in records(run) if "loss" in r}


def weights(run):
    """The teacher's weights and heads."""
    return load_file(run / "weights" / "teacher.safetensors") | load_file(run / "heads.safetensors")


def same_weights(a, b):
    """Whether two runs ended at the same weights, bit for bit."""
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
