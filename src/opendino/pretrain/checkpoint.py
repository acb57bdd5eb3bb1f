# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: sharded, written aside in the background, renamed when whole, found again on any number of
processes.

A checkpoint is a folder RUN/checkpoints/step_<step> in the format of torch.distributed.checkpoint (DCP), which puts
tensors together for whatever sharding asks for them, and `trainer.json`: the step, counters, and the size of every
file, by which a damaged one is recognised.

On several machines the run folder must lie on a file system that all of them see.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from opendino.distributed.collectives import all_true, barrier, broadcast_object, is_main, world_size
from opendino.distributed.sharding import staged
from opendino.errors import ConfigError, DataError

log = logging.getLogger("opendino")
EXTRAS = "trainer.json"
State = dict[str, Any]


class Checkpointer:
    """Writes and reads the checkpoints of one run. Every process calls every method, at the same step.

    Args:
        run: the run folder.
        keep: how many of the newest checkpoints stay.
        milestone_every: checkpoints at multiples of this step stay for ever; None keeps no milestones.
        background: write in a thread while training goes on; the state is copied to CPU memory first.

    Attributes:
        pinned: a step whose checkpoint stays, or None.
    """

    def __init__(
        self, run: Path, *, keep: int = 2, milestone_every: int | None = None, background: bool = True
    ) -> None:
        self.folder = run / "checkpoints"
        self.keep, self.milestone_every, self.background = keep, milestone_every, background
        # Collectives of a background thread must not mix with those of the training.
        self.group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self.pinned: int | None = None
        self._writing: _Writing | None = None

    # --- writing ---------------------------------------------------------------------------------------------------

    def save(self, step: int, tensors: Mapping[str, Tensor], extras: State) -> None:
        """Begin a checkpoint; one that is still being written is finished first.

        Args:
            step: names the checkpoint.
            tensors: everything that is restored in place, by unique names; sharded ones may be among them.
            extras: what is not a tensor, as JSON.
        """
        self.finish()
        aside = self.folder / f".writing_{step:08d}"
        if is_main():
            shutil.rmtree(aside, ignore_errors=True)
        barrier()
        copies: State = {name: staged(tensor) for name, tensor in tensors.items()}
        self._writing = _Writing(aside, step, extras | {"step": step}, lambda: self._write(aside, copies))
        if not self.background:
            self.finish()

    def _write(self, aside: Path, tensors: State) -> None:
        aside.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP remarks that there is one process
            save(tensors, checkpoint_id=aside, process_group=self.group)

    def poll(self) -> None:
        """Put a checkpoint that has been written since into its place."""
        if self._writing is not None and all_true(self._writing.done):
            self.finish()

    def finish(self, required: bool = False) -> None:
        """Wait for the checkpoint that is being written and put it into its place.

        A checkpoint that cannot be written is dropped with a warning: the ones before it stay, training goes on and the
        next one is tried again.

        Raises:
            DataError: instead of the warning, with `required`.
        """
        writing, self._writing = self._writing, None
        if writing is None:
            return
        problem = writing.wait()
        written = all_true(problem is None)
        if written and is_main():
            problem = self._put_in_place(writing)
        problem = broadcast_object(problem) or (None if written else "another process could not write its part")
        if problem is None:
            return
        if is_main():
            shutil.rmtree(writing.aside, ignore_errors=True)
        free = shutil.disk_usage(self.folder).free / 2**20
        text = (
            f"The checkpoint of step {writing.step} could not be written to {self.folder} ({problem}; {free:.0f} MiB "
            f"are free). Make room there; the last whole checkpoint is {self._name_of_newest()}."
        )
        if required:
            raise DataError(text)
        log.warning("%s Training goes on and the next one will be tried.", text)

    def _put_in_place(self, writing: _Writing) -> str | None:
        """Name a written checkpoint and drop old ones; give the problem if there is one."""
        final = self.folder / f"step_{writing.step:08d}"
        try:
            sizes = {f.name: f.stat().st_size for f in sorted(writing.aside.iterdir())}
            (writing.aside / EXTRAS).write_text(json.dumps(writing.extras | {"files": sizes}))
            shutil.rmtree(final, ignore_errors=True)
            writing.aside.rename(final)
            self._drop_old()
        except OSError as error:
            return str(error)
        return None

    def _drop_old(self) -> None:
        found = list_checkpoints(self.folder.parent)
        every = self.milestone_every
        for old in found[: -self.keep]:
            if not (every and step_of(old) % every == 0) and step_of(old) != self.pinned:
                shutil.rmtree(old)

    def rewind(self, step: int, extras: State) -> None:
        """Make the checkpoint of `step` the newest, with other extras: a run that went back to it is continued so."""
        self.finish()
        if is_main():
            path = self.folder / f"step_{step:08d}" / EXTRAS
            sizes = json.loads(path.read_text())["files"]
            aside = path.with_name(f".{EXTRAS}")
            aside.write_text(json.dumps(extras | {"step": step, "files": sizes}))
            aside.rename(path)
            for newer in list_checkpoints(self.folder.parent):
                if step_of(newer) > step:
                    shutil.rmtree(newer)
        barrier()

    def _name_of_newest(self) -> str:
        found = list_checkpoints(self.folder.parent)
        return found[-1].name if found else "none"

    # --- reading ---------------------------------------------------------------------------------------------------

    def load(
        self, tensors: Mapping[str, Tensor] | Callable[[int], Mapping[str, Tensor]], before: int | None = None
    ) -> State | None:
        """Restore the newest whole checkpoint in place and give its extras, or None when the run has none yet.

        Args:
            tensors: what `save` was given, on any number of processes; the values are overwritten. Or a function that
                gives them for the step of a checkpoint, where their shapes depend on it.
            before: only checkpoints of earlier steps than this one.

        Raises:
            ConfigError: when there are checkpoints and none can be read; a run is never restarted from zero silently.
        """
        found = broadcast_object(list_checkpoints(self.folder.parent) if is_main() else None)
        found = [f for f in found if before is None or step_of(f) < before]
        for folder in reversed(found):
            problem = broadcast_object(damage(folder) if is_main() else None)
            if problem is None:
                problem = self._read(folder, tensors(step_of(folder)) if callable(tensors) else tensors)
            if problem is None:
                extras: State = json.loads((folder / EXTRAS).read_text())
                return extras
            if is_main():
                log.warning("Checkpoint %s cannot be read (%s); trying the one before.", folder, problem)
        if found:
            raise ConfigError(
                f"None of the {len(found)} checkpoints in {self.folder} can be read. Remove the folder to start "
                "afresh, or restore one of them."
            )
        return None

    def _read(self, folder: Path, tensors: Mapping[str, Tensor]) -> str | None:
        problem = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load({k: v.detach() for k, v in tensors.items()}, checkpoint_id=folder, process_group=self.group)
        except BaseException as error:
            problem = reason_of(error)
        return problem if all_true(problem is None) else problem or "another process could not read it"


