# SPDX-License-Identifier: Apache-2.0
"""Furniture models with true sizes and names, of the Sweet Home 3D libraries (CC-BY-3.0 and CC0), as triangles."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from opendino.errors import DataError

KEYWORDS: dict[str, str] = {
    "lamp": "lamp light chandelier candle lantern",
    "sofa": "sofa couch settee",
    "chair": "chair stool bench pouf seat armchair",
    "cabinet": "cabinet wardrobe bookcase shel drawer cupboard chest sideboard closet bedside dresser vanity buffet",
    "bed": "bed tatami crib futon",
    "table": "table desk counter",
    "bathroom": "wash sink bath toilet shower urinal bidet tub potty",
    "appliance": "fridge oven dishwasher cooker stove microwave hood cooktop dryer radiator heater fireplace fan "
    "vacuum mixer kettle",
    "electronics": "tv television computer laptop speaker hi-fi phone printer monitor dvd screen camera piano guitar",
    "plant": "plant tree flower tulip ficus palm bamboo hedge bush cactus rose orchid",
}
"""Class → beginnings of words of a model's name; the first class that fits decides."""

CLASSES = ("wall", "floor", "ceiling", *KEYWORDS, "figure", "vehicle", "other")
"""Names of the mask values."""

VAL_SHARE = 0.3
MAX_FACES, MAX_PARTS = 40_000, 40
MIN_SIDE, MAX_SIDE = 0.12, 3.2  # metres, of a model's longest side
GLASS = 0.4
"""Materials of less opacity are left out, unless the model has no other."""
_LIBRARIES = "usr/share/sweethome3d/furniture"
CATALOGUE = "PluginFurnitureCatalog.properties"
_ENTRY = re.compile(r"^([A-Za-z]+)#(\d+)\s*=\s*(.*)$")
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RoomModel:
    """One piece of furniture.

    Attributes:
        id: unique name in its library.
        name: what it is called.
        label: its class.
        size: width, depth, height, metres.
        elevation: how high it hangs, metres.
        path: its .obj file.
        library: name of the library it comes from.
    """

    id: str
    name: str
    label: str
    size: tuple[float, float, float]
    elevation: float
    path: Path
    library: str


@dataclass(frozen=True)
class Material:
    """Diffuse colour 0–1, opacity 0–1 and texture file."""

    colour: tuple[float, ...] = (0.8, 0.8, 0.8)
    opacity: float = 1.0
    texture: Path | None = None


@dataclass(frozen=True)
class Part:
    """The triangles of one material: vertices (n, 3), y up; texture coordinates (n, 2); indices (3 m,)."""

    vertices: Floats
    uvs: Floats
    triangles: npt.NDArray[np.int64]
    material: Material


@dataclass
class _Shape:
    """What has been read of an .obj file: a face corner is (vertex, texture vertex or -1)."""

    vertices: list[list[float]] = field(default_factory=list)
    uvs: list[list[float]] = field(default_factory=list)
    materials: dict[str, Material] = field(default_factory=dict)
    groups: dict[str | None, list[tuple[tuple[int, int], ...]]] = field(default_factory=dict)
    current: str | None = None
    faces: int = 0


# --- which models there are ----------------------------------------------------------------------------------------


def load_models(package: Path) -> list[RoomModel]:
    """Give the usable models of the unpacked `sweethome3d-furniture` package; its libraries are unpacked once.

    Left out: doors, windows, stairs, outdoor things without a class, models that are turned or not of .obj form, and
    those larger than 3.2 m or smaller than 12 cm.
    """
    found = []
    for library in sorted((package / _LIBRARIES).glob("*.sh3f"), key=lambda p: p.name):
        folder = _unpacked(library, package / "models" / library.stem)
        for entry in read_catalogue(folder / CATALOGUE):
            model = _model(entry, folder, library.stem)
            if model is not None:
                found.append(model)
    if not found:
        raise DataError(f"{package} holds no furniture library. Delete it; it is fetched again.")
    return found


def read_catalogue(path: Path) -> list[dict[str, str]]:
    """Read the entries `key#NUMBER = value` of a library, by number."""
    entries: dict[int, dict[str, str]] = defaultdict(dict)
    for line in path.read_bytes().decode("latin1").splitlines():
        match = _ENTRY.match(line)
        if match:
            entries[int(match[2])][match[1]] = match[3].strip()
    return [entries[number] for number in sorted(entries)]


def class_of(name: str, category: str) -> str | None:
    """Give the class of a model by its name and the catalogue's category; None when it is not used."""
    if category in ("Characters", "Vehicles"):
        return "figure" if category == "Characters" else "vehicle"
    if category in ("Doors and windows", "Staircases"):
        return None
    low = name.lower()
    for label, words in KEYWORDS.items():
        if any(re.search(r"\b" + word, low) for word in words.split()):
            return label
    return None if category == "Exterior" else "other"


def split_models(models: Sequence[RoomModel], split: str) -> list[RoomModel]:
    """Give the models of "train" or "val": of each class the first 30 % by hash of the id are val, at least one."""
    by_label: dict[str, list[RoomModel]] = defaultdict(list)
    for model in models:
        by_label[model.label].append(model)
    part: list[RoomModel] = []
    for label in sorted(by_label):
        order = sorted(by_label[label], key=lambda m: hash_of(m.id))
        held_out = max(1, round(VAL_SHARE * len(order)))
        part += order[:held_out] if split == "val" else order[held_out:]
    return part


