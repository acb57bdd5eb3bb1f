# SPDX-License-Identifier: Apache-2.0
"""Segmentation and depth sets on small copies of their true layouts: ids, units, splits, and files that are amiss."""

import pickle
import sys

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from opendino.errors import DataError, MissingExtraError
from opendino.evaluate.datasets.cityscapes import CLASSES as CITY
from opendino.evaluate.datasets.detect import detect, matches, open_depth, open_segmentation

SHAPE = (6, 8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def save_image(path, seed=0):
    return save(path, np.random.default_rng(seed).integers(0, 256, (*SHAPE, 3), dtype=np.uint8))


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def make_ade(root, names=True):
    for split, count in (("training", 2), ("validation", 1)):
        for i in range(1, count + 1):
            stem = f"ADE_{'train' if split == 'training' else 'val'}_{i:08d}"
            save_image(root / "images" / split / f"{stem}.jpg")
            mask = np.array([[0, 1, 2, 150] * 2] * 6, np.uint8)
            save(root / "annotations" / split / f"{stem}.png", mask)
    write(root / "sceneCategories.txt", "ADE_train_00000001 airport_terminal")
    if names:
        rows = [f"{i}\t0.1\t10\t1\t0\t{'wall' if i == 1 else f'thing{i}'}, other name" for i in range(1, 151)]
        write(root / "objectInfo150.txt", "Idx\tRatio\tTrain\tVal\tStuff\tName", *rows)


def test_ade20k(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    make_ade(root)
    (found,) = detect(tmp_path)
    assert (found.name, found.kind, dict(found.splits)) == ("ADE20k", "segmentation", {"training": 2, "validation": 1})
    assert (found.classes, found.problems, found.notes) == (150, (), ())
    val = open_segmentation(root, "val")
    assert (val.classes[0], val.classes[149]) == ("wall", "thing150")
    assert val.image(0).shape == (3, *SHAPE)
    assert val.mask(0)[3].tolist() == [255, 0, 1, 149] * 2
    (root / "annotations/training/ADE_train_00000002.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images in .* have no file of the same name .*ADE_train_00000002\.jpg"):
        open_segmentation(root, "train")


def test_ade20k_with_an_id_that_it_has_not_and_without_names(tmp_path):
    make_ade(tmp_path, names=False)
    save(tmp_path / "annotations/validation/ADE_val_00000001.png", np.full(SHAPE, 151, np.uint8))
    val = open_segmentation(tmp_path, "validation")
    with pytest.raises(DataError, match=r"ADE_val_00000001\.png holds the values \[151\].*ids that the set publishes"):
        val.mask(0)
    assert (val.classes[0], val.classes[149]) == ("001", "150")
    assert "objectInfo150.txt is not there" in detect(tmp_path)[0].notes[0]
    write(tmp_path / "objectInfo150.txt", "Idx\tName", "1\twall")
    with pytest.raises(DataError, match="names 1 classes, not 150"):
        open_segmentation(tmp_path, "validation")


def make_city(root, ending="labelIds", values=(0, 7, 33, 255)):
    for split, city in (("train", "aachen"), ("val", "frankfurt"), ("test", "berlin")):
        stem = f"{city}_000000_000019"
        save_image(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png")
        mask = np.array([list(values) * 2] * 6, np.uint8)
        save(root / "gtFine" / split / city / f"{stem}_gtFine_{ending}.png", mask)
        save_image(root / "gtFine" / split / city / f"{stem}_gtFine_color.png")


def test_cityscapes(tmp_path):
    make_city(tmp_path)
    (found,) = detect(tmp_path)
    assert (found.name, dict(found.splits), found.classes) == ("Cityscapes", {"train": 1, "val": 1}, 19)
    train = open_segmentation(tmp_path, "train")
    assert train.mask(0)[0].tolist() == [255, 0, 18, 255] * 2
    assert (train.classes[0], train.classes[18]) == ("road", "bicycle")
    make_city(tmp_path, values=(34, 7, 8, 40))
    with pytest.raises(DataError, match=r"values \[34, 40\]"):
        open_segmentation(tmp_path, "val").mask(0)


def test_cityscapes_ids_are_those_of_another_implementation():
    from torchvision.datasets import Cityscapes

    published = {c.id: (c.train_id, c.name) for c in Cityscapes.classes if 0 <= c.train_id < 255}
    assert {i: (n, name) for n, (i, name) in enumerate(CITY.items())} == published


def test_torchvision_pairs_the_same_images_and_masks(tmp_path):
    from torchvision.datasets import Cityscapes, VOCSegmentation

    make_city(tmp_path / "city")
    peer, ours = (
        Cityscapes(tmp_path / "city", "val", target_type="semantic"),
        open_segmentation(tmp_path / "city", "val"),
    )
    assert [str(p) for p in ours.images] == peer.images
    assert [[str(p)] for p in ours.masks] == peer.targets
    make_voc(tmp_path / "voc/VOCdevkit/VOC2012")
    peer, ours = VOCSegmentation(tmp_path / "voc", image_set="val"), open_segmentation(tmp_path / "voc", "val")
    assert [str(p) for p in ours.images] == peer.images
    assert np.array_equal(np.array(peer[0][1]), ours.mask(0))


def test_cityscapes_by_train_ids_and_with_a_mask_missing(tmp_path):
    make_city(tmp_path, "labelTrainIds", (0, 18, 255, 3))
    assert open_segmentation(tmp_path, "val").mask(0)[0].tolist() == [0, 18, 255, 3] * 2
    save_image(tmp_path / "leftImg8bit/val/lindau/lindau_000001_000019_leftImg8bit.png")
    with pytest.raises(DataError, match=r"lindau/lindau_000001_000019_gtFine_labelTrainIds\.png"):
        open_segmentation(tmp_path, "val")
    (tmp_path / "gtFine").rename(tmp_path / "gtCoarse")
    with pytest.raises(DataError, match=r"For Cityscapes there is leftImg8bit but no gtFine"):
        detect(tmp_path)


def make_voc(root):
    for name, value in (("2007_000032", 1), ("2007_000033", 20)):
        save_image(root / "JPEGImages" / f"{name}.jpg")
        mask = Image.fromarray(np.array([[0, value, 255, 0] * 2] * 6, np.uint8), "P")
        mask.putpalette([i % 256 for i in range(768)])
        (root / "SegmentationClass").mkdir(exist_ok=True)
        mask.save(root / "SegmentationClass" / f"{name}.png")
        save(root / "SegmentationClassAug" / f"{name}.png", np.full(SHAPE, value, np.uint8))
    write(root / "ImageSets/Segmentation/train.txt", "2007_000032")
    write(root / "ImageSets/Segmentation/val.txt", "2007_000033")
    lines = [f"/JPEGImages/2007_00003{i}.jpg /SegmentationClassAug/2007_00003{i}.png" for i in (2, 3)]
    write(root / "ImageSets/Segmentation/trainaug.txt", *lines)
    write(root / "ImageSets/Main/cat_train.txt", "2007_000032 -1")


def test_voc(tmp_path):
    root = tmp_path / "VOCdevkit/VOC2012"
    make_voc(root)
    for path in (tmp_path, tmp_path / "VOCdevkit", root):
        (found,) = detect(path)
        assert (found.name, dict(found.splits), found.classes) == (
            "Pascal VOC",
            {"train": 1, "val": 1, "trainaug": 2},
            21,
        )
    val = open_segmentation(root, "val")
    assert val.mask(0)[0].tolist() == [0, 20, 255, 0] * 2
    assert (val.classes[0], val.classes[20]) == ("background", "tvmonitor")
    assert open_segmentation(root, "trainaug").mask(1).unique().tolist() == [20]
    write(root / "ImageSets/Segmentation/val.txt", "2007_000033", "2008_000001")
    with pytest.raises(DataError, match=r"1 of 2 files that .*val\.txt names .*2008_000001\.jpg"):
        open_segmentation(root, "val")


def test_voc_2007_has_test_masks(tmp_path):
    make_voc(tmp_path)
    write(tmp_path / "ImageSets/Segmentation/test.txt", "2007_000033")
    assert "test" in detect(tmp_path)[0].splits
    write(tmp_path / "ImageSets/Segmentation/test.txt", "2008_000006")  # as 2012's, without masks
    assert "test" not in detect(tmp_path)[0].splits


def test_voc_mask_saved_in_colour_is_refused(tmp_path):
    make_voc(tmp_path)
    save_image(tmp_path / "SegmentationClass/2007_000033.png")
    with pytest.raises(DataError, match=r"has the shape \(6, 8, 3\); one channel"):
        open_segmentation(tmp_path, "val").mask(0)


def make_nyu_labelled(root, count=5):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 3, SHAPE[1], SHAPE[0]), dtype=np.uint8)  # as HDF5 has MATLAB's (H, W, 3, n)
    depths = rng.uniform(0.5, 9, (count, SHAPE[1], SHAPE[0])).astype(np.float32)
    raw = depths.copy()
    raw[:, :2] = 0
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["depths"], file["rawDepths"] = images, depths, raw
    savemat(root / "splits.mat", {"trainNdxs": np.array([[3], [5]]), "testNdxs": np.array([[1], [2], [4]])})
    return images, raw


def test_nyu_labelled(tmp_path):
    images, raw = make_nyu_labelled(tmp_path)
    (found,) = detect(tmp_path)
    assert (found.name, found.kind) == ("NYU-Depth v2 (labelled)", "depth")
    assert dict(found.splits) == {"train": 2, "test": 3, "all": 5}
    test = open_depth(tmp_path, "test")
    assert (test.crop, test.min_depth, test.max_depth) == ("eigen", 1e-3, 10.0)
    copy = pickle.loads(pickle.dumps(test))
    for data in (test, copy):  # frame 4 counts from 1
        assert np.array_equal(data.image(2), images[3].transpose(0, 2, 1))
        assert np.array_equal(data.depth(2), raw[3].T)
    assert test.image(2).shape == (3, *SHAPE)
    assert test.name(2).endswith("nyu_depth_v2_labeled.mat/0004")


def test_nyu_labelled_without_split_or_damaged(tmp_path, monkeypatch):
    make_nyu_labelled(tmp_path)
    savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([[6]]), "testNdxs": np.array([[1]])})
    with pytest.raises(DataError, match="speaks of frame 6, but .* has 5"):
        open_depth(tmp_path, "train")
    savemat(tmp_path / "splits.mat", {"train": np.array([[6]])})
    with pytest.raises(DataError, match=r"splits\.mat has no 'trainNdxs', only train"):
        open_depth(tmp_path, "train")
    (tmp_path / "splits.mat").unlink()
    (found,) = detect(tmp_path)
    assert dict(found.splits) == {"all": 5}
    assert "splits.mat is not there" in found.notes[0]
    with pytest.raises(DataError, match="has no split 'test'; it has all"):
        open_depth(tmp_path, "test")
    file = tmp_path / "nyu_depth_v2_labeled.mat"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match="no whole HDF5 file"):
        open_depth(tmp_path, "all")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtraError, match=r"opendino\[matlab\]"):
        open_depth(tmp_path, "all")


