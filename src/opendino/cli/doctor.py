# SPDX-License-Identifier: Apache-2.0
"""`opendino doctor`: what this machine and installation can do, what is missing, and whether a model fits."""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import tyro

from opendino.errors import ConfigError

EXAMPLE = """Say what this machine and installation can do for opendino, what is missing, and whether a model fits.

Example:
  opendino doctor
  opendino doctor --model vitg14 --size 518 --batch 8 --json

Nothing is downloaded. The first call on a machine compiles the native kernels, which takes seconds."""

EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "loggers": (("tensorboard", "wandb", "mlflow"), "sending the curves of a run elsewhere"),
    "report": (("matplotlib", "jinja2"), "pages about a run"),
    "remote": (("fsspec",), "URLs as input and output"),
    "scientific": (("tifffile",), "multi-channel TIFF files"),
    "matlab": (("h5py",), "MATLAB files of some data sets"),
    "finetune": (("peft",), "LoRA"),
    "export": (("onnx", "onnxruntime", "openvino"), "opendino export, runtimes onnx and openvino"),
    "ray": (("ray",), "opendino embed --engine ray"),
    "timm": (("timm",), "timm's models as backbones"),
    "rooms": (("pybullet",), "rendering rooms"),
}
"""Packages of each extra and what they are for."""
CORE = ("torch", "torchvision", "numpy", "pillow", "pydantic", "safetensors", "huggingface_hub", "pyarrow",
        "scikit-learn", "torchmetrics")  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Arguments of `opendino doctor`."""

    model: str | None = None
    """Also say what this model takes: a name, weight file, transformers folder or run folder."""
    size: str | None = None
    """Image side in pixels, or HxW; default: the size that travels with the model."""
    batch: int = 8
    """Images in one forward pass."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object."""


def main(argv: list[str]) -> int:
    """Look at everything and print it."""
    args = tyro.cli(Args, args=argv, prog="opendino doctor", description=EXAMPLE)
    if args.batch < 1:
        raise ConfigError(f"--batch is {args.batch}; it must be at least 1.")
    found = examine(args)
    if args.json:
        print(json.dumps(found))
    else:
        show(found)
    return 0


