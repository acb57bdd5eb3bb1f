# SPDX-License-Identifier: Apache-2.0
"""Rendered rooms and objects that a released model may be trained on: open furniture models, surfaces of our own.

Only furniture of the train split is shown, in other rooms, lights and cameras than in the scored sets of `rooms`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.progress import Progress

from opendino.sample_data.licences import Ledger, read_copyright, stanza_of
from opendino.sample_data.made_surfaces import make_surfaces
from opendino.sample_data.room_models import CATALOGUE, RoomModel, load_models, read_catalogue, split_models
from opendino.sample_data.room_renderer import Renderer
from opendino.sample_data.room_scenes import CameraSet
from opendino.sample_data.rooms import VIEWS, object_view, room_views

PACKAGES_NEEDED = ("sweethome3d-furniture",)
SHARD_ROOMS, SHARD_OBJECTS = 20, 80
FIRST_ROOM, FIRST_OBJECT = 10_000, 100  # the scored sets start from 0
CAMERAS = CameraSet(fov=(50, 85), height=(0.7, 1.9), ambient=(0.12, 0.4), brightness=(0.6, 1.3), blue=(0.6, 1.05))
DOUBTFUL = re.compile(
    r"plaintextures|sharetextures|cgtextures|textures?\.com|\bGPL|GNU General|share ?alike|BY-SA|non-?commercial|BY-NC",
    re.I,
)
"""What the notes beside a model may not say: textures of third parties, or other terms than those of its library."""
_DOC = "usr/share/doc/sweethome3d-furniture/copyright"


@dataclass(frozen=True)
class Stage:
    """What shards are rendered with: the renderer, the models and what is known of their licences."""

    renderer: Renderer
    models: Sequence[RoomModel]
    ledger: Ledger


def open_stage(raw: Mapping[str, Path], surfaces: Path) -> Stage:
    """Prepare rendering with the open furniture models of the train split.

    Args:
        raw: unpacked folders of `PACKAGES_NEEDED`.
        surfaces: folder that gets the floors and walls.

    Raises:
        MissingExtraError: without pybullet.
    """
    package, ledger = raw["sweethome3d-furniture"], Ledger()
    models = open_models(package, ledger)
    return Stage(Renderer(make_surfaces(surfaces)), models, ledger)


def open_models(package: Path, ledger: Ledger) -> list[RoomModel]:
    """Give the models of the train split whose licence is open and whose notes say nothing else."""
    stanzas = read_copyright((package / _DOC).read_text(encoding="utf-8"))
    models, found = load_models(package), list[RoomModel]()
    creators = {
        entry["id"]: entry["creator"]
        for library in sorted({m.library for m in models})
        for entry in read_catalogue(package / "models" / library / CATALOGUE)
        if "creator" in entry
    }
    for model in split_models(models, "train"):
        stanza = stanza_of(stanzas, f"{model.library}/{model.path.name}")
        if DOUBTFUL.search(_notes(model)):
            ledger.leave_out("notes beside the model name textures of third parties or other terms")
        elif stanza and ledger.admits(
            f"{model.library}: {model.name}", stanza.licence.removesuffix("-USA"),
            creators.get(model.id, stanza.holder), "sweethome3d-furniture",
        ):  # fmt: skip
            found.append(model)
    return found


def render_shard(stage: Stage, shard: int, out: Path, progress: Progress) -> dict[str, int]:
    """Write shard number `shard`: six views of each of 20 rooms, and 80 single objects, as JPEG files of 224 pixels."""
    written = 0
    task = progress.add_task(f"shard {shard}", total=SHARD_ROOMS * VIEWS + SHARD_OBJECTS)
    for name, image in _shard_images(stage, shard):
        image.save(out / f"{name}.jpg", quality=92)
        written += 1
        progress.advance(task)
    progress.remove_task(task)
    stage.ledger.write(out)
    return {"images": written}


def _shard_images(stage: Stage, shard: int) -> Iterator[tuple[str, Image.Image]]:
    for scene in range(FIRST_ROOM + shard * SHARD_ROOMS, FIRST_ROOM + (shard + 1) * SHARD_ROOMS):
        for number, view in enumerate(room_views(stage.renderer, stage.models, "train", scene, CAMERAS)):
            yield f"room_{scene}_{number}", Image.fromarray(view.image)
    named = [m for m in stage.models if m.label != "other"]
    for place in range(shard * SHARD_OBJECTS, (shard + 1) * SHARD_OBJECTS):
        turn, index = divmod(place, len(named))
        image = object_view(stage.renderer, stage.models, named[index], FIRST_OBJECT + turn)
        if image is not None:
            yield f"object_{place:05d}", image


def _notes(model: RoomModel) -> str:
    """Give the texts about the licence beside a model, without markup."""
    texts = [
        p.read_text(encoding="latin1")
        for p in sorted(model.path.parent.iterdir())
        if p.suffix.lower() in (".txt", ".html") and "licen" in p.name.lower()
    ]
    return re.sub(r"<[^>]*>", " ", "\n".join(texts))
