# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels give what torch's operations and Pillow give, and do without a compiler or a cache."""

import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opendino.native import build
from opendino.native.threads import run_together
from opendino.pretrain import crops as C
from opendino.pretrain import photometric as P
from opendino.pretrain.crops import Boxes, CropsConfig, cut_crops, draw_boxes, sample_rng

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)), reason="no C compiler")
OFF = build.Kernels(None, "")


def random_params(count, seed, jitter=0.9):
    rng = np.random.default_rng(seed)
    factors = np.column_stack([rng.uniform(0, 2, (count, 3)), rng.uniform(-0.5, 0.5, count)])
    factors[rng.random((count, 4)) < 0.2] = 0
    same = rng.random((count, 4)) < 0.2
    return P.PhotometricParams(
        order=np.where(rng.random(count) < jitter, rng.integers(0, 24, count), -1).astype(np.int8),
        factors=np.where(same, P.IDENTITY, factors).astype(np.float32),
        grey=rng.random(count) < 0.3,
        sigma=np.where(rng.random(count) < 0.6, rng.uniform(0.05, 3, count), 0).astype(np.float32),
        solarize=rng.random(count) < 0.3,
    )


def random_crops(count, channels, height, width, seed, floats=False):
    x = torch.randint(0, 256, (count, channels, height, width), generator=torch.Generator().manual_seed(seed))
    x[::3, :, : height // 2] = x[::3, :1, : height // 2]  # grey parts
    return x + 0.25 * (x < 255) if floats else x.to(torch.uint8)


def by_torch(monkeypatch_context, function, *args):
    monkeypatch_context.setattr(P, "native_kernels", lambda: OFF)
    monkeypatch_context.setattr(C, "kernels", lambda: OFF)
    return function(*args)


@needs_compiler
class TestColours:
    @given(
        channels=st.sampled_from([1, 2, 3, 3, 3, 5]), height=st.integers(5, 70), width=st.integers(5, 70),
        seed=st.integers(0, 10**6), floats=st.booleans(),
    )  # fmt: skip
    @settings(max_examples=60, deadline=None)
    def test_equal_torch_operations(self, channels, height, width, seed, floats):
        config = CropsConfig(mean=(0.4,) * channels, std=(0.2,) * channels)
        x, p = random_crops(7, channels, height, width, seed, floats), random_params(7, seed)
        ours = P.apply_photometric(x, p, config)
        with pytest.MonkeyPatch.context() as context:
            expected = by_torch(context, P.apply_photometric, x, p, config)
        torch.testing.assert_close(ours * 0.2, expected * 0.2, atol=1e-5, rtol=0)

    def test_the_kernel_is_what_is_used(self, monkeypatch):
        monkeypatch.setattr(P, "_apply_by_torch", None)
        assert build.kernels().library is not None
        P.apply_photometric(random_crops(2, 3, 9, 9, 0), random_params(2, 0), CropsConfig())

    def test_any_number_of_threads_gives_the_same_bits(self, monkeypatch):
        x, p = random_crops(24, 3, 224, 224, 0), random_params(24, 0)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        one = P.apply_photometric(x, p, CropsConfig())
        monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
        assert torch.equal(P.apply_photometric(x, p, CropsConfig()), one)

    def test_crops_that_are_views_are_read_right(self):
        x, p = random_crops(4, 3, 20, 30, 0), random_params(4, 1)
        view = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        assert torch.equal(P.apply_photometric(view, p, CropsConfig()), P.apply_photometric(x, p, CropsConfig()))

    def test_crops_smaller_than_a_blur_go_without_the_kernel(self):
        x = random_crops(2, 3, 4, 4, 0)
        params = random_params(2, 0)
        params.sigma[:] = 0
        assert P.apply_photometric(x, params, CropsConfig()).shape == x.shape


@needs_compiler
class TestCrops:
    @given(
        channels=st.sampled_from([1, 3, 4]), height=st.integers(1, 120), width=st.integers(1, 120),
        size=st.integers(8, 70), seed=st.integers(0, 10**6),
    )  # fmt: skip
    @settings(max_examples=60, deadline=None)
    def test_equal_the_formula_and_torch(self, channels, height, width, size, seed):
        image = random_crops(1, channels, height, width, seed)[0]
        boxes = draw_boxes(height, width, 5, (0.05, 1.0), 0.5, sample_rng(seed, 0))
        ours = cut_crops(image, boxes, size).int()
        by_formula = torch.stack([formula_crop(image, boxes, i, size) for i in range(5)])
        off = (ours - by_formula).abs()
        # A row's sum half-way between two values may be rounded to the other one, which the columns can enlarge.
        assert off.max() <= 2
        assert (off > 1).float().mean() <= 0.01
        with pytest.MonkeyPatch.context() as context:
            by_torch_operations = by_torch(context, cut_crops, image, boxes, size).int()
        assert (ours - by_torch_operations).abs().max() <= 2  # its weights have 16 bits, and this is noise

    @pytest.mark.parametrize(("height", "width", "size"), [(300, 400, 224), (90, 70, 98)])
    def test_equal_pillow(self, height, width, size):  # which since 13 starts with the columns of other boxes
        image = random_crops(1, 3, 375, 500, 0)[0]
        boxes = Boxes(*np.array([[5, 11], [3, 0], [height] * 2, [width] * 2]), flip=np.array([False, True]))
        ours = cut_crops(image, boxes, size).int()
        off = (ours - torch.stack([pillow_crop(image, boxes, i, size) for i in range(2)])).abs()
        assert off.max() <= 1
        assert (off > 0).float().mean() < 1e-3

    def test_cut_the_named_pixels(self):
        image = random_crops(1, 3, 50, 70, 0)[0]
        boxes = Boxes(*np.array([[0, 42], [7, 62], [8, 8], [8, 8]]), flip=np.array([False, True]))
        ours = cut_crops(image, boxes, 8)
        assert torch.equal(ours[0], image[:, :8, 7:15])
        assert torch.equal(ours[1], image[:, 42:, 62:].flip(-1))

    def test_large_images_and_narrow_boxes(self):
        image = random_crops(1, 3, 1300, 900, 0)[0]
        boxes = Boxes(*np.array([[0, 3], [0, 100], [1300, 1000], [900, 7]]), flip=np.zeros(2, bool))
        ours = cut_crops(image, boxes, 33).int()
        expected = torch.stack([formula_crop(image, boxes, i, 33) for i in range(2)])
        assert (ours - expected).abs().max() <= 1


def formula_crop(image, boxes, i, size):
    """Bicubic weights with antialias in float64, rounded to 8 bits after the rows and after the columns."""
    top, left, height, width = (int(v[i]) for v in (boxes.top, boxes.left, boxes.height, boxes.width))
    part = image[:, top : top + height, left : left + width].double().numpy()
    rows = (part @ weights(width, size).T + 0.5).clip(0, 255.5) // 1
    crop = torch.from_numpy((weights(height, size) @ rows + 0.5).clip(0, 255.5) // 1).int()
    return crop.flip(-1) if boxes.flip[i] else crop


def weights(before, after):
    """(after, before) matrix of one axis."""
    scale = before / after
    wide, matrix = max(scale, 1.0), np.zeros((after, before))
    for i in range(after):
        middle = (i + 0.5) * scale
        first, last = max(int(middle - 2 * wide + 0.5), 0), min(int(middle + 2 * wide + 0.5), before)
        t = np.abs(np.arange(first, last) + 0.5 - middle) / wide
        cubic = np.where(t < 1, 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2)
        cubic = np.where(t < 2, cubic, 0)
        matrix[i, first:last] = cubic / cubic.sum()
    return matrix


def pillow_crop(image, boxes, i, size):
    top, left, height, width = (int(v[i]) for v in (boxes.top, boxes.left, boxes.height, boxes.width))
    part = image[:, top : top + height, left : left + width]
    planes = [Image.fromarray(plane.numpy()).resize((size, size), Image.Resampling.BICUBIC) for plane in part]
    crop = torch.from_numpy(np.stack([np.array(plane) for plane in planes])).int()
    return crop.flip(-1) if boxes.flip[i] else crop


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has loaded nothing yet and has an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build._kernels.cache_clear()
    yield tmp_path / "opendino" / "native"
    build._kernels.cache_clear()


class TestBuild:
    @needs_compiler
    def test_made_once_and_kept(self, fresh, monkeypatch):
        first = build.kernels()
        assert first.library is not None
        [made] = fresh.iterdir()
        assert str(made) in first.about
        build._kernels.cache_clear()
        monkeypatch.setattr(build, "_compile", None)
        assert build.kernels().library is not None

    @needs_compiler
    def test_a_damaged_library_is_made_anew(self, fresh):
        fresh.mkdir(parents=True)
        (fresh / f"kernels-{build._key()}.so").write_bytes(b"half of a library")
        assert build.kernels().library is not None

    @needs_compiler
    def test_a_cache_that_cannot_be_written_is_done_without(self, fresh, monkeypatch):
        (fresh.parents[1] / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(fresh.parents[1] / "file"))
        found = build.kernels()
        assert found.library is not None
        assert "cache cannot be written" in found.about

    @needs_compiler
    def test_processes_that_start_together_all_get_it(self, tmp_path):
        code = "from opendino.native.build import kernels; assert kernels().library.cut_crops"
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
        started = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(4)]
        assert [p.wait() for p in started] == [0] * 4
        assert len(list((tmp_path / "opendino" / "native").iterdir())) == 1

    @pytest.mark.parametrize(
        ("variable", "value", "said"),
        [
            ("CC", "no-such-compiler", r"no C compiler \(no-such-compiler\) was found; install one"),
            ("CC", "false", r"could not compile them \(exit status 1\)"),
            ("OPENDINO_NATIVE", "0", r"OPENDINO_NATIVE=0 turns"),
        ],
    )
    def test_without_a_compiler_torch_does_it_and_the_user_is_told(self, fresh, monkeypatch, variable, value, said):
        image, params = random_crops(1, 3, 30, 40, 0)[0], random_params(1, 0)
        boxes = draw_boxes(30, 40, 3, (0.1, 1.0), 0.5, sample_rng(0, 0))
        with pytest.MonkeyPatch.context() as context:
            expected = by_torch(context, cut_crops, image, boxes, 9)
            coloured = by_torch(context, P.apply_photometric, image[None], params, CropsConfig())
        monkeypatch.setenv(variable, value)
        found = build.kernels()
        assert found.library is None
        assert pytest.approx(0, abs=0) == (cut_crops(image, boxes, 9).int() - expected.int()).abs().max()
        assert torch.equal(P.apply_photometric(image[None], params, CropsConfig()), coloured)
        with pytest.raises(AssertionError, match=said):
            raise AssertionError(found.about)

    @needs_compiler
    def test_another_source_processor_or_compiler_is_another_library(self, monkeypatch, tmp_path):
        names = {build._key()}
        monkeypatch.setattr(build, "_processor", lambda: "another")
        names.add(build._key())
        monkeypatch.setenv("CC", "clang")
        names.add(build._key())
        (tmp_path / "x.c").write_text("int x;")
        monkeypatch.setattr(build, "SOURCES", (tmp_path / "x.c",))
        names.add(build._key())
        assert len(names) == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_helping_threads_are_kept_and_a_forked_process_makes_its_own(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    seen, gate = set(), threading.Barrier(3)

    def kernel():
        gate.wait(10)
        seen.add(threading.current_thread().name)
        return 0

    for _ in range(20):
        run_together(kernel, 8)
    assert 3 <= len(seen) <= 9  # of 40 calls beside this thread's
    with pytest.raises(MemoryError, match="no memory"):
        run_together(lambda: 1, 8)
    child = os.fork()
    if not child:
        signal.alarm(20)
        run_together(kernel, 8)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
