# SPDX-License-Identifier: Apache-2.0
"""Exported files: the same numbers as the model, at every size, in every convention; refused when they are not."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch

import opendino
from opendino.errors import ConfigError, MissingExtraError, WeightsError
from opendino.export.exporter import export_backbone
from opendino.export.metadata import ExportInfo
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.positions import resize_pos_embed
from opendino.models.vit import VisionTransformer

SUFFIXES = (".onnx", ".xml")
ARCHITECTURES = {
    "mlp": {"pos_resize": "scale_offset"},
    "mlp_registers": {"num_register_tokens": 4, "pos_resize": "size_antialias"},
    "swiglu_registers": {"ffn": "swiglu", "num_register_tokens": 1, "pos_resize": "scale_offset", "qkv_bias": False},
    "swiglu": {"ffn": "swiglu", "pos_resize": "size_antialias", "init_values": None},
    "hf": {"pos_resize": "size"},
}


def vary(model: VisionTransformer) -> VisionTransformer:
    """Move every weight far from its initial value, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.2 * noise)
            elif name.endswith("gamma"):
                p.copy_(0.5 * torch.exp(0.5 * noise))
            elif p.ndim >= 2 and "token" not in name and "pos" not in name:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.3 * noise)
    return model.eval()


def tiny(**overrides) -> VisionTransformer:
    shape = {"img_size": 518, "embed_dim": 16, "depth": 2, "num_heads": 2} | overrides
    return vary(VisionTransformer(ViTConfig(**shape), PreprocessSpec()))


def small(**overrides) -> VisionTransformer:
    """One whose images are 28 pixels."""
    config = ViTConfig(**{"img_size": 42, "patch_size": 7, "embed_dim": 16, "depth": 3, "num_heads": 2} | overrides)
    return vary(VisionTransformer(config, PreprocessSpec(resize=32, crop=28)))


def outputs_of(model):
    return "cls,patches,mean,registers" if model.config.num_register_tokens else "cls,patches,mean"


def needs(suffix):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime" if suffix == ".onnx" else "openvino")


def check_well_formed(path):
    """By the standard's own checker, shapes and types included: other runtimes are stricter than the one at hand."""
    if path.suffix == ".onnx":
        import onnx

        onnx.checker.check_model(str(path), full_check=True)


@pytest.fixture(params=SUFFIXES)
def suffix(request):
    needs(request.param)
    return request.param


# --- the same numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_passes_at_fixed_sizes(name, suffix, tmp_path):
    model = tiny(**ARCHITECTURES[name])
    for size in (224, 518, (336, 448)):
        report = export_backbone(model, tmp_path / f"{size}{suffix}", size=size, outputs=outputs_of(model))
        assert report.passed
        assert max(r.max_abs for r in report.rows) < 1e-4
        assert {r.output for r in report.rows} == set(outputs_of(model).split(","))
        check_well_formed(tmp_path / f"{size}{suffix}")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_one_file_serves_all_sizes(name, suffix, tmp_path):
    model = tiny(**ARCHITECTURES[name])
    report = export_backbone(model, tmp_path / f"any{suffix}", dynamic=True, outputs=outputs_of(model), layers=2)
    assert {(r.height, r.width) for r in report.rows} == {(224, 224), (518, 518), (336, 448), (101, 71)}
    assert {r.batch for r in report.rows} == {1, 2, 3}
    assert max(r.max_abs for r in report.rows) < 1e-4
    check_well_formed(tmp_path / f"any{suffix}")


def test_vits14_passes(suffix, tmp_path):
    model = vary(opendino.load("vits14", weights="random"))
    report = export_backbone(model, tmp_path / f"vits14{suffix}", size=224)
    assert max(r.max_abs for r in report.rows) < 1e-4


def test_other_channels_pixels_as_input_and_a_fixed_batch(suffix, tmp_path):
    model = small(in_chans=2)
    model.preprocess = PreprocessSpec(resize=32, crop=28, mean=(0.4, 0.6), std=(0.2, 0.3))
    report = export_backbone(model, tmp_path / f"x{suffix}", batch=2, uint8_input=True)
    assert report.passed
    assert {r.batch for r in report.rows} == {2}


