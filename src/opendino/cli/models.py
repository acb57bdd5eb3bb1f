# SPDX-License-Identifier: Apache-2.0
"""`opendino models`: the named architectures, their sizes, and where their weights are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Args:
    """Arguments of `opendino models`."""

    json: bool = False
    """print one JSON object instead of a table"""


def main(argv: list[str]) -> int:
    """List the models."""
    import tyro

    description = "List the named architectures and where their weights are.\n\nExample:\n  opendino models --json"
    args = tyro.cli(Args, args=argv, prog="opendino models", description=description)
    rows = [describe(name) for name in _names()]
    if args.json:
        print(json.dumps({"models": rows}))
    else:
        show(rows)
    return 0


def _names() -> list[str]:
    from opendino.models.registry import list_models

    return list_models()


def describe(name: str) -> dict[str, Any]:
    """Give one model's row: shape, number of parameters, and its weights' address and cached copy."""
    import torch

    from opendino.models.files import find_published
    from opendino.models.packaged import packaged_weights
    from opendino.models.registry import MODELS
    from opendino.models.vit import VisionTransformer

    entry = MODELS[name]
    c = entry.config
    with torch.device("meta"):
        parameters = sum(p.numel() for p in VisionTransformer(c).parameters())
    cached = find_published(entry) if entry.published else packaged_weights(name)
    return {
        "name": name, "parameters": parameters, "depth": c.depth, "width": c.embed_dim, "heads": c.num_heads,
        "ffn": c.ffn, "registers": c.num_register_tokens, "patch_size": c.patch_size, "pos_resize": c.pos_resize,
        "url": entry.url, "hf_repo": entry.hf_repo, "cached": str(cached) if cached else None,
        "packaged": entry.packaged,
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "params (M)", "depth", "width", "heads", "ffn", "registers", "weights", box=None)
    for row in rows:
        where = "cached" if row["cached"] else "download" if row["url"] else "–"
        where = "in the package" if row["packaged"] else where
        cells = (row[k] for k in ("depth", "width", "heads", "ffn", "registers"))
        table.add_row(row["name"], f"{row['parameters'] / 1e6:,.1f}", *map(str, cells), where)
    console = Console()
    console.print(table)
    console.print(
        'download: opendino.load(NAME) fetches the published weights. –: none are published; weights="random" gives a '
        "fresh initialisation. --json has the addresses.",
        highlight=False,
    )
