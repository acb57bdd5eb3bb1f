# SPDX-License-Identifier: Apache-2.0
"""Runtime "auto": what is measured, what may be chosen, what is remembered, and that a folder keeps its choice."""

import json
import logging
from itertools import count

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity
from torch.utils.flop_counter import FlopCounterMode

from opendino.cli import main
from opendino.embed.embedder import Embedder
from opendino.embed.job import Job
from opendino.embed.runtimes import calibration, measure
from opendino.embed.runtimes.calibration import candidates_for, choose_runtime, forward_flops, pick
from opendino.embed.runtimes.measure import Closeness, closeness, distances, refusal, speedup, time_in_turn
from opendino.embed.runtimes.prepared import packs
from opendino.embed.runtimes.pytorch import TorchRuntime
from opendino.embed.runtimes.remembered import Candidate, read_calibration
from opendino.embed.runtimes.variants import CompiledRuntime, make_runtime
from opendino.embed.settled import settle
from opendino.errors import ConfigError
from opendino.export.exporter import export_backbone
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.registry import get_config
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone

needs_fp32 = pytest.mark.skipif(not packs(torch.float32), reason="no packed fp32 products here")
needs_bf16 = pytest.mark.skipif(not packs(torch.bfloat16), reason="no packed bf16 products here")


def tiny(seed=0, **overrides) -> VisionTransformer:
    torch.manual_seed(seed)
    shape = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2, **overrides}
    return VisionTransformer(ViTConfig(**shape), PreprocessSpec(resize=32, crop=28)).eval()


@pytest.fixture(autouse=True)
def own_calibrations(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENDINO_CALIBRATIONS", str(tmp_path / "calibrations"))
    monkeypatch.setenv("OPENDINO_EXPORTS", str(tmp_path / "exports"))
    return tmp_path / "calibrations"


@pytest.fixture
def measured(monkeypatch):
    """Small models are measured too, for a moment only."""
    monkeypatch.setattr(calibration, "MIN_FLOPS", 0)
    monkeypatch.setattr(calibration, "SECONDS", 0.0)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 34, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_distances_are_those_of_the_formula_and_of_scikit_learn():
    a, b = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [4.0, 3.0], [0.0, -1.0]])
    np.testing.assert_allclose(distances(a, b), [1, 1 - 24 / 25, 2], atol=1e-15)
    x, y = torch.randn(7, 16, generator=torch.Generator().manual_seed(0)), torch.randn(7, 16)
    want = 1 - np.diag(cosine_similarity(x.double().numpy(), y.double().numpy()))
    np.testing.assert_allclose(distances(x, y), want, atol=1e-12)


def test_closeness_is_the_worst_cls_and_the_mean_patch():
    axes = torch.eye(3)
    reference = {"cls": axes[[0, 0]], "patches": axes[[0, 0, 0, 0]].view(2, 2, 3)}
    found = {"cls": torch.stack([axes[0], axes[1]]), "patches": axes[[0, 0, 0, 1]].view(2, 2, 3)}
    assert closeness(found, reference) == Closeness(1.0, 0.25)
    assert closeness({"cls": axes[[0, 0]] * torch.nan, "patches": reference["patches"]}, reference).cls == np.inf
    assert closeness({"cls": axes[[0, 0]] * 0, "patches": reference["patches"]}, reference).cls == np.inf


def test_what_is_too_far_from_fp32_is_refused():
    floor = measure.FLOORS["bf16"]
    assert refusal("bf16", floor) is None
    assert "cls is 2.1e-04" in (refusal("bf16", Closeness(2.1e-4, 0)) or "")
    assert "patches" in (refusal("bf16", Closeness(0, 3.1e-5)) or "")
    assert refusal("bf16", Closeness(0, float("nan"))) is not None
    assert refusal("fp32", Closeness(1e-5, 0)) is not None
    assert "only used when it is named" in (refusal("int8", Closeness(0, 0)) or "")


def test_calls_take_turns_until_the_time_is_up():
    made: list[str] = []
    ticks = count()  # every look at the clock takes a second
    calls = {name: lambda name=name: made.append(name) for name in "ab"}
    times = time_in_turn(calls, 9.5, clock=lambda: next(ticks))
    assert made == ["a", "b"] * 3  # after two rounds 9.5 s are not over, after three they are
    assert times == {"a": [1, 1, 1], "b": [1, 1, 1]}
    assert len(time_in_turn(calls, 0.0)["a"]) == 2
    assert len(time_in_turn(calls, 1e9, max_rounds=4)["b"]) == 4


