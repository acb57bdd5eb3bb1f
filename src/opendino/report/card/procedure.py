# SPDX-License-Identifier: Apache-2.0
"""Training data and training procedure of a card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

Rows = list[tuple[str, object]]
LR_RULES = {"sqrt_wrt_1024": " × √(batch / 1024)", "linear_wrt_256": " × batch / 256", "none": ""}


def data_section(facts: dict[str, Any]) -> str:
    """Say what was trained on: what the run knows, and the notes that the user gave."""
    data, seen = facts["data"], facts["training"].get("images_seen")
    if facts["kind"] == "finetuned":
        n = data["images"]
        lines = [f"{n:,} labelled images." if n else "Number of images: not recorded."]
    else:
        name = f"`{data['name']}`" if data["name"] else "Name: not recorded"
        count = f"{data['images']:,} entries" if data["images"] else "number of images not recorded"
        lines = [f"{name}: {count} (an image that a list names several times counts as often), used without labels."]
        if data["images"] and seen:
            lines.append(f"{seen:,} images were seen, {seen / data['images']:.3g} passes.")
        if data["names"]:
            lines.append(f"sha256 of the list of their names: `{data['names']}`.")
    lines += ["", facts["data_notes"] or "**Where the images come from and under which licences: not recorded.**"]
    return "\n".join(lines)


def procedure_rows(facts: dict[str, Any]) -> Rows:
    """List recipe, objective, lengths, schedules, crops, precision."""
    training = facts["training"]
    if facts["kind"] == "finetuned":
        return tuning_rows(training)
    s = training["settings"]
    heads, loss, masks, optim, crops = (_group(s, k) for k in ("heads", "loss", "masks", "optim", "crops"))
    batch, parts = s.get("batch_size"), f" in {s['accumulate']} parts" if s.get("accumulate", 1) > 1 else ""
    betas = _range(optim.get("betas"), ", ")
    rows: Rows = [
        ("recipe", s.get("recipe")),
        ("started from", f"weights of {origin}" if (origin := training["started_from"]) else "random weights"),
        ("objective", objective(heads, loss, training["teacher"])),
        ("stages", "; ".join(map(stage_text, training["stages"])) or "one"),
        ("steps", _of(training["step"], training["steps"])),
        ("images seen", f"{training['images_seen']:,}" if training["images_seen"] is not None else None),
        ("batch", f"{batch} images{parts}" if batch else None),
        ("crops", crops_text(crops)),
        ("masks", f"{_share(masks.get('share'))} of the global crops, {_range(masks.get('ratio'))} of their patches"),
        ("optimiser", f"AdamW, betas {betas}; gradients clipped at {optim.get('clip_grad')}"),
        ("learning rate", learning_rate(optim)),
        ("weight decay", _from_to(optim, "weight_decay")),
        ("moving average of the student", f"momentum {_from_to(optim, 'momentum')}; it is what this card describes"),
        ("regime", training["precision"]),
        ("seed", s.get("seed")),
        ("losses at the end", ", ".join(f"{k} {v:.3f}" for k, v in training["losses"].items()) or None),
        ("skipped steps, rollbacks, unreadable images", _counts(training["counts"])),
    ]  # fmt: skip
    return rows


def stage_text(stage: Mapping[str, Any]) -> str:
    """Say what a stage has of its own."""
    own = {k: v for k, v in stage.items() if k in ("crops", "masks", "loss", "optim", "data") and v}
    text = (
        f"{stage.get('name', 'stage')}: steps {stage['first'] + 1:,} to {stage['end']:,}, batch {stage['batch_size']}"
    )
    return text + "".join(f", {what}" for k, v in own.items() for what in _plain(k, v))


def objective(heads: Mapping[str, Any], loss: Mapping[str, Any], teacher: str | None) -> str:
    """Say the losses with weights, targets and heads."""
    if teacher:
        return f"distillation from the frozen teacher {teacher}; weights and targets are in the settings below"
    kind = {"sinkhorn": "Sinkhorn-Knopp", "moving": "a moving centre"}.get(str(loss.get("centering")), "not recorded")
    shared = "separate heads" if heads.get("separate") else "one shared head"
    return (
        f"DINO with multi-crop × {loss.get('dino_weight')}, iBOT on masked patches × {loss.get('ibot_weight')}, "
        f"KoLeo × {loss.get('koleo_weight')}; {heads.get('num_prototypes')} prototypes, {shared}"
        + (" with BatchNorm" if heads.get("batch_norm") else "")
        + f"; targets by {kind} at temperature {_distinct(loss.get('warmup_teacher_temp'), loss.get('teacher_temp'))}"
    )


def learning_rate(optim: Mapping[str, Any]) -> str:
    """Say the peak, its scaling by the batch, warm-up, end and layer-wise decay."""
    rule = LR_RULES.get(str(optim.get("lr_rule")), "")
    return (
        f"{optim.get('lr')}{rule}, {optim.get('warmup_steps')} steps of warm-up, "
        f"cosine to {optim.get('min_lr')}; layer-wise decay {optim.get('layerwise_decay')}"
    )


def crops_text(crops: Mapping[str, Any]) -> str:
    """Say number, size and scale of the crops."""
    text = f"2 of {crops.get('global_size')} pixels, {_range(crops.get('global_scale'))} of the image"
    if crops.get("num_local"):
        text += f"; {crops['num_local']} of {crops.get('local_size')} pixels, {_range(crops.get('local_scale'))} of it"
    return text


def tuning_rows(training: Mapping[str, Any]) -> Rows:
    """List what fine-tuning did."""
    s = training["settings"]
    size = training.get("size")
    return [
        ("objective", f"{training['task']} with labels, {len(training['classes'] or [])} classes"),
        ("mode", s.get("mode")),
        ("weights of the backbone that trained", f"{t:,}" if (t := training["trainable"]) is not None else None),
        ("epochs", _of(training["epochs_done"], s.get("epochs"))),
        ("images seen", f"{training['images_seen']:,}" if training["images_seen"] is not None else None),
        ("batch", s.get("batch_size")),
        ("image size, pixels", " × ".join(map(str, size)) if size else None),
        ("learning rate", s.get("lr") if s.get("lr") is not None else "the mode's default"),
        ("weight decay", s.get("weight_decay")),
        ("seed", s.get("seed")),
        ("regime", training["precision"]),
    ]


def settings_block(facts: dict[str, Any]) -> str:
    """Give all settings, folded, without the paths of the machine."""
    text = yaml.safe_dump(facts["training"]["settings"], sort_keys=False, allow_unicode=True)
    return f"<details><summary>All settings</summary>\n\n```yaml\n{text}```\n\n</details>"


def _plain(key: str, value: Any) -> list[str]:
    return [f"{key}.{k} {v}" for k, v in value.items()] if isinstance(value, Mapping) else [f"{key} {value}"]


def _group(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = settings.get(name)
    return found if isinstance(found, Mapping) else {}


def _of(done: int | None, planned: int | None) -> str | None:
    return None if done is None else f"{done:,}" + (f" of {planned:,}" if planned else "")


def _range(pair: Any, between: str = " to ") -> str:
    return f"{pair[0]:g}{between}{pair[1]:g}" if isinstance(pair, list | tuple) and len(pair) == 2 else "not recorded"


def _share(value: Any) -> str:
    return f"{value:.0%}" if isinstance(value, int | float) else "not recorded"


def _distinct(first: Any, last: Any) -> str:
    return f"{first}" if first == last else f"{first} to {last}"


def _from_to(group: Mapping[str, Any], key: str) -> str:
    first, last = group.get(key), group.get(f"{key}_end")
    return _distinct(first, last) + " by a cosine" * (first != last)


def _counts(counts: Mapping[str, Any]) -> str | None:
    values = [counts.get(k) for k in ("bad_steps", "rollbacks", "image_errors")]
    return None if None in values else ", ".join(map(str, values))
