# SPDX-License-Identifier: Apache-2.0
"""What a folder of features says about itself.

The names of the shards are the truth about which images are done (`shards`). `manifest.json` says what the vectors are,
so that a folder is never continued with another model or other settings, and what the input was.
"""

from __future__ import annotations

import json
from typing import Any

from opendino._version import __version__
from opendino.embed.embedder import Embedder
from opendino.embed.folder import Folder
from opendino.errors import ConfigError, DataError
from opendino.models.fingerprint import weights_fingerprint as weights_fingerprint

MANIFEST = "manifest.json"
FORMAT = 1
"""Of the settings that `describe` gives; caches are keyed by them."""
LAYOUT = 2
"""Of the folder: 1 had numbered shards, 2 has the range of places in their names."""


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
        **({} if embedder.decode == "exact" else {"decode": embedder.decode}),
    } | runtime.identity()


# The model's name may change (a file moved); its weights may not. An int and a pair that give the same shape are equal.
_MAY_DIFFER = {"model", "size", "weights"}
_ADDED = {"dtype": "float32", "decode": "exact"}
"""Settings that older manifests do not have, and what they were."""


def read_manifest(folder: Folder) -> dict[str, Any] | None:
    """Read `manifest.json`; None when there is none.

    Raises:
        DataError: when it cannot be read.
    """
    try:
        found = json.loads(folder.read(MANIFEST))
        if not isinstance(found, dict):
            raise ValueError("it is no object")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder.path(MANIFEST)} cannot be read: {error}. Delete the folder or give another --out."
        ) from error
    return found


def check_same(folder: Folder, found: dict[str, Any] | None, settings: dict[str, Any]) -> None:
    """Refuse to continue a folder whose vectors were made otherwise.

    Raises:
        ConfigError: naming every setting that differs, or that there are shards without a manifest.
    """
    if found is None:
        if any(name.startswith("part-") for name in folder.names()):
            raise ConfigError(
                f"{folder.place} has shards but no {MANIFEST}, so it cannot be told what made them. "
                "Give an empty folder."
            )
        return
    if found.get("layout", 1) > LAYOUT:
        raise ConfigError(
            f"{folder.place} has layout {found['layout']}, this version of opendino knows {LAYOUT}. "
            "Give another --out, or use the version that made it."
        )
    found = _ADDED | found
    differing = [k for k, v in settings.items() if k not in _MAY_DIFFER and found.get(k) != v]
    if differing:
        what = "; ".join(f"{k}: {_short(found.get(k))} there, {_short(settings[k])} now" for k in differing)
        raise ConfigError(
            f"{folder.place} was made with other settings ({what}). Its rows cannot be mixed with new ones: "
            "give another --out, or the settings it was made with."
        )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def write_manifest(folder: Folder, content: dict[str, Any]) -> None:
    """Write `manifest.json` whole."""
    text = json.dumps(content | {"layout": LAYOUT, "opendino": __version__}, indent=1) + "\n"
    folder.put(lambda file: file.write(text.encode()), MANIFEST)