@pytest.mark.parametrize("convention", ["scale_offset", "size_antialias", "size"])
def test_positions_in_the_graph_are_those_of_the_model(convention, tmp_path):
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from opendino.export.builder import GraphBuilder
    from opendino.export.positions import resized_positions

    table = torch.randn(1, 1 + 9 * 9, 4, generator=torch.Generator().manual_seed(1))
    g = GraphBuilder()
    out = resized_positions(g, table[0, 1:].unflatten(0, (9, 9)).numpy(), "h", "w", convention)
    value = onnx.helper.make_tensor_value_info
    inputs = [value(n, onnx.TensorProto.INT64, []) for n in "hw"]
    result = [value(out, onnx.TensorProto.FLOAT, None)]
    g.save(tmp_path / "p.onnx", inputs, result, {"opendino.version": "0"})
    session = ort.InferenceSession(str(tmp_path / "p.onnx"), providers=["CPUExecutionProvider"])
    for h, w in [(9, 9), (9, 8), (1, 1), (2, 30), (5, 5), (16, 11), (37, 3), (8, 9)]:
        (got,) = session.run(None, {"h": np.array(h), "w": np.array(w)})
        want = resize_pos_embed(table, h, w, convention)[:, 1:].numpy()
        np.testing.assert_allclose(got, want, atol=2e-5, err_msg=f"{h}x{w}")


def test_half_precision_halves_the_file_and_stays_close(suffix, tmp_path):
    model = small(embed_dim=64)
    whole = export_backbone(model, tmp_path / f"whole{suffix}")
    half = export_backbone(model, tmp_path / f"half{suffix}", precision="fp16")
    assert max(r.max_abs for r in whole.rows) < max(r.max_abs for r in half.rows) < 0.05
    check_well_formed(tmp_path / f"half{suffix}")
    data = ".bin" if suffix == ".xml" else ".onnx"
    assert (tmp_path / f"half{data}").stat().st_size < 0.65 * (tmp_path / f"whole{data}").stat().st_size


# --- int8 ----------------------------------------------------------------------------------------------------------


def test_int8_is_close_smaller_and_calibrated(suffix, tmp_path):
    model = small(embed_dim=64)
    with torch.no_grad():
        model.blocks[1].norm1.weight[3] = 40.0  # a channel far larger than the rest
    report = export_backbone(model, tmp_path / f"x{suffix}", precision="int8")
    assert report.passed
    assert 1e-7 < max(r.worst for r in report.rows) < 1e-2
    check_well_formed(tmp_path / f"x{suffix}")
    export_backbone(model, tmp_path / f"whole{suffix}")
    data = ".bin" if suffix == ".xml" else ".onnx"
    assert (tmp_path / f"x{data}").stat().st_size < 0.45 * (tmp_path / f"whole{data}").stat().st_size


def test_int8_below_its_floor_is_refused_unless_allowed(tmp_path):
    needs(".onnx")
    from opendino.export.verify import Limits

    model, strict = small(), Limits(float("inf"), 1e-9, 1e-9)
    with pytest.raises(WeightsError, match="off by up to"):
        export_backbone(model, tmp_path / "x.onnx", precision="int8", limits=strict)
    assert list(tmp_path.iterdir()) == []
    assert not export_backbone(model, tmp_path / "x.onnx", precision="int8", limits=strict, allow=True).passed
    assert [p.name for p in tmp_path.iterdir()] == ["x.onnx"]


