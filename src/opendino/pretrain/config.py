# SPDX-License-Identifier: Apache-2.0
"""The settings of a pre-training run: typed, frozen, unknown keys refused with the closest match.

Recipes are YAML files of the same fields in `opendino/pretrain/recipes`. Lengths of schedules are in optimiser steps;
an epoch of the published recipes is 1 250 steps (method.md §2).
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from opendino.errors import ConfigError
from opendino.models.config import PosResize
from opendino.pretrain.crops import CropsConfig

MIN_LIKENESS = 0.6
"""Below it a known setting is not offered for an unknown one; difflib's own default."""


class Settings(BaseModel):
    """Base of every group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class BackboneSettings(Settings):
    """Which backbone is trained; sizes that are None come from the named architecture."""

    arch: str = "vits14"
    patch_size: int | None = None
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    in_chans: int = Field(3, ge=1)
    init_values: float = Field(1e-5, gt=0, description="initial LayerScale gamma")
    drop_path_rate: float = Field(0.0, ge=0, lt=1)
    mlp_ratio: float | None = None
    ffn: Literal["mlp", "swiglu"] | None = None
    num_register_tokens: int | None = None
    qkv_bias: bool | None = None
    pos_resize: PosResize | None = None


class InitSettings(Settings):
    """Weights that student and teacher start from (docs/adaptation.md); without any they start at random."""

    weights: str = Field("", description="what opendino.load takes: a name, a file, a folder, a run")
    heads: Literal["auto", "new", "run"] = Field(
        "auto",
        description="take the heads of a run folder where they fit; new: never; run: refuse when they do not fit",
    )
    warm_heads_steps: int | None = Field(
        None, ge=0, description="steps that train the heads only; None: a tenth of the run, 0 with heads of a run"
    )
    backbone_lr: float = Field(0.1, gt=0, description="of the learning rate, for the backbone")
    layerwise_decay: float | None = Field(0.75, gt=0, le=1, description="instead of optim.layerwise_decay; None: that")
    stem: Literal["mean", "colours", "keep"] = Field(
        "mean", description="patch embedding for another number of channels than the weights have"
    )


class GuardSettings(Settings):
    """When a run is worse than it began, and what follows (docs/adaptation.md)."""

    enabled: bool | None = Field(None, description="None: when the run starts from weights")
    every: int | None = Field(None, ge=1, description="steps; None: probe_every, or a twentieth of a shorter run")
    knn_drop: float = Field(2.0, ge=0, description="points of k-NN below the start that are too many")
    rank_drop: float = Field(0.4, ge=0, le=1, description="share of the start's feature rank lost that is too much")
    patience: int = Field(3, ge=1, description="checks in a row that must say so before the run goes back")
    lr_factor: float = Field(0.3, gt=0, le=1, description="of the learning rate, after going back")
    images: int = Field(256, ge=2, description="of the data, whose features' rank is followed")


class HeadSettings(Settings):
    """Projection heads of the DINO and iBOT losses."""

    num_prototypes: int = Field(65_536, ge=2)
    hidden_dim: int = Field(2048, ge=1)
    bottleneck_dim: int = Field(256, ge=1)
    dino_bottleneck_dim: int | None = Field(
        None, description="bottleneck of the DINO head where it differs (ViT-g: 384)"
    )
    num_layers: int = Field(3, ge=1)
    separate: bool = Field(False, description="own head for iBOT instead of sharing the DINO head")
    batch_norm: bool = Field(False, description="normalise over the batch inside the heads; for small runs only")


class LossSettings(Settings):
    """Weights and temperatures of DINO, iBOT and KoLeo."""

    dino_weight: float = Field(1.0, ge=0)
    ibot_weight: float = Field(1.0, ge=0)
    koleo_weight: float = Field(0.1, ge=0)
    hog_weight: float = Field(
        0.0, ge=0, description="of predicting gradients and colours (opendino.pretrain.hog); not part of DINOv2"
    )
    hog_patches: Literal["masked", "all"] = Field("masked", description="whose gradients and colours are predicted")
    hog_identity: int = Field(
        0, ge=0, description="numbers at the end of a patch token that predict the whole crop that the patch is from"
    )
    hog_paste: float = Field(
        0.0, ge=0, le=1, description="share of the global crops that drawings of the batch are pasted on"
    )
    centering: Literal["sinkhorn", "moving"] = "sinkhorn"
    student_temp: float = Field(0.1, gt=0)
    teacher_temp: float = Field(0.07, gt=0)
    warmup_teacher_temp: float = Field(0.04, gt=0)
    warmup_teacher_temp_steps: int = Field(37_500, ge=0)

    @model_validator(mode="after")
    def _check(self) -> LossSettings:
        if self.hog_identity and not self.hog_weight:
            raise ValueError(f"hog_identity is {self.hog_identity} and hog_weight 0: set both, or neither")
        if self.hog_paste and not self.hog_identity:
            raise ValueError(
                f"hog_paste is {self.hog_paste:g} and hog_identity 0: pasted drawings are there to be told apart. "
                "Give hog_identity too (a third of the backbone's width, say), or leave both out"
            )
        return self

    @property
    def asks_teacher(self) -> bool:
        """Whether a loss compares with the teacher; without DINO and iBOT it only follows the student."""
        return bool(self.dino_weight or self.ibot_weight)


class MaskSettings(Settings):
    """Block masks of the student's global crops."""

    share: float = Field(0.5, ge=0, le=1, description="share of the global crops that are masked")
    ratio: tuple[float, float] = Field((0.1, 0.5), description="masked share of the patches of such a crop")

    @model_validator(mode="after")
    def _check(self) -> MaskSettings:
        if not 0 <= self.ratio[0] <= self.ratio[1] <= 1:
            raise ValueError(f"ratio must be two rising shares of the patches in [0, 1], got {list(self.ratio)}")
        return self


