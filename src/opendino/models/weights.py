# SPDX-License-Identifier: Apache-2.0
"""`opendino.load`: anybody's weights into our backbone, strictly; and our own file."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from opendino.errors import ConfigError, WeightsError
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.files import LEFTOVERS, WeightFile, fetch_published, fetch_repository, read_weights, unpack_tensors
from opendino.models.layouts import Reading, State, infer_config, to_published, with_timm_leftovers
from opendino.models.memory import give_up
from opendino.models.packaged import packaged_weights
from opendino.models.positions import resize_pos_embed
from opendino.models.registry import MODELS, get_config
from opendino.models.vit import VisionTransformer

log = logging.getLogger("opendino")


@dataclass(frozen=True)
class LoadReport:
    """Where a model's weights came from; `model.load_report` after `load`.

    Attributes:
        origin: the file.
        layout: whose names it had: "meta", "hf" or "timm".
        missing: tensors of the model that it did not have; they keep their initial values.
        unused: tensors of its backbone that the model has no place for.
        heads: tensors of projection or classifier heads that were left aside.
        mapped: whether the file was mapped: parameters that keep its dtype lie in it, and no copy of them was made.
    """

    origin: str
    layout: str
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    heads: tuple[str, ...]
    mapped: bool = False


SHAPE_FIELDS = ("patch_size", "embed_dim", "depth", "num_heads", "ffn", "num_register_tokens", "qkv_bias", "mlp_ratio")


def load(
    model: str | Path,
    *,
    weights: str | Path | None = None,
    strict: bool = True,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | Literal["auto"] | None = None,
    **overrides: Any,
) -> VisionTransformer:
    """Build a backbone with weights, in eval mode.

    The model is built without memory of its own and the file is mapped: parameters that have the wanted dtype in the
    file stay there, and the system copies what is written to; others are cast one at a time. A .pth is read whole
    instead where `dtype` is None, so that saving over it is safe.

    Args:
        model: an architecture name (`opendino.list_models()`), a Meta .pth, a transformers folder or repository id, a
            timm file or folder, or a run folder of this package.
        weights: for a name: a file or folder as above, "random" for a fresh initialisation, or None for the published
            weights, from a cache or downloaded. A file is never downloaded when one is given.
        strict: refuse files with unused or missing tensors; False loads what fits and reports the rest.
        device: where the model goes; "meta" allocates nothing.
        dtype: of the parameters; None is fp32, "auto" the file's own.
        overrides: fields of `ViTConfig`. `img_size` resizes the position table, `in_chans` inflates an RGB stem with
            its sum kept, `pos_resize` chooses another convention; what contradicts the file is an error.

    Returns:
        The model; `.config` says its shape and position convention, `.preprocess` what its images go through.

    Raises:
        WeightsError: when the weights are missing, damaged, unsafe, or made for another architecture.
        ConfigError: for an unknown name or setting.

    Example:
        >>> load("vits14", weights="random", img_size=28, depth=1)(torch.zeros(1, 3, 28, 28)).shape
        torch.Size([1, 384])
    """
    name = str(model)
    is_name = name.removeprefix("dinov2_") in MODELS
    if weights == "random":
        with torch.device(device):
            fresh = VisionTransformer(get_config(name, **overrides))
        return fresh.to(device=device, dtype=None if dtype == "auto" else dtype).eval()
    path = _locate(name, weights, is_name)
    unknown = set(overrides) - set(ViTConfig.model_fields)
    if unknown:
        raise ConfigError(f"Unknown model settings {sorted(unknown)}; known are {', '.join(ViTConfig.model_fields)}.")
    expected = {} if not is_name else _shape(get_config(name))
    built = _build(path, expected, overrides, strict, _Cast(torch.device(device), dtype))
    return built.to(device=device, dtype=None if dtype == "auto" else dtype).eval()


@dataclass(frozen=True)
class _Cast:
    """Where the tensors of a file go, and as what."""

    device: torch.device
    dtype: torch.dtype | Literal["auto"] | None

    def __call__(self, tensor: Tensor, consume: bool) -> Tensor:
        """Move and cast one tensor; the pages of a mapped one that was copied go back to the system."""
        keep = self.dtype == "auto" or not tensor.is_floating_point()
        target = tensor.dtype if keep else (self.dtype or torch.float32)
        assert isinstance(target, torch.dtype)
        cast = tensor.to(device=self.device, dtype=target)
        if consume and cast is not tensor:
            give_up(tensor)
        return cast


def _locate(name: str, weights: str | Path | None, is_name: bool) -> Path:
    if weights is not None:
        return Path(weights)
    path = Path(name).expanduser()
    if path.exists():
        return path
    if is_name:
        entry = MODELS[name.removeprefix("dinov2_")]
        if entry.packaged and (ours := packaged_weights(name)):
            return ours
        if not entry.published:
            raise WeightsError(
                f"No weights of {name} are published. Train some (opendino pretrain), give a file as weights=, or "
                'weights="random" for a fresh initialisation.'
            )
        return fetch_published(entry)
    if name.count("/") == 1 and not path.suffix and not name.startswith((".", "/", "~")):
        return fetch_repository(name)
    if path.suffix or "/" in name:
        raise WeightsError(f"{name} does not exist. Give a weight file, a folder that holds one, or a model name.")
    get_config(name)  # raises with the closest name
    raise AssertionError("unreachable")


def _shape(config: ViTConfig) -> dict[str, Any]:
    return {field: getattr(config, field) for field in SHAPE_FIELDS}


def _build(
    path: Path, expected: dict[str, Any], overrides: dict[str, Any], strict: bool, cast: _Cast
) -> VisionTransformer:
    file = read_weights(path, map_pickles=cast.dtype is not None)
    if '"arch": "timm:' in file.metadata.get("opendino.config", ""):
        return _build_timm(file, expected, overrides)
    reading = to_published(file.state, file.origin, consume=file.mapped)
    state = reading.state
    if LEFTOVERS in file.metadata:
        state = with_timm_leftovers(state, unpack_tensors(file.metadata[LEFTOVERS]))
    config = _config_of(file, state, overrides.get("num_heads"))
    _check_shape(file.origin, config, expected, overrides)
    preprocess = preprocess_of(file.metadata, file.preprocessor)
    state, config, preprocess = _adapt(state, config, preprocess, overrides, file.origin)
    reading.state.clear()
    with torch.device("meta"):
        model = VisionTransformer(config, preprocess)
    _fill(model, reading, state, file, strict, cast)
    return model


def _build_timm(file: WeightFile, expected: dict[str, Any], overrides: dict[str, Any]) -> VisionTransformer:
    """Build a timm model that `opendino distill` trained."""
    from opendino.models.timm_backbone import PREFIX, TimmBackbone

    config = ViTConfig.model_validate_json(file.metadata["opendino.config"])
    if expected or overrides:
        asked = ", ".join(f"{k} {v}" for k, v in (expected | overrides).items())
        raise WeightsError(
            f"{file.origin} holds weights of {config.arch}, which is loaded as it is; asked for was {asked}. Give the "
            "file alone: opendino.load(FILE)."
        )
    spec = preprocess_of(file.metadata, file.preprocessor)
    name = config.arch.removeprefix(PREFIX)
    model = TimmBackbone(name, img_size=config.img_size, in_chans=config.in_chans, preprocess=spec)
    try:
        model.load_state_dict(file.state)
    except RuntimeError as error:
        raise WeightsError(
            f"{file.origin} does not fit {config.arch} of the timm that is installed "
            f"({' '.join(str(error).split())[:300]}). Install the version of timm that it was trained with."
        ) from error
    model.load_report = LoadReport(file.origin, "timm", (), (), ())
    return model


def _config_of(file: WeightFile, state: State, num_heads: int | None) -> ViTConfig:
    """Read the architecture: from our own metadata, or off the shapes with what a config.json adds to them."""
    beside = file.config
    if beside.get("layer_norm_eps", 1e-6) != 1e-6 or beside.get("hidden_act", "gelu") != "gelu":
        raise WeightsError(
            f"{file.origin} is of a model with layer_norm_eps {beside.get('layer_norm_eps')} and activation "
            f"{beside.get('hidden_act')!r}; a DINOv2 backbone has 1e-06 and 'gelu'. It is another kind of model."
        )
    heads = num_heads or beside.get("num_attention_heads") or beside.get("model_args", {}).get("num_heads")
    try:
        if "opendino.config" in file.metadata:
            return ViTConfig.model_validate_json(file.metadata["opendino.config"])
        config = infer_config(state, file.origin, heads)
        return ViTConfig(**{**config.model_dump(), **beside.get("opendino", {})})
    except ValidationError as error:
        raise WeightsError(
            f"The description of the model in {file.origin} cannot be read: {error.errors()[0]['msg']}. It may be of "
            "another version; convert it again from its source."
        ) from error


def _check_shape(origin: str, config: ViTConfig, expected: dict[str, Any], overrides: dict[str, Any]) -> None:
    wanted = expected | {k: v for k, v in overrides.items() if k in SHAPE_FIELDS}
    wrong = {k: v for k, v in wanted.items() if getattr(config, k) != v}
    if wrong:
        has = ", ".join(f"{k} {getattr(config, k)}" for k in wrong)
        asked = ", ".join(f"{k} {v}" for k, v in wrong.items())
        is_of = "" if config.arch == "custom" else f" of {config.arch}"
        raise WeightsError(
            f"{origin} holds weights{is_of} with {has}; asked for was {asked}. Give the file alone, "
            "opendino.load(FILE), to have its own architecture, or give the file that belongs to the name."
        )


def _adapt(
    state: State, config: ViTConfig, preprocess: PreprocessSpec, overrides: dict[str, Any], origin: str
) -> tuple[State, ViTConfig, PreprocessSpec]:
    """Resize the position table and inflate the stem where the overrides ask for it."""
    fields = {k: v for k, v in overrides.items() if k not in SHAPE_FIELDS}
    try:
        wanted = ViTConfig(**{**config.model_dump(), **fields})
    except ValidationError as error:
        raise ConfigError(f"{origin} cannot be loaded so: {error.errors()[0]['msg']}.") from error
    state = dict(state)
    if wanted.grid != config.grid and "pos_embed" in state:
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], wanted.grid, wanted.grid, wanted.pos_resize)
    if wanted.in_chans != config.in_chans:
        state["patch_embed.proj.weight"] = inflate_stem(state["patch_embed.proj.weight"], wanted.in_chans, origin)
        preprocess = _for_channels(preprocess, wanted.in_chans)
    return state, wanted, preprocess


def inflate_stem(weight: Tensor, in_chans: int, origin: str = "The stem") -> Tensor:
    """Spread an RGB patch convolution over another number of channels; the sum over channels is kept.

    A picture whose channels are all alike gives the same tokens as before. From three channels on, channel c takes the
    weights of colour c mod 3, shared evenly by the channels that take the same colour; below, every channel takes the
    sum divided by their number.

    Args:
        weight: (D, 3, p, p).
        in_chans: number C of channels wanted.
        origin: names the file in errors.

    Returns:
        (D, C, p, p).

    Raises:
        WeightsError: when the stem is not for three channels.
    """
    if weight.shape[1] != 3:
        raise WeightsError(
            f"{origin} is for {weight.shape[1]} channels; only a stem for 3 can become one for {in_chans}."
        )
    if in_chans < 3:
        return (weight.sum(1, keepdim=True) / in_chans).expand(-1, in_chans, -1, -1).contiguous()
    colour = torch.arange(in_chans) % 3
    return weight[:, colour] / torch.bincount(colour)[colour].view(1, -1, 1, 1)


def _for_channels(spec: PreprocessSpec, channels: int) -> PreprocessSpec:
    def spread(values: tuple[float, ...]) -> tuple[float, ...]:
        if channels < len(values):
            return (sum(values) / len(values),) * channels
        return tuple(values[c % len(values)] for c in range(channels))

    return spec.model_copy(update={"mean": spread(spec.mean), "std": spread(spec.std)})


def _fill(
    model: VisionTransformer, reading: Reading, state: State, file: WeightFile, strict: bool, cast: _Cast
) -> None:
    """Put the tensors in; refuse, or with strict=False report, whatever does not fit."""
    origin = file.origin
    own = model.state_dict()
    missing, unused = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [
        f"{k} is {tuple(state[k].shape)} and must be {tuple(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    if shapes or (strict and (missing or unused)):
        problems = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"unused: {', '.join(unused)}"] * bool(unused)
        raise WeightsError(
            f"{origin} ({reading.layout} layout) does not fit {model.config.arch}; {'; '.join(problems + shapes)}. "
            "Check that it is the whole file of that model"
            + ("." if shapes else "; strict=False loads what fits and leaves the rest at its initial values.")
        )
    if missing or unused:
        log.warning("%s: missing %s, unused %s.", origin, missing or "nothing", unused or "nothing")
    if missing:
        model.to_empty(device="cpu")
        model.init_weights()
    # Tensors put together from several have memory of their own; they come last in `state` and are cast first.
    fitting = {k: cast(state.pop(k), file.mapped) for k in reversed(list(state)) if k in own}
    model.load_state_dict(fitting, strict=not missing, assign=True)
    model.requires_grad_(True)
    model.load_report = LoadReport(
        origin, reading.layout, tuple(missing), tuple(unused), tuple(reading.heads), file.mapped
    )


def preprocess_of(metadata: dict[str, str], preprocessor: dict[str, Any]) -> PreprocessSpec:
    """Read the preprocessing that travels with weights: ours, transformers', or else the published one."""
    if "opendino.preprocess" in metadata:
        return PreprocessSpec.model_validate_json(metadata["opendino.preprocess"])
    if not preprocessor:
        return PreprocessSpec()
    published = PreprocessSpec()
    size, crop = preprocessor.get("size", {}), preprocessor.get("crop_size", {})
    return PreprocessSpec(
        resize=size.get("shortest_edge", published.resize) if isinstance(size, dict) else int(size),
        crop=crop.get("height", published.crop) if isinstance(crop, dict) else int(crop),
        interpolation="bilinear" if preprocessor.get("resample") == 2 else "bicubic",
        mean=tuple(preprocessor.get("image_mean", published.mean)),
        std=tuple(preprocessor.get("image_std", published.std)),
    )


def own_metadata(model: VisionTransformer) -> dict[str, str]:
    """Describe a model in the metadata of a safetensors file: architecture, convention, preprocessing."""
    return {
        "format": "pt",
        "opendino.config": json.dumps(model.config.model_dump()),
        "opendino.preprocess": json.dumps(model.preprocess.model_dump()),
    }


def save_backbone(model: VisionTransformer, path: str | Path, *, extra: dict[str, str] | None = None) -> None:
    """Write a backbone as safetensors with published key names; the file appears when it is whole.

    Metadata: opendino.config and opendino.preprocess as JSON, and whatever `extra` holds.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}")
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(state, aside, own_metadata(model) | (extra or {}))
    aside.rename(path)