def test_a_speedup_is_the_median_of_the_rounds_ratios():
    assert speedup({"x": [1.0, 2.0, 4.0], "plain": [3.0, 4.0, 40.0]}, "x", "plain") == 3.0


@pytest.mark.parametrize("name", ["vits14", "vitb14_reg", "vitg14"])
def test_flops_are_those_that_torch_counts(name):
    config = get_config(name, img_size=70, depth=2)
    with torch.device("meta"):
        model, image = VisionTransformer(config).eval(), torch.empty(1, 3, 56, 42)
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert forward_flops(config, (56, 42)) == pytest.approx(counter.get_total_flops(), rel=1e-6)


def candidate(runtime, precision, speed, refused=None):
    return Candidate(runtime=runtime, precision=precision, images_per_s=1, speedup=speed, refused=refused)


def test_the_fastest_that_is_close_enough_is_taken_and_never_a_slower_one():
    plain = candidate("torch", "fp32", 1.0)
    fast, slow = candidate("torch", "bf16", 3.0), candidate("openvino", "bf16", 0.5)
    assert pick([plain, slow, fast], ("torch", "fp32")) == ("torch", "bf16")
    assert pick([plain, slow], ("torch", "fp32")) == ("torch", "fp32")
    assert pick([plain, candidate("torch", "bf16", 9.0, "too far")], ("torch", "fp32")) == ("torch", "fp32")
    assert pick([plain, candidate("torch", "bf16", 1.04)], ("torch", "fp32")) == ("torch", "fp32")
    assert pick([plain, candidate("torch", "bf16", 1.06)], ("torch", "fp32")) == ("torch", "bf16")
    # As fast within the margin: the one that comes first. Never one below plain torch, wherever it comes.
    assert pick([plain, fast, candidate("openvino", "bf16", 3.1)], ("torch", "fp32")) == ("torch", "bf16")
    assert pick([plain, fast, candidate("openvino", "bf16", 3.2)], ("torch", "fp32")) == ("openvino", "bf16")
    gpu = [candidate("torch", "fp32", 0.97), candidate("torch", "bf16", 1.0)]
    assert pick(gpu, ("torch", "bf16")) == ("torch", "bf16")
    not_run = Candidate(runtime="openvino", precision="fp32", refused="it does not run")
    assert pick([plain, not_run], ("torch", "fp32")) == ("torch", "fp32")
    # On a GPU plain torch is bf16; where that is too far, fp32 is taken although it is slower.
    far = candidate("torch", "bf16", 1.0, "too far")
    assert pick([candidate("torch", "fp32", 0.4), far], ("torch", "bf16")) == ("torch", "fp32")


def test_auto_gives_the_vectors_of_what_it_chose_and_measures_once(measured, photos, own_calibrations):
    model = tiny()
    embedder = Embedder(model, runtime="auto", batch_size=2)
    choice = embedder.choice
    assert choice is not None
    assert choice.calibration is not None
    assert (embedder.runtime.name, embedder.precision) == (choice.runtime, choice.precision)
    tried = choice.calibration.candidates
    assert [(c.runtime, c.precision) for c in tried] == candidates_for(model)
    assert tried[0].cls == tried[0].patches == 0
    assert tried[0].speedup == 1
    paths = sorted(photos.iterdir())
    want = Embedder(model, runtime=choice.runtime, precision=choice.precision, batch_size=2)(paths)
    np.testing.assert_array_equal(embedder(paths).cls, want.cls)
    again = Embedder(model, runtime="auto", batch_size=2).choice
    assert again is not None
    assert again.calibration == choice.calibration
    assert len(list(own_calibrations.iterdir())) == 1
    other = Embedder(tiny(seed=1), runtime="auto", batch_size=2).choice
    assert other is not None
    assert other.calibration != choice.calibration
    assert len(list(own_calibrations.iterdir())) == 2


