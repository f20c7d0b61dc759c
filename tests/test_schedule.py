"""The schedule: tables of rates, phases as functions of progress, one program for each."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import compile_counted, load, settings

import train_gpt as tg

JEPA = {"jepa_chunk_size": 4, "jepa_latent_dim": 8, "jepa_proj_hidden": 12}
SWITCHES = [
    {**(JEPA if jepa else {}), "stp_enabled": stp}
    for jepa, stp in itertools.product((0, 1), (0, 1))
]


def auxiliary_losses(phase: tg.Phase) -> tuple[bool, bool]:
    """Which auxiliary losses the program of a phase has: JEPA's, STP's."""
    return phase.jepa_weight > 0, phase.stp_weight > 0


# ---- Rates ----


def test_momentum_rises_linearly_then_stays():
    def momentum(step: int, steps: int) -> float:
        h = settings(muon_momentum_warmup_steps=steps, iterations=20_000)
        return tg.schedule(tg.Progress(step, h.iterations, 0.0, math.inf), h).muon_momentum

    table = {0: 0.92, 50: 0.955, 100: 0.99, 5000: 0.99}
    assert {step: pytest.approx(momentum(step, 100)) for step in table} == table
    assert momentum(0, 0) == 0.99


@pytest.mark.parametrize(
    ("env", "step", "elapsed", "scale"),
    [
        # Steps end the run: 1 until the warm-down, then linear to 0 after the last step.
        ({"iterations": 300, "warmdown_iters": 150}, 0, 0.0, 1.0),
        ({"iterations": 300, "warmdown_iters": 150}, 150, 9.0, 1.0),
        ({"iterations": 300, "warmdown_iters": 150}, 225, 9.0, 0.5),
        ({"iterations": 300, "warmdown_iters": 150}, 299, 9.0, 1 / 150),
        # A warm-down longer than the run takes 0.6 of it.
        ({"iterations": 100, "warmdown_iters": 3500}, 40, 9.0, 1.0),
        ({"iterations": 100, "warmdown_iters": 3500}, 70, 9.0, 0.5),
        # Seconds end the run: 1 s a step, 600 s, so 600 steps.
        ({"max_wallclock_seconds": 600, "warmdown_iters": 100}, 500, 500.0, 1.0),
        ({"max_wallclock_seconds": 600, "warmdown_iters": 100}, 550, 550.0, 0.5),
        ({"max_wallclock_seconds": 600, "warmdown_iters": 100}, 600, 600.0, 0.0),
        # A slow machine: 10 s a step, 60 steps in all; the warm-down is the last 36 of them.
        ({"max_wallclock_seconds": 600, "warmdown_iters": 3500}, 10, 100.0, 1.0),
        ({"max_wallclock_seconds": 600, "warmdown_iters": 3500}, 42, 420.0, 0.5),
        # The byte command, 63.14 ms a step: ITERATIONS=9000 ends it first, and at 0.
        (
            {"max_wallclock_seconds": 600, "iterations": 9000, "warmdown_iters": 3000},
            6000,
            378.84,
            1.0,
        ),
        (
            {"max_wallclock_seconds": 600, "iterations": 9000, "warmdown_iters": 3000},
            9000,
            568.3,
            0.0,
        ),
        ({"iterations": 300, "warmdown_iters": 0}, 299, 9.0, 1.0),
    ],
)
def test_learning_rate_schedule(env, step, elapsed, scale):
    h = settings(**{"iterations": 20_000, **env})
    progress = tg.Progress(step, h.iterations, elapsed, h.training_seconds)
    assert tg.schedule(progress, h).lr_scale == pytest.approx(scale, abs=1e-3)


def test_the_rates_of_a_run_by_steps_fall_to_the_last_step():
    h = settings(iterations=40, warmdown_iters=16)
    scales = [tg.schedule(tg.Progress(n, 40, 0.1 * n, math.inf), h).lr_scale for n in range(40)]
    assert scales[:25] == [1.0] * 25
    assert scales[24:] == pytest.approx([(40 - n) / 16 for n in range(24, 40)])


# ---- Progress ----


@pytest.mark.parametrize(
    ("progress", "fraction", "steps_left"),
    [
        (tg.Progress(0, 100, 0.0, math.inf), 0.0, 100),
        (tg.Progress(25, 100, 9.0, math.inf), 0.25, 75),
        (tg.Progress(100, 100, 9.0, math.inf), 1.0, 0),
        # Seconds end the run: 2 s a step.
        (tg.Progress(25, 1000, 50.0, 200.0), 0.25, 75),
        (tg.Progress(100, 1000, 200.0, 200.0), 1.0, 0),
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


# ---- Phases ----


@pytest.mark.parametrize("switches", SWITCHES)
def test_the_schedule_is_a_pure_function(switches):
    h = settings(**switches)
    state, before = torch.get_rng_state(), tg.asdict(h)
    points = [tg.Progress(n, 30, 0.5 * n, 20.0) for n in range(31)]
    forward = [tg.schedule(progress, h) for progress in points]
    backward = [tg.schedule(progress, h) for progress in reversed(points)]
    assert forward == backward[::-1]
    assert tg.programs(h) == tg.programs(h)
    assert torch.equal(torch.get_rng_state(), state)
    assert tg.asdict(h) == before


@pytest.mark.parametrize("deadline", [math.inf, 20.0, 100.0])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"jepa_lambda_max": 0},
        {"stp_lambda": 0},
        {"jepa_phase1_frac": 0, "jepa_phase2_frac": 1},
        {"warmdown_iters": 0},
        {"warmdown_iters": 10**6, "warmdown_max_fraction": 1},
    ],
)
@pytest.mark.parametrize("switches", SWITCHES)
def test_every_phase_of_a_run_has_a_program(switches, changes, deadline):
    """Whether a phase has auxiliary losses selects its program; no two programs are the same."""
    h = settings(**switches, **changes)
    compiled = [auxiliary_losses(phase) for phase in tg.programs(h)]
    assert len(set(compiled)) == len(compiled)
    used = set()
    for step in range(30):
        phase = tg.schedule(tg.Progress(step, 30, 0.9 * step, deadline), h)
        used.add(auxiliary_losses(phase))
        assert 0 <= phase.lr_scale <= 1
        assert h.muon_momentum_warmup_start <= phase.muon_momentum <= h.muon_momentum
        assert 0 <= phase.jepa_weight <= h.jepa_lambda_max
        assert phase.stp_weight == (h.stp_lambda if h.stp_enabled else 0)
    assert used == set(compiled)


# ---- Programs ----


@dataclass(frozen=True)
class CountingDevice(tg.Device):
    """A CPU whose programs are counted, by the function that is compiled."""

    programs: dict[str, list[object]] = field(default_factory=dict)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        compiled, self.programs[function.__name__] = compile_counted(function)
        return compiled


@pytest.mark.parametrize("switches", SWITCHES)
def test_a_run_compiles_exactly_the_programs_of_the_schedule(switches, byte_corpus):
    """Warm-up compiles all of them; no step of the run compiles another, whatever its weights."""
    h = settings(data_path=byte_corpus, warmup_steps=4, iterations=10, **switches)
    h = tg.replace(h, val_loss_every=4)  # training continues after validations
    device = CountingDevice(torch.device("cpu"), torch.float32, compiled=True)
    torch.manual_seed(0)
    steps = tg.Trainer(tg.GPT(h), load(h), h, tg.Ranks(), device, tg.Log())
    assert steps.grad_accum == 2
    compiled, told, take_step = device.programs["losses"], [], steps.take_step

    def take_told_step(phase: tg.Phase, *batch: torch.Tensor) -> dict[str, torch.Tensor]:
        terms = take_step(phase, *batch)
        told.append((phase, len(compiled)))
        return terms

    steps.take_step = take_told_step
    steps.train()
    with tg.matmul_precision("medium"):  # as in training
        for weight in (0.3, 12.5):  # weights that the schedule does not give
            phase = tg.programs(h)[-1]
            if phase.jepa_weight:
                phase = phase._replace(jepa_weight=weight)
            if phase.stp_weight:
                phase = phase._replace(stp_weight=2 * weight)
            steps.take_step(phase, *torch.randint(260, (2, 16, 64)))
    phases, counts = zip(*told, strict=True)
    wanted = len(tg.programs(h))
    assert wanted == 1 + bool(h.jepa_chunk_size)
    assert counts == tuple(min(n + 1, wanted) for n in range(4 + 10 + 2))
    # The steps of the run had different values of what a phase holds.
    phases = phases[4:14]
    assert len({phase.lr_scale for phase in phases}) > 3
    assert len({phase.muon_momentum for phase in phases}) > 3
    assert len({phase.jepa_weight for phase in phases}) > 3 or not h.jepa_chunk_size