def examine(args: Args) -> dict[str, Any]:
    """Give everything, JSON-able; `advice` is what could be better."""
    found: dict[str, Any] = {
        "versions": versions(), "machine": machine(), "accelerators": accelerators(), "native": native(),
        "extras": extras(), "caches": caches(), "disk": disk(), "weights": published_weights(),
        "calibrations": calibrations(),
    }  # fmt: skip
    if args.model:
        found["model"] = model_memory(args, found["machine"], found["accelerators"])
    return found | {"advice": advice(found)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Give the versions of Python, this package and what it needs."""
    import torch

    from opendino._version import __version__

    own = {"opendino": __version__, "python": platform.python_version()}
    return own | {name: _version(name) for name in CORE} | {"cuda": torch.version.cuda}


def machine() -> dict[str, Any]:
    """Give processor, cores, memory and threads."""
    import torch

    from opendino.embed.runtimes import machine as found
    from opendino.embed.runtimes.prepared import packs

    return {
        "system": f"{platform.system()} {platform.machine()}", "cpu": found.cpu_name(),
        "features": found.cpu_features(), "cores": os.cpu_count(), "usable_cores": found.usable_cores(),
        "cpu_quota": found.cpu_quota(), "threads": torch.get_num_threads(), "memory": found.memory(),
        "packed_products": {"fp32": packs(torch.float32), "bf16": packs(torch.bfloat16)},
    }  # fmt: skip


def accelerators() -> list[dict[str, Any]]:
    """Give the GPUs that torch can use."""
    from opendino.embed.runtimes.machine import accelerators as found

    return found()


def native() -> dict[str, Any]:
    """Say whether the C kernels compile and load, why not, and whether this processor can run that of attention."""
    from opendino.native.attention import attention_supported
    from opendino.native.build import kernels

    built = kernels()
    attention = built.library is not None and attention_supported(built.library)
    return {"loaded": built.library is not None, "attention": attention, "about": built.about}


def extras() -> dict[str, Any]:
    """Give the packages of each extra with their versions, and how to install those that are missing."""
    found = {}
    for name, (packages, use) in EXTRAS.items():
        has = {p: _version(p) for p in packages}
        complete = all(has.values())
        install = None if complete else f"pip install 'opendino[{name}]'"
        found[name] = {"for": use, "complete": complete, "packages": has, "install": install}
    return found


def caches() -> dict[str, dict[str, Any]]:
    """Give place and size of each cache."""
    from opendino.embed.cache import DEFAULT_CACHE
    from opendino.embed.runtimes.exported import CACHE
    from opendino.embed.runtimes.machine import cache_folder
    from opendino.embed.runtimes.remembered import calibrations_folder
    from opendino.sample_data import packages

    folders = {
        "native": cache_folder("native"), "index": cache_folder("index"), "calibrations": calibrations_folder(),
        "exports": Path(os.environ.get("OPENDINO_EXPORTS", CACHE)),
        "features": Path(os.environ.get("OPENDINO_FEATURES", str(DEFAULT_CACHE))), "packages": packages.DEFAULT_CACHE,
    }  # fmt: skip
    found = {}
    for name, folder in folders.items():
        count, size = folder_size(folder.expanduser())
        found[name] = {"folder": str(folder.expanduser()), "files": count, "bytes": size}
    return found


def folder_size(folder: Path) -> tuple[int, int]:
    """Give the number of files below a folder and their bytes; (0, 0) when there is none."""
    count = size = 0
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                size += os.lstat(os.path.join(place, name)).st_size
                count += 1
            except OSError:  # gone meanwhile
                continue
    return count, size


def disk() -> dict[str, dict[str, Any]]:
    """Give the free space where caches and results go."""
    from opendino.embed.runtimes.machine import cache_root

    found = {}
    for name, folder in (("cache", cache_root()), ("here", Path.cwd())):
        existing = next((p for p in (folder, *folder.parents) if p.is_dir()), None)
        if existing:
            usage = shutil.disk_usage(existing)
            found[name] = {"folder": str(existing), "free_bytes": usage.free, "total_bytes": usage.total}
    return found


def published_weights() -> dict[str, str]:
    """Give the published weights that are at hand, by model."""
    from opendino.models.files import find_published
    from opendino.models.registry import MODELS

    found = {name: find_published(entry) for name, entry in MODELS.items() if entry.published}
    return {name: str(path) for name, path in found.items() if path}


def calibrations() -> list[dict[str, Any]]:
    """Give what the runtime auto has measured, the newest first."""
    from opendino.embed.runtimes.remembered import list_calibrations

    return [{"file": str(path), **found.model_dump(mode="json")} for path, found in list_calibrations()]


def model_memory(args: Args, at: dict[str, Any], gpus: list[dict[str, Any]]) -> dict[str, Any]:
    """Give the memory that a model takes by precision, and whether it is free on the CPU and on each GPU."""
    from opendino.embed import embedder  # noqa: F401 - its imports are part of what a process holds
    from opendino.embed.runtimes.estimate import count_parameters, footprints
    from opendino.embed.runtimes.machine import resident_memory
    from opendino.images.preprocess import Preprocess, parse_size
    from opendino.models.config import PreprocessSpec
    from opendino.models.registry import MODELS

    process, name = resident_memory(), str(args.model).removeprefix("dinov2_")
    if name in MODELS:
        config, spec = MODELS[name].config, PreprocessSpec()
    else:
        from opendino.models.weights import load

        loaded = load(str(args.model), device="meta")
        config, spec = loaded.config, loaded.preprocess
    shape = Preprocess(spec, size=parse_size(args.size), patch_size=config.patch_size)
    sides = (shape.height, shape.width)
    places = [("cpu", at["memory"]["available"] or at["memory"]["total"])]
    places += [(g["device"], g["memory_bytes"]) for g in gpus if g["memory_bytes"]]
    rows = [
        {
            "device": device, "way": way.name, "weights_bytes": way.weights, "activation_bytes": way.activations,
            "process_bytes": way.process, "total_bytes": way.total, "free_bytes": free,
            "fits": None if free is None else way.total <= free,
        }
        for device, free in places
        for way in footprints(config, sides, args.batch, at["threads"], device, process if device == "cpu" else 0)
    ]  # fmt: skip
    about = {"name": args.model, "parameters": count_parameters(config), "size": list(sides), "batch": args.batch}
    return about | {"memory": rows}


def advice(found: dict[str, Any]) -> list[str]:
    """Say what could be better, each with what to do."""
    at, said = found["machine"], []
    granted = min(at["usable_cores"], at["cpu_quota"] or at["usable_cores"])
    if at["threads"] > max(1, granted):
        said.append(
            f"torch uses {at['threads']} threads, and this process may use {granted:g} cores: threads that wait for "
            f"each other are slow. Set OMP_NUM_THREADS={max(1, int(granted))}."
        )
    if not found["native"]["loaded"]:
        said.append(found["native"]["about"])
    if not found["accelerators"] and not at["packed_products"]["bf16"]:
        said.append("This processor has no bf16 products: fp32 is its precision, and bf16 would be slower.")
    for name, place in found["disk"].items():
        if place["free_bytes"] < 2 << 30:
            said.append(f"Only {gigabytes(place['free_bytes'])} are free in {place['folder']} ({name}). Make room.")
    rows = found.get("model", {}).get("memory", [])
    if rows and not any(row["fits"] for row in rows):
        said.append(f"{found['model']['name']} does not fit here in any precision: give a smaller --batch or --size.")
    return said


def gigabytes(value: float | None) -> str:
    """Give bytes for people."""
    if value is None:
        return "unknown"
    return f"{value / 1e9:,.2f} GB" if value >= 1e8 else f"{value / 1e6:,.1f} MB"


def show(found: dict[str, Any]) -> None:
    """Print everything for people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()

    def line(name: str, text: str) -> None:
        row = Table.grid(padding=(0, 1))
        row.add_column(width=16, no_wrap=True)
        row.add_column()
        row.add_row(Text(f"  {name}"), Text(text))
        console.print(row)

    def title(text: str) -> None:
        console.print(text, style="bold", highlight=False, markup=False)

    title("machine")
    _show_machine(found, line)
    title("versions")
    given = found["versions"]
    line("", ", ".join(f"{name} {v}" for name, v in given.items() if v))
    title("extras")
    for name, extra in found["extras"].items():
        has = ", ".join(f"{p} {v}" if v else f"no {p}" for p, v in extra["packages"].items())
        line(name, has if extra["complete"] else f"{has}: {extra['install']} ({extra['for']})")
    title("caches")
    for name, cache in found["caches"].items():
        line(name, f"{gigabytes(cache['bytes'])}, {cache['files']} files, {cache['folder']}")
    for name, place in found["disk"].items():
        line(f"disk, {name}", f"{gigabytes(place['free_bytes'])} of {gigabytes(place['total_bytes'])} free")
    line("weights", ", ".join(found["weights"]) or "no published ones at hand")
    title("calibrations of the runtime auto")
    for one in found["calibrations"]:
        _show_calibration(one, line)
    if not found["calibrations"]:
        line("", "none yet; `opendino embed` makes one when it needs it")
    if "model" in found:
        _show_model(found["model"], title, line)
    for text in found["advice"]:
        console.print(text, style="yellow", highlight=False, markup=False)


def _show_machine(found: dict[str, Any], line: Any) -> None:
    at, memory = found["machine"], found["machine"]["memory"]
    quota = f", {at['cpu_quota']:g} granted" if at["cpu_quota"] else ""
    line(
        "processor", f"{at['cpu']}, {at['usable_cores']} of {at['cores']} cores usable{quota}, {at['threads']} threads"
    )
    line("can", ", ".join(at["features"]) or "unknown")
    limit = f", limited to {gigabytes(memory['limit'])}" if memory["limit"] else ""
    line("memory", f"{gigabytes(memory['total'])}, {gigabytes(memory['available'])} available{limit}")
    for gpu in found["accelerators"]:
        line(gpu["device"], f"{gpu['name']}, {gigabytes(gpu['memory_bytes'])}, bf16 {'yes' if gpu['bf16'] else 'no'}")
    if not found["accelerators"]:
        line("GPU", "none that torch can use")
    line("kernels", found["native"]["about"])
    line("", f"attention in bf16: {'native kernel' if found['native']['attention'] else 'by torch'}")


def _show_calibration(one: dict[str, Any], line: Any) -> None:
    key, best = one["key"], next(c for c in one["candidates"] if [c["runtime"], c["precision"]] == list(one["chosen"]))
    size = "x".join(map(str, key["size"]))
    asked = "" if key["precision"] == "auto" else f", asked for {key['precision']}"
    line(key["arch"], f"{size} px, batch {key['batch']}, {key['threads']} threads{asked}, {one['when'][:10]}:")
    speed = f"{best['speedup']:.2f} times plain torch, " if best["speedup"] else ""
    line("", f"{best['runtime']} {best['precision']}, {speed}1 − cosine cls {best['cls']:.0e}")
    for other in one["candidates"]:
        if other is not best and other["refused"]:
            line("", f"not {other['runtime']} {other['precision']}: {other['refused']}")


def _show_model(model: dict[str, Any], title: Any, line: Any) -> None:
    size = "x".join(map(str, model["size"]))
    title(f"{model['name']}: {model['parameters'] / 1e6:,.1f} M parameters, {size} px, batch {model['batch']}")
    for row in model["memory"]:
        verdict = "unknown whether it fits" if row["fits"] is None else "fits" if row["fits"] else "does NOT fit"
        line(row["device"], row["way"])
        line(
            "", f"weights {gigabytes(row['weights_bytes'])} + activations {gigabytes(row['activation_bytes'])} + "
            f"process {gigabytes(row['process_bytes'])} = {gigabytes(row['total_bytes'])}: {verdict} "
            f"({gigabytes(row['free_bytes'])} free)",
        )  # fmt: skip
