"""Training: the clock, the loop, no trace of the warm-up, the same bytes from the same seed."""

import itertools
import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import TINY, load, score, settings, trainer

import train_gpt as tg


def trained(h: tg.Hyperparameters, device: tg.Device, **options: object) -> tg.Trainer:
    """A tiny model of seed 0 after its training."""
    torch.manual_seed(0)
    steps = trainer(tg.GPT(h), load(h), h, device, **options)
    steps.train()
    return steps


def test_the_loss_falls(byte_corpus: Path, cpu):
    run = trained(settings(data_path=byte_corpus, iterations=60, warmdown_iters=30), cpu)
    assert run.average.copy_to_model(tg.Log()) == "ema"
    losses = run.step_log.losses
    assert len(losses) == 60
    assert losses[0] == pytest.approx(math.log(260), abs=0.2)
    assert losses[-1] < losses[0] - 2


def test_training_alone_may_round_the_inputs_of_products(byte_corpus, tmp_path, monkeypatch):
    """Validation, GPTQ and scores are of full precision, whatever training leaves behind."""
    found = {}

    def noting(owner, name):
        function = getattr(owner, name)

        def noted(*arguments, **options):
            found.setdefault(name, set()).add(torch.get_float32_matmul_precision())
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, noted)

    noting(tg.Trainer, "take_step")
    noting(tg.WindowScorer, "sums_of")
    noting(tg, "collect_hessians")
    env = {**TINY, "DATA_PATH": str(byte_corpus), "RUN_DIR": str(tmp_path / "run")}
    env |= {"ITERATIONS": "3", "VAL_LOSS_EVERY": "1", "GPTQ_ENABLED": "1", "EVAL_STRIDE": "0"}
    assert tg.main([], {**env, "GPTQ_CALIB_TOKENS": "128"}) == 0
    assert found == {
        "take_step": {"medium"},
        "sums_of": {"highest"},
        "collect_hessians": {"highest"},
    }


def test_ema_of_30_steps_is_far_from_the_start(byte_corpus: Path, cpu):
    """With a constant decay of 0.997 it would be 91 % initialisation and score near ln 260."""
    run = trained(settings(data_path=byte_corpus, iterations=30), cpu)
    run.average.copy_to_model(tg.Log())
    scoring_pass = tg.plain_pass(run.model.eval().forward_logits, run.h)
    assert score(scoring_pass, run.val, cpu).val_loss < math.log(260) - 1.5


class WeightsOfSteps:
    """The learning-rate scale of each step, and all weights after it."""

    def __init__(self, monkeypatch) -> None:
        take_step, self.lr_scales, self.weights = tg.Trainer.take_step, [], []

        def recorded(steps, phase, *batch):
            terms = take_step(steps, phase, *batch)
            self.lr_scales.append(phase.lr_scale)
            self.weights.append({n: p.clone() for n, p in steps.average.params.items()})
            return terms

        monkeypatch.setattr(tg.Trainer, "take_step", recorded)


@pytest.mark.parametrize(
    ("every", "start_frac", "count"), [(5, 0.2, 1), (5, 0.7, 2), (3, 1.0, 3), (1, 0.8, 7)]
)
def test_swa_is_the_equal_average_of_the_weights_at_its_steps(
    byte_corpus, cpu, monkeypatch, every, start_frac, count, capsys
):
    """Multiples of SWA_EVERY at which the learning rate is below SWA_START_FRAC of its peak."""
    h = settings(
        data_path=byte_corpus,
        iterations=20,
        warmdown_iters=10,
        swa_enabled=1,
        swa_every=every,
        swa_start_frac=start_frac,
    )
    recorded = WeightsOfSteps(monkeypatch)
    run = trained(h, cpu)
    steps = zip(recorded.lr_scales, recorded.weights, strict=True)
    due = [
        weights
        for step, (lr_scale, weights) in enumerate(steps, 1)
        if lr_scale < start_frac and step % every == 0
    ]
    assert len(due) == run.average.count == count
    assert run.average.copy_to_model(tg.Log()) == "swa"
    for name, p in run.model.named_parameters():
        want = sum(weights[name].double() for weights in due) / len(due)
        torch.testing.assert_close(p.detach().double(), want, atol=1e-6, rtol=1e-5, msg=name)
    assert f"swa:applying averaged {len(due)} checkpoints" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"swa_every": 50}, {"swa_start_frac": 0}])