class OptimSettings(Settings):
    """AdamW, its schedules and the teacher's momentum."""

    lr: float = Field(4e-3, gt=0, description="before scaling by the batch size")
    lr_rule: Literal["sqrt_wrt_1024", "linear_wrt_256", "none"] = "sqrt_wrt_1024"
    min_lr: float = Field(1e-6, ge=0)
    warmup_steps: int = Field(12_500, ge=0)
    weight_decay: float = Field(0.04, ge=0)
    weight_decay_end: float = Field(0.4, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: float = Field(
        3.0, ge=0, description="largest gradient norm of backbone and of each head; 0 turns it off"
    )
    layerwise_decay: float = Field(0.9, gt=0, le=1)
    patch_embed_lr_mult: float = Field(0.2, ge=0)
    freeze_last_layer_steps: int = Field(1250, ge=0)
    momentum: float = Field(0.992, ge=0, le=1, description="of the teacher's moving average, at the start")
    momentum_end: float = Field(1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> OptimSettings:
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be two values in [0, 1), got {list(self.betas)}")
        return self


class StageSettings(Settings):
    """A stretch of a run with settings of its own; what it leaves out is the recipe's, not the stage before's.

    `opendino.pretrain.stages` resolves it; docs/high-resolution.md says what a switch does.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", description="letters, digits, dots, dashes; names files too")
    steps: int = Field(ge=1, description="of this stage")
    compress_schedules: bool = Field(
        False, description="run all schedules anew, compressed into this stage; else they go on as if nothing changed"
    )
    resume_optimizer: bool = Field(True, description="keep AdamW's moments at the switch; else they begin at zero")
    data: str | None = None
    batch_size: int | None = None
    accumulate: int | None = None
    activation_checkpointing: bool | None = None
    crops: dict[str, Any] = Field({}, description="any of the settings of this group, and likewise below")
    masks: dict[str, Any] = {}
    loss: dict[str, Any] = {}
    optim: dict[str, Any] = {}

    def overrides(self) -> dict[str, Any]:
        """Give the settings that differ from the recipe's, groups nested."""
        values = self.model_dump(exclude={"name", "steps", "compress_schedules", "resume_optimizer"})
        return {key: value for key, value in values.items() if value is not None and value != {}}


class PretrainConfig(Settings):
    """Everything that defines a pre-training run; written resolved to RUN/config.yaml."""

    recipe: str = "vits14"
    data: str = Field("", description="images: folder, list, CSV, tar shards, Parquet, or a URL; labels are not used")
    data_may_change: bool = Field(False, description="continue a run although its list of images has changed")
    out: str = Field("", description="run folder")
    probe: str | None = Field(
        None, description="folder with train/ and test/ class folders for a k-NN score on the way"
    )
    steps: int = Field(125_000, ge=1)
    batch_size: int = Field(2048, ge=1, description="images per optimiser step")
    accumulate: int = Field(1, ge=1, description="micro-batches per optimiser step")
    seed: int = Field(0, ge=0)
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    sharding: Literal["auto", "ddp", "fsdp"] = Field(
        "auto", description="over several processes: a copy in each, or shards; auto shards from ViT-L on"
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile the blocks; auto on CUDA only, a CPU gains nothing"
    )
    activation_checkpointing: bool = Field(False, description="recompute the student's blocks; less memory, slower")
    num_workers: int = Field(2, ge=0)
    shuffle_buffer: int = Field(8192, ge=1, description="images shuffled together in tar shards and Parquet")
    cache_images: bool = Field(False, description="keep decoded images in memory; for small sets")
    log_every: int = Field(10, ge=1, description="steps between health figures")
    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field((), description="beside metrics.jsonl")
    checkpoint_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(2, ge=1, description="how many of the newest checkpoints stay")
    milestone_every: int | None = Field(None, ge=1, description="checkpoints at multiples of this step stay for ever")
    async_checkpoints: bool = Field(True, description="write checkpoints in the background")
    probe_every: int = Field(500, ge=1)
    max_bad_steps: int = Field(20, ge=1, description="non-finite steps in a row after which the run goes back")
    max_rollbacks: int = Field(2, ge=0, description="how often a run goes back to its last good checkpoint")
    max_errors: int | None = Field(None, description="unreadable images after which the run stops; None: never")
    model: BackboneSettings = BackboneSettings()
    crops: CropsConfig = CropsConfig()
    heads: HeadSettings = HeadSettings()
    loss: LossSettings = LossSettings()
    masks: MaskSettings = MaskSettings()
    optim: OptimSettings = OptimSettings()
    init: InitSettings = InitSettings()
    guard: GuardSettings = GuardSettings()
    stages: tuple[StageSettings, ...] = Field((), description="the run in stages; steps is then their sum")

    @model_validator(mode="before")
    @classmethod
    def _steps_of_stages(cls, values: Any) -> Any:
        """Add up the steps of the stages where the whole number is not given."""
        if not isinstance(values, dict) or not values.get("stages") or "steps" in values:
            return values
        with contextlib.suppress(TypeError, KeyError, ValueError):  # what is wrong with them is said later
            return values | {"steps": sum(int(dict(stage)["steps"]) for stage in values["stages"])}
        return values

    @model_validator(mode="after")
    def _check(self) -> PretrainConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        if self.stages:
            _check_stages(self)
        return self


def _check_stages(config: PretrainConfig) -> None:
    total, names = sum(s.steps for s in config.stages), [s.name for s in config.stages]
    if total != config.steps:
        raise ValueError(
            f"steps is {config.steps} and the stages add up to {total}; leave steps out, or make it {total}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"stages need names of their own, got {', '.join(names)}")
    if config.stages[0].compress_schedules:
        raise ValueError(f"stage {names[0]!r} is the first, so there are no schedules to compress into it yet")
    for stage in config.stages:
        try:
            overridden(config, stage)
        except ValidationError as error:
            raise ValueError(
                f"stage {stage.name!r}: " + "; ".join(_explain(e, type(config)) for e in error.errors())
            ) from None


def overridden(config: PretrainConfig, stage: StageSettings) -> PretrainConfig:
    """Give the settings of a run with those of one stage in their places, and without its list of stages.

    Raises:
        pydantic.ValidationError: when the stage has a setting that does not exist or a value that is not allowed.
    """
    values = config.model_dump() | {"stages": ()}
    for key, value in stage.overrides().items():
        values[key] = values[key] | value if isinstance(value, dict) else value
    return type(config).model_validate(values)


MAY_CHANGE = frozenset(
    [
        "data", "data_may_change", "out", "probe", "device", "sharding", "compile", "activation_checkpointing",
        "num_workers", "cache_images", "log_every", "loggers", "checkpoint_every", "keep_checkpoints",
        "milestone_every", "async_checkpoints", "probe_every", "max_bad_steps", "max_rollbacks", "max_errors", "guard",
        "teacher", "teacher_heads", "frozen_teacher", "cache_teacher",  # compared by their contents
    ]
)  # fmt: skip
"""Settings that a run may be continued with other values of; the others define what is computed."""


def list_recipes() -> list[str]:
    """Name the recipes that come with the package."""
    folder = resources.files("opendino.pretrain") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_recipe(name: str) -> PretrainConfig:
    """Read a recipe by name, or from a YAML file.

    Raises:
        ConfigError: for an unknown recipe or key, naming the closest match.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ConfigError(f"The recipe file {name} does not exist. Give a YAML file or one of {list_recipes()}.")
        return parse_config(Path(name).read_text(), name)
    if name not in list_recipes():
        close = difflib.get_close_matches(name, list_recipes(), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{name!r} is no recipe; known are {', '.join(list_recipes())}, or give a YAML file.{hint}")
    text = (resources.files("opendino.pretrain") / "recipes" / f"{name}.yaml").read_text()
    return parse_config(text, name)


def parse_config(text: str, origin: str) -> PretrainConfig:
    """Build a config from YAML text; `origin` names it in errors."""
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{origin} must hold settings as `key: value`, got {type(values).__name__}.")
    kind = config_class(values)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{origin}: " + "; ".join(_explain(e, kind) for e in error.errors())) from error


def config_class(values: Mapping[str, Any]) -> type[PretrainConfig]:
    """Say which kind of run settings are of, by what only that kind has."""
    if "teacher" in values or "frozen_teacher" in values:
        from opendino.pretrain.distill.config import DistillConfig, WarmHeadsConfig

        return DistillConfig if "teacher" in values else WarmHeadsConfig
    return PretrainConfig


def _explain(problem: Any, kind: type[PretrainConfig]) -> str:
    where = ".".join(str(p) for p in problem["loc"])
    if problem["type"] == "extra_forbidden":
        close = _closest(where, kind)
        return f"unknown setting {where!r}" + (f", did you mean {close!r}?" if close else "")
    # The message of a check over a whole group says itself what it was given.
    given = "" if isinstance(problem["input"], dict) else f", got {problem['input']!r}"
    return f"{where or 'settings'}: {problem['msg'].removeprefix('Value error, ')}{given}"


def _closest(setting: str, kind: type[PretrainConfig]) -> str | None:
    """Find the known setting whose name is most like that of an unknown one; its own group wins a tie."""
    group, _, key = setting.rpartition(".")

    def likeness(path: str) -> tuple[float, bool]:
        home, _, name = path.rpartition(".")
        return difflib.SequenceMatcher(None, key, name).ratio(), home == group

    best = max(_known_settings(kind), key=likeness)
    return best if likeness(best)[0] >= MIN_LIKENESS else None


def _known_settings(group: type[BaseModel], prefix: str = "") -> list[str]:
    paths = []
    for name, field in group.model_fields.items():
        paths.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            paths += _known_settings(field.annotation, f"{prefix}{name}.")
    return paths
