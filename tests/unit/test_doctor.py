# SPDX-License-Identifier: Apache-2.0
"""`opendino doctor` says what is there; its memory estimates are what a forward pass really holds."""

import json
import mmap
import os
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opendino._version import __version__
from opendino.cli import doctor, main
from opendino.embed.embedder import Embedder
from opendino.embed.runtimes import calibration, machine
from opendino.embed.runtimes.estimate import count_parameters, footprints, plain_activations, prepared_activations
from opendino.embed.runtimes.prepared import PreparedViT, packs
from opendino.embed.runtimes.pytorch import TorchRuntime
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.registry import get_config
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    for name in ("CALIBRATIONS", "EXPORTS", "FEATURES"):
        monkeypatch.setenv(f"OPENDINO_{name}", str(tmp_path / name.lower()))
    return tmp_path


def asked(capsys, *words) -> dict:
    assert main(["doctor", "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def tiny(**overrides) -> VisionTransformer:
    torch.manual_seed(0)
    shape = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, **overrides}
    return VisionTransformer(ViTConfig(**shape), PreprocessSpec(resize=32, crop=28)).eval()


def test_it_says_what_is_here(capsys):
    found = asked(capsys)
    assert found["versions"]["opendino"] == __version__
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    at = found["machine"]
    assert 1 <= at["usable_cores"] <= at["cores"]
    assert at["threads"] == torch.get_num_threads()
    assert found["native"]["loaded"] or "There are no native kernels" in found["native"]["about"]
    assert found["extras"]["export"]["complete"] == (found["extras"]["export"]["install"] is None)
    for disk in found["disk"].values():
        assert 0 < disk["free_bytes"] <= disk["total_bytes"]
    assert "model" not in found
    assert found["calibrations"] == []


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="Linux says these")
def test_memory_is_what_the_system_says():
    found = machine.memory()
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert found["total"] == pytest.approx(pages, rel=0.01)
    assert found["available"] is not None
    assert 0 < found["available"] < pages
    assert machine.forget_peak()
    before = machine.peak_memory()
    with mmap.mmap(-1, 80_000_000) as block:  # given back at once, whatever the C library keeps of freed memory
        for page in range(0, 80_000_000, mmap.PAGESIZE):
            block[page] = 1
        assert machine.peak_memory() - before > 70e6
    assert machine.peak_memory() - before > 60e6
    assert machine.forget_peak()
    assert machine.peak_memory() - before < 40e6


def test_the_extras_are_those_of_the_package():
    tomllib = pytest.importorskip("tomllib")
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {k: [re.split(r"[\[<>=~]", p)[0] for p in v] for k, v in stated.items() if k != "dev"}
    assert {k: list(packages) for k, (packages, _) in doctor.EXTRAS.items()} == names


