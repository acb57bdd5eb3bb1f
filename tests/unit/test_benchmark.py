# SPDX-License-Identifier: Apache-2.0
"""`opendino benchmark` measures in processes of its own; its arithmetic is checked by hand."""

import json
import os
import time

import numpy as np
import pytest
import torch

from opendino.cli import benchmark, main
from opendino.embed.runtimes import bench
from opendino.embed.runtimes.bench import Bench, Row, chosen, pairs_of
from opendino.embed.runtimes.bench_process import BenchProcess, Plan
from opendino.embed.runtimes.prepared import packs
from opendino.errors import ConfigError, WeightsError
from opendino.models.config import PreprocessSpec, ViTConfig
from opendino.models.vit import VisionTransformer
from opendino.models.weights import save_backbone


@pytest.fixture(autouse=True)
def own_exports(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENDINO_EXPORTS", str(tmp_path / "exports"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(img_size=28, patch_size=7, embed_dim=32, depth=2, num_heads=2)
    save_backbone(VisionTransformer(config, PreprocessSpec(resize=32, crop=28)), tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


def row(runtime="torch", precision="fp32", batch=2, **more):
    return Row("m", runtime, precision, batch, [28, 28], **more)


def test_a_rows_figures_by_hand():
    one = row(turns=[[0.1, 0.3], [0.2], [0.5, 0.5]], reference=[[0.4], [0.4, 0.4], [0.1]])
    found = one.figures()
    # images/s of the turns: 4/0.4 = 10, 2/0.2 = 10, 4/1 = 4; of the reference: 5, 5, 20
    assert found["images_per_s"] == 10
    assert found["speedup"] == 2  # of 2, 2 and 0.2
    assert found["latency_p50_ms"] == 300
    assert found["latency_p99_ms"] == pytest.approx(float(np.quantile([0.1, 0.3, 0.2, 0.5, 0.5], 0.99)) * 1e3)
    assert found["calls"] == 5
    empty = row(problem="not installed").figures()
    assert (empty["images_per_s"], empty["speedup"], empty["latency_p50_ms"]) == (None, None, None)


def test_what_auto_would_take():
    base = [[1.0], [1.0]]
    plain = row(turns=base, reference=base, cls=0.0, patches=0.0)
    fast = row(precision="bf16", turns=[[0.2], [0.2]], reference=base, cls=1e-5, patches=1e-6)
    far = row("openvino", "bf16", turns=[[0.1], [0.1]], reference=base, cls=1e-2, patches=1e-6)
    unmeasured = row("onnx", problem="not installed", reference=base)
    assert chosen([plain, fast, far, unmeasured]) is fast
    assert chosen([plain, far, unmeasured]) is plain
    assert chosen([unmeasured]) is None


def test_runtimes_and_precisions_are_crossed():
    assert pairs_of(["onnx", "torch"], ["fp32", "bf16"], "cpu") == (
        ("torch", "fp32"), ("onnx", "fp32"), ("onnx", "bf16"), ("torch", "bf16"),
    )  # fmt: skip
    usual = pairs_of([], [], "cpu")
    assert usual[0] == ("torch", "fp32")
    assert ("torch-compiled", "fp32") not in usual
    assert (("torch", "bf16") in usual) == packs(torch.bfloat16)
    assert ("onnx", "bf16") not in pairs_of([], ["bf16"], "cpu")
    assert ("torch-compiled", "fp16") in pairs_of([], [], "cuda:1")
    with pytest.raises(ConfigError, match="--runtime is 'tensorrt'"):
        pairs_of(["tensorrt"], [], "cpu")


@pytest.mark.slow
def test_it_measures_what_is_there_and_says_why_not(model, tmp_path, capsys):
    out = tmp_path / "result.json"
    words = ["benchmark", model, "--runtime", "torch", "onnx", "--precision", "fp32", "bf16", "--batch", "1", "3"]
    words += ["--size", "28", "28x42", "--seconds", "0.02", "--rounds", "2", "--device", "cpu", "--threads", "1"]
    assert main([*words, "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == found
    rows = {(r["runtime"], r["precision"], r["batch"], tuple(r["size"])): r for r in found["rows"]}
    assert len(rows) == 4 * 4
    for (runtime, precision, batch, _), one in rows.items():
        if (runtime, precision) == ("onnx", "bf16"):
            assert "onnx computes a model in fp32, fp16" in one["problem"] or "not installed" in one["problem"]
            assert one["images_per_s"] is None
            continue
        if one["problem"]:
            assert "not installed" in one["problem"]  # onnx, where the extra is missing
            continue
        assert one["calls"] >= 2
        assert one["images_per_s"] > 0
        assert one["latency_p50_ms"] <= one["latency_p99_ms"]
        assert one["peak_memory_bytes"] > 50e6
        if runtime == "torch" and precision == "fp32":
            assert (one["speedup"], one["cls_distance"], one["patch_distance"]) == (1, 0, 0)
        elif precision == "fp32":
            assert 0 < one["cls_distance"] < 1e-6
        else:
            assert 1e-9 < one["cls_distance"] < 1e-2
        assert batch in (1, 3)
    autos = [(r["batch"], tuple(r["size"])) for r in found["rows"] if r["auto"]]
    assert sorted(autos) == [(1, (28, 28)), (1, (28, 42)), (3, (28, 28)), (3, (28, 42))]
    (about,) = found["models"]
    assert (about["depth"], about["threads"], found["stopped"]) == (2, 1, False)
    benchmark.show(found)
    text = capsys.readouterr().out
    assert "28x42 px, batch 3" in text
    assert "onnx bf16: " in text


@pytest.mark.slow
def test_a_dead_process_is_a_reason_and_the_others_go_on(model):
    pairs = (("torch", "fp32"), ("torch", "bf16"))
    run = Bench(Plan(model, None, pairs, batches=(1, 2), seconds=0.02, rounds=2, threads=1))

    def on_step(text):
        process = run._workers["torch", "bf16"].process if text == "torch bf16, batch 1" else None
        if process:
            process.kill()

    run.on_step = on_step
    run.run()
    found = {(r.precision, r.batch): r for r in run.rows}
    assert "ended by signal 9" in (found["bf16", 1].problem or "")
    assert found["bf16", 2].problem is None  # started again
    assert [len(found[p, batch].turns) for p, batch in (("fp32", 1), ("fp32", 2), ("bf16", 2))] == [2, 2, 2]


def test_after_ctrl_c_what_is_measured_is_kept_and_no_process_is_left(model, tmp_path, capsys, monkeypatch):
    seen: list[int] = []
    told = Bench._ask

    def interrupted(self, pair, row, **message):
        answer = told(self, pair, row, **message)
        if "turn" in message:
            seen.extend(w.process.pid for w in self._workers.values() if w.process)
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(Bench, "_ask", interrupted)
    out = tmp_path / "result.json"
    words = ["benchmark", model, "--runtime", "torch", "--precision", "fp32", "--batch", "1", "2", "--seconds", "0.02"]
    assert main([*words, "--out", str(out), "--device", "cpu"]) == 130
    found = json.loads(out.read_text())
    assert found["stopped"]
    assert [(r["batch"], r["cls_distance"], r["calls"]) for r in found["rows"]] == [(1, 0, 0)]
    assert "stopped before its first turn" in capsys.readouterr().out
    for pid in seen:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
def test_processes_that_do_not_fit_together_run_one_by_one(model, monkeypatch):
    most = []
    monkeypatch.setattr(bench, "memory", lambda: {"available": bench.PROCESS_BYTES * 1.5})
    pairs = (("torch", "fp32"), ("torch", "bf16"))
    run = Bench(Plan(model, None, pairs, batches=(1,), seconds=0.02, rounds=2, threads=1))
    run.on_step = lambda text: most.append(len(run._workers))
    run.run()
    assert not run.in_turn
    assert max(most) == 1
    assert len(most) == run.steps
    assert [(r.precision, len(r.turns)) for r in run.rows] == [("fp32", 2), ("bf16", 2)]
    assert 0 < (run.rows[1].cls or 0) < 1e-2


def test_what_cannot_be_measured_is_refused(model, tmp_path, monkeypatch, capsys):
    for words in (["--batch", "0"], ["--seconds", "0"], ["--rounds", "0"], ["--random"], ["--runtime", "x"]):
        assert main(["benchmark", model, *words]) == 2
    assert main(["benchmark", "features.onnx"]) == 2
    assert "exported file" in capsys.readouterr().err
    assert main(["benchmark", model, "--out", str(tmp_path / "missing" / "x.json")]) == 1
    assert main(["benchmark", "vitt14"]) == 1
    assert "--random" in capsys.readouterr().err
    assert main(["benchmark", str(tmp_path / "nothing.pth"), "--device", "cpu"]) == 1
    # A model that cannot be loaded is one line for each, under the size that was never found out.
    assert "nothing.pth does not exist" in " ".join(capsys.readouterr().out.split())


def test_weights_that_are_not_at_hand_are_told(monkeypatch):
    from opendino.models import files

    def offline(entry):
        raise WeightsError("there is no network.")

    monkeypatch.setattr(files, "fetch_published", offline)
    monkeypatch.setattr(files, "find_published", lambda entry: None)
    with pytest.raises(WeightsError, match=r"no network\. Or give --random"):
        benchmark.weights_of(benchmark.Args(models=("vitb14",)), "vitb14")
    weights, note = benchmark.weights_of(benchmark.Args(models=("vitb14",), random=True), "vitb14")
    assert weights == "random"
    assert "random weights" in note
    assert benchmark.weights_of(benchmark.Args(), "vits14")[0] == "random"


@pytest.mark.slow
def test_a_worker_ends_with_its_leader(model, tmp_path):
    """Its input ends when the leader is gone, however that came about."""
    process = BenchProcess(Plan(model, None, (), threads=1), ("torch", "fp32"), tmp_path / "log")
    assert process.about["arch"] == "custom"
    assert process.process
    assert process.process.stdin
    process.process.stdin.close()
    deadline = time.monotonic() + 30
    while process.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.process.poll() == 0
    process.close()
