# SPDX-License-Identifier: Apache-2.0
"""The step clock, the tables and the sentence on known times, and the measurements on real work."""

import itertools
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from opendino.images.sources import open_source
from opendino.pretrain.crops import CropsConfig
from opendino.pretrain.data import make_loader
from opendino.pretrain.profile import (
    NOTHING,
    StepClock,
    limit_sentence,
    make_profile,
    measure_loader,
    operator_table,
    profile_table,
    show_profile,
    top_operators,
)

CPU = torch.device("cpu")


def text_of(table):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_clock_that_is_off_measures_and_allocates_nothing():
    clock = StepClock(CPU)
    assert clock.span("backward") is clock.span("ema") is NOTHING
    with clock.span("backward"):
        pass
    clock.step_done()
    assert (clock.seconds, clock.steps, clock.total) == ({}, 0, 0.0)


def test_spans_add_up_and_the_rest_is_other():
    clock = StepClock(CPU, on=True)
    for _ in range(2):
        with clock.span("backward"):
            time.sleep(0.02)
        time.sleep(0.01)
        with clock.span("data wait"):
            time.sleep(0.005)
        with clock.span("backward"):
            time.sleep(0.01)
        clock.step_done()
    profile = make_profile(clock, 8)
    assert list(profile.spans) == ["data wait", "backward", "other"]
    assert profile.spans["backward"] >= 0.06
    assert profile.spans["data wait"] >= 0.01
    assert profile.spans["other"] >= 0.02
    assert sum(profile.spans.values()) == pytest.approx(clock.total)
    assert profile.rate == pytest.approx(16 / clock.total)
    assert profile.compute_rate == pytest.approx(16 / (clock.total - profile.spans["data wait"]))
    assert json.loads(json.dumps(profile.as_dict()))["steps"] == 2
    clock.reset()
    assert (clock.seconds, clock.steps) == ({}, 0)


def test_a_span_counts_when_its_body_raises():
    clock = StepClock(CPU, on=True)
    with pytest.raises(RuntimeError), clock.span("clip"):
        raise RuntimeError
    assert clock.seconds["clip"] >= 0


def test_the_table_has_milliseconds_shares_and_the_rate():
    text = text_of(profile_table({"data wait": 0.1, "backward": 0.3}, steps=4, batch_size=10))
    assert "25.0" in text
    assert "75.0%" in text
    assert "100.0" in text  # the whole step, ms
    assert "100 images/s" in text
    assert "12.5" in text_of(operator_table([("aten::mm", 0.0125, 3)]))


@pytest.mark.parametrize(
    ("loader", "compute", "expected"),
    [
        (310, 100, "Compute is the limit: the loader could feed 3.1× more"),
        (50, 100, "The loader is the limit: compute could take 2.0× more"),
        (104, 100, "equally fast"),
        (None, 100, "was not measured"),
    ],
)
def test_the_sentence_names_the_limit(loader, compute, expected):
    assert expected in limit_sentence(loader, compute)


def test_without_workers_they_take_turns():
    text = limit_sentence(300, 100, num_workers=0)
    assert "loading is 25% of a step" in text
    assert "--num-workers" in text


def test_the_loader_alone_is_measured(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    crops = CropsConfig(global_size=28, local_size=14, num_local=2)
    rate = measure_loader(make_loader(open_source(str(tmp_path)), crops, batch_size=4), 4, budget_s=0.2)
    assert rate > 10
    short = measure_loader(make_loader(open_source(str(tmp_path)), crops, batch_size=4, num_steps=3), 4)
    assert short > 10


def test_a_slow_loader_is_measured_as_slow():
    def batches():
        while True:
            time.sleep(0.02)
            yield 0

    assert 50 < measure_loader(batches(), 4, budget_s=0.2) <= 200


def test_the_costliest_operator_comes_first():
    x = torch.randn(400, 400)
    found = top_operators(lambda: [x @ x for _ in range(5)] + [x + 1], CPU, count=3)
    assert found[0][0] == "aten::mm"
    assert found[0][2] == 5
    assert 1 <= len(found) <= 3
    assert all(a[1] >= b[1] for a, b in itertools.pairwise(found))


def test_a_profile_is_printed(capsys):
    clock = StepClock(CPU, on=True)
    with clock.span("backward"):
        time.sleep(0.01)
    clock.step_done()
    show_profile(make_profile(clock, 4, loader_rate=1e6, operators=[("aten::mm", 0.002, 3)]))
    out = capsys.readouterr().out
    for part in ("backward", "other", "aten::mm", "Compute is the limit"):
        assert part in out
