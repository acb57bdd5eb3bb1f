# SPDX-License-Identifier: Apache-2.0
"""`opendino card`: the model card of a run folder."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from opendino.errors import ConfigError, DataError, OpendinoError

log = logging.getLogger("opendino")
EXAMPLE = """Write the model card of a run: RUN/card.md, Markdown with front matter for model hubs.

Example:
  opendino card run --license apache-2.0 --data-notes licences.md
  opendino card run --evaluation suite --fairness fairness --grid 0.24

All that stands in it comes from the files of the run and from these flags; what neither says is "not recorded".
`opendino pretrain` writes a card when it ends; a card that was edited by hand is never overwritten unasked."""
MARK = re.compile(r"\n<!-- opendino card, (asked for|automatic), sha256 of all above: (\w+) -->\n\Z")
HASHED_UP_TO = 300_000_000
"""Bytes of a weight file up to which the card at the end of a run has its sha256; larger ones take seconds to read."""


@dataclass(frozen=True)
class Args:
    """Arguments of `opendino card`."""

    run: tyro.conf.Positional[Path]
    """Folder of `opendino pretrain --out` or `opendino finetune --out`."""
    evaluation: tuple[Path, ...] = ()
    """Folders of `opendino eval suite --out`."""
    fairness: Path | None = None
    """Folder of `opendino eval fairness --out`."""
    license: str | None = None
    """Licence of the weights, such as apache-2.0."""
    data_notes: Path | None = None
    """Markdown file: where the training images come from, and under which licences."""
    name: str | None = None
    """Name of the model; default: the folder's."""
    author: str | None = None
    """Who developed it."""
    base_model: str | None = None
    """Hub name of the model that a fine-tuned one comes from."""
    device: str | None = None
    """What it was computed on, where RUN does not say: cpu, a100, h100 or h200."""
    hardware: str | None = None
    """What it was computed on in words, where RUN does not say or says it too shortly."""
    devices: int | None = None
    """How many, where RUN does not say; default 1."""
    hours: float | None = None
    """By the clock, where RUN does not say or says too little."""
    watts: float | None = None
    """Power of a device; default: that of `opendino plan` for it."""
    pue: float = 1.1
    """Energy of the building over that of its devices."""
    grid: float = 0.385
    """Kilograms of CO2eq a kWh; 0.385 is what the published card used for the USA."""
    region: str | None = None
    """Where it was computed."""
    provider: str | None = None
    """Whose machines these were."""
    out: Path | None = None
    """File of the card; default: RUN/card.md."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also a card that was edited by hand."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the facts of the card as one JSON object."""


def main(argv: list[str]) -> int:
    """Write the card and print where it is."""
    args = tyro.cli(Args, args=argv, prog="opendino card", description=EXAMPLE)
    path = args.out or args.run / "card.md"
    written = how_written(path)
    if written == "edited" and not args.overwrite:
        raise ConfigError(
            f"{path} was edited by hand, or not written by this command. Give another --out and compare, or "
            "--overwrite."
        )
    facts = gather(args)
    write(path, facts, "asked for")
    print(json.dumps(facts | {"card": str(path)}) if args.json else path)
    return 0


def automatic_card(run: Path) -> Path | None:
    """Write RUN/card.md at the end of training; nothing where a card was asked for or edited, or no weights are there.

    What goes wrong is told and stops nothing.
    """
    path = run / "card.md"
    try:
        weights = run / "weights" / "teacher.safetensors"
        if how_written(path) not in ("", "automatic") or not weights.is_file():
            return None
        write(path, gather(Args(run), hashed=weights.stat().st_size <= HASHED_UP_TO), "automatic")
    except Exception as error:  # a card is no reason to end a training run badly
        log.warning("%s was not written: %s", path, error)
        return None
    return path


# --- the file ------------------------------------------------------------------------------------------------------


def how_written(path: Path) -> str:
    """Say whose a card is: "" when there is none, "automatic", "asked for", or "edited" by hand."""
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8")
    mark = MARK.search(text)
    if mark is None or hashlib.sha256(text[: mark.start()].encode()).hexdigest() != mark[2]:
        return "edited"
    return mark[1]


def write(path: Path, facts: dict[str, Any], how: str) -> None:
    """Write a card aside, with a mark that shows whether it was edited since, and put it in place."""
    from opendino.cli.evaluate.suite import write_text
    from opendino.report.card.text import card_markdown

    text = card_markdown(facts)
    digest = hashlib.sha256(text.encode()).hexdigest()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, f"{text}\n<!-- opendino card, {how}, sha256 of all above: {digest} -->\n")


# --- the facts -----------------------------------------------------------------------------------------------------


def gather(args: Args, hashed: bool = True) -> dict[str, Any]:
    """Put together what the card says.

    Returns:
        The facts of `opendino.report.card.facts.run_facts`, and "licence", "author", "region", "provider",
        "base_model", "hardware", "data_notes", "findings", "flops_per_image", "grid" of patches, "evaluation",
        "fairness" and "impact"; None for what is not known.
    """
    from opendino.report.card.facts import run_facts
    from opendino.report.card.scores import read_evaluation, read_fairness

    if args.hours is not None and args.hours <= 0:
        raise ConfigError(f"--hours is {args.hours}; it must be above 0.")
    facts = run_facts(args.run, hashed)
    if args.name:
        facts["name"] = args.name
    facts |= {"licence": args.license, "author": args.author, "region": args.region, "provider": args.provider}
    facts |= {"base_model": args.base_model, "data_notes": read_notes(args.data_notes)}
    facts["findings"], facts["flops_per_image"] = judged(args.run) if facts["kind"] == "pretrained" else ([], None)
    side = facts["model"]["preprocess"]["crop"] // facts["model"]["config"]["patch_size"]
    facts["grid"] = [side, side]
    fingerprint = fingerprint_of(args.run) if args.evaluation else None
    facts["evaluation"] = read_evaluation(args.evaluation, args.run, fingerprint)
    facts["fairness"] = read_fairness(args.fairness, args.run) if args.fairness else None
    facts["hardware"], watts, source = hardware(args, facts["sessions"])
    facts["time"], device_hours, assumed = hours(args, facts["time"], watts is not None)
    facts["impact"] = impact(args, device_hours, watts, [*source, *assumed])
    return facts


