"""Training: the loop, its clock and log, the warm-up, and the choice of attention and compiler."""

import errno
import math
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import choose, load, score, settings, trainer
from torch.nn import functional

import train_gpt as tg


def make_trainer(
    h: tg.Hyperparameters, device: tg.Device, attend: tg.Attend = tg.attend_sdpa
) -> tg.Trainer:
    """A trainer of a tiny model of seed 0, with the settings' own deadline."""
    torch.manual_seed(0)
    return trainer(tg.GPT(h, attend), load(h), device, h.training_seconds)


def trained(
    h: tg.Hyperparameters, device: tg.Device, attend: tg.Attend = tg.attend_sdpa
) -> tg.Trainer:
    """The trainer after its training."""
    run = make_trainer(h, device, attend)
    run.train()
    return run


# ---- Steps ----


def test_the_loss_falls_and_the_ema_follows(byte_corpus: Path, cpu):
    """With a constant decay of 0.997 the average would score near ln 260 after so few steps."""
    run = trained(settings(data_path=byte_corpus, iterations=30), cpu)
    assert run.average.copy_to_model(tg.Log()) == "ema"
    losses = run.step_log.losses
    assert len(losses) == 30
    assert losses[0] == pytest.approx(math.log(260), abs=0.2)
    assert losses[-1] < losses[0] - 1.5
    scoring_pass = tg.ScoringPass(
        run.model.eval().forward_logits, run.h.window_tokens, run.h.window_tokens
    )
    assert score(scoring_pass, run.val, cpu).val_loss < math.log(260) - 1.5


def test_training_alone_may_round_the_inputs_of_products(byte_corpus: Path, cpu):
    """Validation is of full precision, and what follows training has that of before."""
    found = set()

    def attend(*qkv: torch.Tensor, **options: Any) -> torch.Tensor:
        found.add((torch.is_grad_enabled(), torch.get_float32_matmul_precision()))
        return tg.attend_sdpa(*qkv, **options)

    trained(settings(data_path=byte_corpus, iterations=2, val_loss_every=1), cpu, attend)
    assert found == {(True, "medium"), (False, "highest")}
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.fault(34)
def test_training_ends_at_a_gradient_that_is_not_finite_with_finite_weights(byte_corpus, cpu):
    run = make_trainer(settings(data_path=byte_corpus, iterations=6), cpu)
    run.model.tok_emb.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(tg.DivergenceError, match=r"step 1: .* ATTN"):
        run.train()
    assert all(weight.isfinite().all() for weight in run.average.weights.values())


def test_the_message_names_the_terms_that_are_not_finite(cpu):
    log = tg.StepLog(cpu, tg.Log(silent=True), tg.Ranks(), 9, 0)
    log.record({"train_loss": 5.1, "stp": 0.2})
    with pytest.raises(tg.DivergenceError, match=r"step 2: the loss is inf: stp or its gradient"):
        log.record({"train_loss": 5.1, "stp": math.inf})


