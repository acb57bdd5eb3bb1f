# SPDX-License-Identifier: Apache-2.0
"""Starting a run from weights: the architecture and student and teacher from the file, heads new or those of a run.

Only the start reads the file. A run that has a checkpoint never needs it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from opendino.errors import ConfigError, WeightsError
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.packaged import packaged_heads
from opendino.models.registry import MODELS, get_config
from opendino.models.vit import VisionTransformer
from opendino.models.weights import SHAPE_FIELDS, inflate_stem, load
from opendino.pretrain.config import BackboneSettings, InitSettings, PretrainConfig
from opendino.pretrain.hog import TARGETS
from opendino.pretrain.schedules import scaled_lr
from opendino.pretrain.student_teacher import StudentTeacher, backbone_config

WARM_SHARE, WARM_MOST = 0.1, 2500
"""New heads are trained alone for a tenth of a run, and no longer than two epochs of the published recipes."""
HEADS_FILE = "heads.safetensors"
TAKEN = (*SHAPE_FIELDS, "pos_resize")
"""What the architecture of a run has from its weights."""


@dataclass(frozen=True)
class Start:
    """What a run began with; kept in its checkpoints.

    Attributes:
        text: in words.
        warm_steps: first steps in which the backbone stands still.
        heads_taken: the heads are those of the run it continues.
    """

    text: str
    warm_steps: int = 0
    heads_taken: bool = False

    def state(self) -> dict[str, Any]:
        """Give it as JSON."""
        return asdict(self)


# --- the settings that follow from the weights -----------------------------------------------------------------------


def with_start(config: PretrainConfig, num_heads: int | None = None) -> PretrainConfig:
    """Give the settings with the architecture of `init.weights`, and its channel statistics where none were set.

    Args:
        config: with `init.weights`.
        num_heads: attention heads, for a bare file of a width that does not tell.

    Raises:
        WeightsError: when the weights are missing or damaged.
    """
    source = _read(config, num_heads)
    return config.model_copy(
        update={
            "model": _settings_of(source.config, config.model),
            "crops": config.crops
            if "mean" in config.crops.model_fields_set
            else config.crops.model_copy(update=_statistics(source.preprocess, config.model, source.config.in_chans)),
        }
    )


def fitted(config: PretrainConfig) -> PretrainConfig:
    """Check crops against patches, and give each channel statistics: the mean of those there are, when they differ.

    Raises:
        ConfigError: when the global crops are not whole patches.
    """
    crops, channels = config.crops, config.model.in_chans
    patch = config.model.patch_size or MODELS[config.model.arch.removeprefix("dinov2_")].config.patch_size
    if crops.global_size % patch:
        below = max(crops.global_size // patch, 1) * patch
        raise ConfigError(
            f"--crops.global-size {crops.global_size} is no multiple of the patch of {config.init.weights}, {patch} "
            f"pixels. Give {below} or {below + patch}; --crops.local-size should be one too."
        )
    if len(crops.mean) == channels:
        return config
    spec = PreprocessSpec(mean=crops.mean, std=crops.std)
    return config.model_copy(update={"crops": crops.model_copy(update=_spread(spec, channels))})


def _read(config: PretrainConfig, num_heads: int | None, **overrides: Any) -> VisionTransformer:
    """Load the weights; a number of heads is only passed on when there is one, to be compared with the file's."""
    shape: dict[str, Any] = {} if num_heads is None else {"num_heads": num_heads}
    return load(config.init.weights, **shape, **overrides)


def _settings_of(found: ViTConfig, asked: BackboneSettings) -> BackboneSettings:
    """Describe a backbone as a named architecture and what differs from it."""
    name = found.arch if found.arch in MODELS else _nearest(found)
    preset = MODELS[name].config
    different = {k: getattr(found, k) for k in TAKEN if getattr(found, k) != getattr(preset, k)}
    chans = asked.in_chans if "in_chans" in asked.model_fields_set else found.in_chans
    return BackboneSettings(
        arch=name, in_chans=chans, init_values=asked.init_values, drop_path_rate=asked.drop_path_rate, **different
    )


def _nearest(found: ViTConfig) -> str:
    """Name the architecture that has most in common with a custom one."""
    return max(MODELS, key=lambda n: sum(getattr(MODELS[n].config, k) == getattr(found, k) for k in TAKEN))


