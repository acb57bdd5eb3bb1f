# SPDX-License-Identifier: Apache-2.0
"""Before an extraction begins: what `auto` stands for, so that all its rows are computed in one way.

A folder that was begun goes on as it was begun. Otherwise the leading process measures, once, and tells the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from opendino.embed.folder import open_folder
from opendino.embed.job import Job
from opendino.embed.resume import read_manifest
from opendino.embed.runtimes.calibration import Choice
from opendino.export.session import is_exported


@dataclass(frozen=True)
class Settled:
    """A job whose runtime and precision are named.

    Attributes:
        job: what is to be computed.
        choice: what `auto` stands for; None when it was not asked for.
    """

    job: Job
    choice: Choice | None = None


def settle(job: Job, *, ray: bool = False) -> Settled:
    """Give a job with a named runtime and precision.

    Args:
        job: its embedder's runtime may be "auto".
        ray: whether other machines compute; then it is plain torch, as the one here says nothing about them.
    """
    if job.embedder.get("runtime") != "auto" or is_exported(job.model):
        return Settled(job)
    asked = job.embedder.get("precision") or "auto"
    found = read_manifest(open_folder(job.out))
    if found is not None and "precision" in found:
        runtime = str(found.get("runtime", "torch"))
        precision = found["precision"] if asked == "auto" else asked
        return Settled(_named(job, runtime, precision), Choice(runtime, precision, "as the folder was begun"))
    if ray:
        return Settled(_named(job, "torch", asked), Choice("torch", asked, "with Ray nothing is measured"))
    choice = job.make_embedder().choice  # not kept: what computes loads no more than its runtime needs
    return Settled(_named(job, choice.runtime, choice.precision), choice)


def _named(job: Job, runtime: str, precision: str) -> Job:
    return replace(job, embedder=job.embedder | {"runtime": runtime, "precision": precision})
