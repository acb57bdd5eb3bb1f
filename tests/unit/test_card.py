# SPDX-License-Identifier: Apache-2.0
"""Model cards of real small runs, whole, killed and fine-tuned; hours, front matter, and the file."""

import json
import re
import time

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image

import opendino
from opendino.cli import main
from opendino.cli.card import how_written, kind_of, machine
from opendino.pretrain.config import parse_config
from opendino.pretrain.session import recorded_session
from opendino.pretrain.trainer import Trainer
from opendino.report.card import citation
from opendino.report.card.front_matter import licence_keys
from opendino.report.card.hours import energy, measured_time

SMALL = [
    *("--recipe", "vitt14_demo", "--batch-size", "4", "--num-workers", "0", "--device", "cpu", "--log-every", "2"),
    *("--model.depth", "1", "--model.embed-dim", "16", "--model.num-heads", "2", "--heads.num-prototypes", "16"),
    *("--heads.hidden-dim", "16", "--heads.bottleneck-dim", "8", "--checkpoint-every", "4", "--precision", "fp32"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """photos/, labelled train/ and val/, and a finished run of six steps."""
    root = tmp_path_factory.mktemp("card")
    rng = np.random.default_rng(0)
    for name in [f"photos/{i}" for i in range(8)] + [
        f"{s}/{c}/{i}" for s in ("train", "val") for c in "ab" for i in "01"
    ]:
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        field = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(field).resize((64, 60), Image.Resampling.BICUBIC).save(path)
    train(root / "run", root / "photos")
    return root


def train(out, photos, steps=6):
    assert main(["pretrain", *SMALL, "--data", str(photos), "--out", str(out), "--steps", str(steps)]) == 0


@pytest.fixture
def run(root, tmp_path):
    """A copy of the run, to be changed."""
    import shutil

    return shutil.copytree(root / "run", tmp_path / "run")


def card(run, capsys, *flags):
    """Facts, text and metadata of a card."""
    assert main(["card", str(run), "--json", *map(str, flags)]) == 0
    facts = json.loads(capsys.readouterr().out)
    text = (run / "card.md").read_text() if "--out" not in flags else ""
    return facts, text, ModelCard(text).data.to_dict() if text else {}


def row(text, name):
    """The second cell of a row of any table."""
    return re.search(rf"^\| {re.escape(name)} \| (.*?) \|", text, re.MULTILINE)[1]


# --- what a run's files say ----------------------------------------------------------------------------------------


def test_facts_are_those_of_the_run(run, root, capsys):
    facts, text, _ = card(run, capsys)
    model = opendino.load(run)
    assert facts["model"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["model"]["config"] == model.config.model_dump(mode="json")
    assert facts["model"]["preprocess"] == model.preprocess.model_dump(mode="json")
    training = facts["training"]
    assert (training["step"], training["steps"], training["images_seen"], training["precision"]) == (6, 6, 24, "fp32")
    assert facts["data"]["images"] == 8
    assert facts["sessions"][0]["software"]["opendino"] == opendino.__version__
    assert row(text, "images seen") == "24"
    assert row(text, "regime") == "fp32"
    assert row(text, "patch size, width") == "14 pixels, 16"
    assert "24 images were seen, 3 passes" in text
    assert str(root) not in text
    assert str(run.parent) not in text


def test_training_writes_a_card_by_itself(root):
    assert how_written(root / "run" / "card.md") == "automatic"
    assert "not recorded" in (root / "run" / "card.md").read_text()


def test_the_code_of_the_card_runs(run, root, capsys, monkeypatch):
    facts, text, _ = card(run, capsys)
    (root / "photos" / "0.png").rename(run / "image.jpg")
    monkeypatch.chdir(run)
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)
    assert names["features"].cls.shape == (1, 16)
    grid = facts["grid"]
    assert names["features"].patches.shape == (1, grid[0] * grid[1], 16)
    assert f"(1, {grid[0]} × {grid[1]}, 16)" in text
    (run / "image.jpg").rename(root / "photos" / "0.png")


def test_a_run_that_was_killed(run, capsys):
    """Its last session has no end; its weights are older than its last step; a line is cut off."""
    lines = [json.loads(line) for line in (run / "sessions.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["start", "end"]
    (run / "sessions.jsonl").write_text(json.dumps(lines[0]) + '\n{"event": "e')
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"steps": 9}))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    facts, text, _ = card(run, capsys)
    assert "**The run was not finished**: these are the weights of step 6 of 9." in text
    spent = sum(4 / r["images_per_s"] for r in records if r["step"])
    assert facts["time"]["seconds"] == pytest.approx(spent)
    assert facts["time"]["device_seconds"] == pytest.approx(spent)
    assert "without start, probes and checkpoints" in facts["time"]["source"]


def test_a_run_of_older_code_says_what_is_not_recorded(run, capsys):
    (run / "sessions.jsonl").unlink()
    facts, text, meta = card(run, capsys)
    for name in ("hardware", "processes", "software", "energy, kWh", "carbon emitted, kg CO2eq", "developed by"):
        assert row(text, name) == "not recorded", name
    assert facts["impact"]["co2_kg"] is None
    assert "co2_eq_emissions" not in meta
    assert facts["data"]["images"] == 8  # the checkpoint knows
    facts, text, meta = card(
        run, capsys, "--device", "a100", "--hours", 10, "--devices", 2, "--grid", 0.1, "--pue", 1.2
    )
    assert facts["impact"]["kwh"] == pytest.approx(10 * 2 * 0.4 * 1.2)
    assert meta["co2_eq_emissions"]["emissions"] == pytest.approx(960)  # grams
    assert row(text, "hardware") == "2 × NVIDIA A100 SXM 80 GB, as stated"


def test_a_run_of_several_sessions(root, tmp_path, capsys):
    config = parse_config((root / "run" / "config.yaml").read_text(), "run")
    for steps in (4, 6):
        (tmp_path / "run" / "config.yaml").unlink(missing_ok=True)  # a longer run is one with other settings
        Trainer(config.model_copy(update={"steps": steps, "out": str(tmp_path / "run")})).train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "sessions.jsonl").read_text().splitlines()]
    assert [(x["event"], x["step"]) for x in lines] == [("start", 0), ("end", 4), ("start", 4), ("end", 6)]
    capsys.readouterr()
    facts, text, _ = card(tmp_path / "run", capsys)
    assert facts["time"]["sessions"] == 2
    assert facts["time"]["seconds"] == pytest.approx(lines[1]["wall_s"] + lines[3]["wall_s"])
    assert "in 2 sessions" in row(text, "hours")


