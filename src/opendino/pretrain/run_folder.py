# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: config.yaml, metrics.jsonl, events.jsonl, weights/teacher.safetensors, heads.safetensors.

Process 0 writes; every file appears whole, written aside and renamed, or grows by whole lines.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor

from opendino.errors import ConfigError
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone
from opendino.pretrain.config import MAY_CHANGE, PretrainConfig, parse_config

log = logging.getLogger("opendino")
Record = dict[str, Any]


class RunFolder:
    """Files of one run.

    Args:
        config: of the run; `config.out` is its folder.

    Raises:
        ConfigError: when the folder holds a run with other settings, apart from those that may change on the way.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self.path = Path(config.out)
        self.metrics, self.events = self.path / "metrics.jsonl", self.path / "events.jsonl"
        self._claim(config)

    def _claim(self, config: PretrainConfig) -> None:
        path = self.path / "config.yaml"
        if path.exists():
            different = changed_settings(parse_config(path.read_text(), str(path)), config)
            if different:
                raise ConfigError(
                    f"{self.path} holds a run with other settings ({', '.join(different)}). Continue it with "
                    f"`opendino resume {self.path}`, or give another --out."
                )
        self.path.mkdir(parents=True, exist_ok=True)
        replace_text(path, yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder, so that a second process that trains in it is refused; the system lets go when we die.

        Raises:
            ConfigError: when another process holds it.
        """
        try:
            import fcntl
        except ImportError:  # Windows has no such locks
            yield
            return
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"Another process is training in {self.path}. Wait for it, stop it, or give another --out."
                ) from error
            except OSError as error:  # some network file systems have none either
                log.warning("%s cannot be locked (%s): make sure that only one run writes to it.", self.path, error)
            yield

    def append(self, record: Record, event: bool = False) -> None:
        """Add a line to metrics.jsonl, or to events.jsonl."""
        with (self.events if event else self.metrics).open("a") as file:
            file.write(json.dumps(record) + "\n")

    def trim_metrics(self, step: int) -> None:
        """Drop the lines of steps after `step`, which a kill or a rollback undid, so that each step stands once."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the line that was being written
                continue
            if 0 < record["step"] <= step or (record["step"] == 0 < step):
                kept.append(line + "\n")
        replace_text(self.metrics, "".join(kept))

    def write_weights(self, teacher: VisionTransformer, heads: Mapping[str, Tensor], step: int) -> None:
        """Write the teacher as one plain file with published names, which says its step, and its heads."""
        (self.path / "weights").mkdir(exist_ok=True)
        save_backbone(teacher, self.path / "weights" / "teacher.safetensors", extra={"opendino.step": str(step)})
        aside = self.path / ".heads.safetensors"
        save_file({k: v.cpu().contiguous() for k, v in heads.items()}, aside)
        aside.rename(self.path / "heads.safetensors")

    def keep_weights(self, name: str) -> None:
        """Keep the teacher that was written last as weights/teacher_NAME.safetensors too."""
        newest, aside = self.path / "weights" / "teacher.safetensors", self.path / "weights" / ".kept"
        if newest.is_file():
            shutil.copyfile(newest, aside)
            aside.rename(newest.with_name(f"teacher_{name}.safetensors"))


def changed_settings(a: PretrainConfig, b: PretrainConfig) -> list[str]:
    """Name the settings in which two runs differ, apart from those that may change on the way."""
    x, y = _defining(a.model_dump()), _defining(b.model_dump())
    return [key for key in x | y if x.get(key) != y.get(key)]


def _defining(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what may change on the way, in stages too."""
    kept = {key: value for key, value in settings.items() if key not in MAY_CHANGE}
    return kept | {"stages": [_defining(s) for s in settings["stages"]]} if "stages" in kept else kept


def replace_text(path: Path, text: str) -> None:
    """Write a text file aside, to the disk, and rename it."""
    aside = path.with_name(f".{path.name}")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
