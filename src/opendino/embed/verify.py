# SPDX-License-Identifier: Apache-2.0
"""Checking a finished folder of features: every image has exactly one row, every shard is as it was written, every
vector is one, and a sample of them is what the model gives.

The shards are read one after the other, so memory does not grow with the number of images. An input that was changed
and continued is compared by hashes of its paths, 32 bytes an image.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from opendino.embed.embedder import Embedder, Features
from opendino.embed.folder import Folder
from opendino.embed.order import InputState, Order, absent, opened, read_paths, row_name, surplus
from opendino.embed.resume import MANIFEST, read_manifest
from opendino.embed.shards import Shard, list_shards, missing_ranges
from opendino.errors import DataError
from opendino.images.sources import ImageSource, SourceImage

TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 1e-2, "float32": 0.0, "float16": 2e-3}
"""Largest relative difference of a vector that is computed again, by precision and by type on the disk: another batch
and another machine add up in another order."""
MAX_TOLD = 5
"""Examples of one kind of trouble that are named."""
OnShard = Callable[[int, int], None]


@dataclass
class Sample:
    """A row that is to be computed again."""

    path: str
    sha256: str | None
    error: str | None
    vectors: dict[str, Any]


@dataclass
class Verdict:
    """What a check has found.

    Attributes:
        troubles: one sentence each.
        notes: what is no trouble but worth knowing.
        rows: counted in the shards.
        errors: rows without vectors.
        shards: files.
        sampled: rows that were computed again.
        largest: largest relative difference of a vector that was computed again, ‖a − b‖ / ‖b‖.
    """

    troubles: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: int = 0
    errors: int = 0
    shards: int = 0
    sampled: int = 0
    largest: float = 0.0

    def trouble(self, text: str) -> None:
        """Note a trouble."""
        self.troubles.append(text)


class Check:
    """The check of one folder.

    Args:
        folder: of features.
        source: the input, opened anew; None leaves out what needs it.
        sample: rows to keep for `recompute`.
        seed: of the choice of rows.

    Raises:
        DataError: when there is no manifest.
    """

    def __init__(self, folder: Folder, source: ImageSource | None, sample: int = 0, seed: int = 0) -> None:
        found = read_manifest(folder)
        if found is None:
            raise DataError(f"{folder.place} has no {MANIFEST}, so it is no folder of features. Give one that has it.")
        self.folder, self.source, self.manifest = folder, source, found
        self.verdict = Verdict()
        self.states = [InputState(**s) for s in found.get("inputs", [])]
        self.sample, self._random = sample, random.Random(seed)
        self.samples: list[Sample] = []
        self._seen = 0

    def run(self, on_shard: OnShard | None = None) -> Verdict:
        """Check all that can be checked without the model.

        Args:
            on_shard: called with shards done and shards in all.
        """
        shards, repeated, old = list_shards(self.folder)
        self._against_manifest(shards, repeated, old)
        names = [*old, *(s.name for s in [*shards, *repeated])]
        kept = set(old) | {s.name for s in shards}
        digests = {e["file"]: e["sha256"] for e in self.manifest.get("shards", [])}
        for number, name in enumerate(names, 1):
            shard = Shard.of(name)
            digest = shard.digest if shard else digests.get(name)
            if digest is None:
                self.verdict.notes.append(f"{name} is of the first layout, which has no checksums.")
            elif digest != self.folder.digest(name):
                self.verdict.trouble(f"{name} is damaged: its bytes are not those that were written. {_redo(shard)}")
            if name in kept:
                self._rows(name, shard)
            if on_shard:
                on_shard(number, len(names))
        self._figures()
        if self.source is not None:
            self._input(shards, old)
        return self.verdict

    def _against_manifest(self, shards: list[Shard], repeated: list[Shard], old: list[str]) -> None:
        """Compare the files that are there with those that should be."""
        tell, found = self.verdict.trouble, self.manifest
        if not found.get("done"):
            tell(f"It is not finished: {found.get('count')} rows were written when {MANIFEST} was. "
                 "Run the same command to go on.")  # fmt: skip
        there = {s.name for s in [*shards, *repeated]} | set(old)
        listed = {e["file"] for e in found.get("shards", [])}
        lost, extra = sorted(listed - there), sorted(there - listed) if listed else []
        if lost:
            tell(f"{_some(lost)} {'is' if len(lost) == 1 else 'are'} gone. Run the same command to redo the rows.")
        if extra:
            tell(f"{_some(extra)} came after the run had ended. Run the same command; it removes what repeats rows.")
        if repeated:
            tell(f"{_some([s.name for s in repeated])} repeat{'s' if len(repeated) == 1 else ''} rows of others. "
                 "Run the same command; it removes them.")  # fmt: skip
        if self.states:
            gaps = missing_ranges(shards, self.states[-1].first, self.states[-1].end)
            if gaps and not lost and found.get("done"):
                tell(f"No shard has the places {', '.join(f'{a} to {b - 1}' for a, b in gaps[:MAX_TOLD])}.")

    def _rows(self, name: str, shard: Shard | None) -> None:
        """Look at every row of a shard."""
        tell, verdict = self.verdict.trouble, self.verdict
        verdict.shards += 1
        try:
            with opened(self.folder, name) as file:
                self._schema(name, file.schema_arrow)
                rows = errors = 0
                for batch in file.iter_batches(batch_size=256):
                    errors += self._batch(name, batch)
                    rows += batch.num_rows
        except (DataError, OSError, ValueError, KeyError) as error:
            tell(f"{name} cannot be read: {error} {_redo(shard)}")
            return
        verdict.rows, verdict.errors = verdict.rows + rows, verdict.errors + errors
        if shard and (rows, errors) != (shard.end - shard.first, shard.errors):
            tell(f"{name} has {rows} rows, {errors} without vectors; its name says {shard.end - shard.first} and "
                 f"{shard.errors}. {_redo(shard)}")  # fmt: skip

    def _schema(self, name: str, schema: Any) -> None:
        found = self.manifest
        kind = {"float32": pa.float32(), "float16": pa.float16()}[found.get("dtype", "float32")]
        patches = int(np.prod(found["grid"]))
        for vector in ("cls", "mean", "patches"):
            there = schema.field(vector).type if vector in schema.names else None
            width = found["dim"] * (patches if vector == "patches" else 1)
            want = pa.list_(kind, width) if vector in found["what"] else None
            same = there is None if want is None else there is not None and there.equals(want)
            if not same:
                self.verdict.trouble(f"{name} has {vector} as {there}; {MANIFEST} says {want}.")

    def _batch(self, name: str, batch: Any) -> int:
        """Check vectors and paths of some rows; give how many have an error."""
        bad = ~batch.column("error").is_null().to_numpy(zero_copy_only=False)
        vectors = {}
        for vector in self.manifest["what"]:
            column = batch.column(vector)
            empty = column.is_null().to_numpy(zero_copy_only=False)
            width = column.type.list_size
            flat = column.values.slice(column.offset * width, len(batch) * width)
            values = flat.to_numpy(zero_copy_only=False).reshape(len(batch), width)
            finite = np.isfinite(values).all(1)
            wrong = np.flatnonzero((empty != bad) | (~bad & ~empty & ~finite))
            if len(wrong):
                path = batch.column("path")[int(wrong[0])].as_py()
                self.verdict.trouble(
                    f"{name} has {len(wrong)} rows whose {vector} is empty or not finite without an error, or is there "
                    f"with one, such as that of {path}."
                )
            vectors[vector] = values
        self._keep(batch, vectors)
        return int(bad.sum())

    def _keep(self, batch: Any, vectors: dict[str, Any]) -> None:
        """Choose rows to compute again, each row of the folder with the same chance."""
        for i in range(len(batch)):
            self._seen += 1
            at = self._random.randrange(self._seen) if self._seen > self.sample else len(self.samples)
            if at >= self.sample:
                continue
            path, sha256, error = (batch.column(c)[i].as_py() for c in ("path", "sha256", "error"))
            row = {name: np.array(values[i], np.float32) for name, values in vectors.items()}
            self.samples[at : at + 1] = [Sample(path, sha256, error, row)]

    def _figures(self) -> None:
        found, verdict = self.manifest, self.verdict
        for figure, there in (("count", verdict.rows), ("errors", verdict.errors)):
            if found.get("done") and found.get(figure) != there:
                verdict.trouble(f"The shards have {figure} {there}; {MANIFEST} says {found.get(figure)}.")

    def _input(self, shards: list[Shard], old: list[str]) -> None:
        """Compare rows with images."""
        source, tell = self.source, self.verdict.trouble
        assert source is not None
        last = self.states[-1] if self.states else None
        same = last and (last.images, last.names_sha256) == (len(source), source.names_hash())
        if last and not same:
            tell(f"The input has changed since: it has {len(source)} images, and had {last.images}. "
                 "Run the same command to add what is new.")  # fmt: skip
        if last and same and last.first == 0:
            self._paths_in_order(Order(source, last), shards)
            return
        names = [*old, *(s.name for s in shards)]
        try:
            without, rows = absent(self.folder, source, names), surplus(self.folder, source, names)
        except DataError:
            return  # told above
        if len(without):
            first = [row_name(source, int(i)) for i in without[:MAX_TOLD]]
            tell(f"{len(without)} images have no row: {_some(first, len(without))}.")
        if rows:
            tell(f"{len(rows)} rows are of images that the input has not, or not as often: {_some(rows)}.")

    def _paths_in_order(self, order: Order, shards: list[Shard]) -> None:
        """See that the row at every place is that of the image there."""
        wrong: list[str] = []
        for shard in shards:
            try:
                for place, path in enumerate(read_paths(self.folder, shard.name), shard.first):
                    if place >= order.state.end or order.image(place).path != path:
                        wrong.append(path)
            except DataError:
                continue  # told above
        if wrong:
            self.verdict.trouble(f"{len(wrong)} rows are not of the image at their place: {_some(wrong)}.")
        missing = missing_ranges(shards, 0, order.state.end)
        if missing:
            number = sum(b - a for a, b in missing)
            self.verdict.trouble(f"{number} images have no row: {_some(list(_paths(order, missing)), number)}.")


def recompute(
    embedder: Embedder, source: ImageSource, manifest: dict[str, Any], samples: list[Sample], verdict: Verdict
) -> None:
    """Compute rows again and compare them; files that have changed since are told apart by their hash.

    Args:
        embedder: with the model and settings of the folder.
        source: the input.
        manifest: of the folder.
        samples: the rows.
        verdict: takes what is found.
    """
    wanted = {s.path for s in samples}
    images = {}
    for i in range(len(source)):
        name = row_name(source, i)
        if name in wanted:
            images[name] = SourceImage(source, i, name)
    present = [s for s in samples if s.path in images]  # the others are told by the check of the input
    tolerance = max(TOLERANCE.get(manifest["precision"], 0.1), TOLERANCE[manifest.get("dtype", "float32")])
    again = (row for batch in embedder.stream([images[s.path] for s in present]) for row in _rows_of(batch))
    for old, (sha256, error, vectors) in zip(present, again, strict=True):
        verdict.sampled += 1
        if sha256 != old.sha256:
            verdict.trouble(f"{old.path} has changed since: its bytes are others. Its row is of the earlier image.")
        elif error or old.error:
            _compare_errors(old, error, verdict)
        else:
            _compare(old, vectors, tolerance, verdict)


def _rows_of(batch: Features) -> Iterator[tuple[str | None, str | None, dict[str, Any]]]:
    names = [n for n in ("cls", "mean", "patches") if getattr(batch, n) is not None]
    for i in range(len(batch)):
        yield batch.hashes[i], batch.errors[i], {n: getattr(batch, n)[i].reshape(-1) for n in names}


def _compare_errors(old: Sample, error: str | None, verdict: Verdict) -> None:
    if error and not old.error:
        verdict.trouble(f"{old.path} has vectors, but cannot be read any more: {error}.")
    elif old.error and not error:
        verdict.notes.append(f"{old.path} can be read now; when it was written: {old.error}.")


def _compare(old: Sample, vectors: dict[str, Any], tolerance: float, verdict: Verdict) -> None:
    for name, stored in old.vectors.items():
        new = np.asarray(vectors[name], np.float64)
        difference = float(np.linalg.norm(stored - new) / max(float(np.linalg.norm(new)), 1e-12))
        verdict.largest = max(verdict.largest, difference)
        if not difference <= tolerance:
            verdict.trouble(
                f"{name} of {old.path} is not what the model gives: the relative difference is {difference:.2g}, "
                f"above {tolerance:g}."
            )


def _paths(order: Order, ranges: list[tuple[int, int]]) -> Iterator[str]:
    for first, end in ranges:
        for place in range(first, min(end, first + MAX_TOLD)):
            yield order.image(place).path


def _some(names: list[str], number: int | None = None) -> str:
    left = (number or len(names)) - MAX_TOLD
    more = f" and {left} more" if left > 0 else ""
    return ", ".join(names[:MAX_TOLD]) + more


def _redo(shard: Shard | None) -> str:
    rows = f"its {shard.end - shard.first} rows" if shard else "its rows"
    return f"Delete it and run the same command to redo {rows}."
