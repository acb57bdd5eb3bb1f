# SPDX-License-Identifier: Apache-2.0
"""What a folder of features says about itself, and what is already in it.

The shards are the truth about which images are done: they appear whole or not at all. `manifest.json` says what the
vectors are, so that a folder is never continued with another model or other settings.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from opendino._version import __version__
from opendino.embed.embedder import Embedder
from opendino.errors import ConfigError, DataError
from opendino.models.fingerprint import weights_fingerprint as weights_fingerprint

MANIFEST = "manifest.json"
FORMAT = 1


@dataclass
class Progress:
    """What the shards of a folder hold.

    Attributes:
        paths: how many rows each path has.
        count: rows in all, errors included.
        errors: rows without vectors.
        next_part: number of the next shard.
    """

    paths: Counter[str] = field(default_factory=Counter)
    count: int = 0
    errors: int = 0
    next_part: int = 0

    def remaining(self, paths: Iterable[str]) -> list[int]:
        """Give the places of the inputs that have no row yet, in order; a path listed twice gets two rows."""
        left, missing = Counter(self.paths), []
        for place, path in enumerate(paths):
            if left[path] > 0:
                left[path] -= 1
            else:
                missing.append(place)
        return missing


def describe(embedder: Embedder, model_name: str, source: str) -> dict[str, Any]:
    """Give the manifest's fixed part: all that decides what a row holds."""
    config, runtime = embedder.config, embedder.runtime
    return {
        "format": FORMAT,
        "model": model_name,
        "weights_sha256": runtime.weights_sha256(),
        "config": config.model_dump(mode="json"),
        "preprocess": runtime.spec.model_dump(mode="json"),
        "input_shape": list(embedder.input_shape),
        "size": list(embedder.size) if isinstance(embedder.size, tuple) else embedder.size,
        "fit": embedder.fit,
        "precision": embedder.precision,
        "what": list(embedder.what),
        "layers": embedder.layers,
        "dim": embedder.layers * config.embed_dim,
        "grid": list(embedder.grid),
        "input": source,
    } | runtime.identity()


# The model's name may change (a file moved); its weights may not. An int and a pair that give the same shape are equal.
_MAY_DIFFER = {"model", "size"}


def check_same(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to continue a folder whose vectors were made otherwise.

    Raises:
        ConfigError: naming every setting that differs.
        DataError: for a manifest that cannot be read.
    """
    path = folder / MANIFEST
    if not path.exists():
        if any(folder.glob("part-*.parquet")):
            raise ConfigError(
                f"{folder} has shards but no {MANIFEST}, so it cannot be told what made them. Give an empty folder."
            )
        return
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}. Delete the folder or give another --out.") from error
    differing = [k for k, v in settings.items() if k not in _MAY_DIFFER and found.get(k) != v]
    if differing:
        what = "; ".join(f"{k}: {_short(found.get(k))} there, {_short(settings[k])} now" for k in differing)
        raise ConfigError(
            f"{folder} was made with other settings ({what}). Its rows cannot be mixed with new ones: "
            "give another --out, or the settings it was made with."
        )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def write_manifest(folder: Path, settings: dict[str, Any], progress: Progress, done: bool) -> None:
    """Write `manifest.json` aside and put it in place."""
    content = settings | {"count": progress.count, "errors": progress.errors, "done": done, "opendino": __version__}
    aside = folder / f"{MANIFEST}.tmp"
    aside.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(aside, folder / MANIFEST)


def scan(folder: Path) -> Progress:
    """Read what the shards of a folder hold and remove what a killed run left unfinished.

    Raises:
        DataError: for a shard that cannot be read.
    """
    progress = Progress()
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()
    for part in sorted(folder.glob("part-*.parquet")):
        try:
            table = pq.read_table(part, columns=["path", "error"])
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{part} is no readable shard: {error}. Delete it and start again to redo it.") from error
        progress.paths.update(table["path"].to_pylist())
        progress.count += table.num_rows
        progress.errors += table.num_rows - table["error"].null_count
        progress.next_part = int(part.stem.removeprefix("part-")) + 1
    return progress
