# SPDX-License-Identifier: Apache-2.0
"""What a user can do wrong, as exceptions.

Every message is one paragraph in three parts: what was given, what is needed, what to do. `assert` is kept for our own
invariants. The command line prints these errors without a traceback.
"""


class OpendinoError(ValueError):
    """Base of every error that a user can mend; catching it never hides a bug of ours."""


class ConfigError(OpendinoError):
    """A setting, a recipe or a command line that cannot be run as given."""


class WeightsError(OpendinoError):
    """A weight file that is missing, damaged, unsafe, or made for another architecture."""


class DataError(OpendinoError):
    """An image, a folder or an array that cannot be used as given."""


class MissingExtraError(OpendinoError, ImportError):
    """An optional package is needed; the message names the extra to install."""

    def __init__(self, package: str, extra: str, what_for: str) -> None:
        super().__init__(
            f"{what_for} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'opendino[{extra}]'"
        )
