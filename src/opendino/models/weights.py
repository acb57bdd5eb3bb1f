# SPDX-License-Identifier: Apache-2.0
"""Find, check and load weights; write our own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from opendino.errors import WeightsError
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.registry import MODELS, get_config
from opendino.models.vit import VisionTransformer

RUN_WEIGHTS = Path("weights") / "teacher.safetensors"


def load(
    model: str | Path,
    *,
    weights: str | Path | None = None,
    strict: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> VisionTransformer:
    """Build a backbone with weights, in eval mode.

    Args:
        model: a run folder or a file that this package wrote; or an architecture name with `weights`.
        weights: a weight file for a named architecture, or "random" for a fresh initialisation.
        strict: refuse unused and missing keys.
        device: where the model goes.
        dtype: of the parameters; None keeps fp32.
        overrides: fields of `ViTConfig` for a named architecture.

    Raises:
        WeightsError: when there is no such file, or it does not fit.
    """
    if weights == "random":
        built = VisionTransformer(get_config(str(model), **overrides))
    else:
        path = _locate(Path(model) if weights is None else Path(weights), str(model))
        built = _read(path, strict)
    return built.to(device=device, dtype=dtype).eval()


def _locate(path: Path, model: str) -> Path:
    if path.is_dir() and (path / RUN_WEIGHTS).is_file():
        return path / RUN_WEIGHTS
    if path.is_file():
        return path
    entry = MODELS.get(model.removeprefix("dinov2_"))
    if entry is not None and entry.url:
        raise WeightsError(
            f"The weights of {model} are needed and were not given. They are {entry.file_name} from {entry.url}; "
            'pass the file as weights="…", or weights="random" for a fresh initialisation.'
        )
    raise WeightsError(f"{path} is no weight file and no run folder with {RUN_WEIGHTS}.")


def _read(path: Path, strict: bool) -> VisionTransformer:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is damaged or no safetensors file: {error}") from error
    if "opendino.config" not in metadata:
        raise WeightsError(f"{path} does not say which architecture it is for; it was not written by this package.")
    config = ViTConfig.model_validate_json(metadata["opendino.config"])
    model = VisionTransformer(config, PreprocessSpec.model_validate_json(metadata["opendino.preprocess"]))
    missing, unused = set(model.state_dict()) - set(state), set(state) - set(model.state_dict())
    if strict and (missing or unused):
        raise WeightsError(f"{path} does not fit {config.arch}: missing {sorted(missing)}, unused {sorted(unused)}.")
    model.load_state_dict(state, strict=False)
    return model


def save_backbone(model: VisionTransformer, path: str | Path, *, extra: dict[str, str] | None = None) -> None:
    """Write a backbone as safetensors with published key names; the file appears when it is whole.

    Metadata: opendino.config and opendino.preprocess as JSON, and whatever `extra` holds.
    """
    path = Path(path)
    metadata = {
        "opendino.config": json.dumps(model.config.model_dump()),
        "opendino.preprocess": json.dumps(model.preprocess.model_dump()),
        **(extra or {}),
    }
    aside = path.with_name(f".{path.name}")
    save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, aside, metadata)
    aside.rename(path)
