"""The schedule: rates and weights as functions of progress, and one program for each phase."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import compile_counted, load, settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import train_gpt as tg

JEPA = {"jepa_chunk_size": 4, "jepa_latent_dim": 8, "jepa_proj_hidden": 12}


def phase_at(step: int, seconds: float = 0.0, **changes: object) -> tg.Phase:
    """The phase of a step after some seconds of training."""
    h = settings(**{"iterations": 20_000, **changes})
    return tg.schedule(tg.Progress(step, h.iterations, seconds, h.training_seconds), h)


# ---- Progress ----


@pytest.mark.parametrize(
    ("progress", "fraction", "steps_left"),
    [
        (tg.Progress(0, 100, 0.0, math.inf), 0.0, 100),
        (tg.Progress(25, 100, 9.0, math.inf), 0.25, 75),
        # Seconds end the run: 2 s a step.
        (tg.Progress(25, 1000, 50.0, 200.0), 0.25, 75),
        (tg.Progress(101, 1000, 202.0, 200.0), 1.01, 0),
        # Steps end it although there is a deadline.
        (tg.Progress(25, 100, 50.0, 600.0), 0.25, 75),
        # Nothing is known of the speed yet.
        (tg.Progress(0, 100, 0.0, 600.0), 0.0, 100),
        (tg.Progress(0, 100, 3.0, 600.0), 0.005, 100),
        (tg.Progress(0, 0, 0.0, math.inf), 0.0, 0),
    ],
)
def test_progress_is_by_steps_or_seconds_whichever_is_further(progress, fraction, steps_left):
    assert progress.fraction == pytest.approx(fraction)
    assert progress.steps_left == pytest.approx(steps_left)


# ---- Rates and weights ----

SHORT = {"iterations": 300, "warmdown_iters": 150}
CAPPED = {"max_wallclock_seconds": 600, "warmdown_iters": 100}
SLOW = {"max_wallclock_seconds": 600, "warmdown_iters": 3500}
FRACTION = {"max_wallclock_seconds": 600, "warmdown_frac": 0.5, "warmdown_iters": 9}
BYTE_COMMAND = {"max_wallclock_seconds": 600, "iterations": 9000, "warmdown_iters": 3000}


@pytest.mark.parametrize(
    ("changes", "step", "seconds", "scale"),
    [
        # Steps end the run: 1 until the warm-down, then linear to 0 after the last step.
        (SHORT, 0, 0.0, 1.0),
        (SHORT, 225, 9.0, 0.5),
        ({"iterations": 300, "warmdown_iters": 0}, 299, 9.0, 1.0),
        # A warm-down longer than the run takes 0.6 of it.
        ({"iterations": 100, "warmdown_iters": 3500}, 70, 9.0, 0.5),
        # Seconds end the run: 1 s a step, 600 s, so 600 steps.
        (CAPPED, 550, 550.0, 0.5),
        (CAPPED, 600, 600.0, 0.0),
        # A slow machine: 10 s a step, 60 steps in all; the warm-down is the last 36 of them.
        (SLOW, 42, 420.0, 0.5),
        # The byte command, 63.14 ms a step: ITERATIONS=9000 ends it first, and at 0.
        (BYTE_COMMAND, 6000, 378.84, 1.0),
        (BYTE_COMMAND, 9000, 568.3, 0.0),
        # By fraction, of steps or seconds, down to a floor.
        (FRACTION, 4000, 0.0, 1.0),
        (FRACTION, 15_000, 0.0, 0.5),
        (FRACTION, 100, 450.0, 0.5),
        (FRACTION, 19_000, 0.0, 0.1),
        (FRACTION | {"min_lr": 0.25}, 19_000, 0.0, 0.25),
        (SHORT | {"min_lr": 0.25}, 299, 9.0, 0.25),
    ],
)
def test_the_learning_rate_falls_to_0_at_the_end_of_the_run(changes, step, seconds, scale):
    assert phase_at(step, seconds, **changes).lr_scale == pytest.approx(scale, abs=1e-3)


@pytest.mark.parametrize(
    ("warmup", "step", "momentum"),
    [(100, 0, 0.92), (100, 50, 0.955), (100, 5000, 0.99), (0, 0, 0.99)],
)
def test_momentum_rises_linearly_and_then_stays(warmup, step, momentum):
    phase = phase_at(step, muon_momentum_warmup_steps=warmup)
    assert phase.muon_momentum == pytest.approx(momentum)


@pytest.mark.parametrize(
    ("step", "seconds", "weight"),
    [
        (2700, 0.0, 0.0),
        (4950, 0.0, 0.0005),
        (7199, 0.0, 0.001),
        (7200, 0.0, 0.0),
        (4950, 300.0, 0.0005),  # the steps are further on
        (100, 330.0, 0.0005),  # the seconds are: 330 of 600 is 4950 of 9000
    ],
)
def test_lambda_rises_over_half_the_run_by_steps_or_seconds(step, seconds, weight):
    run = {"iterations": 9000, "max_wallclock_seconds": 600, "jepa_lambda_max": 0.001}
    found = phase_at(step, seconds, **JEPA, **run).jepa_weight
    assert found == pytest.approx(weight, rel=1e-3)
    assert phase_at(step, seconds, **run).jepa_weight == 0  # without the head


@hypothesis_settings(max_examples=60, derandomize=True, deadline=None)
@given(
    changes=st.fixed_dictionaries(
        {
            "jepa_chunk_size": st.sampled_from((0, 4)),
            "jepa_lambda_max": st.sampled_from((0, 0.001)),
            "jepa_phase1_frac": st.sampled_from((0, 0.3)),
            "warmdown_iters": st.sampled_from((0, 15, 10**6)),
            "warmdown_max_fraction": st.sampled_from((0.6, 1)),
            "warmdown_frac": st.sampled_from((0, 0.5)),
            "min_lr": st.sampled_from((0, 0.1)),
            "num_loops": st.sampled_from((0, 2)),
            "enable_looping_at": st.sampled_from((0, 0.4)),
        }
    ),
    deadline=st.sampled_from((math.inf, 20.0, 100.0)),
)
def test_every_phase_of_a_run_has_exactly_one_program(changes, deadline):
    """The repeated layers of a phase, and whether it has the JEPA losses, select its program."""
    h = settings(**changes, loop_start=1, loop_end=1)

    def program(phase: tg.Phase) -> tuple[int, bool]:
        return phase.loops, phase.jepa_weight > 0

    compiled = [program(phase) for phase in tg.programs(h)]
    phases = [tg.schedule(tg.Progress(n, 30, 0.9 * n, deadline), h) for n in range(30)]
    assert len({*compiled}) == len(compiled)
    assert {program(phase) for phase in phases} == {*compiled}
    for phase in phases:
        assert h.min_lr <= phase.lr_scale <= 1
        assert h.muon_momentum_warmup_start <= phase.muon_momentum <= h.muon_momentum
        assert 0 <= phase.jepa_weight <= h.jepa_lambda_max


# ---- Programs ----


@dataclass(frozen=True)
class CountingDevice(tg.Device):
    """A CPU whose programs are counted, by the function that is compiled."""

    programs: dict[str, list[object]] = field(default_factory=dict)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        compiled, self.programs[function.__name__] = compile_counted(function)
        return compiled


class CountingLog(tg.Log):
    """A log that notes the number of programs at each line."""

    def __init__(self, device: CountingDevice) -> None:
        super().__init__()
        self.device, self.counts = device, []

    def __call__(self, line: str) -> None:
        self.counts.append((line.partition(":")[0], len(self.device.programs["losses"])))


def test_warm_up_compiles_every_program_and_the_run_no_other(byte_corpus):
    """Whatever the values of its phases, and after validations."""
    h = settings(data_path=byte_corpus, warmup_steps=2, iterations=8, num_layers=1, **JEPA)
    h = tg.replace(h, stp_enabled=True, val_loss_every=4, warmdown_iters=6, enable_looping_at=0.5)
    h = tg.replace(h, num_loops=1, loop_start=0, loop_end=0)
    device = CountingDevice(torch.device("cpu"), torch.float32, compiled=True)
    log = CountingLog(device)
    torch.manual_seed(0)
    trainer = tg.Trainer(tg.GPT(h), load(h), tg.Ranks(), device, log, math.inf)
    assert trainer.grad_accum == 2
    trainer.train()
    steps = [count for kind, count in log.counts if kind == "step"]
    warm_up = [count for kind, count in log.counts if kind == "warmup_step"]
    assert len(tg.programs(h)) == 4
    assert warm_up == [1, 2, 3, 4]
    assert len(steps) >= 10
    assert {*steps} == {4}
