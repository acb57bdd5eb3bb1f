# SPDX-License-Identifier: Apache-2.0
"""Weight files on disk, in caches and at their official addresses. Nothing here ever unpickles code."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opendino.errors import WeightsError
from opendino.models.registry import MODELS, ModelEntry

RUN_WEIGHTS = Path("weights") / "teacher.safetensors"
TUNED_WEIGHTS = Path("weights") / "backbone.safetensors"
DESCRIBED = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
"""Files that a config.json beside them belongs to."""
FOLDER_FILES = (str(RUN_WEIGHTS), str(TUNED_WEIGHTS), *DESCRIBED, "teacher_checkpoint.pth")
LEFTOVERS = "opendino.leftovers"


@dataclass(frozen=True)
class WeightFile:
    """What a file holds.

    Attributes:
        origin: the path, for errors.
        state: tensors by name, as the file has them.
        metadata: of a safetensors file; leftovers of other layouts are in it.
        config: of a config.json beside it, empty without one.
        preprocessor: of a preprocessor_config.json beside it.
        mapped: whether the tensors lie in the file and are read when they are used.
    """

    origin: str
    state: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)
    mapped: bool = False


# --- reading -------------------------------------------------------------------------------------------------------


def read_weights(path: Path, *, map_pickles: bool = False) -> WeightFile:
    """Read a .pth, .bin or .safetensors file, or a folder that transformers, timm or this package wrote.

    The tensors of safetensors are mapped: they take memory as they are used, and no copy is made.

    Args:
        path: file or folder.
        map_pickles: map .pth and .bin files too where their format allows it. Whoever keeps the tensors must not write
            to the file in place, as `torch.save` over it does.

    Raises:
        WeightsError: when it is missing, truncated, damaged, or would have to run code to be read.
    """
    path = path.expanduser()
    file = _file_in(path) if path.is_dir() else path
    if not file.is_file():
        raise WeightsError(f"{path} does not exist. Give a weight file, a folder that holds one, or a model name.")
    beside = file.parent
    config, preprocessor = (
        _read_json(beside / name) if file.name in DESCRIBED else {}
        for name in ("config.json", "preprocessor_config.json")
    )
    if file.name.endswith(".index.json"):
        names = sorted(set(_read_json(file).get("weight_map", {}).values()))
        shards = [_read_safetensors(beside / name) for name in names]
        state = {k: v for shard, _ in shards for k, v in shard.items()}
        return WeightFile(str(file), state, {}, config, preprocessor, mapped=True)
    if _is_safetensors(file):
        state, metadata = _read_safetensors(file)
        return WeightFile(str(file), state, metadata, config, preprocessor, mapped=True)
    mapped = map_pickles and zipfile.is_zipfile(file)  # what torch.save writes since 1.6; older ones cannot be mapped
    return WeightFile(str(file), _read_pickle(file, mapped), {}, config, preprocessor, mapped)


def _file_in(folder: Path) -> Path:
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(
        f"The folder {folder} holds no weights. Looked for {', '.join(FOLDER_FILES)}. Give the file itself if it has "
        "another name; a run that was stopped before its first checkpoint has none yet."
    )


def _is_safetensors(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors file is the length of its header, then the header as JSON; a .pth is a zip archive or a pickle.
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path} is truncated, damaged or no safetensors file ({error}). Get it again, or compare its size with "
            "the original's."
        ) from error


def _read_pickle(path: Path, mapped: bool) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if _wants_code(str(error)):
            raise WeightsError(
                f"{path} is refused: to read it, code of its own would have to run ({_first_line(error)}). A weight "
                "file needs tensors only. Get it from its official address, or have its owner save a plain state dict."
            ) from error
        raise _damaged(path, error) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error
    return _tensors(found, path)


def _wants_code(reason: str) -> bool:
    return any(word in reason for word in ("GLOBAL", "global", "Unsupported operand", "whitelist", "allowlist"))


def _damaged(path: Path, error: Exception) -> WeightsError:
    return WeightsError(
        f"{path} is truncated, damaged or no weight file ({_first_line(error) or type(error).__name__}). It has "
        f"{path.stat().st_size:,} bytes; get it again, or compare its size with the original's."
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    wanted = next((line for line in lines if "GLOBAL" in line), lines[0] if lines else "")
    return wanted[:160]


def _tensors(found: Any, path: Path) -> dict[str, Tensor]:
    """Find the state dict in what a training program saved."""
    for key in ("teacher", "model", "state_dict", "model_state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    state = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, dict) else {}
    if not state:
        raise WeightsError(
            f"{path} holds no tensors by name but {type(found).__name__}. Give a file that holds a state dict."
        )
    return state


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise WeightsError(f"{path} is no valid JSON ({error}). Get it again, or remove it.") from error
    return found if isinstance(found, dict) else {}


# --- finding -------------------------------------------------------------------------------------------------------


def find_published(entry: ModelEntry) -> Path | None:
    """Give the path of a published model's weights in torch.hub's or huggingface_hub's cache, or None."""
    hub = hub_path(entry)
    if hub.is_file():
        return hub
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(entry.hf_repo), "model.safetensors")
    return Path(found) if isinstance(found, str) else None