def save_depth(path, metres, units):
    return save(path, np.full(SHAPE, round(metres * units), np.uint16))


@pytest.mark.parametrize("inner", ["", "nyu/", "sync/"])
def test_nyu_folders(tmp_path, inner):
    save_image(tmp_path / f"{inner}kitchen_0028b/rgb_00045.jpg")
    save_depth(tmp_path / f"{inner}kitchen_0028b/sync_depth_00045.png", 2.5, 1000)
    save_image(tmp_path / "official_splits/test/bathroom/rgb_00045.jpg")
    save_depth(tmp_path / "official_splits/test/bathroom/sync_depth_00045.png", 1.25, 1000)
    write(tmp_path / "nyu_train.txt", "/kitchen_0028b/rgb_00045.jpg /kitchen_0028b/sync_depth_00045.png 518.8579")
    write(tmp_path / "nyu_test.txt", "bathroom/rgb_00045.jpg bathroom/sync_depth_00045.png 518.8579")
    (found,) = detect(tmp_path)
    assert (found.name, dict(found.splits)) == ("NYU-Depth v2", {"train": 1, "test": 1})
    train, test = open_depth(tmp_path, "train"), open_depth(tmp_path, "test")
    assert (train.depth(0).unique().item(), test.depth(0).unique().item()) == (2.5, 1.25)
    assert test.crop == "eigen"
    write(tmp_path / "nyu_test.txt", "bathroom/rgb_00046.jpg bathroom/sync_depth_00046.png 518.8579")
    with pytest.raises(DataError, match=r"1 of 1 files that .*nyu_test\.txt names are not there.*rgb_00046\.jpg"):
        open_depth(tmp_path, "test")
    write(tmp_path / "nyu_test.txt", "bathroom/rgb_00045.jpg")
    with pytest.raises(DataError, match=r"nyu_test\.txt line 1 is 'bathroom/rgb_00045\.jpg'; 2 parts"):
        open_depth(tmp_path, "test")