def hash_of(text: str) -> str:
    """Give the SHA-256 of a text, by which things are put in an order that means nothing."""
    return hashlib.sha256(text.encode()).hexdigest()


def _model(entry: Mapping[str, str], folder: Path, library: str) -> RoomModel | None:
    label = class_of(entry.get("name", ""), entry.get("category", ""))
    width, depth, height = (float(entry[k]) / 100 for k in ("width", "depth", "height"))
    file = entry.get("model", "")
    longest = max(width, depth, height)
    if label is None or not MIN_SIDE <= longest <= MAX_SIDE or "modelRotation" in entry or not file.endswith(".obj"):
        return None
    elevation = float(entry.get("elevation", 0)) / 100
    path = folder / file.lstrip("/")
    return RoomModel(entry["id"], entry["name"], label, (width, depth, height), elevation, path, library)


def _unpacked(library: Path, folder: Path) -> Path:
    if not folder.is_dir():
        part = folder.with_name(f".{folder.name}.part")
        try:
            with zipfile.ZipFile(library) as file:
                file.extractall(part)
        except (OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{library} cannot be unpacked: {error}. Delete it; it is fetched again.") from error
        part.rename(folder)
    return folder


# --- their triangles -----------------------------------------------------------------------------------------------


def read_obj(path: Path) -> list[Part] | None:
    """Read the triangles of a Wavefront file, one part per material; None when it has too many or none.

    Raises:
        OSError, ValueError, IndexError: for a file that is missing or broken.
    """
    shape = _Shape()
    with open(path, encoding="latin1") as file:
        for line in file:
            _read_line(shape, line, path.parent)
            if shape.faces > MAX_FACES:
                return None
    vertices = np.array(shape.vertices, float)
    uvs = np.array(shape.uvs, float) if shape.uvs else np.zeros((1, 2))
    parts = []
    for name, group in shape.groups.items():
        material = shape.materials.get(str(name), Material())
        if material.opacity >= GLASS or len(shape.groups) == 1:
            parts.append(_part(np.array(group), vertices, uvs, material))
    return parts if 0 < len(parts) <= MAX_PARTS else None


def _read_line(shape: _Shape, line: str, folder: Path) -> None:
    if line.startswith("v "):
        shape.vertices.append([float(x) for x in line.split()[1:4]])
    elif line.startswith("vt "):
        shape.uvs.append([float(x) for x in line.split()[1:3]])
    elif line.startswith("f "):
        corners = [_corner(word, len(shape.vertices), len(shape.uvs)) for word in line.split()[1:]]
        fan = [(corners[0], corners[k], corners[k + 1]) for k in range(1, len(corners) - 1)]
        shape.groups.setdefault(shape.current, []).extend(fan)
        shape.faces += len(corners) - 2
    elif line.startswith("mtllib"):
        materials = folder / line.split(None, 1)[1].strip()
        if materials.exists():
            shape.materials.update(read_materials(materials))
    elif line.startswith("usemtl"):
        words = line.split(None, 1)
        shape.current = words[1].strip() if len(words) > 1 else None


def _corner(word: str, num_vertices: int, num_uvs: int) -> tuple[int, int]:
    """Give the places, from 0, that a corner `v/vt/vn` names; negative numbers count from the end."""
    numbers = word.split("/")
    vertex, uv = int(numbers[0]), int(numbers[1]) if len(numbers) > 1 and numbers[1] else 0
    place = vertex - 1 if vertex > 0 else num_vertices + vertex
    return place, (uv - 1 if uv > 0 else num_uvs + uv) if uv else -1


def _part(corners: npt.NDArray[np.int64], vertices: Floats, uvs: Floats, material: Material) -> Part:
    """Gather the corners (m, 3, 2) of one material; corners that agree in both numbers become one vertex."""
    pairs = np.stack([corners[..., 0].ravel(), corners[..., 1].ravel()], 1)
    unique, inverse = np.unique(pairs, axis=0, return_inverse=True)
    own = uvs[np.maximum(unique[:, 1], 0)]
    return Part(vertices[unique[:, 0]], own - np.floor(own.min(0)), inverse.ravel(), material)


def read_materials(path: Path) -> dict[str, Material]:
    """Read colour, opacity and texture of the materials of an .mtl file."""
    found: dict[str, dict[str, Any]] = {}
    current: dict[str, Any] = {}
    with open(path, encoding="latin1") as file:
        for line in file:
            words = line.split()
            if not words:
                continue
            if words[0] == "newmtl":
                current = found.setdefault(" ".join(words[1:]), {})
            elif words[0] == "Kd":
                current["colour"] = tuple(float(x) for x in words[1:4])
            elif words[0] == "d":
                current["opacity"] = float(words[-1])
            elif words[0] == "map_Kd":
                current["texture"] = path.parent / words[-1].replace("\\", "/")
    return {name: Material(**values) for name, values in found.items()}
