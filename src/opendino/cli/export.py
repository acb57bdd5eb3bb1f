# SPDX-License-Identifier: Apache-2.0
"""`opendino export onnx|openvino|verify`: a backbone as a file for other runtimes, proven against the torch model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from opendino.errors import ConfigError

if TYPE_CHECKING:
    from opendino.export.verify import Report
    from opendino.models.vit import VisionTransformer

USAGE = """usage: opendino export onnx|openvino|verify …

  onnx      write an .onnx file for ONNX Runtime and whatever reads ONNX
  openvino  write an .xml file (and its .bin) for OpenVINO
  verify    run an exported file against a model again

opendino export onnx --help tells more, with an example:
  opendino export onnx --model vits14 --out vits14.onnx --size 224"""
ABOUT = """Write a backbone for {name}. The file is run on photographs, compared with the torch model in fp32 and
only then gets its name; one that is off by more than its precision allows is removed.

Examples:
  opendino export {command} --model vits14 --out vits14{suffix} --size 224
  opendino export {command} --model runs/first --out any-size{suffix} --dynamic --outputs cls,mean
  opendino export {command} --model vitb14_reg --out vitb14{suffix} --precision int8 --images photos/"""
VERIFY = """Run an exported file on photographs and compare it with the torch model in fp32; exit 1 when it is off.

Example:
  opendino export verify vits14.onnx --model vits14 --images photos/"""


@dataclass(frozen=True)
class ExportArgs:
    """Arguments of `opendino export onnx` and `opendino export openvino`."""

    model: str
    """Model name, weight file, transformers folder or run folder."""
    out: Path
    """File to write."""
    size: str | None = None
    """Image side in pixels, or HxW; default: the size that travels with the model."""
    dynamic: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take images of any height and width; the position table is resized in the graph."""
    batch: str = "dynamic"
    """Images at once: a number, or dynamic."""
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """Of the weights and products; int8 is calibrated on --images."""
    outputs: str = "cls,patches"
    """Of cls, patches, mean, registers, with commas."""
    layers: int = 1
    """Concatenate the vectors of the last n blocks."""
    uint8_input: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take pixels 0-255 and normalise them in the graph."""
    images: Path | None = None
    """Folder or list of images to calibrate and verify on; default: two photographs that scikit-learn carries."""
    weights: str | None = None
    """Weight file for a model given by name; 'random' draws them from seed 0."""
    licence: str | None = None
    """Licence of the weights, kept in the file; default: that of published weights."""
    allow: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Keep a file that is off by more than its precision allows; the table says by how much."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the report as one JSON object."""


@dataclass(frozen=True)
class VerifyArgs:
    """Arguments of `opendino export verify`."""

    file: tyro.conf.Positional[Path]
    """Exported file, .onnx or .xml."""
    model: str
    """What it was exported from."""
    images: Path | None = None
    """Folder or list of images; default: two photographs that scikit-learn carries."""
    weights: str | None = None
    """Weight file for a model given by name; 'random' draws them from seed 0."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the report as one JSON object."""


def main(argv: list[str]) -> int:
    """Dispatch on the first word."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "verify":
        return _verify(argv[1:])
    if argv[0] not in ("onnx", "openvino"):
        raise ConfigError(f"{argv[0]!r} is no part of `opendino export`; there is onnx, openvino and verify.")
    return _export(argv[0], argv[1:])


def _export(command: str, argv: list[str]) -> int:
    name, suffix = {"onnx": ("ONNX", ".onnx"), "openvino": ("OpenVINO", ".xml")}[command]
    about = ABOUT.format(name=name, command=command, suffix=suffix)
    args = tyro.cli(ExportArgs, args=argv, prog=f"opendino export {command}", description=about)
    if args.out.suffix != suffix:
        raise ConfigError(f"--out is {args.out}; the name of a file for {name} must end in {suffix}.")
    from opendino.export.exporter import export_backbone
    from opendino.export.images import photographs
    from opendino.images.preprocess import parse_size

    model = _model(args.model, args.weights)
    with _progress(f"verify {args.out.name}") as on_case:
        report = export_backbone(
            model, args.out, size=parse_size(args.size), dynamic=args.dynamic, batch=_batch(args.batch),
            precision=args.precision, outputs=args.outputs, layers=args.layers, uint8_input=args.uint8_input,
            images=photographs(args.images, model.config.in_chans), allow=args.allow, on_case=on_case,
            licence=args.licence or _licence(args.model, args.weights),
        )  # fmt: skip
    _say(report, args.json, {"file": str(args.out), "bytes": _bytes(args.out)})
    return 0


def _verify(argv: list[str]) -> int:
    args = tyro.cli(VerifyArgs, args=argv, prog="opendino export verify", description=VERIFY)
    from opendino.export.images import photographs
    from opendino.export.verify import check, verify

    model = _model(args.model, args.weights)
    with _progress(f"verify {args.file.name}") as on_case:
        images = photographs(args.images, model.config.in_chans)
        report = verify(args.file, model, images=images, on_case=on_case)
    _say(report, args.json, {"file": str(args.file), "bytes": _bytes(args.file)})
    check(report)
    return 0


def _model(name: str, weights: str | None) -> VisionTransformer:
    import torch

    from opendino.models.weights import load

    if weights == "random":
        torch.manual_seed(0)
    return load(name, weights=weights)


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not text.isdigit():
        raise ConfigError(f"--batch is {text!r}; give a number of images, or dynamic.")
    return int(text)


def _licence(name: str, weights: str | None) -> str:
    from opendino.models.registry import MODELS

    entry = MODELS.get(name.removeprefix("dinov2_"))
    return (entry.licence if entry and weights is None else None) or "not stated"


def _bytes(path: Path) -> int:
    """Size of a file and of what belongs to it."""
    from opendino.export.session import beside

    return sum(p.stat().st_size for p in (path, beside(path)) if p.is_file())


@contextmanager
def _progress(name: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _say(report: Report, as_json: bool, extra: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps(report.to_json() | extra))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("size", "batch", "output", "max abs", "1-cos worst", "1-cos mean", "", box=None)
    for row in report.rows:
        figures = (f"{value:.1e}" for value in (row.max_abs, row.worst, row.mean))
        verdict = "passed" if row.passed else "TOO FAR"
        table.add_row(f"{row.height}x{row.width}", str(row.batch), row.output, *figures, verdict)
    console, limits = Console(width=100), report.limits
    console.print(table)
    console.print(
        f"{extra['file']}: {report.precision}, {extra['bytes'] / 1e6:.1f} MB; limits: max abs {limits.max_abs:g}, "
        f"1-cos {limits.vector:g}, of patches on average {limits.patch:g}", highlight=False, soft_wrap=True,
    )  # fmt: skip