def rotated(metres):
    d = round(metres * 1000)
    return ((d << 3) | (d >> 13)) & 0xFFFF


def make_sun(root):
    frames = {"kv1/NYUdata/NYU0001": 2.5, "kv2/kinect2data/000002_x/": 9.999, "xtion/sun3ddata/a/b/0001": 0.001}
    for name, metres in frames.items():
        save_image(root / name / "image" / "x.jpg")
        save(root / name / "depth_bfx" / "y.png", np.full(SHAPE, rotated(metres), np.uint16))
        save(root / name / "depth" / "z.png", np.zeros(SHAPE, np.uint16))
        save_image(root / name / "fullres" / "x.jpg")
    return [n.strip("/") for n in frames]


def cells(names):
    array = np.empty((1, len(names)), dtype=object)
    array[0] = [f"/n/fs/sun3d/data/SUNRGBD/{n}" for n in names]
    return array


def test_sun_rgbd(tmp_path):
    root = tmp_path / "SUNRGBD"
    names = make_sun(root)
    for path in (tmp_path, root):
        (found,) = detect(path)
        assert (found.name, dict(found.splits)) == ("SUN-RGBD", {"all": 3})
        assert "allsplit.mat is not there" in found.notes[0]
    every = open_depth(root, "all")
    assert [every.depth(i).unique().item() for i in range(3)] == pytest.approx([2.5, 8, 0.001])
    assert (every.crop, every.max_depth) == ("eigen", 8)
    (tmp_path / "SUNRGBDtoolbox/traintestSUNRGBD").mkdir(parents=True)
    split = {"alltrain": cells(names[:2]), "alltest": cells([names[2] + "/"])}
    savemat(tmp_path / "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat", split)
    assert dict(detect(tmp_path)[0].splits) == {"train": 2, "test": 1, "all": 3}
    assert "xtion" in open_depth(tmp_path, "test").name(0)
    write(tmp_path / "SUNRGBD_val_splits.txt", f"SUNRGBD/{names[0]}/image/x.jpg SUNRGBD/{names[0]}/depth/z.png")
    save(root / names[0] / "depth/z.png", np.full(SHAPE, rotated(3.21), np.uint16))
    assert open_depth(root, "val").depth(0).unique().item() == pytest.approx(3.21)
    (root / "kv1/NYUdata/NYU0001/image/x.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 2 frames that .*allsplit\.mat names .*kv1/NYUdata/NYU0001"):
        open_depth(root, "train")
    assert "1 frames lack an image or a depth file, such as kv1/NYUdata/NYU0001" in detect(root)[0].notes[0]