def test_a_session_has_its_end_however_it_ends(tmp_path, caplog):
    with pytest.raises(ZeroDivisionError), recorded_session(tmp_path, lambda: {"device": "cpu"}, lambda: 3):
        1 / 0  # noqa: B018
    with recorded_session(None, lambda: {}, lambda: 3):  # not the first process
        pass
    start, end = (json.loads(line) for line in (tmp_path / "sessions.jsonl").read_text().splitlines())
    assert (start["event"], start["device"], start["step"]) == ("start", "cpu", 3)
    assert (end["event"], end["step"]) == ("end", 3)
    assert 0 <= end["wall_s"] < 5
    with recorded_session(tmp_path / "gone", lambda: {}, lambda: 3):
        pass
    assert "will not know this session" in caplog.text


def test_a_fine_tuned_run(run, root, tmp_path, capsys):
    out = tmp_path / "tuned"
    words = ["--train", root / "train", "--val", root / "val", "--mode", "last-k", "--last-k", 1, "--epochs", 1]
    assert main(["finetune", "--model", str(run), *map(str, words), "--out", str(out)]) == 0
    capsys.readouterr()
    facts, text, meta = card(out, capsys, "--base-model", "someone/model")
    assert (facts["kind"], facts["training"]["images_seen"]) == ("finetuned", 4)
    assert row(text, "mode") == "last-k"
    assert f"linear probe before tuning {facts['training']['probe']:.2f}" in text
    assert meta["base_model"] == "someone/model"
    assert row(text, "hours") == "not recorded"


