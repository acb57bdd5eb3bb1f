# SPDX-License-Identifier: Apache-2.0
"""The command line: `opendino COMMAND …`. Each command is a file here; its module is imported when it is called."""

from __future__ import annotations

import importlib
import logging
import sys

from opendino._version import __version__

COMMANDS: dict[str, tuple[str, str]] = {
    "models": ("models", "list the named architectures and where their weights are"),
    "convert": ("convert", "rewrite a weight file for the original, transformers or timm"),
    "export": ("export", "write a backbone for ONNX Runtime or OpenVINO, proven against the torch model"),
    "embed": ("embed", "turn images into feature vectors on disk"),
    "eval": ("evaluate", "score frozen features as the paper does"),
    "data": ("data", "say which data set lies at a path and whether it can be used"),
    "visualize": ("visualize", "draw what a model sees: pca, attention"),
    "pretrain": ("pretrain", "train a backbone on your images without labels"),
    "distill": ("distill", "train a small student against a frozen teacher"),
    "resume": ("resume", "continue an interrupted pre-training run"),
    "finetune": ("finetune", "tune a backbone with labels, against a linear probe on the frozen one"),
    "stats": ("stats", "mean and std of each channel of your images, for a recipe"),
    "demo": ("demo", "pre-train a small model on real photographs and write a report"),
    "benchmark": ("benchmark", "images/s, latency, memory and exactness of each runtime on this machine"),
    "doctor": ("doctor", "what this machine and installation can do, and what is missing"),
    "plan": ("plan", "what a run will take: memory, hours, energy"),
    "card": ("card", "write the model card of a run"),
    "report": ("report", "judge a pre-training run in plain words and write its page"),
}


def usage() -> str:
    """Give the text of `opendino --help`."""
    rows = "\n".join(f"  {name:12}{about}" for name, (_, about) in COMMANDS.items())
    return (
        f"opendino {__version__}: the DINOv2 system in one package\n\nusage: opendino COMMAND …\n\n{rows}\n\n"
        "opendino COMMAND --help tells more, with an example. Exit code 0: done, 1: the job failed, 2: wrong usage."
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command and give its exit code; users' mistakes become one paragraph on standard error."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if args else 2
    if args[0] in ("--version", "-V"):
        print(__version__)
        return 0
    if args[0] not in COMMANDS:
        print(f"{args[0]!r} is no command.\n\n{usage()}", file=sys.stderr)
        return 2
    from opendino.errors import ConfigError, OpendinoError

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    module = importlib.import_module(f"opendino.cli.{COMMANDS[args[0]][0]}")
    try:
        return int(module.main(args[1:]))
    except OpendinoError as error:
        print(f"opendino {args[0]}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt as stop:  # a run that was asked to stop says where it is
        if str(stop):
            print(stop, file=sys.stderr)
        return 128 + getattr(stop, "number", 2)