def test_a_missing_package_comes_with_the_way_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(doctor.EXTRAS, "export", (("no-such-package-of-ours", "torch"), "exports"))
    found = asked(capsys)["extras"]["export"]
    assert found["packages"]["no-such-package-of-ours"] is None
    assert found["packages"]["torch"] is not None
    assert found["install"] == "pip install 'opendino[export]'"
    assert main(["doctor"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "no no-such-package-of-ours" in text
    assert "pip install 'opendino[export]'" in text


def test_without_kernels_it_says_why(monkeypatch, capsys):
    from opendino.native import build

    monkeypatch.setenv("OPENDINO_NATIVE", "0")
    build._kernels.cache_clear()
    try:
        found = asked(capsys)
    finally:
        build._kernels.cache_clear()
    assert not found["native"]["loaded"]
    assert not found["native"]["attention"]
    assert any("OPENDINO_NATIVE=0" in text for text in found["advice"])


def test_caches_have_their_size(own_caches, capsys):
    folder = own_caches / "features" / "deep"
    folder.mkdir(parents=True)
    (folder / "a").write_bytes(b"x" * 1000)
    (folder.parent / "b").write_bytes(b"x" * 24)
    found = asked(capsys)["caches"]
    assert found["features"] == {"folder": str(own_caches / "features"), "files": 2, "bytes": 1024}
    assert found["exports"]["files"] == 0


def test_calibrations_are_shown(monkeypatch, capsys):
    monkeypatch.setattr(calibration, "MIN_FLOPS", 0)
    monkeypatch.setattr(calibration, "SECONDS", 0.0)
    choice = Embedder(tiny(), runtime="auto").choice
    assert choice is not None
    (found,) = asked(capsys)["calibrations"]
    assert found["chosen"] == [choice.runtime, choice.precision]
    assert main(["doctor"]) == 0
    assert f"{choice.runtime} {choice.precision}," in capsys.readouterr().out


def test_too_many_threads_are_told():
    at = {"threads": 16, "usable_cores": 16, "cpu_quota": 2.0, "packed_products": {"bf16": True}}
    found = {"machine": at, "native": {"loaded": True}, "accelerators": [], "disk": {}}
    (text,) = doctor.advice(found)
    assert "OMP_NUM_THREADS=2" in text
    assert doctor.advice({**found, "machine": at | {"threads": 2}}) == []


def test_a_model_is_weighed_before_it_is_loaded(capsys):
    found = asked(capsys, "--model", "vitg14", "--batch", "1")["model"]
    # 1.1 billion parameters, as published
    assert found["parameters"] == pytest.approx(1.136e9, rel=0.001)
    rows = {row["way"]: row for row in found["memory"] if row["device"] == "cpu"}
    assert rows["fp32"]["weights_bytes"] == 4 * found["parameters"]
    for row in found["memory"]:
        assert row["fits"] == (row["total_bytes"] <= row["free_bytes"])
    assert main(["doctor", "--model", "vits15"]) == 2


def test_what_does_not_fit_is_told(capsys, monkeypatch):
    monkeypatch.setattr(machine, "memory", lambda: {"total": 2**30, "available": 2**29, "limit": None})
    found = asked(capsys, "--model", "vitl14")
    assert not any(row["fits"] for row in found["model"]["memory"])
    assert any("vitl14 does not fit" in text for text in found["advice"])
    assert main(["doctor", "--model", "vitl14"]) == 0
    assert "does NOT fit" in " ".join(capsys.readouterr().out.split())


def test_a_file_is_weighed_too(tmp_path, capsys):
    save_backbone(tiny(), tmp_path / "model.safetensors")
    found = asked(capsys, "--model", str(tmp_path / "model.safetensors"))["model"]
    assert (found["parameters"], found["size"]) == (sum(p.numel() for p in tiny().parameters()), [28, 28])


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operators make while they are alive."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone():
            self.known.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


def held(call) -> int:
    with torch.inference_mode(), Alive() as alive:
        call()
    return alive.peak


@pytest.mark.parametrize("overrides", [{}, {"ffn": "swiglu"}, {"num_register_tokens": 4}])
def test_activations_are_what_a_forward_pass_holds(overrides):
    model = tiny(img_size=84, embed_dim=128, **overrides)
    images = torch.randn(4, 3, 84, 84)
    got = held(lambda: TorchRuntime(model, "fp32").tokens(images, 1))  # the images among them
    assert plain_activations(model.config, (84, 84), 4) == pytest.approx(got, rel=0.1)


@pytest.mark.skipif(not packs(torch.bfloat16), reason="no packed bf16 products here")
@pytest.mark.parametrize("overrides", [{}, {"ffn": "swiglu"}])
def test_activations_of_the_prepared_model_are_what_it_holds(overrides):
    model = tiny(img_size=84, embed_dim=128, **overrides)
    images = torch.randn(4, 3, 84, 84)
    prepared = PreparedViT(model, "bf16", threads=1)
    prepared.tokens(images)
    got = held(lambda: prepared.tokens(images)) + images.nbytes
    want = prepared_activations(model.config, (84, 84), 4, 1)
    assert got <= want * 1.15
    assert got >= want * 0.6  # results are counted as if they were put together while a piece is computed


def test_parameters_are_counted_without_making_them():
    config = get_config("vits14")
    assert count_parameters(config) == sum(p.numel() for p in VisionTransformer(config).parameters())
    names = [way.name for way in footprints(config, (224, 224), 8, 2, "cuda:0")]
    assert not any("beside" in name for name in names)