def test_stages_weights_to_start_from_and_a_teacher(run, capsys):
    """Settings that other versions have: the card reads them, the verdict is left out."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    stages = [
        {"name": "small", "steps": 4},
        {"name": "large", "steps": 4, "batch_size": 2, "crops": {"global_size": 70}},
    ]
    more = {"steps": 8, "stages": stages, "init": {"weights": "/home/me/dinov2_vits14.pth"}, "later": 1}
    (run / "config.yaml").write_text(yaml.safe_dump(config | more))
    facts, text, _ = card(run, capsys)
    assert facts["training"]["images_seen"] == 4 * 4 + 2 * 2
    assert "small: steps 1 to 4, batch 4; large: steps 5 to 8, batch 2, crops.global_size 70" in text
    assert "crops of at most 70 and 28 pixels" in text
    assert row(text, "started from weights") == "dinov2_vits14.pth"
    assert "comes from dinov2_vits14.pth and inherits its limits" in text
    assert "/home/me" not in text
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"teacher": "facebook/dinov2-small"}))
    _, text, _ = card(run, capsys)
    assert row(text, "distilled from") == "facebook/dinov2-small"
    assert "distilled from a frozen teacher" in text


# --- hours and energy by hand ---------------------------------------------------------------------------------------


def eight(step):
    return 8


def test_hours_by_hand(tmp_path):
    """Ten steps of 2 s: 1–4 before sessions were recorded, 5–7 in a whole session of 9 s, 8–10 in a killed one."""
    records = [{"step": s, "images_per_s": 4.0} for s in range(1, 11)]
    gpu = {"event": "start", "device": "cuda", "processes": 3, "machines": 1}
    sessions = [gpu | {"step": 4}, {"event": "end", "step": 7, "wall_s": 9.0}, gpu | {"step": 7}]
    found = measured_time(tmp_path, records, sessions, eight)
    assert found["seconds"] == 4 * 2 + 9 + 3 * 2
    assert found["device_seconds"] is None  # how many devices made the first four steps is not known
    found = measured_time(tmp_path, records[4:], sessions, eight)
    assert found["device_seconds"] == 3 * (9 + 6)
    cpu = {"event": "start", "device": "cpu", "processes": 4, "machines": 2, "step": 0}
    found = measured_time(tmp_path, records, [cpu, {"event": "end", "step": 10, "wall_s": 30.0, "cpu_s": 50.0}], eight)
    assert (found["seconds"], found["device_seconds"], found["cpu_seconds"]) == (30, 60, 50)
    (tmp_path / "sessions").mkdir()
    for i in (1, 2):
        (tmp_path / "sessions" / f"{i}.json").write_text(json.dumps({"wall_s": 100.0 * i, "cpu_s": 7.0}))
    assert measured_time(tmp_path, records, [], eight)["seconds"] == 300
    assert measured_time(tmp_path / "no", [], [], eight) is None


@pytest.mark.parametrize(("name", "kind", "words"), [
    ("NVIDIA A100-SXM4-80GB", "a100", "8 × NVIDIA A100-SXM4-80GB"),
    ("NVIDIA H100 80GB HBM3", "h100", "8 × NVIDIA H100 80GB HBM3"),
    ("NVIDIA H200", "h200", "8 × NVIDIA H200"),
    ("NVIDIA GeForce RTX 4090", None, "8 × NVIDIA GeForce RTX 4090"),
])  # fmt: skip
def test_power_is_that_of_devices_that_the_plan_knows(name, kind, words):
    session = {"device": "cuda", "device_name": name, "processes": 8, "machines": 1}
    assert (kind_of(session), machine(session)) == (kind, words)


def test_energy_by_hand():
    found = energy(22_000, 400, 1.1, 0.385, ["x"])
    assert found["kwh"] == pytest.approx(9680)
    assert found["co2_kg"] == pytest.approx(3726.8)
    assert energy(None, 400, 1.1, 0.385, ["x"])["kwh"] is None


# --- evaluation and fairness ----------------------------------------------------------------------------------------


@pytest.fixture
def suite(run, root, tmp_path, capsys):
    out = tmp_path / "suite"
    args = ["--model", str(run), "--data", str(root), "--out", str(out), "--tasks", "knn", "logreg"]
    assert main(["eval", "suite", *args]) == 0
    capsys.readouterr()
    return out


def test_evaluation_is_in_the_table_and_in_the_index(run, suite, capsys):
    facts, text, meta = card(run, capsys, "--evaluation", suite)
    measured = {c["title"]: c["scores"]["run"] for c in json.loads((suite / "table.json").read_text())["columns"]
                if "run" in c["scores"]}  # fmt: skip
    assert {c["title"]: c["value"] for c in facts["evaluation"]["columns"]} == measured
    assert len(measured) == 2
    name, results = model_index_to_eval_results(ModelCard(text).data.to_dict()["model-index"])
    assert name == "run"
    assert sorted(r.metric_value for r in results) == sorted(round(v, 4) for v in measured.values())
    assert {(r.task_type, r.metric_type) for r in results} == {("image-classification", "accuracy")}
    for title, value in measured.items():
        assert f"| {title} |" in text
        assert f"| {value:.1f} |" in text
    assert meta["license"] == "unknown"


def test_figures_of_another_model_are_refused(run, suite, capsys):
    report = json.loads((suite / "table.json").read_text())
    (suite / "table.json").write_text(json.dumps(report | {"weights_sha256": "0" * 64}))
    assert main(["card", str(run), "--evaluation", str(suite)]) == 2
    assert "not those of" in capsys.readouterr().err
    del report["weights_sha256"]  # an older table is known by the path of the run
    (suite / "table.json").write_text(json.dumps(report))
    assert main(["card", str(run), "--evaluation", str(suite)]) == 0
    assert main(["card", str(run), "--evaluation", str(suite), str(suite)]) == 2
    assert "once more" in capsys.readouterr().err


def test_fairness_is_in_the_card(run, root, tmp_path, capsys):
    rows = [f"val/{c}/{i}.png,{c},{c if i else 'a'},{'north' if i else 'south'}" for c in "ab" for i in (0, 1)]
    (root / "homes.csv").write_text("\n".join(["image,label,prediction,region", *rows]))
    out = tmp_path / "fair"
    assert main(["eval", "fairness", "--csv", str(root / "homes.csv"), "--groups", "region", "--out", str(out)]) == 0
    capsys.readouterr()
    _, text, _ = card(run, capsys, "--fairness", out)
    assert "| north (small) | 2 | 100.0 |" in text
    assert "| south (small) | 2 | 50.0 |" in text
    assert "does not say which model" in text
    result = json.loads((out / "fairness.json").read_text())
    (out / "fairness.json").write_text(json.dumps(result | {"model": "elsewhere"}))
    assert main(["card", str(run), "--fairness", str(out)]) == 2
    assert "are of elsewhere" in capsys.readouterr().err


# --- front matter and citation --------------------------------------------------------------------------------------


def test_front_matter_is_what_hubs_read(run, capsys):
    notes = run / "notes.md"
    notes.write_text("Drawings, CC-BY-4.0.")
    flags = ["--license", "Apache-2.0", "--name", "a: b", "--data-notes", notes, "--region", "Iceland"]
    facts, text, meta = card(run, capsys, *flags)
    data = ModelCard(text).data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "opendino",
        "image-feature-extraction",
    )
    assert "dinov2" in data.tags
    assert data.eval_results is None
    impact = meta["co2_eq_emissions"]
    assert impact["geographical_location"] == "Iceland"
    assert impact["emissions"] == pytest.approx(1000 * facts["impact"]["co2_kg"], abs=1e-3)
    assert "Drawings, CC-BY-4.0." in text
    assert "\n# a: b\n" in text


@pytest.mark.parametrize(("given", "keys"), [
    (None, {"license": "unknown"}),
    ("CC-BY-4.0", {"license": "cc-by-4.0"}),
    ("Our Own, 2", {"license": "other", "license_name": "our-own-2"}),
])  # fmt: skip
def test_licences(given, keys):
    assert licence_keys(given) == keys


def test_citation_file_says_what_the_card_says():
    from pathlib import Path

    cff = yaml.safe_load((Path(__file__).parents[2] / "CITATION.cff").read_text())
    assert cff["version"] == opendino.__version__
    assert f"title = {{{cff['title']}}}" in citation.SOFTWARE
    assert cff["authors"][0]["name"] in citation.SOFTWARE
    paper = cff["references"][0]
    names = " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"])
    assert f"author = {{{names}}}" in citation.PAPER
    assert f"title = {{{paper['title']}}}" in citation.PAPER


# --- the file -------------------------------------------------------------------------------------------------------


def test_a_card_that_was_edited_or_asked_for_stays(run, root, capsys):
    path = run / "card.md"
    path.write_text(path.read_text().replace("## Uses", "## Uses!"))
    assert how_written(path) == "edited"
    assert main(["card", str(run)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["card", str(run), "--overwrite", "--license", "mit"]) == 0
    asked = path.read_text()
    assert how_written(path) == "asked for"
    from opendino.cli.card import automatic_card

    assert automatic_card(run) is None
    assert path.read_text() == asked
    assert main(["card", str(run)]) == 0  # asked for again
    path.unlink()
    start = time.perf_counter()
    assert automatic_card(run) == path
    assert time.perf_counter() - start < 5


def test_mistakes_are_told(run, tmp_path, capsys):
    def fails(*words):
        assert main(["card", *map(str, words)]) in (1, 2)
        return capsys.readouterr().err

    assert "no run folder" in fails(tmp_path)
    assert "--device is 'tpu'" in fails(run, "--device", "tpu")
    assert "--pue is 0.5" in fails(run, "--pue", 0.5)
    assert "--hours is -1" in fails(run, "--hours", "-1")
    assert "does not exist" in fails(run, "--data-notes", tmp_path / "none.md")
    assert "does not exist" in fails(run, "--evaluation", tmp_path)
    assert "does not exist" in fails(run, "--fairness", tmp_path)
    (run / "weights" / "teacher.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0 nothing")
    assert "no whole safetensors file" in fails(run)
    (run / "weights" / "teacher.safetensors").unlink()
    assert "first checkpoint" in fails(run)
