# SPDX-License-Identifier: Apache-2.0
"""`opendino eval PROTOCOL …`: scores of frozen features. Each protocol is a file here, imported when it is called."""

from __future__ import annotations

import importlib

from opendino.errors import ConfigError

PROTOCOLS: dict[str, str] = {
    "knn": "weighted vote of the nearest labelled images",
    "logreg": "logistic regression on the cls token",
    "linear": "the published grid of linear classifiers",
    "multilabel": "images of several classes (VOC2007), mean average precision",
    "robustness": "a trained classifier on other test sets",
    "segmentation": "linear head on patch tokens, mIoU",
    "depth": "linear or DPT head on patch tokens, RMSE",
    "retrieval": "nearest neighbours, mAP or GAP",
    "fairness": "accuracy by group and the gaps",
    "suite": "everything that the given data allows, in one table",
}


def usage() -> str:
    """Give the text of `opendino eval --help`."""
    rows = "\n".join(f"  {name:14}{about}" for name, about in PROTOCOLS.items())
    return (
        f"usage: opendino eval PROTOCOL …\n\n{rows}\n\nopendino eval PROTOCOL --help tells more, with an example:\n"
        "  opendino eval knn --model vits14 --train photos/train --val photos/val --k 10 20 --json"
    )


def main(argv: list[str]) -> int:
    """Dispatch on the first word."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] not in PROTOCOLS:
        raise ConfigError(f"{argv[0]!r} is no protocol of `opendino eval`; there is {', '.join(PROTOCOLS)}.")
    module = importlib.import_module(f"opendino.cli.evaluate.{argv[0]}")
    return int(module.main(argv[1:]))