DRIVE = "2011_09_26_drive_0002_sync"


def make_kitti(root, raw="input", annotated="gt_depth", part=""):
    for frame in ("0000000005", "0000000069"):
        save_image(root / raw / f"2011_09_26/{DRIVE}/image_02/data/{frame}.png")
        depth = root / annotated / part / DRIVE / f"proj_depth/groundtruth/image_02/{frame}.png"
        save_depth(depth, 40.5, 256)
    image, depth = f"2011_09_26/{DRIVE}/image_02/data", f"{DRIVE}/proj_depth/groundtruth/image_02"
    return [f"{image}/{f}.png {depth}/{f}.png 721.5377" for f in ("0000000005", "0000000069")]


@pytest.mark.parametrize(
    ("raw", "annotated", "part"), [("input", "gt_depth", ""), ("raw", "data_depth_annotated", "val")]
)
def test_kitti_eigen_lists(tmp_path, raw, annotated, part):
    lines = make_kitti(tmp_path, raw, annotated, part)
    write(tmp_path / "kitti_eigen_train.txt", *lines)
    write(tmp_path / "kitti_eigen_test.txt", lines[0], lines[1].split()[0] + " None 721.5377")
    found = detect(tmp_path)[0]
    assert (found.name, dict(found.splits)) == ("KITTI depth (Eigen split)", {"train": 2, "test": 1})
    assert found.notes == ("1 of the 2 lines of kitti_eigen_test.txt have no depth file (None) and are left out.",)
    test = open_depth(tmp_path, "test")
    assert (test.crop, test.max_depth, test.depth(0).unique().item()) == ("garg", 80.0, 40.5)
    (tmp_path / "kitti_eigen_test.txt").rename(tmp_path / "eigen_test_files_with_gt.txt")
    write(tmp_path / "eigen_test_files_with_gt.txt", lines[1].removeprefix("2011_09_26/"))  # as some copies have it
    assert open_depth(tmp_path, "test").name(0).endswith(lines[1].split()[0])


