# SPDX-License-Identifier: Apache-2.0
"""NYU-Depth v2: depths up to 10 m, scored inside the Eigen crop.

nyu_depth_v2_labeled.mat  splits.mat                    1449 frames in one HDF5 file, split 795/654
nyu_train.txt  nyu_test.txt  SCENE/rgb_*.jpg  SCENE/sync_depth_*.png    lines: IMAGE DEPTH FOCAL, depth in mm
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opendino.errors import DataError, MissingExtraError
from opendino.evaluate.datasets.depth_lists import open_depth_list
from opendino.evaluate.datasets.layout import Layout, Opened, read_mat, variable
from opendino.evaluate.datasets.types import DepthCrop, DepthSet

LABELLED = "nyu_depth_v2_labeled.mat"
LISTS = {
    "train": ("nyu_train.txt", "nyudepthv2_train_files_with_gt.txt"),
    "test": ("nyu_test.txt", "nyudepthv2_test_files_with_gt.txt"),
}
FOLDERS = ("", "nyu", "sync", "train", "test", "official_splits/train", "official_splits/test")
MIN_DEPTH, MAX_DEPTH = 1e-3, 10.0


class LabelledFrames(DepthSet):
    """Frames of the labelled file, read one at a time; MATLAB's (H, W, 3, n) is (n, 3, W, H) in HDF5.

    Args:
        root: what was opened.
        file: nyu_depth_v2_labeled.mat.
        frames: indices from 0.
    """

    crop: DepthCrop = "eigen"

    def __init__(self, root: str, file: Path, frames: list[int]) -> None:
        self.root, self.file, self.frames = root, file, frames
        self.min_depth, self.max_depth = MIN_DEPTH, MAX_DEPTH
        self._opened: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return len(self.frames)

    def name(self, index: int) -> str:
        """Give the file and the number of the frame, from 1 as in splits.mat."""
        return f"{self.file}/{self.frames[index] + 1:04d}"

    def image(self, index: int) -> Tensor:
        """Read an image, uint8 (3, H, W)."""
        return torch.from_numpy(np.ascontiguousarray(self._read("images", index).transpose(0, 2, 1)))

    def depth(self, index: int) -> Tensor:
        """Read depths as the camera gave them, float32 (H, W) in metres, 0 where unknown."""
        name = "rawDepths" if "rawDepths" in self._handle() else "depths"
        return torch.from_numpy(np.ascontiguousarray(self._read(name, index).T.astype(np.float32)))

    def _read(self, name: str, index: int) -> Any:
        try:
            return self._handle()[name][self.frames[index]]
        except (OSError, KeyError) as error:
            raise DataError(f"{self.name(index)} cannot be read: {error}.") from error

    def _handle(self) -> Any:
        """Give the open file; a forked worker opens its own."""
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), _open_hdf5(self.file)
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}


def open_labelled(root: Path, split: str) -> Opened:
    """Open train, test or all of the labelled file."""
    file = root / LABELLED
    notes: tuple[str, ...] = ()
    handle = _open_hdf5(file)
    missing = [n for n in ("images", "depths") if n not in handle]
    if missing:
        raise DataError(f"{file} has no {' and no '.join(missing)}. It is another file than the one that is published.")
    count = len(handle["images"])
    handle.close()
    if split == "all":
        if not (root / "splits.mat").is_file():
            notes = ("splits.mat is not there, so train and test cannot be told apart; it is on the set's own page.",)
        return Opened(LabelledFrames(str(root), file, list(range(count))), notes)
    listed = root / "splits.mat"
    frames = [int(i) - 1 for i in np.atleast_1d(variable(read_mat(listed), f"{split}Ndxs", listed))]
    if frames and not 0 <= min(frames) <= max(frames) < count:
        raise DataError(f"{listed} speaks of frame {max(frames) + 1}, but {file} has {count}. Take both anew.")
    return Opened(LabelledFrames(str(root), file, frames))


def _open_hdf5(file: Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError("h5py", "matlab", f"Reading {file}") from error
    try:
        return h5py.File(file, "r")
    except OSError as error:
        raise DataError(f"{file} is no whole HDF5 file: {error}. Take it anew from the download.") from error


def open_list(root: Path, split: str) -> Opened:
    """Open the frames that nyu_train.txt or nyu_test.txt lists."""
    listed = _list(root, split)
    assert listed is not None
    return open_depth_list(
        root, listed, [root / d for d in FOLDERS], [root / d for d in FOLDERS], scale=0.001, min_depth=MIN_DEPTH,
        max_depth=MAX_DEPTH, crop="eigen",
    )  # fmt: skip


def _list(root: Path, split: str) -> Path | None:
    return next((p for n in LISTS[split] if (p := root / n).is_file()), None)


LAYOUTS = (
    Layout(
        "NYU-Depth v2 (labelled)", "depth", (LABELLED,),
        lambda root: ["train", "test", "all"] if (root / "splits.mat").is_file() else ["all"], open_labelled,
    ),
    Layout(
        "NYU-Depth v2", "depth", ("|".join(n for names in LISTS.values() for n in names),),
        lambda root: [s for s in LISTS if _list(root, s)], open_list, ("nyu",),
    ),
)  # fmt: skip
