# SPDX-License-Identifier: Apache-2.0
"""Precision by machine; the loss scale of fp16; being asked to stop."""

import os
import signal

import pytest
import torch

from opendino.pretrain.device import LossScale, choose_precision, cpu_has_bf16
from opendino.pretrain.interrupts import StopRequest, TrainingStopped


def test_precision_follows_its_name_and_auto_the_machine():
    cpu = torch.device("cpu")
    assert choose_precision("fp32", cpu) is None
    assert choose_precision("fp16", cpu) is torch.float16
    assert choose_precision("bf16", cpu) is torch.bfloat16
    assert choose_precision("auto", torch.device("cuda")) is torch.bfloat16
    assert choose_precision("auto", torch.device("mps")) is None
    assert choose_precision("auto", cpu) is (torch.bfloat16 if cpu_has_bf16() else None)


def test_the_scale_halves_after_an_overflow_and_doubles_after_long_without():
    scale = LossScale(True, scale=8.0, growth_interval=3)
    for finite, expected in [(False, 4), (True, 4), (True, 4), (True, 8), (True, 8), (False, 4), (True, 4), (True, 4)]:
        scale.update(finite)
        assert scale.value == expected
    again = LossScale(True)
    again.restore(scale.state())
    again.growth_interval = 3
    again.update(True)
    assert again.value == 8


def test_the_scale_never_falls_below_one_and_is_inert_when_off():
    scale, off = LossScale(True, scale=2.0), LossScale(False)
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([2.0, 4.0])
    scale.unscale([p])
    assert p.grad.tolist() == [1.0, 2.0]
    for _ in range(5):
        scale.update(False)
        off.update(False)
    off.unscale([p])
    assert (scale.value, off.value, p.grad.tolist()) == (1.0, 1.0, [1.0, 2.0])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_the_first_signal_is_noted_and_the_handlers_come_back(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.number == number
    assert signal.getsignal(number) is before


def test_a_second_interrupt_interrupts():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_stopped_a_run_says_how_to_go_on():
    stopped = TrainingStopped(signal.SIGUSR1, 12, "runs/first")
    assert stopped.number == signal.SIGUSR1
    assert str(stopped) == "Stopped at step 12; continue with: opendino resume runs/first"
