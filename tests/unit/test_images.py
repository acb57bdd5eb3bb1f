# SPDX-License-Identifier: Apache-2.0
"""What users' pictures become: every colour mode, damaged files, sources, preprocessing, refused arrays."""

import contextlib
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from opendino.errors import ConfigError, DataError
from opendino.images.decode import _decode_jpeg, decode_image
from opendino.images.preprocess import Preprocess, to_tensor
from opendino.images.sources import open_source
from opendino.models.config import PreprocessSpec


def photograph(width=60, height=40, seed=0):
    small = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def array(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# --- decoding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, tmp_path):
    upright = photograph()
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(turns[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert torch.equal(decode_image(tmp_path / "a.png"), array(upright))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGB"])
def test_colour_modes_become_rgb(mode, tmp_path):
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    image = photograph().convert(mode)
    image.save(path)
    assert torch.equal(decode_image(path), array(image.convert("RGB")))
    assert decode_image(path, channels=1).shape == (1, 40, 60)


def test_a_cmyk_jpeg_has_its_colours(tmp_path):
    Image.new("RGB", (16, 16), (200, 40, 40)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    pixel = decode_image(tmp_path / "a.jpg")[:, 8, 8].int()
    assert (pixel - torch.tensor([200, 40, 40])).abs().max() <= 6


@pytest.mark.parametrize("peak", [200, 65_535])
def test_sixteen_bit_grey_is_scaled_by_its_mode_not_by_its_values(peak, tmp_path):
    values = np.linspace(0, peak, 40 * 60).reshape(40, 60).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    wanted = torch.from_numpy((values / 257).round().astype(np.uint8))
    assert torch.equal(decode_image(tmp_path / "a.png"), wanted.expand(3, -1, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(mode, tmp_path):
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 8))
    image.convert(mode).save(tmp_path / "a.png", **({"transparency": 0} if mode == "P" else {}))
    pixels = decode_image(tmp_path / "a.png")
    if mode != "P":
        assert (pixels[:, :, :4] == 255).all()
        assert (pixels[:, :, 4:] < 40).all()
    else:
        index = Image.open(tmp_path / "a.png")
        clear = torch.from_numpy(np.array(index)) == 0
        assert clear.any()
        assert (pixels[:, clear] == 255).all()


def test_half_transparency_mixes_with_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert (decode_image(tmp_path / "a.png").int() - 127).abs().max() <= 1


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert decode_image(tmp_path / "a.gif")[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "gif", "bmp"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_files_say_their_path_and_a_reason(suffix, share, tmp_path):
    path = tmp_path / f"a.{suffix}"
    photograph(300, 200).save(path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match=f"{path}.*cannot be read as an image: .+"):
        decode_image(path)


def test_other_files_folders_and_nothing(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("text.jpg", "folder.jpg", "missing.jpg"):
        with pytest.raises(DataError, match=name):
            decode_image(tmp_path / name)
    with pytest.raises(DataError, match="<bytes> cannot be read as an image: its bytes are of no known format"):
        decode_image(b"no picture")
    photograph().save(tmp_path / "a.png")
    with pytest.raises(DataError, match="5 were asked for"):
        decode_image(tmp_path / "a.png", channels=5)


def test_random_damage_is_an_error_of_ours_or_a_picture(tmp_path):
    rng = np.random.default_rng(0)
    for suffix in ("jpg", "png", "tif", "gif", "webp"):
        photograph().save(tmp_path / f"a.{suffix}")
        whole = np.frombuffer((tmp_path / f"a.{suffix}").read_bytes(), np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[rng.integers(0, len(whole), 12)] = rng.integers(0, 256, 12)
            with contextlib.suppress(DataError):  # any other exception fails the test
                assert decode_image(damaged.tobytes()).shape[0] == 3


def by_pillow_alone(data, channels=3):
    """What Pillow reads, or None where it refuses."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            upright = ImageOps.exif_transpose(picture).convert("RGB" if channels == 3 else "L")
            return torch.from_numpy(np.array(upright)).reshape(upright.height, upright.width, channels).permute(2, 0, 1)
    except Exception:
        return None


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [{}, {"quality": 30}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"restart_marker_rows": 1},
     {"keep_rgb": True}],
)  # fmt: skip
def test_jpeg_pixels_are_those_of_pillow(options, mode, channels):
    if mode != "RGB" and "keep_rgb" in options:
        return
    data = jpeg(photograph(61, 43).convert(mode), **options)
    assert torch.equal(decode_image(data, channels=channels), by_pillow_alone(data, channels))


def test_jpeg_from_the_fast_path_is_the_one_that_is_measured():
    data = jpeg(photograph())
    with Image.open(io.BytesIO(data)) as picture:
        assert _decode_jpeg(data, picture, 3) is not None
        assert _decode_jpeg(data[: len(data) // 2], picture, 3) is None


@pytest.mark.parametrize("orientation", range(10))
def test_jpeg_orientation_is_that_of_pillow(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(photograph(61, 43), exif=exif)
    assert torch.equal(decode_image(data), by_pillow_alone(data))


def test_damaged_jpegs_are_refused_or_read_as_by_pillow():
    rng = np.random.default_rng(0)
    whole = np.frombuffer(jpeg(photograph(120, 80), quality=90), np.uint8)
    refused = 0
    for i in range(300):
        damaged = whole.copy()
        damaged[rng.integers(0, len(whole), 1 + i % 8)] = rng.integers(0, 256, 1 + i % 8)
        data = damaged.tobytes()[: len(whole) - (i % 3) * int(rng.integers(0, len(whole) // 2))]
        expected = by_pillow_alone(data)
        if expected is None:
            refused += 1
            with pytest.raises(DataError):
                decode_image(data)
        else:
            assert torch.equal(decode_image(data), expected)
    assert 20 < refused < 280


# --- sources -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for name in ("cat/1.JPG", "cat/deep/2.png", "dog/ü 3.jpeg", ".hidden/4.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        photograph().save(tmp_path / name)
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    return tmp_path


def test_class_folders(folder):
    source = open_source(folder)
    assert source.classes == ["cat", "dog"]
    assert [item.label for item in source.items] == ["cat", "cat", "dog"]
    assert source.labels == [0, 0, 1]


def test_a_folder_with_images_of_its_own_has_no_labels(folder):
    photograph().save(folder / "5.png")
    source = open_source(folder)
    assert len(source) == 4
    assert source.classes == []
    assert set(source.labels) == {-1}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_with_labels_relative_and_absolute_paths(separator, folder):
    rows = [["label", "path", "note"], ["x", "cat/1.JPG", "a"], ["", str(folder / "dog" / "ü 3.jpeg"), "b"]]
    text = "\r\n".join(separator.join(row) for row in rows)
    (folder / "list.csv").write_text("\ufeff" + text, encoding="utf-8")
    source = open_source(folder / "list.csv")
    assert [item.label for item in source.items] == ["x", None]
    assert all(decode_image(item.path).shape == (3, 40, 60) for item in source.items)


def test_a_list_keeps_order_and_repetitions(folder):
    (folder / "list.txt").write_text("dog/ü 3.jpeg\n\ncat/1.JPG\r\ndog/ü 3.jpeg\n", encoding="utf-8")
    assert [i.path.rsplit("/", 1)[1] for i in open_source(folder / "list.txt").items] == [
        "ü 3.jpeg",
        "1.JPG",
        "ü 3.jpeg",
    ]


def test_what_is_no_source(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("file,label\na.jpg,x\n")
    (tmp_path / "gap.csv").write_text("path,label\na.jpg,x\n,y\n")
    (tmp_path / "latin.txt").write_bytes("ü.jpg".encode("latin-1"))
    for name, words in (("empty", "holds no images"), ("nowhere", "does not exist"), ("bad.csv", "needs a header"),
                        ("gap.csv", "no path in line 3"), ("latin.txt", "UTF-8")):  # fmt: skip
        with pytest.raises(DataError, match=words):
            open_source(tmp_path / name)


# --- preprocessing -------------------------------------------------------------------------------------------------


def by_pillow(image):
    """The model card's preprocessing in Pillow alone: shorter side 256 bicubic, centre crop 224, as grey levels."""
    w, h = image.size
    size = (256, int(256 * h / w)) if w < h else (int(256 * w / h), 256)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - 224) / 2), round((size[1] - 224) / 2)
    return array(resized.crop((left, top, left + 224, top + 224)))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (300, 201), (90, 120), (1000, 260)])
@pytest.mark.parametrize("kind", ["smooth", "noise"])
def test_evaluation_preprocessing_is_within_two_grey_levels_of_pillow(size, kind):
    if kind == "smooth":
        image = photograph(*size)
    else:
        image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    spec = PreprocessSpec()
    found = Preprocess(spec)(image)
    assert found.shape == (3, 224, 224)
    assert found.dtype == torch.float32
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.mean, spec.std))
    levels = (found * std + mean) * 255
    assert (levels - by_pillow(image)).abs().max() <= 2.01


@pytest.mark.parametrize("fit", ["crop", "resize", "pad"])
@pytest.mark.parametrize("size", [98, (56, 112)])
def test_every_fit_gives_the_asked_size(fit, size):
    height, width = (size, size) if isinstance(size, int) else size
    assert Preprocess(PreprocessSpec(), size=size, fit=fit)(photograph(130, 50)).shape == (3, height, width)


def test_padding_is_the_mean_and_keeps_the_whole_image():
    out = Preprocess(PreprocessSpec(), size=64, fit="pad")(Image.new("RGB", (80, 40), "white"))
    assert out[:, 33:].abs().max() < 0.02
    assert out[:, :31].min() > 2


def test_sizes_below_a_patch_and_unknown_fits_are_refused():
    with pytest.raises(ConfigError, match="below one patch"):
        Preprocess(PreprocessSpec(), size=7)
    with pytest.raises(ConfigError, match="crop, resize, pad or aspect"):
        Preprocess(PreprocessSpec(), fit="stretch")


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((8, 8, 3), np.float32), "float32.*uint8"),
        (np.full((8, 8, 3), 200, np.int64), "int64 with values from 200 to 200"),
        (np.zeros((3, 8, 9), np.uint8), "channels are at the other end"),
        (torch.zeros(8, 9, 3, dtype=torch.uint8), "permute"),
        (np.zeros((2, 8, 8, 3), np.uint8), "batch"),
        (np.zeros((8, 8, 4), np.uint8), "alpha"),
        (np.zeros((0, 8, 3), np.uint8), "shape"),
        (np.zeros((0, 8), np.uint8), "shape"),
        ("a.jpg", "given as str"),
        (None, "NoneType"),
    ],
)
def test_arrays_that_are_no_images_are_refused_with_the_reason(image, words):
    with pytest.raises(DataError, match=words):
        to_tensor(image)


def test_images_in_memory_equal_the_same_file(tmp_path):
    image = Image.new("RGBA", (20, 16), (10, 20, 30, 90))
    image.save(tmp_path / "a.png")
    assert torch.equal(to_tensor(image), decode_image(tmp_path / "a.png"))
    rgb = np.array(photograph())
    rgb.setflags(write=False)
    assert torch.equal(to_tensor(rgb), to_tensor(torch.from_numpy(np.array(rgb)).permute(2, 0, 1)))
    grey = rgb[..., 0]
    assert torch.equal(to_tensor(grey), to_tensor(np.stack([grey] * 3, -1)))
    assert to_tensor(grey, channels=1).shape == (1, 40, 60)