class _Writing:
    """One checkpoint being written by a thread."""

    def __init__(self, aside: Path, step: int, extras: State, write: Callable[[], None]) -> None:
        self.aside, self.step, self.extras = aside, step, extras
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint")
        self._thread.start()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._problem = reason_of(error)

    @property
    def done(self) -> bool:
        """Whether the thread has ended."""
        return not self._thread.is_alive()

    def wait(self) -> str | None:
        """Wait for the thread; give its problem, or None."""
        self._thread.join()
        return self._problem


def reason_of(error: BaseException) -> str:
    """Say in one line what went wrong in DCP, whose exception is no `Exception` and holds those of all processes.

    Raises:
        KeyboardInterrupt: when it is no failure but the user.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit):
        raise error
    failures = getattr(error, "failures", None)
    first = next(iter(failures.values()))[0] if failures else error
    return " ".join(str(first).split())[:200] or type(first).__name__


def list_checkpoints(run: Path) -> list[Path]:
    """List the finished checkpoint folders of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step_*"))


def step_of(folder: Path) -> int:
    """Give the step that a checkpoint folder is named after."""
    return int(folder.name.removeprefix("step_"))


def damage(folder: Path) -> str | None:
    """Say what is wrong with the files of a checkpoint, or None when all are there at their sizes."""
    try:
        sizes = json.loads((folder / EXTRAS).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{EXTRAS}: {error or type(error).__name__}"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    return None
