# SPDX-License-Identifier: Apache-2.0
"""Where released head files are published and kept."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from opendino.errors import ConfigError, WeightsError
from opendino.models.registry import HUB, MODELS


def released_stems(name: str) -> tuple[str, str]:
    """Give the folder and the stem of the released files of an architecture, e.g. dinov2_vits14, dinov2_vits14_reg4.

    Raises:
        ConfigError: for an architecture that nothing was released for.
    """
    key = name.removeprefix("dinov2_")
    if key not in MODELS or not MODELS[key].published:
        known = ", ".join(n for n, entry in MODELS.items() if entry.published)
        raise ConfigError(f"No head was released for {name!r}; there are heads for {known}.")
    folder = f"dinov2_{key.removesuffix('_reg')}"
    return folder, f"{folder}_reg4" if key.endswith("_reg") else folder


def fetch_head(folder: str, file_name: str) -> Path:
    """Give a released file from torch.hub's cache, downloaded when it is not there.

    Args:
        folder: below the official address, e.g. dinov2_vits14.
        file_name: e.g. dinov2_vits14_linear4_head.pth.

    Raises:
        WeightsError: when there is no network, saying which file is wanted, from where, and where to put it.
    """
    target, url = Path(torch.hub.get_dir()) / "checkpoints" / file_name, f"{HUB}/{folder}/{file_name}"
    if target.is_file():
        return target
    why = "HF_HUB_OFFLINE is set"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "TRUE", "YES", "ON"):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(target), progress=True)  # written aside and renamed by torch
            return target
        except Exception as error:  # urllib, ssl and http share no base class
            why = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
    raise WeightsError(
        f"The head {file_name} is in no cache and cannot be downloaded ({why}). Wanted is {url}: put it at {target}, "
        "or give its path as weights=."
    )
