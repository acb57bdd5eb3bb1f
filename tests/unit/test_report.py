# SPDX-License-Identifier: Apache-2.0
"""The page of a run: whole, half-finished, with figures missing; and the command that writes it."""

import base64
import io
import json
import math
import re

import pytest
import yaml
from PIL import Image

from opendino.cli import main
from opendino.errors import DataError
from opendino.pretrain.config import parse_config
from opendino.report.page import Figure, Note, Section, write_page
from opendino.report.panels import PANELS, names, panels
from opendino.report.plots import curves, running_mean
from opendino.report.training import duration, flat, progress, write_training_report

SETTINGS = """
{steps: 400, batch_size: 16, heads: {num_prototypes: 64}, optim: {clip_grad: 3.0}, model: {embed_dim: 32, num_heads: 2}}
"""


def record(step):
    figures = {
        "step": step, "loss": 6.0 - step / 400, "dino": 4.0, "dino_global": 1.0, "dino_local": 3.0, "ibot": 2.0,
        "koleo": 0.5, "feature_cls": 0.3, "hog_cls": 0.4, "lr": 1e-3, "last_layer_lr": 1e-3,
        "weight_decay": 0.04, "momentum": 0.99,
        "teacher_temp": 0.04,
        "grad_norm_backbone": 1.0, "grad_norm_dino_head": 2.0, "images_per_s": 80.0, "data_wait": 0.1, "mfu": 0.3,
        "tflops": 0.01, "peak_memory_gb": 1.2, "bad_steps": 0, "image_errors": 0,
    }  # fmt: skip
    if step % 10 == 0:
        figures |= {
            "teacher_entropy": 3.0, "prototype_use": 0.8, "prototypes_won": 25, "feature_rank": 9.0,
            "koleo_distance": 0.6, "near_duplicates": 0.0, "cls_norm_max": 1.5, "patch_norm_max": 2.5,
            "cls_norm_outliers": 0.0, "patch_norm_outliers": 0.0, "update_norm_backbone": 1e-3,
            "update_norm_dino_head": 0.0,
        }  # fmt: skip
    checked = {"probe": {"knn20_top1": 40.0, "knn20_mean": 30.0}, "guard": {"feature_rank": 12.0}}
    return figures | (checked if step % 100 == 0 else {})


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "first"
    (folder / "samples").mkdir(parents=True)
    (folder / "weights").mkdir()
    (folder / "weights" / "teacher.safetensors").touch()
    config = json.loads(parse_config(SETTINGS, "test").model_dump_json())
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for step in (0, 100, 200):
        Image.new("RGB", (8 + step, 8)).save(folder / "samples" / f"step_{step:08d}.png")
    write_records(
        folder, [{"step": 0, "probe": {"knn20_top1": 30.0, "knn20_mean": 20.0}}] + [record(s) for s in range(1, 251)]
    )
    return folder


def write_records(folder, records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def pictures(html):
    return [base64.b64decode(x) for x in re.findall(r"data:image/png;base64,([^\"]+)", html)]


def test_the_page_has_the_verdict_first_and_every_picture(run):
    path = write_training_report(run, [{"level": "bad", "since_step": 3, "text": "Lower <the> rate."}])
    html = path.read_text()
    assert path == run / "report.html"
    assert html.index("Lower &lt;the&gt; rate.") < html.index("<figure>")
    sizes = [Image.open(io.BytesIO(p)).size for p in pictures(html)]
    assert len(sizes) == sum(len(chosen) for chosen in PANELS.values()) + 2
    assert (8, 8) in sizes
    assert (208, 8) in sizes  # the first and the newest
    assert (108, 8) not in sizes
    for part in (
        "Step 250 of 400",
        "30 seconds to go",
        "optim.clip_grad",
        "opendino resume",
        "opendino.load",
        "viewport",
    ):
        assert part in html
    assert not re.findall(r"(?:src|href)=\"(?!data:)", html)


def test_a_finished_run_is_not_continued(run):
    write_records(run, [record(400)])
    html = write_training_report(run).read_text()
    assert "the run is complete" in html
    assert "opendino resume" not in html


def test_missing_figures_and_cut_lines_are_left_out(run):
    write_records(run, [{"step": s, "loss": math.nan, "dino": 4.0, "probe": None} for s in range(1, 5)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "di')
    (run / "weights" / "teacher.safetensors").unlink()
    html = write_training_report(run).read_text()
    assert len(pictures(html)) == 1 + 2
    assert "There is no checkpoint yet" in html
    assert "Step 4 of 400" in html
    assert "<h2>Speed" not in html


def test_a_folder_without_a_run_or_a_step_says_so(tmp_path, run):
    with pytest.raises(DataError, match="no config.yaml"):
        write_training_report(tmp_path)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match="Let it train first"):
        write_training_report(run)


def test_the_command_prints_the_verdict(run, capsys):
    assert main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert "ok" in out
    assert "report.html" in out
    assert main(["report", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(run / "report.html")
    assert found["findings"][0]["level"] == "ok"
    assert found["findings"][0]["text"] in (run / "report.html").read_text()
    assert main(["report", str(run.parent)]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_names_resolve_prefixes_and_probes():
    assert names([record(100)], ["grad_norm_*", "dino"]) == ["grad_norm_backbone", "grad_norm_dino_head", "dino"]
    assert names([record(100)], ["probe/*"]) == ["probe/knn20_mean", "probe/knn20_top1"]
    assert panels([record(1)], {}, PANELS["Teacher"]) == []


def test_running_mean_equals_plain_means():
    y = [float(i * i % 7) for i in range(20)]
    x, means = running_mean(list(range(20)), y, 4)
    assert x == list(range(3, 20))
    assert means == pytest.approx([sum(y[i - 3 : i + 1]) / 4 for i in range(3, 20)])


def test_curves_take_zeros_on_a_log_scale_and_long_series():
    steps = list(range(1000))
    png = curves({"a": (steps, [0.0] + [1e-3] * 999), "b": ([5], [2.0])}, "t", "u", marks={"m": 1.0}, log=True)
    assert Image.open(io.BytesIO(png)).size == (572, 330)


def test_durations_settings_and_progress_without_speed():
    assert duration(90) == "90 seconds"
    assert duration(5400) == "90.0 minutes"
    assert duration(3 * 86400) == "3.0 days"
    assert flat({"a": 1, "b": {"c": [1, 2]}}) == [("a", "1"), ("b.c", "[1, 2]")]
    assert "to go" not in progress([{"step": 3}], {"steps": 9})


def test_page_parts_are_escaped_and_ordered(tmp_path):
    section = Section(
        "s", ["p<"], ["c"], [["r"]], [Figure(b"x", "my words")], [Note("ok", "n& --optim.lr.")], ["run me"], folded=True
    )
    write_page(tmp_path / "x.html", "t", [section])
    html = (tmp_path / "x.html").read_text()
    order = [
        html.index(x)
        for x in ("n&amp; <code>--optim.lr</code>.", "p&lt;", "run me", "<details>", "<td>r", "my words<", "</details>")
    ]
    assert order == sorted(order)
