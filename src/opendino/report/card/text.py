# SPDX-License-Identifier: Apache-2.0
"""A model card as Markdown: front matter and the sections of the published DINOv2 card, in our words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from opendino.models.registry import MODELS
from opendino.report.card.citation import PAPER, SOFTWARE
from opendino.report.card.front_matter import as_block, front_matter
from opendino.report.card.procedure import data_section, procedure_rows, settings_block
from opendino.report.fairness import CAUTIONS, gap_note

NOT_RECORDED = "not recorded"
CONVENTIONS = {
    "scale_offset": "bicubic by a scale factor of (grid + 0.1) / table side, without antialiasing, as the published "
    "models without registers",
    "size_antialias": "bicubic to the size of the grid, with antialiasing, as the published models with registers",
    "size": "bicubic to the size of the grid, without antialiasing, as transformers' Dinov2Model",
}


def card_markdown(facts: dict[str, Any]) -> str:
    """Write the card of the facts that `opendino card` gathers."""
    sections = [
        f"# {facts['name']}",
        summary(facts),
        details(facts),
        uses(facts),
        limitations(facts),
        start(facts),
        f"## Training data\n\n{data_section(facts)}",
        f"## Training procedure\n\n{table(('', ''), procedure_rows(facts))}\n\n{settings_block(facts)}",
        evaluation(facts),
        impact(facts),
        specification(facts),
        f"## Citation\n\n```bibtex\n{SOFTWARE}\n\n{PAPER}\n```",
    ]
    return as_block(front_matter(facts)) + "\n" + "\n\n".join(sections) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a table; None is "not recorded", and pipes are escaped."""
    cells = [[NOT_RECORDED if c is None else str(c).replace("|", "\\|").replace("\n", " ") for c in r] for r in rows]
    lines = [list(head), ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- what it is ----------------------------------------------------------------------------------------------------


def summary(facts: dict[str, Any]) -> str:
    """Say in a few lines what the model is."""
    c = facts["model"]["config"]
    registers = f", {c['num_register_tokens']} registers" if c["num_register_tokens"] else ""
    how = {
        "pretrained": "distilled from a frozen teacher by the method of DINOv2 (Oquab et al. 2023)"
        if facts["training"].get("teacher")
        else "trained without labels by the method of DINOv2 (Oquab et al. 2023)",
        "finetuned": "tuned with labels from weights that were there before",
    }[facts["kind"]]
    side = facts["model"]["preprocess"]["crop"]
    patches = (side // c["patch_size"]) ** 2
    return (
        f"A Vision Transformer backbone {how} with opendino, an Apache-2.0 package (`pip install opendino`). It takes "
        f"an image and gives one class token and, at {side} × {side} pixels, {patches} patch tokens{registers}; each "
        f"is a vector of {c['embed_dim']} numbers."
    )


def details(facts: dict[str, Any]) -> str:
    """Name architecture, shapes, convention, licence."""
    model, c = facts["model"], facts["model"]["config"]
    rows = [
        ("developed by", facts["author"]),
        ("model type", model_type(c)),
        ("licence", facts["licence"] or f"{NOT_RECORDED} (`--license` of `opendino card` states it)"),
        ("parameters", f"{model['parameters']:,}"),
        ("patch size, width", f"{c['patch_size']} pixels, {c['embed_dim']}"),
        ("blocks, attention heads", f"{c['depth']}, {c['num_heads']}"),
        ("feed-forward", {"mlp": "MLP with GELU", "swiglu": "SwiGLU"}[c["ffn"]]),
        ("register tokens", c["num_register_tokens"]),
        ("input", f"{c['in_chans']} channels; sides are cut to multiples of {c['patch_size']} pixels"),
        ("output", f"class token ({c['embed_dim']},), patch tokens (h·w, {c['embed_dim']}), after the last LayerNorm"),
        ("position table", f"made for {c['img_size']} × {c['img_size']} pixels; other sizes "
         f"{CONVENTIONS[c['pos_resize']]}"),
        ("preprocessing", preprocessing(model["preprocess"])),
        ("file", f"`{model['file']}`, {model['bytes'] / 1e6:,.1f} MB, {model['dtype']}, published DINOv2 key names"),
        ("sha256", f"`{model['sha256']}`" if model["sha256"] else None),
    ]  # fmt: skip
    for what, key in (("started from weights", "started_from"), ("distilled from", "teacher")):
        if facts["training"].get(key):
            rows.insert(2, (what, facts["training"][key]))
    if facts["kind"] == "finetuned":
        rows.insert(2, ("tuned from weights with fingerprint", facts["training"]["base_sha256"]))
    return f"## Model details\n\n{table(('', ''), rows)}"


def model_type(config: dict[str, Any]) -> str:
    """Name the architecture, and what of it is another than its name says."""
    if config["arch"] not in MODELS:
        return "Vision Transformer"
    named = MODELS[config["arch"]].config.model_dump(mode="json")
    own = [
        k
        for k in ("patch_size", "embed_dim", "depth", "num_heads", "ffn", "num_register_tokens")
        if config[k] != named[k]
    ]
    return f"Vision Transformer, {config['arch']}" + (f" with {', '.join(own)} of its own" if own else "")


def preprocessing(spec: dict[str, Any]) -> str:
    """Say in words what an image goes through."""
    mean, std = (", ".join(f"{v:g}" for v in spec[k]) for k in ("mean", "std"))
    return (
        f"shorter side to {spec['resize']}, {spec['interpolation']}; centre {spec['crop']} × {spec['crop']}; values "
        f"0–1, minus ({mean}), over ({std})"
    )


# --- what it is for, and what not ----------------------------------------------------------------------------------


def uses(facts: dict[str, Any]) -> str:
    """Say what the features are good for and what they must not be used for."""
    tuned = facts["training"].get("task") if facts["kind"] == "finetuned" else None
    direct = (
        "The frozen features can be used as they are: nearest neighbours and retrieval on the class token; k-NN, "
        "logistic or linear classifiers on the class token, alone or with the mean of the patch tokens; segmentation "
        "and depth by a linear layer on the patch tokens."
    )
    if tuned:
        direct += f" `head.safetensors` beside the weights is the {tuned} head that was tuned together with them."
    return f"""## Uses

**Direct use.** {direct}

**Downstream use.** `opendino.heads` fits such heads, `opendino eval` scores them. `opendino finetune` changes the
backbone as well; try the frozen features first, which cost nothing to keep and forget nothing.

**Out of scope.** Decisions about people, such as identifying them or judging their health, character, credit or work.
Anything where a wrong answer does harm and nobody looks. Images unlike those it was trained on, until they have been
measured: the evaluation below holds for its own data sets alone. It does not generate images, and knows no text."""


def limitations(facts: dict[str, Any]) -> str:
    """Say what is known against the model: how little it has seen, what its run looked like, accuracy by group."""
    lines = ["## Bias, risks and limitations", "", *(f"- {line}" for line in known_limits(facts)), ""]
    fairness = facts["fairness"]
    if fairness is None:
        lines += ["**Accuracy by group was not measured.** `opendino eval fairness` measures it on a table of images."]
    else:
        lines += fairness_lines(fairness)
    lines += ["", "To keep in mind:", "", *(f"- {text}" for text in (CAUTIONS if fairness else CAUTIONS[:2]))]
    return "\n".join(lines)


def known_limits(facts: dict[str, Any]) -> list[str]:
    """List limits that follow from the facts."""
    training, data = facts["training"], facts["data"]
    lines = []
    seen = training.get("images_seen")
    if seen and facts["kind"] == "pretrained":
        share = f" from a list of {data['images']:,}" if data["images"] else ""
        lines.append(
            f"It has seen {seen:,} images{share}. The published DINOv2 models were trained on 142 million different "
            "ones, many times over; do not expect of this model what is known of them."
        )
    if facts["kind"] == "pretrained":
        step, steps = training["step"], training["steps"]
        if step is not None and steps and step < steps:
            lines.append(f"**The run was not finished**: these are the weights of step {step:,} of {steps:,}.")
        for finding in facts["findings"]:
            if finding["level"] != "ok":
                lines.append(f"What the run's own figures say ({finding['level']}): {finding['text']}")
        if origin := training["started_from"] or training["teacher"]:
            lines.append(f"It comes from {origin} and inherits its limits, which are not measured here.")
        crops = training["settings"].get("crops") or {}
        if training["stages"]:
            own = [stage.get("crops") or {} for stage in training["stages"]]
            crops = {k: max(c.get(k, crops.get(k, 0)) for c in own) for k in ("global_size", "local_size")}
        if crops.get("global_size"):
            lines.append(
                f"It was trained on crops of at most {crops['global_size']} and {crops['local_size']} pixels; larger "
                "images show objects larger than any that it has seen."
            )
    elif training["probe"] is not None and training["best"]:
        best = training["best"]["score"]
        if best <= training["probe"]:
            lines.append(
                f"**Tuning did not help**: {training['metric']} {best:.2f}, and {training['probe']:.2f} for a linear "
                "probe on the weights it began from."
            )
        lines.append("Tuning follows its labels, also where these are unfair or wrong.")
    lines.append("One run with one seed; how much another seed would change is not known.")
    return lines


def fairness_lines(result: dict[str, Any]) -> list[str]:
    """Write accuracy by group, a table for each grouping, with what the gap is worth."""
    lines = [
        f"**Accuracy by group**, {result['num_images']:,} images, top-{result['k']}, in percent. "
        f"{result['classifier']}."
    ]
    if not result.get("model"):
        lines.append("The result does not say which model was measured.")
    span = f"{result['confidence']:g} % interval"
    for name, found in result["columns"].items():
        rows = [
            (
                group + (" (small)" if row["small"] else ""), row["n"], f"{row['accuracy']:.1f}",
                "{:.1f} to {:.1f}".format(*row["interval"]), f"{row['against_overall']:+.1f}",
            )
            for group, row in found["groups"].items()
        ]  # fmt: skip
        lines += ["", table((name, "images", "accuracy", span, "against all"), rows), "", gap_note(found["gap"]).text]
    return lines


# --- how to use it -------------------------------------------------------------------------------------------------


def start(facts: dict[str, Any]) -> str:
    """Give code that runs where the card lies."""
    width = facts["model"]["config"]["embed_dim"]
    return f"""## How to get started

In the folder of this card:

```python
import opendino

model = opendino.load("{facts["model"]["file"]}")
features = opendino.Embedder(model)(["image.jpg"])
features.cls  # (1, {width}) float32, one vector an image
features.patches  # (1, {"{} × {}".format(*facts["grid"])}, {width}), one vector a patch
```

The same file loads in other packages after `opendino convert {facts["model"]["file"]} OUT --to hf` (or `timm`)."""


# --- what it is worth ----------------------------------------------------------------------------------------------


def evaluation(facts: dict[str, Any]) -> str:
    """Write the table of the suite."""
    columns, failed = facts["evaluation"]["columns"], facts["evaluation"]["failed"]
    lines = ["## Evaluation", ""]
    if columns:
        rows = [
            (c["title"], c["data"], c["unit"] + " ↓" * c["lower_is_better"], figure(c, c["value"]), c["note"],
             ", ".join(f"{k} {figure(c, v)}" for k, v in c["published"].items()) or "–")
            for c in columns
        ]  # fmt: skip
        head = ("protocol", "data", "unit", "this model", "how", "published DINOv2, same set")
        lines += [table(head, rows), "", "Frozen features, measured by `opendino eval suite`; ↓: lower is better."]
    else:
        lines += [
            f"{NOT_RECORDED}. `opendino eval suite --out DIR` measures, `opendino card --evaluation DIR` takes it."
        ]
    lines += [f"Could not be measured: {what}: {why}" for what, why in failed.items()]
    probe, training = facts["training"].get("probe"), facts["training"]
    if facts["kind"] == "pretrained" and probe:
        (first, a), (last, b) = probe["first"], probe["last"]
        scores = "; ".join(f"{k} {a[k]:.1f} at step {first}, {b[k]:.1f} at step {last}" for k in b if k in a)
        lines += ["", f"Probe during training, on labelled images that the run was given: {scores}."]
    if facts["kind"] == "finetuned" and training["best"]:
        lines += [
            "",
            f"On the {training['num_val']:,} validation images on which the epoch was chosen, which flatters: "
            f"{training['metric']} {training['best']['score']:.2f} at epoch {training['best']['epoch']}; linear probe "
            f"before tuning {training['probe']:.2f}.",
        ]
    return "\n".join(lines)


def figure(column: dict[str, Any], value: float) -> str:
    """Write a figure as the suite does."""
    return f"{value:.3f}" if column["lower_is_better"] else f"{value:.1f}"


def amount(value: float) -> str:
    """Write three digits, or all of those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# --- what it took --------------------------------------------------------------------------------------------------


def impact(facts: dict[str, Any]) -> str:
    """Write hours, hardware, energy and CO₂eq with what was assumed."""
    time, e = facts["time"], facts["impact"]
    hours = f"{amount(time['seconds'] / 3600)} ({time['source']})" if time else None
    many = f" in {time['sessions']} sessions" if time and time["sessions"] and time["sessions"] > 1 else ""
    rows = [
        ("hardware", facts["hardware"]),
        ("hours", hours + many if hours else None),
        ("device hours", amount(e["device_hours"]) if e["device_hours"] is not None else None),
        ("CPU hours of the processes", amount(time["cpu_seconds"] / 3600) if time and time["cpu_seconds"] else None),
        ("provider, region", f"{facts['provider'] or NOT_RECORDED}, {facts['region'] or NOT_RECORDED}"),
        ("power of a device, W", f"{e['watts']:g}" if e["watts"] is not None else None),
        ("PUE", f"{e['pue']:g}"),
        ("grid, kg CO2eq a kWh", f"{e['grid_kg_per_kwh']:g}"),
        ("energy, kWh", amount(e["kwh"]) if e["kwh"] is not None else None),
        ("carbon emitted, kg CO2eq", amount(e["co2_kg"]) if e["co2_kg"] is not None else None),
    ]  # fmt: skip
    lines = ["## Environmental impact", "", table(("", ""), rows), ""]
    lines += ["Energy = device hours × power × PUE, emissions = energy × grid; neither was metered.", ""]
    lines += [f"- {text}" for text in e["assumptions"]]
    if e["kwh"] is None:
        lines += [
            "- Not computed, because hours or hardware were not recorded: give `--hours`, `--device` or `--watts`."
        ]
    return "\n".join(lines)


def specification(facts: dict[str, Any]) -> str:
    """Write architecture, objective, compute and software in short."""
    training, sessions = facts["training"], facts["sessions"]
    software: dict[str, list[str]] = {}
    for session in sessions:
        for name, version in (session.get("software") or {}).items():
            software.setdefault(name, [])
            if version not in software[name]:
                software[name].append(version)
    flops = None if training.get("stages") or training.get("teacher") else facts["flops_per_image"]
    seen = training.get("images_seen")
    rows = [
        ("hardware", facts["hardware"]),
        ("processes", ", ".join(dict.fromkeys(str(s["processes"]) for s in sessions)) or None),
        ("memory of a machine, GB", next((s.get("memory_gb") for s in reversed(sessions)), None)),
        ("most memory used, GB", f"{m:.2f}" if (m := training.get("peak_memory_gb")) else None),
        ("GFLOP of an image and step", f"{amount(flops / 1e9)}: all crops, teacher, student, heads" if flops else None),
        ("FLOPs of the training", f"{flops * seen:.3g}" if flops and seen else None),
        ("share of a matrix product's speed", f"{m:.0%}, median of the steps" if (m := training.get("mfu")) else None),
        ("software", ", ".join(f"{k} {' and '.join(v)}" for k, v in software.items()) or None),
    ]  # fmt: skip
    if facts["kind"] == "finetuned":
        rows = [row for row in rows if not row[0].startswith(("FLOPs", "GFLOP", "share", "most"))]
    return f"## Technical specification\n\n{table(('', ''), rows)}"