def test_quantised_weights_are_within_half_a_step_and_smoothing_changes_nothing_exact():
    from opendino.export.calibrate import Range, input_ranges
    from opendino.export.linear import input_scale, quantised, smoothing

    rng = np.random.default_rng(0)
    weight = rng.normal(size=(5, 7)).astype(np.float32)
    integers, scales = quantised(weight)
    assert np.abs(integers * scales[:, None] - weight).max() <= scales.max() / 2 * 1.0001
    assert np.abs(integers).max(1).tolist() == [127] * 5
    share = smoothing(weight, Range(np.full(7, -4, np.float32), np.arange(7, dtype=np.float32)))
    np.testing.assert_allclose(share[6], (6 / np.abs(weight[:, 6]).max()) ** 0.5, rtol=1e-6)
    np.testing.assert_allclose(share[0], (4 / np.abs(weight[:, 0]).max()) ** 0.5, rtol=1e-6)
    scale, zero = input_scale(np.array([-1.0, 0.5], np.float32), np.array([4.0, 1.0], np.float32))
    np.testing.assert_allclose(scale, 5 / 255, rtol=1e-6)
    assert zero == 51
    model, seen = small(), {}
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    model.blocks[0].mlp.fc2.register_forward_pre_hook(lambda _, x: seen.update(x=x[0]))
    found = input_ranges(model, [images])
    np.testing.assert_allclose(found["blocks.0.mlp.fc2"].high, seen["x"].flatten(0, 1).amax(0).clamp(min=0))
    assert len(found) == 12


# --- refusals ------------------------------------------------------------------------------------------------------


def test_a_file_beyond_its_limits_never_gets_its_name(suffix, tmp_path):
    from opendino.export.verify import Limits

    with pytest.raises(WeightsError, match="must not be used"):
        export_backbone(small(), tmp_path / f"x{suffix}", limits=Limits(0.0, 0.0, 0.0))
    assert list(tmp_path.iterdir()) == []


def damage(path):
    """Change one weight matrix a little; the file stays readable."""
    if path.suffix == ".xml":
        data = np.fromfile(path.with_suffix(".bin"), np.float32)
        data[len(data) // 2 : len(data) // 2 + 64] += 0.5
        data.tofile(path.with_suffix(".bin"))
        return
    import onnx

    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == "blocks.1.mlp.fc1.weight")
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * 1.05, tensor.name))
    onnx.save(model, path)


def forge(path):
    """Make the description agree with the damaged numbers."""
    from opendino.export.content import bin_sha256, constants_sha256
    from opendino.export.session import open_session

    old = open_session(path).info.content_sha256
    new = bin_sha256(path) if path.suffix == ".xml" else constants_sha256(path)
    content = path.read_bytes()
    assert old.encode() in content
    path.write_bytes(content.replace(old.encode(), new.encode()))


