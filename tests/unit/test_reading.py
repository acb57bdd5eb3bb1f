# SPDX-License-Identifier: Apache-2.0
"""From files to what a runtime takes: close to Pillow, in order, grouped by shape, uint8 as long as it can be."""

import io
import threading
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from opendino.embed.embedder import Embedder
from opendino.embed.reading import Reader
from opendino.embed.runtimes.prepared import packs
from opendino.embed.runtimes.pytorch import TorchRuntime
from opendino.embed.writer import embed_to_folder
from opendino.errors import ConfigError, DataError
from opendino.images.decode import decode_image
from opendino.images.preprocess import Preprocess, normalise
from opendino.images.sources import SourceImage, open_source
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.vit import VisionTransformer

PHOTOGRAPHS = [Image.fromarray(pixels) for pixels in load_sample_images().images]
needs_packed_bf16 = pytest.mark.skipif(not packs(torch.bfloat16), reason="this processor has no packed bf16 products")


def tiny(**overrides):
    torch.manual_seed(0)
    shape = {"img_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 2, "num_heads": 2} | overrides
    spec = PreprocessSpec(resize=32, crop=28, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    model = VisionTransformer(ViTConfig(**shape), spec).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def jpeg(picture, **options):
    file = io.BytesIO()
    picture.save(file, "JPEG", **options)
    return file.getvalue()


def by_pillow(data, shape, crop):
    """Pillow's own decoding and resizing to `shape`, and the middle of it."""
    with Image.open(io.BytesIO(data)) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGB").resize(shape[::-1], Image.Resampling.BICUBIC)
    if crop:
        left, top = (round((n - crop) / 2) for n in picture.size)
        picture = picture.crop((left, top, left + crop, top + crop))
    return np.asarray(picture).astype(int)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("side", [(640, 427), (427, 640), (501, 375), (225, 1001), (97, 131), (30, 33)])
@pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 70, "subsampling": 0}, {"progressive": True}])
@pytest.mark.parametrize("fit", ["crop", "aspect"])
def test_exact_pixels_are_pillows_within_two_levels(number, side, options, fit):
    data = jpeg(PHOTOGRAPHS[number].resize(side), **options)
    preprocess = Preprocess(PreprocessSpec(), fit=fit)
    got = preprocess.fitted(decode_image(data)).permute(1, 2, 0).numpy()
    want = by_pillow(data, preprocess.resized(*side[::-1]), 224 if fit == "crop" else 0)
    assert np.abs(got - want).max() <= 2


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_exact_pixels_of_turned_grey_and_cmyk_files_too(orientation, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(PHOTOGRAPHS[0].resize((333, 251)).convert(mode), exif=exif)
    preprocess = Preprocess(PreprocessSpec())
    pixels = decode_image(data)
    want = by_pillow(data, preprocess.resized(*pixels.shape[-2:]), 224)
    assert np.abs(preprocess.fitted(pixels).permute(1, 2, 0).numpy() - want).max() <= 2


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(("side", "share"), [((2000, 1500), 4), ((2001, 1333), 2)])
def test_scaled_decoding_is_near_and_smaller(orientation, side, share, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photograph.jpg"
    path.write_bytes(jpeg(PHOTOGRAPHS[1].resize(side), quality=90, exif=exif))
    model = tiny()
    preprocess = Preprocess(PreprocessSpec())
    exact, scaled = (Reader(TorchRuntime(model), preprocess, how)(path).pixels for how in ("exact", "scaled"))
    away = (exact - scaled).abs() * torch.tensor(preprocess.spec.std).view(3, 1, 1) * 255
    assert 0 < away.mean() < 1.5
    assert away.quantile(0.99) <= 12
    upright = side[::-1] if orientation == 1 else side
    smaller = decode_image(path.read_bytes(), enough=lambda h, w: tuple(n // share for n in (h, w)))
    assert tuple(smaller.shape[1:]) == tuple(-(-n // share) for n in upright)
    assert exact.shape == scaled.shape


def test_scaled_decoding_leaves_small_files_and_boxes_as_they_are(tmp_path):
    small = jpeg(PHOTOGRAPHS[0].resize((500, 375)))
    assert torch.equal(decode_image(small, enough=Preprocess(PreprocessSpec()).resized), decode_image(small))
    path = tmp_path / "large.jpg"
    path.write_bytes(jpeg(PHOTOGRAPHS[0]))
    runtime, preprocess = TorchRuntime(tiny()), Preprocess(tiny().preprocess, patch_size=7)
    item = SourceImage(open_source(tmp_path), 0, str(path), box=(100, 50, 300, 250))
    exact, scaled = (Reader(runtime, preprocess, how)(item).pixels for how in ("exact", "scaled"))
    assert torch.equal(exact, scaled)
    assert not torch.equal(exact, Reader(runtime, preprocess, "scaled")(path).pixels)


def test_unknown_decoding_is_refused():
    with pytest.raises(ConfigError, match="exact, scaled"):
        Embedder(tiny(), decode="fast")


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (1, 5000), (5000, 1), (100, 100), (40, 333)])
def test_aspect_has_whole_patches_within_the_budget(size):
    preprocess = Preprocess(PreprocessSpec(), fit="aspect", size=(224, 196))
    height, width = preprocess.resized(*size)
    rows, columns = height // 14, width // 14
    assert (rows * 14, columns * 14) == (height, width)
    assert 1 <= rows * columns <= 16 * 14
    if 20 > size[0] / size[1] > 1 / 20:
        assert rows * columns > 0.8 * 16 * 14
        stretched = max(abs(rows - columns * size[0] / size[1]), abs(columns - rows * size[1] / size[0]))
        assert stretched <= 1


@pytest.fixture
def mixed(tmp_path):
    """Ten files of three shapes, one unreadable, one of 16 bits."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(10):
        shape = [(40, 60), (60, 40), (50, 50)][i % 3]
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(paths[-1])
    paths[4].write_bytes(b"no image")
    paths[7] = tmp_path / "7.npy"
    np.save(paths[7], rng.integers(0, 65536, (60, 40, 3), dtype=np.uint16))
    return paths


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_packed_bf16)])
def test_mixed_shapes_come_out_in_order_as_if_alone(mixed, precision):
    embedder = Embedder(tiny(), fit="aspect", batch_size=4, precision=precision)
    assert embedder.what == ("cls", "mean")
    got = embedder(mixed)
    assert got.paths == [str(p) for p in mixed]
    assert [i for i, e in enumerate(got.errors) if e] == [4]
    assert got.patches is None
    for i, path in enumerate(mixed):
        alone = embedder([path])
        np.testing.assert_allclose(got.cls[i], alone.cls[0], atol=1e-5 if precision == "fp32" else 2e-2)
        np.testing.assert_allclose(got.mean[i], alone.mean[0], atol=1e-5 if precision == "fp32" else 2e-2)
    shapes = {tuple(embedder.reader(p).pixels.shape[1:]) for i, p in enumerate(mixed) if i != 4}
    assert len(shapes) == 3


def test_aspect_refuses_patches():
    with pytest.raises(ConfigError, match="patches are asked for"):
        Embedder(tiny(), fit="aspect", what=("cls", "patches"))


def test_a_folder_of_mixed_shapes_and_scaled_decoding_is_written_and_its_settings_kept(mixed, tmp_path):
    source = open_source(mixed[0].parent)
    folder = tmp_path / "out"
    progress = embed_to_folder(Embedder(tiny(), fit="aspect", batch_size=3, decode="scaled"), source, folder)
    assert (progress.count, progress.errors) == (10, 1)
    with pytest.raises(ConfigError, match='decode: "scaled" there, "exact" now'):
        embed_to_folder(Embedder(tiny(), fit="aspect", batch_size=3), source, folder)


@needs_packed_bf16
def test_uint8_reaches_the_prepared_runtime_and_floats_pass_beside_it(mixed):
    model = tiny()
    embedder = Embedder(model, precision="bf16", batch_size=10)
    reads = [embedder.reader(p).pixels for p in mixed]
    assert [p.dtype for i, p in enumerate(reads) if i not in (4, 7)] == [torch.uint8] * 8
    assert reads[7].dtype is torch.float32
    eight = embedder.stacked(reads[:4])
    assert (eight.dtype, eight.shape, eight.stride()[1]) == (torch.uint8, (4, 3, 28, 28), 1)
    both = embedder.stacked([reads[0], reads[7]])
    assert torch.equal(both[0], normalise(reads[0], model.preprocess))
    assert torch.equal(both[1], reads[7])
    want = Embedder(model, precision="fp32")(mixed).cls
    good = [i for i in range(10) if i != 4]
    got = embedder(mixed).cls
    away = 1 - torch.nn.functional.cosine_similarity(torch.tensor(got[good]), torch.tensor(want[good]))
    assert away.max() < 1e-3


@needs_packed_bf16
def test_batches_at_once_are_those_one_after_the_other(mixed):
    model = tiny()
    paths = [mixed[i % 10] for i in range(37)]
    many = Embedder(model, precision="bf16", batch_size=4, workers=3)
    one = Embedder(model, precision="bf16", batch_size=4, workers=0)
    one.runtime.takes_turns = False
    before, threads = threading.active_count(), torch.get_num_threads()
    first, again, alone = many(paths), many(paths), one(paths)
    assert first.paths == [str(p) for p in paths]
    for other in (again, alone):
        assert np.array_equal(first.cls, other.cls, equal_nan=True)
        assert np.array_equal(first.patches, other.patches, equal_nan=True)
    assert torch.get_num_threads() == threads
    assert threading.active_count() <= before + many.runtime._prepared.threads + one.runtime._prepared.threads


@needs_packed_bf16
def test_an_endless_source_is_read_little_ahead_and_an_error_comes_through(mixed):
    drawn = []

    def endless():
        while True:
            drawn.append(mixed[len(drawn) % 4])
            yield drawn[-1]

    stream = Embedder(tiny(), precision="bf16", batch_size=4, workers=2).stream(endless())
    parts = list(islice(stream, 3))
    assert [p for part in parts for p in part.paths] == [str(p) for p in drawn[:12]]
    assert len(drawn) <= 3 * 4 + 3 * 4 + 1  # two batches computed or waiting, one read ahead
    stream.close()
    with pytest.raises(DataError, match="float32"):
        Embedder(tiny(), precision="bf16", batch_size=2)([mixed[0], mixed[1], np.zeros((30, 30, 3), np.float32)])