@pytest.mark.parametrize("features", [{}, {"tie_embeddings": 0, "stp_enabled": 1}])
def test_micro_batches_change_nothing_but_rounding(byte_corpus: Path, cpu, features):
    """After one step the optimizers' state is the gradient times constants."""
    states = []
    for micro, parts in ((1024, 1), (128, 8)):
        h = settings(data_path=byte_corpus, micro_batch_tokens=micro, **features)
        run = make_trainer(h, cpu)
        assert run.grad_accum == parts
        run.take_step(tg.programs(h)[0], *run.batches.batch(0))
        states.append(run.optimizers.state())
    assert states[0]["muon/blocks.0.mlp.down.weight"].any()
    for name, one in states[0].items():
        torch.testing.assert_close(one, states[1][name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("features", [{}, {"jepa_chunk_size": 4, "stp_enabled": 1}])
def test_warm_up_leaves_no_trace(byte_corpus: Path, cpu, monkeypatch, capsys, features):
    """Losses and random numbers are as without it; here compiling does nothing."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    h = settings(data_path=byte_corpus, warmup_steps=3, iterations=4, **features)
    losses, draws = [], []
    for compiled in (False, True):
        run = trained(h, tg.replace(cpu, compiled=compiled))
        losses.append(run.step_log.losses)
        draws.append(torch.get_rng_state())
        assert ("warmup_step:3/3" in capsys.readouterr().out) is compiled
    assert losses[0] == losses[1]
    assert torch.equal(*draws)


# ---- Clock and log ----


class FakeTime:
    """A monotonic clock that a test moves."""

    now = 0.0


@pytest.fixture
def fake_time(monkeypatch) -> FakeTime:
    clock = FakeTime()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def slow_attention(clock: FakeTime, seconds: Callable[[bool], float]) -> tg.Attend:
    """Attention that takes so many seconds, given whether it is part of a training step."""

    def attend(*qkv: torch.Tensor, **options: Any) -> torch.Tensor:
        clock.now += seconds(torch.is_grad_enabled())
        return tg.attend_sdpa(*qkv, **options)

    return attend


ONE_PASS = {"num_layers": 1, "micro_batch_tokens": 1024}  # a step calls attention once


@pytest.mark.fault(25)
@pytest.mark.parametrize(("cap", "steps"), [(0.001, 1), (10.0, 7), (30.0, 28)])
def test_training_stops_before_the_cap(byte_corpus: Path, cpu, capsys, fake_time, cap, steps):
    """Steps take 1 s, the third 2 s: the run leaves room for one as slow as any recent one."""
    calls = iter([1.0, 1.0, 2.0] + [1.0] * 100)
    attend = slow_attention(fake_time, lambda trains: next(calls) if trains else 0.0)
    limits = {"iterations": 100_000, "max_wallclock_seconds": cap, "warmdown_iters": 20}
    run = trained(settings(data_path=byte_corpus, **ONE_PASS, **limits), cpu, attend)
    assert "stopping_early: wallclock_cap" in capsys.readouterr().out
    assert run.step == len(run.step_log.losses) == steps  # before the first step nothing is known
    assert run.step_log.elapsed < cap or steps == 1


@pytest.mark.parametrize(("iterations", "validated"), [(5, [0, 2, 4, 5]), (4, [0, 2, 4])])
def test_validation_is_at_its_steps_and_outside_the_clock(
    byte_corpus: Path, cpu, capsys, fake_time, iterations, validated
):
    attend = slow_attention(fake_time, lambda trains: 1.0 if trains else 100.0)
    every = {"iterations": iterations, "val_loss_every": 2, "train_log_every": 0}
    run = trained(settings(data_path=byte_corpus, **ONE_PASS, **every), cpu, attend)
    assert run.step_log.elapsed == iterations
    lines = capsys.readouterr().out.splitlines()
    steps = [line.split()[0] for line in lines if "val_bpb" in line and "step_avg" in line]
    assert steps == [f"step:{step}/{iterations}" for step in validated]


class LateStepLog(tg.StepLog):
    """A log that reads the loss of a step after the launch of the next one, as on CUDA."""

    def launched(self, terms: dict[str, torch.Tensor]) -> None:
        self.running.append((None, list(terms), torch.stack(list(terms.values()))))
        self.record_steps(keep=1)


def test_steps_that_are_known_late_are_logged_and_have_time(
    byte_corpus: Path, cpu, capsys, fake_time
):
    """One step still runs when the next could be launched: both must end before the cap."""
    attend = slow_attention(fake_time, lambda trains: 1.0 if trains else 0.0)
    limits = {"iterations": 1000, "max_wallclock_seconds": 10, "val_loss_every": 3}
    run = make_trainer(settings(data_path=byte_corpus, **ONE_PASS, **limits), cpu, attend)
    run.step_log = LateStepLog(cpu, run.log, tg.Ranks(), 1000, 1)
    run.train()
    # The slowest step took 2 s. After 6 s one step still runs: it and one more could end at 10 s.
    assert run.step == len(run.step_log.losses) == 6
    lines = [x.split()[:2] for x in capsys.readouterr().out.splitlines() if "step_avg" in x]
    logged = [(step.split("/")[0], value.split(":")[0]) for step, value in lines]
    expected = [("step:0", "val_loss")]
    for n in range(1, 7):
        expected.append((f"step:{n}", "train_loss"))
        if n % 3 == 0:
            expected.append((f"step:{n}", "val_loss"))
    assert logged[: len(expected)] == expected


def test_a_log_that_nobody_can_read_ends_no_run(tmp_path: Path, monkeypatch):
    """Nor does a folder that is not there."""

    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    tg.Log(tmp_path / "gone")("step:1/2 train_loss:3.0000")


@pytest.mark.fault(44, 45)
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "final_model.safetensors"
    path.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            tg.write_atomically(path, b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]
    tg.write_atomically(path, b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"new"]


# ---- The device, its attention and its compiler ----


@pytest.fixture
def no_gpu(monkeypatch, back_ends) -> None:
    """A machine without one, whatever is here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("attn", ["flash", "math"])
def test_each_attention_back_end_of_a_cpu_is_the_definition(attn):
    device, _ = choose(settings(attn=attn))
    q, k, v = (torch.randn(2, 24, heads, 8) for heads in (4, 2, 2))
    keys, values = (x.repeat_interleave(2, dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(24, 24).triu(1).bool(), -math.inf)
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
    assert (device.attention, device.compiled) == (attn, False)
    torch.testing.assert_close(tg.attend_sdpa(q, k, v), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.fault(27)
@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("kind", ["missing", "only FA4", "no GPU"])
def test_a_named_attention_that_cannot_run_is_an_error(monkeypatch, kind):
    fa4, fa3 = types.ModuleType("flash_attn"), types.ModuleType("flash_attn_interface")
    fa4.cute = types.ModuleType("flash_attn.cute")
    monkeypatch.setitem(sys.modules, "flash_attn", fa4 if kind == "only FA4" else None)
    module = fa3 if kind == "no GPU" else None
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    with pytest.raises(tg.SettingsError, match="ATTN=fa3 COMPILE=auto: cannot run here") as error:
        choose(settings(attn="fa3"))
    assert ("needs a Hopper GPU" if module else "No module named 'flash_attn_3'") in str(
        error.value
    )


def no_kernel(y: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image")


BROKEN = {
    "no kernel image": no_kernel,
    "it gave NaN": lambda y: y * math.nan,
    "gave NaN": lambda y: y + (y * 0).sqrt(),  # in its gradient alone
    "its output differs from the math back end's": lambda y: 1.1 * y,
    "its gradient differs": lambda y: y + 0.1 * (y - y.detach()),
}


@pytest.mark.fault(28)
@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("why", BROKEN)
def test_an_attention_that_fails_its_probe_is_left_for_the_next(monkeypatch, why):
    attend = functional.scaled_dot_product_attention

    def broken(*arguments: torch.Tensor, **options: object) -> torch.Tensor:
        y = attend(*arguments, **options)
        return BROKEN[why](y) if torch.backends.cuda.flash_sdp_enabled() else y

    monkeypatch.setattr(functional, "scaled_dot_product_attention", broken)
    device, notes = choose(settings())
    assert device.attention != "flash"
    (note,) = [note for note in notes if note.startswith("attention:flash")]
    assert note.startswith("attention:flash compiled:False not used: ")
    assert why in note


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)]
)
def test_a_gpu_without_bf16_computes_in_float32_and_says_so(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    device, notes = tg.start_device("auto")
    assert (device.device.type, device.dtype, device.compiled) == ("cuda", dtype, True)
    assert ("dtype:fp32, this GPU has no bf16" in notes) == (capability < (8, 0))


GPU_LISTS = [  # values of CUDA_VISIBLE_DEVICES, and whether they hide all GPUs
    (None, False),
    ("0", False),
    ("3,1", False),
    ("GPU-5a3c", False),
    ("MIG-7e1d", False),
    ("", True),
    ("-1", True),
    ("-1,0", True),
    ("NoDevFiles", True),
]


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("value", "hidden"), GPU_LISTS)
@pytest.mark.parametrize("name", ["nvidia0", "nvidia13"])
def test_a_gpu_that_torch_cannot_use_is_an_error_unless_it_is_hidden(
    name, value, hidden, tmp_path, monkeypatch
):
    for node in (name, "nvidiactl", "nvidia-uvm"):
        (tmp_path / node).touch()
    monkeypatch.setattr(tg, "GPU_NODES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    if hidden:
        assert not tg.start_device("auto")[0].is_cuda
        return
    with pytest.raises(tg.SettingsError, match=f"{tmp_path / name}: this machine has a GPU that"):
        tg.start_device("auto")


@pytest.mark.fault(29)
@pytest.mark.usefixtures("no_gpu")
def test_a_compiler_that_fails_is_left_or_an_error_where_asked_for(cpu, monkeypatch):
    """With COMPILE=auto, as on CUDA, every attention is tried compiled, then one without."""

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(tg.SettingsError, match=r"COMPILE=1.*\n(.*\n)*.*no C\+\+ compiler"):
        choose(settings(compile=1))
    device = tg.replace(cpu, compiled=True)
    device, notes = tg.choose_attention(settings(), device, tg.Ranks())
    assert (device.attention, device.compiled) == ("flash", False)
    assert [note.split()[:2] for note in notes] == [
        [f"attention:{name}", "compiled:True"] for name in ("flash", "cudnn", "math")
    ]
    assert all("no C++ compiler" in note for note in notes)


@pytest.mark.slow
def test_compiled_is_the_same_function(byte_corpus: Path):
    device, _ = choose(settings(compile=1, num_layers=2))
    assert device.compiled
    h = settings(data_path=byte_corpus, compile=1, num_layers=2)
    torch.manual_seed(0)
    model = tg.GPT(h, tg.attend_sdpa)
    ids, targets = torch.randint(4, 260, (2, 4, 64))
    torch.testing.assert_close(device.compile(model)(ids, targets), model(ids, targets))
    val = load(h).val
    scores = [
        score(tg.ScoringPass(f(model.forward_logits), 64, 16), val, device)
        for f in (device.compile, lambda function: function)
    ]
    assert scores[0].nats == pytest.approx(scores[1].nats, rel=1e-6)
    assert not torch._dynamo.utils.counters["graph_break"]