def _statistics(spec: PreprocessSpec, asked: BackboneSettings, channels: int) -> dict[str, tuple[float, ...]]:
    wanted = asked.in_chans if "in_chans" in asked.model_fields_set else channels
    return _spread(spec, wanted)


def _spread(spec: PreprocessSpec, channels: int) -> dict[str, tuple[float, ...]]:
    if len(spec.mean) == channels:
        return {"mean": tuple(spec.mean), "std": tuple(spec.std)}
    mean, std = sum(spec.mean) / len(spec.mean), sum(spec.std) / len(spec.std)
    return {"mean": (round(mean, 6),) * channels, "std": (round(std, 6),) * channels}


# --- the tensors -----------------------------------------------------------------------------------------------------


def initialise(model: StudentTeacher, config: PretrainConfig) -> Start:
    """Put the weights of `config.init` into student and teacher; call it before they are spread over processes.

    Args:
        model: as it was built for `config`; its heads stay new unless the weights are a run whose heads fit.
        config: of the run.

    Raises:
        WeightsError: when the weights are missing, damaged, or cannot be fitted to the run's number of channels.
        ConfigError: when the run asks for another architecture than the weights have.
    """
    init, size = config.init, config.crops.global_size
    source = _read(config, config.model.num_heads)
    wanted = get_config(config.model.arch, **backbone_config(config))
    _check(source.config, wanted, init.weights)
    notes = []
    if source.config.grid != wanted.grid:
        notes.append(
            f"position table {source.config.grid}×{source.config.grid} → {wanted.grid}×{wanted.grid} for crops of "
            f"{size} px ({wanted.pos_resize})"
        )
        source = _read(config, config.model.num_heads, img_size=size)
    state = dict(source.state_dict())
    note = _fit_layer_scale(state, source, wanted)
    stem = state["patch_embed.proj.weight"]
    if stem.shape[1] != wanted.in_chans:
        state["patch_embed.proj.weight"] = fit_stem(stem, wanted.in_chans, init)
        note += [f"patch embedding for {stem.shape[1]} channels → {wanted.in_chans} ({STEMS[init.stem]})"]
    for network in (model.student, model.teacher):
        network["backbone"].load_state_dict(state)
    heads_taken, heads_note = _take_heads(model, init)
    warm = init.warm_heads_steps
    if warm is None:
        warm = 0 if heads_taken else min(round(WARM_SHARE * config.steps), WARM_MOST)
    report = source.load_report
    text = [
        f"Starting from {init.weights} ({report.origin}, {report.layout} names): {_describe(wanted)}",
        *notes,
        *note,
        heads_note,
        f"the backbone stands still for {warm} of {config.steps} steps" if warm else "",
        _rates(config),
    ]
    return Start("; ".join(t for t in text if t) + ".", warm, heads_taken)


STEMS = {
    "mean": "each gets the mean over the file's channels, scaled so that the sum is kept",
    "colours": "each gets the weights of one colour in turn, scaled so that the sum is kept",
    "keep": "the file's channels keep theirs and further ones start at zero",
}


def fit_stem(weight: Tensor, in_chans: int, init: InitSettings) -> Tensor:
    """Make a patch convolution for another number of channels.

    "mean" and "colours" keep the sum over channels, so that an image whose channels are all alike gives the same tokens
    as before; "keep" leaves the first channels as they are, so that further ones do not change the features at first.

    Args:
        weight: (D, C, p, p).
        in_chans: number of channels wanted.
        init: which way, and what to call the weights in errors.

    Raises:
        WeightsError: when it cannot be done that way.
    """
    has = weight.shape[1]
    if init.stem == "mean":
        return (weight.sum(1, keepdim=True) / in_chans).expand(-1, in_chans, -1, -1).contiguous()
    if init.stem == "colours":
        return inflate_stem(weight, in_chans, init.weights)
    if in_chans < has:
        raise WeightsError(
            f"{init.weights} has a patch embedding for {has} channels and --model.in-chans is {in_chans}: with "
            "--init.stem keep channels can only be added. Take --init.stem mean."
        )
    return torch.cat([weight, weight.new_zeros(weight.shape[0], in_chans - has, *weight.shape[2:])], 1)


def _check(has: ViTConfig, wanted: ViTConfig, name: str) -> None:
    different = [k for k in TAKEN if getattr(has, k) != getattr(wanted, k)]
    if different:
        raise ConfigError(
            f"{name} holds a backbone with {', '.join(f'{k} {getattr(has, k)}' for k in different)}; the run asks for "
            f"{', '.join(f'{k} {getattr(wanted, k)}' for k in different)}. Leave the --model flags out: the "
            "architecture comes from the weights (in Python: opendino.pretrain.initialise.with_start(config))."
        )