def test_changed_weights_are_refused(suffix, tmp_path, monkeypatch, capsys):
    from opendino.cli import main
    from opendino.export.verify import verify
    from opendino.models.weights import save_backbone

    model, path = small(), tmp_path / f"x{suffix}"
    save_backbone(model, tmp_path / "model.safetensors")
    export_backbone(model, path)
    command = ["export", "verify", str(path), "--model", str(tmp_path / "model.safetensors"), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    damage(path)
    assert main(command) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["passed"] is False
    assert "it was changed or damaged" in said.err
    forge(path)
    report = verify(path, model)
    assert not report.problems
    assert not report.passed
    assert main(command) == 1


def test_another_model_than_the_source_is_refused(tmp_path):
    needs(".onnx")
    from opendino.export.verify import verify

    model = small()
    export_backbone(model, tmp_path / "x.onnx")
    with torch.no_grad():
        model.norm.bias[0] += 1e-6  # too little for the numbers to tell
    assert "other weights" in verify(tmp_path / "x.onnx", model).why()
    assert "other weights" in verify(tmp_path / "x.onnx", small(embed_dim=32)).why()


def test_damaged_and_foreign_files_are_refused_in_words(tmp_path):
    needs(".onnx")
    import onnx

    from opendino.export.session import open_session

    export_backbone(small(), tmp_path / "x.onnx")
    whole = (tmp_path / "x.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="damaged"):
        open_session(tmp_path / "cut.onnx")
    model = onnx.load(tmp_path / "x.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(WeightsError, match="not exported by opendino"):
        open_session(tmp_path / "foreign.onnx")
    with pytest.raises(WeightsError, match="does not exist"):
        open_session(tmp_path / "gone.onnx")


@pytest.mark.parametrize(
    "bad",
    [
        {"outputs": "cls,tokens"}, {"outputs": "registers"}, {"size": 3}, {"batch": 0}, {"layers": 4},
        {"precision": "int4"}, {"size": 28, "dynamic": True},
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(bad, tmp_path):
    with pytest.raises(ConfigError):
        export_backbone(small(), tmp_path / "x.onnx", **bad)


def test_a_target_that_exists_or_has_another_ending_is_refused(tmp_path):
    (tmp_path / "x.onnx").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        export_backbone(small(), tmp_path / "x.onnx")
    (tmp_path / "z.bin").write_text("mine")
    with pytest.raises(ConfigError, match=r"z\.bin exists already"):
        export_backbone(small(), tmp_path / "z.xml")
    with pytest.raises(ConfigError, match="ends in"):
        export_backbone(small(), tmp_path / "x.pt")
    with pytest.raises(ConfigError, match="fp32 weights"):
        export_backbone(small().bfloat16(), tmp_path / "y.onnx")


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"opendino\[export\]"):
        export_backbone(small(), tmp_path / "x.onnx")


# --- the file ------------------------------------------------------------------------------------------------------


def test_metadata_round_trip(suffix, tmp_path):
    from opendino.export.session import open_session
    from opendino.models.fingerprint import weights_fingerprint

    model = small(num_register_tokens=2)
    export_backbone(
        model,
        tmp_path / f"x{suffix}",
        batch=2,
        outputs="registers,cls",
        layers=2,
        licence="CC-BY-4.0 ü",
        uint8_input=True,
    )
    info = open_session(tmp_path / f"x{suffix}").info
    assert (info.config, info.preprocess) == (model.config, model.preprocess)
    assert (info.outputs, info.layers, info.size, info.batch) == (("cls", "registers"), 2, (28, 28), 2)
    assert (info.licence, info.uint8_input, info.precision) == ("CC-BY-4.0 ü", True, "fp32")
    assert (info.weights_sha256, info.version) == (weights_fingerprint(model), opendino.__version__)
    assert ExportInfo.from_strings(info.to_strings(), "x") == info


def test_large_weights_lie_in_a_file_beside(tmp_path):
    needs(".onnx")
    from opendino.export.exporter import describe_export
    from opendino.export.onnx import write_onnx
    from opendino.export.verify import verify

    model = small(embed_dim=64)
    info = describe_export(model)
    write_onnx(model, info, tmp_path / "x.onnx", external_from=0)
    assert (tmp_path / "x.onnx").stat().st_size < (tmp_path / "x.onnx.data").stat().st_size
    assert verify(tmp_path / "x.onnx", model).passed
    (tmp_path / "moved").mkdir()
    for name in ("x.onnx", "x.onnx.data"):
        shutil.move(tmp_path / name, tmp_path / "moved" / name)
    assert verify(tmp_path / "moved" / "x.onnx", model).passed
    (tmp_path / "moved" / "x.onnx.data").unlink()
    with pytest.raises(WeightsError, match="beside"):
        verify(tmp_path / "moved" / "x.onnx", model)


def test_the_command_exports_and_says_how_close(suffix, tmp_path, capsys):
    from opendino.cli import main
    from opendino.models.weights import save_backbone

    save_backbone(small(), tmp_path / "model.safetensors")
    kind = "onnx" if suffix == ".onnx" else "openvino"
    out = tmp_path / f"x{suffix}"
    command = ["export", kind, "--model", str(tmp_path / "model.safetensors"), "--out", str(out)]
    assert main([*command, "--size", "28x35", "--outputs", "cls,mean", "--batch", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["passed"] is True
    assert {(r["height"], r["width"], r["batch"], r["output"]) for r in said["rows"]} == {
        (28, 35, 2, "cls"), (28, 35, 2, "mean"),
    }  # fmt: skip
    assert said["bytes"] >= out.stat().st_size
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", kind, "--model", str(tmp_path / "model.safetensors"), "--out", str(tmp_path / "x.pt")]) == 2
    assert main(["export", "coreml"]) == 2