def test_kitti_without_lists(tmp_path):
    make_kitti(tmp_path, "raw", "data_depth_annotated", "val")
    (found,) = detect(tmp_path)
    assert (found.name, dict(found.splits)) == ("KITTI depth (all annotated)", {"val": 2})
    assert "not the Eigen split" in found.notes[0]
    (tmp_path / f"raw/2011_09_26/{DRIVE}/image_02/data/0000000069.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 depth files .* have no image .*0000000069"):
        open_depth(tmp_path, "val")


def test_own_folders_of_masks_and_depth(tmp_path):
    for part in ("train", "val"):
        save_image(tmp_path / "images" / part / "a.jpg")
        save(tmp_path / "masks" / part / "a.png", np.ones(SHAPE, np.uint8))
        save_depth(tmp_path / "depth" / part / "a.png", 2, 1000)
    write(tmp_path / "classes.txt", "floor", "wall")
    assert [(f.name, dict(f.splits), f.classes) for f in detect(tmp_path)] == [
        ("images with masks", {"train": 1, "val": 1}, 2), ("images with depth", {"train": 1, "val": 1}, 0),
    ]  # fmt: skip
    assert open_segmentation(tmp_path, "validation").mask(0).unique().tolist() == [1]
    assert open_depth(tmp_path, "train").depth(0).unique().item() == 2
    (tmp_path / "classes.txt").unlink()
    assert "classes.txt is missing" in detect(tmp_path)[0].problems[0]
    assert [layout.kind for layout, _ in matches(tmp_path, "depth")] == ["depth"]
