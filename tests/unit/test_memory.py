# SPDX-License-Identifier: Apache-2.0
"""Weights are in memory once: mapped, cast one at a time, prepared block by block."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import opendino
from opendino.embed.embedder import Embedder
from opendino.embed.runtimes.prepared import packs, preparable
from opendino.errors import WeightsError
from opendino.models.config import ViTConfig
from opendino.models.fingerprint import weights_fingerprint
from opendino.models.layouts import to_transformers
from opendino.models.memory import give_up
from opendino.models.vit import VisionTransformer
from opendino.models.weights import own_metadata

bf16 = pytest.mark.skipif(not packs(torch.bfloat16), reason="no bf16 products here")
KINDS = ("fp32.safetensors", "bf16.safetensors", "fp32.pth", "old.pth", "transformers.safetensors")


def make_model(**overrides):
    torch.manual_seed(0)
    shape = {"img_size": 28, "embed_dim": 64, "depth": 2, "num_heads": 1, "init_values": 0.5, **overrides}
    return VisionTransformer(ViTConfig(**shape)).eval()


def write(model, folder, kind):
    path = folder / kind
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    if kind == "bf16.safetensors":
        state = {k: v.bfloat16() for k, v in state.items()}
    if kind == "transformers.safetensors":
        state = to_transformers(state)
    if path.suffix == ".pth":
        torch.save(state, path, _use_new_zipfile_serialization=kind != "old.pth")
    else:
        save_file(state, path, {} if kind == "transformers.safetensors" else own_metadata(model))
    return path


@pytest.fixture(params=KINDS)
def stored(request, tmp_path):
    return write(make_model(), tmp_path, request.param)


PICTURE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)


@bf16
def test_an_embedder_of_a_file_gives_what_one_of_the_model_gives(stored):
    model = opendino.load(stored)
    expected = Embedder(model, precision="bf16", size=28)
    embedder = Embedder(stored, precision="bf16", size=28, device="cpu")
    np.testing.assert_array_equal(embedder([PICTURE]).cls, expected([PICTURE]).cls)
    assert embedder.runtime.weights_sha256() == weights_fingerprint(model) == expected.runtime.weights_sha256()
    assert embedder.config == model.config
    assert embedder.runtime._model is None


@bf16
def test_the_model_is_read_again_when_it_is_asked_for_and_watched_from_then_on(stored):
    embedder = Embedder(stored, precision="bf16", size=28, device="cpu")
    before = embedder([PICTURE]).cls
    assert embedder.model is embedder.model
    assert embedder.model.cls_token.dtype is torch.float32
    assert torch.equal(embedder.model.blocks[1].mlp.fc1.weight, opendino.load(stored).blocks[1].mlp.fc1.weight)
    np.testing.assert_array_equal(embedder([PICTURE]).cls, before)
    untouched = embedder.runtime.weights_sha256()
    with torch.no_grad():
        embedder.model.blocks[0].mlp.fc1.weight.mul_(2)
    assert np.abs(embedder([PICTURE]).cls - before).max() > 1e-3
    assert embedder.runtime.weights_sha256() != untouched


@bf16
def test_another_file_in_its_place_is_refused(tmp_path):
    path = write(make_model(), tmp_path, "fp32.safetensors")
    embedder = Embedder(path, precision="bf16", size=28, device="cpu")
    path.unlink()
    write(make_model(depth=3), tmp_path, "fp32.safetensors")
    with pytest.raises(WeightsError, match="has changed"):
        _ = embedder.model


def test_a_loaded_model_has_the_dtype_asked_for(stored):
    exact = opendino.load(stored)
    assert {p.dtype for p in exact.parameters()} == {torch.float32}
    cast = opendino.load(stored, dtype=torch.bfloat16)
    own = opendino.load(stored, dtype="auto")
    assert {p.dtype for p in cast.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in own.parameters()} == {torch.bfloat16 if "bf16" in stored.name else torch.float32}
    for a, b, c in zip(exact.parameters(), cast.parameters(), own.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)
        assert torch.equal(a, c.float())
    assert own.load_report.mapped == (stored.name != "old.pth")


def test_saving_over_the_file_of_a_loaded_model_is_safe(tmp_path):
    path = write(make_model(), tmp_path, "fp32.pth")
    model = opendino.load(path)
    torch.save(model.state_dict(), path)
    assert weights_fingerprint(opendino.load(path)) == weights_fingerprint(model)


def test_the_fingerprint_counts_tensors_as_cast_and_consumes_mapped_ones(tmp_path):
    path = write(make_model(embed_dim=128), tmp_path, "bf16.safetensors")
    exact = weights_fingerprint(opendino.load(path))
    own = opendino.load(path, dtype="auto")
    assert weights_fingerprint(own) != exact
    assert weights_fingerprint(own, dtype=torch.float32, consume=True) == exact
    assert weights_fingerprint(own, dtype=torch.float32) == exact  # given up, it is read from the file again


def test_what_is_given_up_leaves_its_neighbours_alone():
    whole = torch.arange(10_000.0)
    give_up(whole[3000:7000])
    assert torch.equal(whole[:3000], torch.arange(3000.0))
    assert torch.equal(whole[7000:], torch.arange(7000.0, 10_000.0))


def test_models_with_foreign_parts_are_not_prepared():
    model = make_model()
    assert preparable(model)
    model.blocks[1].attn.qkv = type("Adapted", (torch.nn.Linear,), {})(64, 192)
    assert not preparable(model)


RUN = """
import gc, json, sys
import numpy as np, opendino, torch
from opendino.embed.embedder import Embedder
from opendino.models.memory import close_gaps

def status(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) / 1024

def embed(path):
    embedder = Embedder(path, precision="bf16", size=56, device="cpu", what=["cls"])
    assert np.isfinite(embedder([np.zeros((56, 56, 3), np.uint8)]).cls).all()
    return embedder

def grown(way, path):
    gc.collect()
    close_gaps()
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
    before = status("VmRSS")
    kept = way(path)
    return status("VmHWM") - before

ways = {"embed": embed, "load": lambda path: opendino.load(path, dtype=torch.bfloat16)}
first, *paths = sys.argv[1:]
for way in ways.values():
    way(first)  # libraries, kernels, threads
print(json.dumps({f"{name} {path.split('/')[-1]}": grown(way, path) for name, way in ways.items() for path in paths}))
"""


@bf16
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_bf16_weights_take_their_own_size_and_no_more(tmp_path):
    model = make_model(embed_dim=512, depth=14, num_heads=8)
    weights_mib = sum(p.numel() for p in model.parameters()) * 2 / 2**20
    paths = [write(model, tmp_path, kind) for kind in KINDS if kind != "old.pth"]
    del model
    (tmp_path / "small").mkdir()
    small = write(make_model(embed_dim=512, num_heads=8), tmp_path / "small", "fp32.safetensors")
    done = subprocess.run([sys.executable, "-c", RUN, small, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    assert grown.pop("load bf16.safetensors") < 0.1 * weights_mib  # they stay in the file
    assert len(grown) == 7
    assert 0.9 * weights_mib < min(grown.values()), (weights_mib, grown)
    assert max(grown.values()) < 1.2 * (weights_mib + 4), (weights_mib, grown)  # 4 MiB: one layer while it is prepared
