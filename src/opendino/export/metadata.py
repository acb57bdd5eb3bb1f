# SPDX-License-Identifier: Apache-2.0
"""What an exported file says about itself, so that it can be run without the weights that it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from opendino._version import __version__
from opendino.errors import ConfigError, WeightsError
from opendino.models.config import PreprocessSpec, ViTConfig

Output = Literal["cls", "patches", "mean", "registers"]
ExportPrecision = Literal["fp32", "fp16", "int8"]
OUTPUTS: tuple[Output, ...] = ("cls", "patches", "mean", "registers")
PRECISIONS: tuple[ExportPrecision, ...] = ("fp32", "fp16", "int8")
PREFIX = "opendino."
FORMAT = 1


class ExportInfo(BaseModel):
    """Describes an exported backbone; every field is a key `opendino.FIELD` with a JSON value in the file.

    The file takes one input, `images` (B, C, H, W): float32 normalised with `preprocess`, or with `uint8_input` uint8
    pixels 0–255. Its outputs are float32: cls (B, L·D), patches (B, P, L·D) row by row, mean (B, L·D) of the patches,
    registers (B, R, L·D), all after the final LayerNorm.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    version: str = Field(__version__, description="of opendino, which wrote the file")
    config: ViTConfig = Field(description="shape of the backbone and its position convention")
    preprocess: PreprocessSpec
    outputs: tuple[Output, ...] = ("cls", "patches")
    layers: int = Field(1, ge=1, description="each vector is that of the last `layers` blocks, concatenated")
    size: tuple[int, int] | None = Field(None, description="(height, width) in pixels; None takes any")
    batch: int | None = Field(None, description="images at once; None takes any number")
    precision: ExportPrecision = "fp32"
    uint8_input: bool = False
    weights_sha256: str = Field(description="opendino.models.fingerprint.weights_fingerprint of the source")
    content_sha256: str = Field("", description="of the numbers in the file, in their order")
    licence: str = Field("not stated", description="of the weights")

    def to_strings(self) -> dict[str, str]:
        """Give the keys and values to keep in a file."""
        return {PREFIX + k: json.dumps(v) for k, v in self.model_dump(mode="json").items()}

    @classmethod
    def from_strings(cls, values: Mapping[str, str], origin: str) -> ExportInfo:
        """Read what `to_strings` gave; other keys are left aside.

        Raises:
            WeightsError: when the file was not exported by this package, or by a later version of it.
        """
        own = {k.removeprefix(PREFIX): v for k, v in values.items() if k.startswith(PREFIX)}
        if not own:
            raise WeightsError(
                f"{origin} says nothing about its preprocessing and outputs, so it was not exported by opendino. Give "
                "a file that `opendino export` wrote."
            )
        try:
            return cls.model_validate({k: json.loads(v) for k, v in own.items()})
        except (ValidationError, ValueError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            where = ".".join(map(str, first["loc"]))
            raise WeightsError(
                f"The description in {origin} cannot be read ({where}: {first['msg']}). It may be of another version "
                f"of opendino (this is {__version__}); export it again."
            ) from error


def checked_outputs(outputs: Any, config: ViTConfig) -> tuple[Output, ...]:
    """Give the outputs in the order of `OUTPUTS` from "cls,patches" or a sequence.

    Raises:
        ConfigError: for an unknown one, none, or registers of a model that has none.
    """
    names = tuple(outputs.split(",")) if isinstance(outputs, str) else tuple(outputs)
    if not names or set(names) - set(OUTPUTS):
        raise ConfigError(f"outputs are {','.join(names)}; give one or more of {', '.join(OUTPUTS)}, with commas.")
    if "registers" in names and not config.num_register_tokens:
        raise ConfigError("outputs name registers, but the model has none. Leave them out.")
    return tuple(n for n in OUTPUTS if n in names)
