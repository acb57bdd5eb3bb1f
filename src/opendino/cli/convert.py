# SPDX-License-Identifier: Apache-2.0
"""`opendino convert`: rewrite weights in another layout."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

DESCRIPTION = """Rewrite weights for the original code, transformers or timm.

SRC is a Meta .pth, a transformers folder, a timm file, a run folder of pretrain, or a model name. DST is a file for
meta (.pth or .safetensors) and timm (.safetensors or .pth), a folder for hf.

Example:
  opendino convert dinov2_vits14_pretrain.pth dinov2-small --to hf"""


@dataclass(frozen=True)
class Args:
    """Arguments of `opendino convert`."""

    src: Annotated[str, tyro.conf.Positional]
    """weights to read, in any layout"""
    dst: Annotated[str, tyro.conf.Positional]
    """file or folder to write"""
    to: Literal["meta", "hf", "timm"]
    """layout to write"""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """of the written tensors"""
    json: bool = False
    """print one JSON object instead of a sentence"""


def main(argv: list[str]) -> int:
    """Convert and say what was read and written."""
    args = tyro.cli(Args, args=argv, prog="opendino convert", description=DESCRIPTION)
    from opendino.models.convert import convert

    model = convert(args.src, args.dst, args.to, args.precision)
    report, config = model.load_report, model.config
    count = sum(p.numel() for p in model.parameters())
    if args.json:
        print(json.dumps({
            "arch": config.arch, "parameters": count, "from": report.layout, "source": report.origin, "to": args.to,
            "target": args.dst, "left_aside": list(report.heads),
        }))  # fmt: skip
        return 0
    aside = f" Left aside: {len(report.heads)} tensors of heads ({report.heads[0]} …)." if report.heads else ""
    print(
        f"{args.dst}: {config.arch}, {count:,} parameters, position convention {config.pos_resize}; read from "
        f"{report.origin} ({report.layout} layout).{aside}"
    )
    return 0