@pytest.mark.parametrize("damage", ["", "{", '{"format": 1}', "swapped", "\xff"])
def test_a_broken_calibration_is_told_and_made_again(measured, own_calibrations, caplog, damage):
    model = tiny()
    first = choose_runtime(model, batch_size=2)[1].calibration
    path = next(own_calibrations.iterdir())
    if damage == "swapped":
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"key": content["key"] | {"batch": 7}}))
    else:
        path.write_bytes(damage.encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        again = choose_runtime(model, batch_size=2)[1].calibration
    assert "made again" in caplog.text
    assert again is not None
    assert first is not None
    assert read_calibration(path, first.key) == again


def test_a_cache_that_cannot_be_written_costs_nothing_else(measured, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("OPENDINO_CALIBRATIONS", str(tmp_path / "file" / "below"))
    with caplog.at_level(logging.WARNING):
        assert choose_runtime(tiny())[1].calibration is not None
    assert "cannot be kept" in caplog.text


@needs_bf16
def test_a_precision_under_its_floor_is_left_unless_it_is_named(measured, monkeypatch):
    monkeypatch.setitem(measure.FLOORS, "bf16", Closeness(0.0, 0.0))
    _, choice = choose_runtime(tiny())
    assert choice.precision == "fp32"
    assert choice.calibration is not None
    refused = next(c for c in choice.calibration.candidates if c.precision == "bf16")
    assert "more than" in (refused.refused or "")
    runtime, named = choose_runtime(tiny(), "bf16")
    assert (runtime.precision, named.precision) == ("bf16", "bf16")
    assert "below the floor" in named.why


@needs_fp32
def test_a_named_precision_is_kept(measured):
    model = tiny()
    assert ("torch", "bf16") not in candidates_for(model, "fp32")
    _, choice = choose_runtime(model, "fp32")
    assert choice.precision == "fp32"
    assert choice.calibration is not None
    assert {c.precision for c in choice.calibration.candidates} == {"fp32"}


def test_a_large_model_is_measured_in_fewer_calls(measured, monkeypatch):
    calls: list[int] = []
    model = tiny()
    model.patch_embed.register_forward_hook(lambda module, given, out: calls.append(len(given[0])))
    key = calibration.key_of(model, (28, 28), 8, [], "auto")
    calibration.calibrate(model, [("torch", "fp32")], ("torch", "fp32"), key)
    assert calls == [4, 8, 8, 8]  # the check, a warm-up, two rounds
    calls.clear()
    monkeypatch.setattr(calibration, "LARGE_FLOPS", 0)
    monkeypatch.setattr(calibration, "CALL_SECONDS", 1e-9)
    calibration.calibrate(model, [("torch", "fp32")], ("torch", "fp32"), key)
    assert calls == [2, 1, 1]


def test_what_does_not_run_is_no_candidate(measured):
    model = tiny()
    key = calibration.key_of(model, (28, 28), 2, [], "auto")
    found = calibration.calibrate(model, [("torch", "fp32"), ("onnx", "bf16")], ("torch", "fp32"), key)
    assert found.chosen == ("torch", "fp32")
    assert (found.candidates[1].refused or "").startswith("it does not run: precision is 'bf16'")


def test_nothing_is_measured_where_there_is_nothing_to_choose(own_calibrations):
    runtime, choice = choose_runtime(tiny())
    assert (runtime.name, runtime.precision, choice.calibration) == ("torch", "fp32", None)
    assert "too small" in choice.why
    runtime, choice = choose_runtime(tiny().to(torch.bfloat16))
    assert (runtime.precision, choice.precision) == ("bf16", "bf16")
    with pytest.raises(ConfigError, match="precision is 'fp64'"):
        choose_runtime(tiny(), "fp64")
    assert not own_calibrations.exists()


def test_openvino_is_tried_where_its_file_lies_already():
    pytest.importorskip("onnx")
    pytest.importorskip("openvino")
    model = tiny()
    assert not [p for p in candidates_for(model) if p[0] == "openvino"]
    make_runtime(model, "openvino", "fp32").vectors(torch.zeros(1, 3, 28, 28), 1, ["cls"])
    # bf16 runs the same file
    assert [p for p in candidates_for(model) if p[0] == "openvino"] == [("openvino", "fp32"), ("openvino", "bf16")]


def test_an_exported_file_needs_no_choice(tmp_path, photos):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    export_backbone(tiny(), path)
    embedder = Embedder(path, runtime="auto")
    assert (embedder.runtime.name, embedder.precision, embedder.choice) == ("onnx", "fp32", None)
    job = Job(str(photos), str(path), str(tmp_path / "out"), embedder={"runtime": "auto", "precision": "auto"})
    assert settle(job).job is job


def test_a_compiled_model_gives_the_same_and_leaves_the_model_alone():
    model, images = tiny(), torch.randn(3, 3, 28, 28)
    keys = list(model.state_dict())
    compiled = CompiledRuntime(model, "fp32", backend="eager")
    plain = TorchRuntime(model, "fp32")
    for part in (images, images[:2]):
        torch.testing.assert_close(compiled.tokens(part, 2), plain.tokens(part, 2), atol=1e-6, rtol=1e-6)
    assert list(model.state_dict()) == keys
    assert compiled.identity() == {"runtime": "torch-compiled"}


@needs_fp32
def test_a_prepared_fp32_model_gives_the_same_and_follows_its_weights():
    model, images = tiny(), torch.randn(3, 3, 28, 28)
    prepared, plain = make_runtime(model, "torch-prepared"), TorchRuntime(model, "fp32")
    assert (prepared.precision, prepared.identity()) == ("fp32", {"runtime": "torch-prepared"})
    before = prepared.vectors(images, 1, ["cls"])["cls"]
    torch.testing.assert_close(before, plain.vectors(images, 1, ["cls"])["cls"], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        model.cls_token.add_(1)
    after = prepared.vectors(images, 1, ["cls"])["cls"]
    torch.testing.assert_close(after, plain.vectors(images, 1, ["cls"])["cls"], atol=1e-5, rtol=1e-5)
    assert not torch.equal(before, after)
    for wrong in ((model, "fp16"), (tiny().half(), "auto")):
        with pytest.raises(ConfigError, match="torch-prepared"):
            make_runtime(wrong[0], "torch-prepared", wrong[1])


def test_an_unknown_runtime_is_refused():
    with pytest.raises(ConfigError, match="runtime is 'tensorrt'"):
        Embedder(tiny(), runtime="tensorrt")
    with pytest.raises(ConfigError, match="auto or one of"):
        make_runtime(tiny(), "tensorrt")


def test_a_folder_goes_on_as_it_was_begun(photos, tmp_path, capsys):
    save_backbone(tiny(), tmp_path / "model.safetensors")
    out = tmp_path / "out"
    command = ["embed", str(photos), "--model", str(tmp_path / "model.safetensors"), "--out", str(out), "--json"]
    assert main([*command, "--runtime", "torch", "--precision", "bf16"]) == 0
    assert "auto" not in json.loads(capsys.readouterr().out)
    before = {p.name: p.read_bytes() for p in out.glob("part-*")}
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save(photos / "more.png")
    assert main(command) == 0
    auto = json.loads(capsys.readouterr().out)["auto"]
    assert (auto["runtime"], auto["precision"]) == ("torch", "bf16")
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["precision"], manifest["count"]) == ("bf16", 6)
    assert before.items() < {p.name: p.read_bytes() for p in out.glob("part-*")}.items()
    assert main([*command, "--precision", "fp32"]) == 2
    assert "precision" in capsys.readouterr().err


def test_a_new_folder_says_what_was_chosen(measured, photos, tmp_path, capsys):
    save_backbone(tiny(), tmp_path / "model.safetensors")
    out = tmp_path / "out"
    command = ["embed", str(photos), "--model", str(tmp_path / "model.safetensors"), "--out", str(out)]
    assert main([*command, "--json"]) == 0
    auto = json.loads(capsys.readouterr().out)["auto"]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["precision"] == auto["precision"]
    assert manifest.get("runtime", "torch") == auto["runtime"]
    assert auto["cls"] <= measure.FLOORS[auto["precision"]].cls
    assert main(command) == 0
    assert f"by {auto['runtime']} {auto['precision']}: as the folder was begun" in capsys.readouterr().out


def test_other_processes_are_told_a_named_runtime(tmp_path):
    save_backbone(tiny(), tmp_path / "model.safetensors")
    place, out = str(tmp_path / "model.safetensors"), str(tmp_path / "out")
    job = Job("photos", place, out, embedder={"runtime": "auto", "precision": "auto"})
    assert settle(job).job.embedder == {"runtime": "torch", "precision": "fp32"}
    assert settle(job, ray=True).job.embedder == {"runtime": "torch", "precision": "auto"}
    named = Job("photos", place, out, embedder={"runtime": "torch", "precision": "bf16"})
    assert settle(named).job is named