def _fit_layer_scale(state: dict[str, Tensor], source: VisionTransformer, wanted: ViTConfig) -> list[str]:
    """Give a backbone without LayerScale one of 1, which changes nothing; say how large it is elsewhere."""
    if source.config.init_values is None:
        for i in range(wanted.depth):
            for name in ("ls1", "ls2"):
                state[f"blocks.{i}.{name}.gamma"] = torch.ones(wanted.embed_dim)
        return ["the weights have no LayerScale and get one of 1, which changes nothing"]
    gammas = torch.cat([v for k, v in state.items() if k.endswith(".gamma")])
    return [f"LayerScale kept (mean size {float(gammas.abs().mean()):.3g})"]


def _take_heads(model: StudentTeacher, init: InitSettings) -> tuple[bool, str]:
    path = packaged_heads(init.weights) or Path(init.weights).expanduser() / HEADS_FILE
    if init.heads == "new" or not path.is_file():
        if init.heads == "run":
            raise WeightsError(
                f"--init.heads run needs {HEADS_FILE} beside the weights, and {init.weights} has none. Give a run "
                "folder, or leave --init.heads at auto to begin with new heads."
            )
        return False, "new heads"
    found = load_file(path)
    _take_targets(model, found)
    own = {k: v for k, v in model.student.state_dict().items() if not k.startswith("backbone.")}
    problem = _misfit(found, own)
    if problem is None:
        for network in (model.student, model.teacher):
            _fill(network, found)
        return True, f"heads of {path}"
    if init.heads == "run":
        raise WeightsError(
            f"The heads in {path} do not fit this run: {problem}. Give the --heads settings of that run's config.yaml, "
            "or leave --init.heads at auto to begin with new ones."
        )
    return False, f"new heads, because those in {path} do not fit ({problem})"


def _take_targets(model: StudentTeacher, found: dict[str, Tensor]) -> None:
    """Take the components of `loss.hog_weight` out of what lies beside heads; the model has those that fit it.

    Those found anew in other crops would be turned, and every token would have to follow.
    """
    mine = {k.removeprefix(TARGETS): found.pop(k).float() for k in list(found) if k.startswith(TARGETS)}
    if model.hog is not None:
        model.hog.take(mine)


def _misfit(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    names = sorted(found.keys() ^ own.keys())
    if names:
        return f"{names[0]} is in one of them only"
    wrong = next((k for k in own if found[k].shape != own[k].shape), None)
    return wrong and f"{wrong} is {tuple(found[wrong].shape)} there and {tuple(own[wrong].shape)} here"


def _fill(network: nn.ModuleDict, tensors: Mapping[str, Tensor]) -> None:
    network.load_state_dict(dict(tensors), strict=False)  # names and shapes were compared


def _describe(config: ViTConfig) -> str:
    return f"{config.arch} (width {config.embed_dim}, {config.depth} blocks, patch {config.patch_size})"


def _rates(config: PretrainConfig) -> str:
    optim, init = config.optim, config.init
    peak = scaled_lr(optim.lr, config.batch_size, optim.lr_rule)
    return (
        f"learning rate of the backbone {init.backbone_lr * peak:.3g} at most ({init.backbone_lr:g} of the heads' "
        f"{peak:.3g}), × {layerwise_decay(config):g} a layer downwards"
    )


# --- the rates -------------------------------------------------------------------------------------------------------


def layerwise_decay(config: PretrainConfig) -> float:
    """Give the decay of the learning rate by layer that a run has."""
    init = config.init
    return init.layerwise_decay if init.weights and init.layerwise_decay is not None else config.optim.layerwise_decay


def backbone_rate(config: PretrainConfig, step: int, lr: float, warm_steps: int) -> float:
    """Give the learning rate of the backbone: 0 while the heads are warmed, then a linear warm-up of its own.

    Args:
        config: of a run with `init.weights`.
        step: from 0.
        lr: of the heads at that step.
        warm_steps: in which the backbone stands still.
    """
    if step < warm_steps:
        return 0.0
    rise = min(1.0, (step - warm_steps + 1) / max(config.optim.warmup_steps, 1)) if warm_steps else 1.0
    return config.init.backbone_lr * lr * rise
