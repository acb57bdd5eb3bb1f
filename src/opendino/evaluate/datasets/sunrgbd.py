# SPDX-License-Identifier: Apache-2.0
"""SUN-RGBD, on which depth heads trained on NYU-Depth v2 are scored without training.

SENSOR/…/FRAME/image/*.jpg  SENSOR/…/FRAME/depth_bfx/*.png (else depth/)    SENSOR is kv1, kv2, realsense or xtion
SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat                                alltrain, alltest: folders of frames

SUNRGBD_val_splits.txt          lines IMAGE DEPTH, of depth/: the list of the Monocular Depth Estimation Toolbox, "val"

A depth file holds millimetres in 16 bits, rotated left by three: metres are ((v >> 3) | (v << 13)) / 1000, and what is
beyond 8 m counts as 8 m, as the set's own toolbox reads them. The published scores use NYU's Eigen crop.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from opendino.errors import DataError
from opendino.evaluate.datasets.depth_lists import open_depth_list
from opendino.evaluate.datasets.folders import FolderDepth, read_plane
from opendino.evaluate.datasets.layout import Layout, Opened, read_mat, variable
from opendino.images.sources import EXTENSIONS

SENSORS = ("kv1", "kv2", "realsense", "xtion")
SPLIT = tuple(
    f"{up}SUNRGBDtoolbox/{folder}/allsplit.mat"
    for up in ("", "../")
    for folder in ("traintestSUNRGBD", "traintestsplit")
)
LIST = ("SUNRGBD_val_splits.txt", "../SUNRGBD_val_splits.txt")
MAX_DEPTH = 8.0


class RotatedDepth(FolderDepth):
    """Depth files whose 16 bits are rotated left by three."""

    def depth(self, index: int) -> Tensor:
        """Read depths, float32 (H, W) in metres, 0 where unknown."""
        raw = read_plane(self.depths[index]).int()
        return ((((raw >> 3) | (raw << 13)) & 0xFFFF).float() * self.scale).clamp(max=self.max_depth)


def open_sunrgbd(root: Path, split: str) -> Opened:
    """Open train, test or all frames, or val, which is a list of its own."""
    if split == "val":
        return _open_list(root)
    frames, skipped = _frames(root)
    notes = [f"{len(skipped)} frames lack an image or a depth file, such as {skipped[0]}."] if skipped else []
    if split == "all":
        if _split_file(root) is None:
            notes.append("SUNRGBDtoolbox with allsplit.mat is not there, so train and test cannot be told apart.")
        kept = frames
    else:
        kept = _chosen(root, split, frames)
    if not kept:
        raise DataError(f"{root} has no frames with image/ and depth_bfx/ below {', '.join(SENSORS)}.")
    images, depths = [i for i, _ in kept.values()], [d for _, d in kept.values()]
    data = RotatedDepth(str(root), images, depths, scale=0.001, max_depth=MAX_DEPTH, crop="eigen")
    return Opened(data, tuple(notes))


def _open_list(root: Path) -> Opened:
    listed = _first(root, LIST)
    assert listed is not None
    places = [root.parent, root]  # its lines begin with SUNRGBD/
    return open_depth_list(
        root, listed, places, places, scale=0.001, min_depth=1e-3, max_depth=MAX_DEPTH, crop="eigen", made=RotatedDepth
    )


def _frames(root: Path) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    """Give image and depth file of each frame folder, and the folders that lack one."""
    found, skipped = {}, []
    for sensor in SENSORS:
        for place, folders, _ in os.walk(root / sensor):
            if "image" not in folders:
                continue
            frame = Path(place)
            folders[:] = []  # a frame has nothing further below
            image = _only(frame / "image", EXTENSIONS)
            depth = _only(frame / "depth_bfx", (".png",)) or _only(frame / "depth", (".png",))
            name = frame.relative_to(root).as_posix()
            if image is None or depth is None:
                skipped.append(name)
            else:
                found[name] = (image, depth)
    return dict(sorted(found.items())), skipped


def _only(folder: Path, suffixes: Collection[str]) -> Path | None:
    if not folder.is_dir():
        return None
    return next((p for p in sorted(folder.glob("[!.]*")) if p.suffix.lower() in suffixes), None)


def _chosen(root: Path, split: str, frames: dict[str, tuple[Path, Path]]) -> dict[str, tuple[Path, Path]]:
    file = _split_file(root)
    assert file is not None
    listed = np.atleast_1d(variable(read_mat(file), f"all{split}", file)).tolist()
    names = [posixpath.normpath(str(p).split("SUNRGBD/", 1)[-1]) for p in listed]  # /n/fs/sun3d/data/SUNRGBD/kv1/…
    missing = [n for n in names if n not in frames]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(names)} frames that {file} names are not in {root}, such as {missing[0]}. Unpack "
            "SUNRGBD.zip again."
        )
    return {n: frames[n] for n in names}


def _split_file(root: Path) -> Path | None:
    return _first(root, SPLIT)


def _first(root: Path, names: Sequence[str]) -> Path | None:
    return next((p for name in names if (p := root / name).is_file()), None)


def _splits(root: Path) -> list[str]:
    listed = ["val"] if _first(root, LIST) else []
    return (["train", "test", "all"] if _split_file(root) else ["all"]) + listed


LAYOUTS = (
    Layout("SUN-RGBD", "depth", ("kv1|kv2|realsense|xtion",), _splits, open_sunrgbd, ("SUNRGBD",)),
)  # fmt: skip