def read_notes(path: Path | None) -> str | None:
    """Read what the user wrote about the data."""
    if path is None:
        return None
    if not path.is_file():
        raise DataError(
            f"--data-notes {path} does not exist. Give a Markdown file about the images and their licences."
        )
    return path.read_text(encoding="utf-8").strip()


def fingerprint_of(run: Path) -> str:
    """Give the fingerprint of a model's weights by which `opendino eval suite` knows them."""
    import opendino
    from opendino.embed.resume import weights_fingerprint

    return weights_fingerprint(opendino.load(run))


def judged(run: Path) -> tuple[list[dict[str, Any]], float | None]:
    """Give the verdict on a run and its FLOPs an image; neither when its settings are of another version."""
    from opendino.cli.report import judge_run
    from opendino.pretrain.config import parse_config
    from opendino.pretrain.flops import model_flops_per_image

    path = run / "config.yaml"
    try:
        config = parse_config(path.read_text(encoding="utf-8"), str(path))
        return [f.as_dict() for f in judge_run(run)], model_flops_per_image(config)
    except OpendinoError as error:
        log.warning("The verdict and the FLOPs are left out of the card: %s", error)
        return [], None


def hardware(args: Args, sessions: list[dict[str, Any]]) -> tuple[str | None, float | None, list[str]]:
    """Give the hardware in words, the power of a device in W, and where that is from; None where it is not known."""
    from opendino.cli.plan import CPU_WATTS
    from opendino.pretrain.plan import DEVICES

    if args.device is not None and args.device not in (*DEVICES, "cpu"):
        raise ConfigError(f"--device is {args.device!r}; it must be {', '.join(DEVICES)} or cpu.")
    if args.device:
        words = f"{args.devices or 1} × {'CPU' if args.device == 'cpu' else DEVICES[args.device].name}, as stated"
        kinds: set[str | None] = {args.device}
    else:
        words = "; ".join(dict.fromkeys(machine(s) for s in sessions))
        kinds = {kind_of(s) for s in sessions}
    words = args.hardware or words
    if args.watts is not None:
        return words or None, args.watts, [f"{args.watts:g} W a device, as stated"]
    if len(kinds) != 1 or (kind := kinds.pop()) is None:
        return words or None, None, []
    watts = CPU_WATTS if kind == "cpu" else DEVICES[kind].watts
    what = (
        "a machine that computes on its CPU, assumed" if kind == "cpu" else f"{DEVICES[kind].name}, by its data sheet"
    )
    return words or None, watts, [f"{watts:g} W for {what}, at full load all the time"]


def machine(session: dict[str, Any]) -> str:
    """Name the hardware of a session."""
    name = session.get("device_name") or f"{session.get('device', 'device')} of a name that was not recorded"
    if session.get("device") != "cpu":
        return f"{session.get('processes', 1)} × {name}"
    text = f"{name}, {session.get('cores')} cores" if session.get("cores") else name
    return f"{session['machines']} × {text}" if session.get("machines", 1) > 1 else text


def kind_of(session: dict[str, Any]) -> str | None:
    """Find the device of `opendino plan` that a session was computed on; None for one that it does not know."""
    from opendino.pretrain.plan import DEVICES

    if session.get("device") == "cpu":
        return "cpu"
    words = re.split(r"[^a-z0-9]+", str(session.get("device_name", "")).lower())
    return next((key for key in DEVICES if key in words), None)


def hours(
    args: Args, time: dict[str, Any] | None, may_assume: bool
) -> tuple[dict[str, Any] | None, float | None, list[str]]:
    """Give the time, device hours, and what was assumed about them."""
    many = args.devices or 1
    stated = f"{many} device{'s' * (many > 1)}" + ("" if args.devices else ", assumed, as no number was stated")
    if args.hours is not None:
        found = {"seconds": args.hours * 3600, "device_seconds": args.hours * 3600 * many, "cpu_seconds": None}
        return found | {"sessions": None, "source": "as stated"}, args.hours * many, [stated]
    if time is None:
        return None, None, []
    if time["device_seconds"] is not None and args.devices is None:
        return time, time["device_seconds"] / 3600, []
    return time, time["seconds"] * many / 3600 if args.devices or may_assume else None, [stated]


def impact(args: Args, device_hours: float | None, watts: float | None, assumptions: list[str]) -> dict[str, Any]:
    """Give energy and CO₂eq with all that was assumed.

    Raises:
        ConfigError: for figures that cannot be.
    """
    from opendino.report.card.hours import energy

    for flag, value, least in (("watts", watts, 0), ("pue", args.pue, 1), ("grid", args.grid, 0)):
        if value is not None and not least <= value < float("inf"):
            raise ConfigError(f"--{flag} is {value}; it must be at least {least}.")
    defaults = Args(args.run)
    pue = f"{args.pue:g} times the devices' energy for the building" + ", assumed" * (args.pue == defaults.pue)
    grid = f"{args.grid:g} kg CO2eq a kWh" + (
        ", the figure of the published card for the USA" if args.grid == defaults.grid else ", as stated"
    )
    return energy(device_hours, watts, args.pue, args.grid, [*assumptions, pue, grid])