def test_swa_without_a_step_that_is_due_ends_with_the_last_weights(
    byte_corpus, cpu, monkeypatch, changes, capsys
):
    h = settings(data_path=byte_corpus, iterations=8, warmdown_iters=4, swa_enabled=1, **changes)
    recorded = WeightsOfSteps(monkeypatch)
    run = trained(h, cpu)
    assert run.average.count == 0
    for name, weight in run.average.weights.items():
        assert torch.equal(weight, recorded.weights[-1][name])
    assert run.average.copy_to_model(tg.Log()) == "raw"
    for name, p in run.model.named_parameters():
        assert torch.equal(p, recorded.weights[-1][name])
    assert "weights:applying the last weights" in capsys.readouterr().out


def test_micro_batches_change_nothing_but_rounding(byte_corpus: Path, cpu):
    grads = []
    for micro in (1024, 128):
        h = settings(data_path=byte_corpus, micro_batch_tokens=micro)
        torch.manual_seed(0)
        steps = trainer(tg.GPT(h), load(h), h, cpu)
        steps.optimizers.step = lambda *_: None
        steps.take_step(tg.programs(h)[0], *steps.batches.batch(0))
        assert steps.model.blocks[0].mlp.down.weight.grad.any()
        grads.append([p.grad for p in steps.model.parameters()])
    for one, eight in zip(*grads, strict=True):
        torch.testing.assert_close(one, eight, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("features", [{}, {"jepa_chunk_size": 4, "stp_enabled": 1}])
def test_warm_up_leaves_no_trace(byte_corpus: Path, cpu, monkeypatch, features):
    """Training after it is as without it, and it takes a step of each program."""
    h = settings(data_path=byte_corpus, warmup_steps=3, iterations=4, **features)
    phases, losses = [], {}
    for compiled in (False, True):
        # Say that something is compiled, so that the warm-up takes its steps; nothing is.
        device = tg.replace(cpu, compiled=compiled)
        monkeypatch.setattr(tg.Device, "compile", lambda _, function: function)
        torch.manual_seed(0)
        steps = trainer(tg.GPT(h), load(h), h, device)
        random_state = torch.get_rng_state()
        take_step = steps.take_step
        steps.take_step = lambda phase, *batch, take=take_step: (
            phases.append(phase) or take(phase, *batch)
        )
        steps.warm_up()
        assert torch.equal(random_state, torch.get_rng_state())
        assert not any(p.grad.any() for p in steps.model.parameters())
        assert len(phases) == 3 * compiled
        steps.take_step = take_step
        steps.loop(tg.StopSignal())
        losses[compiled] = steps.step_log.losses
    assert losses[True] == losses[False]
    assert {*phases} == {*tg.programs(h)}


LOSS = {"train_loss": torch.tensor(1.0)}


def step_log(device: tg.Device) -> tg.StepLog:
    """The log of steps of a single rank, with its clock."""
    clock = tg.TrainingClock(device, tg.Ranks())
    return tg.StepLog(clock, tg.Log(silent=True), tg.Ranks(), 100, 0)


class FakeTime:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def fake_time(monkeypatch):
    clock = FakeTime()
    monkeypatch.setattr(tg.time, "perf_counter", clock.perf_counter)
    return clock


def test_the_clock_stands_still_when_paused_and_knows_its_slowest_step(fake_time, cpu):
    steps = step_log(cpu)
    clock = steps.clock
    for seconds in (1.0, 3.0, 1.0):
        fake_time.now += seconds
        steps.launched(LOSS)
    clock.count()
    fake_time.now += 100
    clock.resume()
    assert (clock.elapsed, clock.slowest) == (5.0, 3.0)
    fake_time.now += 2.0
    steps.launched(LOSS)
    assert clock.elapsed == 7.0
    assert steps.times == [1.0, 4.0, 5.0, 7.0]


@pytest.mark.fault(25)
def test_time_between_steps_belongs_to_training(fake_time, cpu):
    steps = step_log(cpu)
    fake_time.now += 1
    steps.launched(LOSS)
    fake_time.now += 5  # a slow batch, say
    assert steps.clock.seconds() == 6.0
    steps.clock.count()
    assert steps.clock.elapsed == 6.0


@pytest.mark.fault(25)
@pytest.mark.parametrize(("cap", "steps"), [(0.001, 1), (10.0, 7), (30.0, 28)])
def test_training_stops_before_the_cap(
    byte_corpus: Path, cpu, cap: float, steps: int, capsys, fake_time, monkeypatch
):
    """Steps take 1 s, the third 2 s: the run leaves room for one as slow as any recent one."""
    take_step, taken = tg.Trainer.take_step, []

    def timed(*arguments):
        taken.append(0)
        fake_time.now += 2.0 if len(taken) == 3 else 1.0
        return take_step(*arguments)

    monkeypatch.setattr(tg.Trainer, "take_step", timed)
    h = settings(
        data_path=byte_corpus, iterations=100_000, max_wallclock_seconds=cap, warmdown_iters=20
    )
    run = trained(h, cpu, deadline=h.training_deadline)
    assert "stopping_early: wallclock_cap" in capsys.readouterr().out
    assert run.step == len(run.step_log.losses) == steps  # before the first step nothing is known
    assert run.clock.elapsed < cap or steps == 1


@pytest.mark.fault(20)
def test_no_steps_are_a_defined_result(byte_corpus: Path, cpu):
    run = trained(settings(data_path=byte_corpus, iterations=0), cpu)
    assert (run.step, run.step_log.losses, run.step_log.times) == (0, [], [])
    before = {name: p.clone() for name, p in run.average.params.items()}
    assert run.average.copy_to_model(tg.Log()) == "ema"  # of nothing: the initial weights
    assert all(torch.equal(p, before[name]) for name, p in run.average.params.items())


@pytest.mark.fault(34)
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_by_step(cpu, loss):
    steps = step_log(cpu)
    steps.launched({"train_loss": torch.tensor(2.0)})
    with pytest.raises(tg.DivergenceError, match=f"step 2: the loss is {loss}; lower MATRIX_LR"):
        steps.launched({"train_loss": torch.tensor(loss)})


@pytest.mark.parametrize(("iterations", "validated"), [(5, [0, 2, 4, 5]), (4, [0, 2, 4])])
def test_validation_is_at_its_steps_and_outside_the_clock(
    byte_corpus: Path, cpu, capsys, fake_time, monkeypatch, iterations, validated
):
    score_once = tg.score

    def slow(*arguments):
        fake_time.now += 100.0
        return score_once(*arguments)

    monkeypatch.setattr(tg, "score", slow)
    h = settings(data_path=byte_corpus, iterations=iterations, val_loss_every=2, train_log_every=0)
    assert trained(h, cpu).clock.elapsed == 0
    lines = capsys.readouterr().out.splitlines()
    steps = [line.split()[0] for line in lines if "val_bpb" in line and "step_avg" in line]
    assert steps == [f"step:{step}/{iterations}" for step in validated]


def test_every_step_is_logged_though_it_is_known_late(byte_corpus: Path, cpu, capsys, monkeypatch):
    """As on CUDA, where a step's loss is read after the next one's launch."""

    def launched(steps, terms):
        steps.running.append((None, list(terms), torch.stack(list(terms.values()))))
        steps.finish(keep=1)

    monkeypatch.setattr(tg.StepLog, "launched", launched)
    run = trained(settings(data_path=byte_corpus, iterations=6, val_loss_every=3), cpu)
    steps = [
        line.split()[:2] for line in capsys.readouterr().out.splitlines() if "step_avg" in line
    ]
    told = [(step, value.split(":")[0]) for step, value in steps]
    assert told == [
        ("step:0/6", "val_loss"),
        ("step:1/6", "train_loss"),
        ("step:2/6", "train_loss"),
        ("step:3/6", "train_loss"),
        ("step:3/6", "val_loss"),
        *((f"step:{n}/6", "train_loss") for n in (4, 5, 6)),
        ("step:6/6", "val_loss"),
    ]
    assert run.step_log.times == sorted(run.step_log.times)
    assert run.clock.elapsed >= run.step_log.times[-1]


def test_log_files_hold_what_was_said(tmp_path: Path, capsys):
    log = tg.Log(tmp_path)
    log("step:1/2 train_loss:3.0000")
    log.event("step", step=1, train_loss=3.0)
    log.progress("not watched, not shown")
    assert (tmp_path / "train.log").read_text() == "step:1/2 train_loss:3.0000\n"
    assert json.loads((tmp_path / "events.jsonl").read_text())["train_loss"] == 3.0
    assert capsys.readouterr().out == "step:1/2 train_loss:3.0000\n"


@pytest.mark.fault(44, 45)
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch):
    path = tmp_path / "final_model.safetensors"
    path.write_bytes(b"old")

    def full(_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tg.os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            tg.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    tg.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_full_disk_or_a_closed_pipe_ends_no_run(tmp_path: Path, monkeypatch):
    log = tg.Log(tmp_path / "gone")
    log("to a folder that is not there")

    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    log("to nobody")


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without one, whatever is here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def chosen(h: tg.Hyperparameters) -> tuple[tg.Attention, tg.Device, list[str]]:
    """What a single rank chooses: attention, device, and all notes."""
    device, notes = tg.start_device(h.compile)
    attention, device, more = tg.choose_attention(h, device, tg.Ranks())
    return attention, device, notes + more


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("attn", ["flash", "math"])
def test_each_attention_back_end_of_a_cpu_is_the_definition(attn):
    flags = ("flash", "math", "mem_efficient", "cudnn")
    before = [getattr(torch.backends.cuda, f"{f}_sdp_enabled")() for f in flags]
    try:
        attention, device = chosen(settings(attn=attn))[:2]
        q, k, v = (torch.randn(2, 24, heads, 8) for heads in (4, 2, 2))
        keys, values = (x.repeat_interleave(2, dim=2) for x in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) / math.sqrt(8)
        scores = scores.masked_fill(torch.ones(24, 24).triu(1).bool(), -math.inf)
        want = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
        assert (attention.name, device.compiled) == (attn, False)
        torch.testing.assert_close(attention.attend(q, k, v), want, atol=1e-5, rtol=1e-5)
    finally:
        for flag, on in zip(flags, before, strict=True):
            getattr(torch.backends.cuda, f"enable_{flag}_sdp")(on)


@pytest.mark.fault(27)
@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("kind", ["missing", "only FA4", "of another GPU"])
def test_a_named_attention_that_cannot_run_is_an_error(monkeypatch, kind):
    def refuses(*_, **__):
        raise RuntimeError("FlashAttention only supports Hopper GPUs")

    fa4, fa3 = types.ModuleType("flash_attn"), types.ModuleType("flash_attn_interface")
    fa4.cute, fa3.flash_attn_func = types.ModuleType("flash_attn.cute"), refuses
    monkeypatch.setitem(sys.modules, "flash_attn", fa4 if kind == "only FA4" else None)
    there = fa3 if kind == "of another GPU" else None
    monkeypatch.setitem(sys.modules, "flash_attn_interface", there)
    with pytest.raises(tg.SettingsError, match="ATTN=fa3 COMPILE=auto: cannot run here") as error:
        chosen(settings(attn="fa3"))
    assert ("only supports Hopper" if there else "flash_attn_interface") in str(error.value)


def raises(q, k, v, **_):
    raise RuntimeError("no kernel image")


BROKEN = {
    "no kernel image": raises,
    "it gave NaN": lambda q, k, v, **_: q * math.nan,
    "gave NaN": lambda q, k, v, **_: (q * 0).sqrt(),  # in its gradient alone
}


@pytest.mark.fault(28)
@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("why", BROKEN)
def test_an_attention_that_fails_its_probe_is_left_for_the_next(monkeypatch, why):
    def load_attention(name):
        return BROKEN[why] if name == "flash" else tg.attend_sdpa

    monkeypatch.setattr(tg, "load_attention", load_attention)
    attention, device, notes = chosen(settings())
    assert (attention.name, device.compiled) == ("cudnn", False)  # next in the order
    (note,) = [note for note in notes if note.startswith("attention:")]
    assert note.startswith("attention:flash compiled:False not used: ")
    assert why in note


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_a_gpu_without_bf16_computes_in_fp32_and_says_so(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    device, notes = tg.start_device("auto")
    assert (device.device.type, device.dtype, device.compiled) == ("cuda", dtype, True)
    assert ("dtype:fp32, this GPU has no bf16" in notes) == (capability < (8, 0))


@pytest.mark.fault(29)
@pytest.mark.usefixtures("no_gpu")
def test_a_compiler_that_fails_is_an_error_where_asked_for(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(tg.SettingsError, match=r"COMPILE=1.*\n(.*\n)*.*no C\+\+ compiler"):
        chosen(settings(compile=1))


@pytest.mark.fault(29)
@pytest.mark.usefixtures("no_gpu")
def test_a_compiler_that_fails_is_left_with_the_reason(cpu, monkeypatch):
    """As on CUDA with COMPILE=auto: every attention is tried compiled, then not compiled."""

    def fails(*_, **__):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", fails)
    device = tg.replace(cpu, compiled=True)
    attention, device, notes = tg.choose_attention(settings(), device, tg.Ranks())
    assert (attention.name, device.compiled) == ("flash", False)
    assert [note.split()[:2] for note in notes] == [
        [f"attention:{name}", "compiled:True"] for name in ("flash", "cudnn", "math")
    ]
    assert all("no C++ compiler" in note for note in notes)


@pytest.mark.slow
def test_compiled_is_the_same_function(byte_corpus: Path):
    h = settings(data_path=byte_corpus, compile=1, num_layers=2)
    attention, device, _ = chosen(h)
    assert device.compiled
    torch.manual_seed(0)
    model = tg.GPT(h, attention.attend)
    ids, targets = torch.randint(4, 260, (2, 4, 64))
    torch.testing.assert_close(device.compile(model)(ids, targets), model(ids, targets))
    val = load(h).val
    scores = [
        score(tg.ScoringPass(f(model.forward_logits), 64, 16), val, device)
        for f in (device.compile, lambda function: function)
    ]
    assert scores[0].nats == pytest.approx(scores[1].nats, rel=1e-6)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_loop_leaves_room_for_the_steps_that_still_run(
    byte_corpus, cpu, fake_time, monkeypatch
):
    """As on CUDA, where one step still runs when the next could be launched."""

    def launched(steps, terms):
        steps.running.append((None, list(terms), torch.stack(list(terms.values()))))
        fake_time.now += 1.0
        steps.finish(keep=1)

    monkeypatch.setattr(tg.StepLog, "launched", launched)
    h = settings(data_path=byte_corpus, iterations=1000, max_wallclock_seconds=10)
    run = trained(h, cpu, deadline=h.training_deadline)
    # The slowest step took 2 s. After 6 s one step still runs: it and one more could end at 10 s.
    assert run.step == len(run.step_log.losses) == 6


def test_steps_see_every_token_once(byte_corpus: Path):
    h = settings(data_path=byte_corpus)
    stream = tg.TokenStream(byte_corpus, "train", 260)
    batches = tg.TrainingBatches(stream, h.train_batch_tokens, h.train_seq_len, tg.Ranks())
    seen = [batches.batch(step)[1].flatten() for step in range(8)]
    assert torch.equal(torch.cat(seen), stream.read(1, 8 * h.train_batch_tokens))
    for a, b in itertools.pairwise(batches.batch(s) for s in range(4)):
        assert a[1][-1, -1] == b[0][0, 0]
