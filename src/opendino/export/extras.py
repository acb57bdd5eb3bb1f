# SPDX-License-Identifier: Apache-2.0
"""The optional packages of this room, imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any

from opendino.errors import MissingExtraError


def require(package: str, what_for: str) -> Any:
    """Import an optional package.

    Raises:
        MissingExtraError: naming the extra, when it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise MissingExtraError(package.split(".")[0], "export", what_for) from error