def hub_path(entry: ModelEntry) -> Path:
    """Where torch.hub keeps the published file."""
    return Path(torch.hub.get_dir()) / "checkpoints" / str(entry.file_name)


def fetch_published(entry: ModelEntry) -> Path:
    """Give a published model's weights, downloaded when no cache has them.

    Raises:
        WeightsError: when there is no network, saying which file is wanted, from where, and where to put it.
    """
    found = find_published(entry)
    if found is not None:
        return found
    target, failures = hub_path(entry), []
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "TRUE", "YES", "ON"):
        for download in (_from_address, _from_hugging_face):
            try:
                return download(entry)
            except Exception as error:  # urllib, ssl, requests and httpx share no base class
                failures.append(f"{_first_line(error) or type(error).__name__}")
    else:
        failures.append("HF_HUB_OFFLINE is set")
    raise WeightsError(
        f"The weights of {entry.name} are in no cache and cannot be downloaded ({'; '.join(failures)}). Wanted is "
        f"{entry.file_name} from {entry.url}: put it at {target}, or give its path as weights=. The same weights are "
        f'{entry.hf_repo} on the Hugging Face hub. weights="random" gives an untrained model.'
    )


def _from_address(entry: ModelEntry) -> Path:
    target = hub_path(entry)
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.hub.download_url_to_file(str(entry.url), str(target), progress=True)  # written aside and renamed by torch
    return target


def _from_hugging_face(entry: ModelEntry) -> Path:
    return _snapshot(str(entry.hf_repo))


def _snapshot(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, allow_patterns=["*.json", "model*.safetensors"], etag_timeout=5))


def fetch_repository(repo: str) -> Path:
    """Give the local folder of a Hugging Face repository's weights, downloaded when the cache has none.

    Raises:
        WeightsError: when it is neither cached nor to be had.
    """
    try:
        return _snapshot(repo)
    except Exception as error:  # see fetch_published
        raise WeightsError(
            f"{repo} is no file or folder here, and as a Hugging Face repository it cannot be had "
            f"({_first_line(error) or type(error).__name__}). Give a path, one of {', '.join(MODELS)}, or download it "
            "where there is a network and give its folder."
        ) from error


# --- small tensors in metadata -------------------------------------------------------------------------------------


def pack_tensors(tensors: dict[str, Tensor]) -> str:
    """Write small tensors as text, for the metadata of a safetensors file."""
    from safetensors.torch import save

    return base64.b64encode(save({k: v.contiguous() for k, v in tensors.items()})).decode("ascii")


def unpack_tensors(text: str) -> dict[str, Tensor]:
    """Read what `pack_tensors` wrote."""
    from safetensors.torch import load

    found: dict[str, Tensor] = load(base64.b64decode(text))
    return found
