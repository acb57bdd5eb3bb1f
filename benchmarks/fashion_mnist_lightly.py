# SPDX-License-Identifier: Apache-2.0
"""lightly-train's side of fashion_mnist.py: the same backbone, crops and augmentations through its own `pretrain`.

Its interface has no setting for width and depth, but takes a model: its own class is built with them. What still
differs is inside it: crops are resized by area and not bicubic, and with BatchNorm in the heads its teacher's heads are
in evaluation mode with statistics that are never updated. Hence a row without BatchNorm.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from opendino.pretrain.config import PretrainConfig
from opendino.pretrain.lengths import with_steps
from opendino.pretrain.schedules import scaled_lr

VARIANTS = {
    "lightly-train": "its defaults for everything but backbone, crops and augmentations",
    "lightly-train-matched": "our settings wherever it has them",
    "lightly-train-matched-no-bn": "the same without BatchNorm in the heads",
}
OnStart = Callable[[torch.nn.Module], None]
OnStep = Callable[[int, float, torch.nn.Module], bool]


def lightly_train_run(
    variant: str,
    config: PretrainConfig,
    settings: dict[str, Any],
    data: Path,
    out: Path,
    on_start: OnStart,
    on_step: OnStep,
) -> None:
    """Train one of `VARIANTS`.

    Args:
        variant: its name.
        config: our recipe.
        settings: "steps", "precision" and "workers".
        data: folder of images.
        out: run folder.
        on_start: called with the teacher's backbone before the first batch is asked for.
        on_step: called with the number of steps, the loss and the teacher's backbone after each; True ends the run.
    """
    os.environ |= {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1", "LIGHTLY_DID_VERSION_CHECK": "True"}  # asks no server
    import lightly_train
    from lightly_train._methods.dinov2.dinov2 import DINOv2

    start, end = DINOv2.on_train_start, DINOv2.on_train_batch_end

    def teacher(method: Any) -> torch.nn.Module:
        return method.teacher_embedding_model.wrapped_model.get_model()

    def on_train_start(self: Any) -> None:
        start(self)
        on_start(teacher(self))

    def on_train_batch_end(self: Any, outputs: Any, *args: Any) -> None:
        end(self, outputs, *args)  # the teacher's moving average is in here
        if on_step(self.trainer.global_step, float(outputs["loss"]), teacher(self)):
            self.trainer.should_stop = True

    DINOv2.on_train_start, DINOv2.on_train_batch_end = on_train_start, on_train_batch_end
    matched = variant != "lightly-train"
    config = with_steps(config, settings["steps"])
    method = matched_method(config, variant == "lightly-train-matched") if matched else {}
    lightly_train.pretrain(
        out=str(out),
        data=str(data),
        model=backbone(config, matched),
        method="dinov2",
        method_args=method["method_args"] if matched else None,
        optim_args=method["optim_args"] if matched else None,
        transform_args=transforms(config),
        num_workers=settings["workers"],
        epochs=10**6,
        accelerator="cpu",
        precision={"bf16": "bf16-mixed", "fp32": "32-true"}[settings["precision"]],
        loggers={"jsonl": None, "tensorboard": None},
        callbacks={"learning_rate_monitor": None, "model_checkpoint": None, "model_export": None},
        trainer_args={"max_steps": settings["steps"], "enable_checkpointing": False},
        **({"batch_size": config.batch_size} if matched else {}),
    )


def backbone(config: PretrainConfig, matched: bool) -> torch.nn.Module:
    """Build its DINOv2 class in our shape; LayerScale and stochastic depth are its defaults unless matched."""
    from lightly_train._models.dinov2_vit.dinov2_vit_src.layers import MemEffAttention
    from lightly_train._models.dinov2_vit.dinov2_vit_src.layers import NestedTensorBlock as Block
    from lightly_train._models.dinov2_vit.dinov2_vit_src.models.vision_transformer import DinoVisionTransformer

    from opendino.models.registry import get_config
    from opendino.pretrain.student_teacher import backbone_config

    shape = get_config(config.model.arch, **backbone_config(config))
    model = DinoVisionTransformer(
        img_size=shape.img_size,
        patch_size=shape.patch_size,
        embed_dim=shape.embed_dim,
        depth=shape.depth,
        num_heads=shape.num_heads,
        block_chunks=0,
        block_fn=partial(Block, attn_class=MemEffAttention),
        init_values=shape.init_values if matched else 1e-5,
        drop_path_rate=shape.drop_path_rate if matched else 0.1,
        drop_path_uniform=True,
    )
    model.init_weights()
    return model


def matched_method(config: PretrainConfig, batch_norm: bool) -> dict[str, Any]:
    """Translate our settings of heads, losses, masks and optimiser."""
    heads, loss, optim, masks = config.heads, config.loss, config.optim, config.masks
    method = {
        "ibot_separate_head": heads.separate,
        "hidden_dim": heads.hidden_dim,
        "dino_bottleneck_dim": heads.dino_bottleneck_dim or heads.bottleneck_dim,
        "ibot_bottleneck_dim": heads.bottleneck_dim,
        "output_dim": heads.num_prototypes,
        "batch_norm": heads.batch_norm and batch_norm,
        "student_freeze_last_layer_steps": optim.freeze_last_layer_steps,
        "dino_loss_weight": loss.dino_weight,
        "ibot_loss_weight": loss.ibot_weight,
        "koleo_loss_weight": loss.koleo_weight,
        "center_method": {"sinkhorn": "sinkhorn_knopp", "moving": "softmax"}[loss.centering],
        "momentum_start": optim.momentum,
        "momentum_end": optim.momentum_end,
        "student_temp": loss.student_temp,
        "teacher_temp_start": loss.warmup_teacher_temp,
        "teacher_temp_end": loss.teacher_temp,
        "teacher_temp_warmup_steps": max(loss.warmup_teacher_temp_steps, 1),
        "mask_ratio_min": masks.ratio[0],
        "mask_ratio_max": masks.ratio[1],
        "mask_probability": masks.share,
        "min_lr": optim.min_lr,
        "warmup_steps": optim.warmup_steps,
        "layerwise_decay": optim.layerwise_decay,
        "patch_embed_lr_multiplier": optim.patch_embed_lr_mult,
        "reference_batch_size": config.batch_size,  # so that the rate is taken as it is
        "weight_decay_end": optim.weight_decay_end,
        "gradient_clip_val": optim.clip_grad,
    }
    rate = scaled_lr(optim.lr, config.batch_size, optim.lr_rule)
    return {"method_args": method, "optim_args": {"lr": rate, "weight_decay": optim.weight_decay}}


def transforms(config: PretrainConfig) -> dict[str, Any]:
    """Translate crops and colours; what is not named here has our values by default."""
    c = config.crops
    blur = {"sigmas": c.blur_sigma}
    brightness, contrast, saturation, hue = c.jitter
    return {
        "image_size": (c.global_size,) * 2,
        "random_resize": {"min_scale": c.global_scale[0], "max_scale": c.global_scale[1]},
        "random_flip": {"horizontal_prob": c.flip, "vertical_prob": 0.0},
        "color_jitter": {
            "prob": c.jitter_prob,
            "strength": 1.0,
            "brightness": brightness,
            "contrast": contrast,
            "saturation": saturation,
            "hue": hue,
        },
        "random_gray_scale": c.grey_prob,
        "normalize": {"mean": c.mean, "std": c.std},
        "gaussian_blur": {"prob": c.blur_probs[0], **blur},
        "global_view_1": {
            "gaussian_blur": {"prob": c.blur_probs[1], **blur},
            "solarize": {"prob": c.solarize_prob, "threshold": 0.5},
        },
        "local_view": {
            "num_views": c.num_local,
            "view_size": (c.local_size,) * 2,
            "random_resize": {"min_scale": c.local_scale[0], "max_scale": c.local_scale[1]},
            "gaussian_blur": {"prob": c.blur_probs[2], **blur},
        },
    }
