"""Training: the clock, the loop, no trace of the warm-up, the same bytes from the same seed."""

import itertools
import json
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import TINY, settings

import train_gpt as tg


def load(h: tg.Hyperparameters) -> tg.Data:
    return tg.load_data(h, tg.Log())


def test_the_loss_falls(byte_corpus: Path, cpu):
    h = settings(data_path=byte_corpus, iterations=60, warmdown_iters=30)
    torch.manual_seed(0)
    model = tg.GPT(h)
    clock, average = tg.train(model, load(h), h, cpu, tg.Log())
    assert average.apply(tg.Log()) == "ema"
    losses = clock.losses
    assert len(losses) == 60
    assert losses[0] == pytest.approx(math.log(260), abs=0.2)
    assert losses[-1] < losses[0] - 2


def test_training_alone_may_round_the_inputs_of_products(byte_corpus, tmp_path, monkeypatch):
    """Validation, GPTQ and scores are of full precision, whatever training leaves behind."""
    found = {}

    def noting(name):
        function = getattr(tg, name)

        def noted(*arguments, **options):
            found.setdefault(name, set()).add(torch.get_float32_matmul_precision())
            return function(*arguments, **options)

        return noted

    for name in ("train_step", "evaluate", "collect_hessians"):
        monkeypatch.setattr(tg, name, noting(name))
    env = {**TINY, "DATA_PATH": str(byte_corpus), "RUN_DIR": str(tmp_path / "run")}
    env |= {"ITERATIONS": "3", "VAL_LOSS_EVERY": "1", "GPTQ_ENABLED": "1", "EVAL_STRIDE": "0"}
    assert tg.main([], {**env, "GPTQ_CALIB_TOKENS": "128"}) == 0
    assert found == {
        "train_step": {"medium"},
        "evaluate": {"highest"},
        "collect_hessians": {"highest"},
    }


def test_ema_of_30_steps_is_far_from_the_start(byte_corpus: Path, cpu):
    """With a constant decay of 0.997 it would be 91 % initialisation and score near ln 260."""
    h = settings(data_path=byte_corpus, iterations=30)
    torch.manual_seed(0)
    model = tg.GPT(h)
    data = load(h)
    _, average = tg.train(model, data, h, cpu, tg.Log())
    average.apply(tg.Log())
    score = tg.evaluate(model.eval().forward_logits, data, h, cpu, tg.Log())
    assert score.val_loss < math.log(260) - 1.5


def test_the_cut_of_a_step_changes_nothing_but_rounding(byte_corpus: Path, cpu):
    grads = []
    for micro in (1024, 128):
        h = settings(data_path=byte_corpus, micro_batch_tokens=micro)
        torch.manual_seed(0)
        model = tg.GPT(h)
        optimizers = tg.Optimizers(model, h)
        optimizers.step = lambda *_: None
        batch = load(h).train.batch(0, h)
        tg.train_step(model.losses, optimizers, batch, 0, 1.0, cpu)
        assert all(p.grad.any() for p in model.blocks[0].mlp.down.parameters())
        grads.append([p.grad for p in model.parameters()])
    for one, eight in zip(*grads, strict=True):
        torch.testing.assert_close(one, eight, atol=1e-6, rtol=1e-4)


def test_warm_up_leaves_no_trace(byte_corpus: Path, cpu):
    h = settings(data_path=byte_corpus, warmup_steps=3)
    # Say that something is compiled, so that the warm-up takes its steps; nothing is.
    rt = tg.Runtime(cpu.device, cpu.dtype, cpu.attention, cpu.attend, True, [])
    torch.manual_seed(0)
    model = tg.GPT(h)
    before = [p.detach().clone() for p in model.parameters()]
    random_state = torch.get_rng_state()
    took = []
    tg.warm_up(model, lambda x, y: took.append(x) or model.losses(x, y), h, rt, tg.Log())
    assert len(took) == 3 * tg.micro_batches(h)
    assert torch.equal(random_state, torch.get_rng_state())
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, was)
        assert not p.grad.any()


LOSS = {"train_loss": torch.tensor(1.0)}


def capped(rt: tg.Runtime, cap: float) -> tg.TrainingClock:
    """The clock of a run of so many seconds."""
    return tg.TrainingClock(rt, settings(max_wallclock_seconds=cap), tg.Log(silent=True))


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
    clock = capped(cpu, 10)
    for seconds in (1.0, 3.0, 1.0):
        fake_time.now += seconds
        clock.step_launched(LOSS)
    clock.pause()
    fake_time.now += 100
    clock.resume()
    assert clock.elapsed == 5.0
    assert not clock.spent()  # 5 + 3 < 10
    fake_time.now += 2.0
    clock.step_launched(LOSS)
    assert clock.elapsed == 7.0
    assert clock.spent()  # 7 + 3 reaches 10


@pytest.mark.fault(25)
def test_time_between_steps_belongs_to_training(fake_time, cpu):
    clock = capped(cpu, 0)
    fake_time.now += 1
    clock.step_launched(LOSS)
    fake_time.now += 5  # a slow batch, say
    clock.pause()
    assert clock.elapsed == 6.0
    assert not clock.spent()  # no cap


@pytest.mark.fault(25)
@pytest.mark.parametrize(("cap", "steps"), [(0.001, 1), (10.0, 7), (30.0, 28)])
def test_training_stops_before_the_cap(
    byte_corpus: Path, cpu, cap: float, steps: int, capsys, fake_time, monkeypatch
):
    """Steps take 1 s, the third 2 s: the run leaves room for one as slow as any recent one."""
    train_step, taken = tg.train_step, []

    def timed(*arguments):
        taken.append(0)
        fake_time.now += 2.0 if len(taken) == 3 else 1.0
        return train_step(*arguments)

    monkeypatch.setattr(tg, "train_step", timed)
    h = settings(
        data_path=byte_corpus, iterations=100_000, max_wallclock_seconds=cap, warmdown_iters=20
    )
    clock, _ = tg.train(tg.GPT(h), load(h), h, cpu, tg.Log())
    assert "stopping_early: wallclock_cap" in capsys.readouterr().out
    assert len(clock.losses) == steps  # of 0.001 s nothing is known before the first step
    assert clock.elapsed < cap or steps == 1


@pytest.mark.fault(20)
def test_no_steps_are_a_defined_result(byte_corpus: Path, cpu):
    h = settings(data_path=byte_corpus, iterations=0)
    clock, average = tg.train(tg.GPT(h), load(h), h, cpu, tg.Log())
    assert (clock.losses, clock.times) == ([], [])
    before = [p.clone() for p in average.params]
    assert average.apply(tg.Log()) == "ema"  # of nothing: the initial weights
    assert all(torch.equal(p, was) for p, was in zip(average.params, before, strict=True))


@pytest.mark.fault(34)
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_run_by_step(cpu, loss):
    clock = capped(cpu, 0)
    clock.step_launched({"train_loss": torch.tensor(2.0)})
    with pytest.raises(tg.DivergenceError, match=f"step 2: the loss is {loss}; lower MATRIX_LR"):
        clock.step_launched({"train_loss": torch.tensor(loss)})


def test_validation_is_at_its_steps_and_outside_the_clock(byte_corpus: Path, cpu, capsys):
    h = settings(data_path=byte_corpus, iterations=5, val_loss_every=2, train_log_every=0)
    tg.train(tg.GPT(h), load(h), h, cpu, tg.Log())
    lines = capsys.readouterr().out.splitlines()
    steps = [line.split()[0] for line in lines if "val_bpb" in line and "step_avg" in line]
    assert steps == ["step:0/5", "step:2/5", "step:4/5"]


def test_every_step_is_logged_though_it_is_known_late(byte_corpus: Path, cpu, capsys, monkeypatch):
    """As on CUDA, where a step's loss is read after the next one's launch."""

    def launched(clock, terms):
        clock.running.append((None, list(terms), torch.stack(list(terms.values()))))
        while len(clock.running) > 1:
            clock.finish_step()

    monkeypatch.setattr(tg.TrainingClock, "step_launched", launched)
    h = settings(data_path=byte_corpus, iterations=6, val_loss_every=3)
    clock, _ = tg.train(tg.GPT(h), load(h), h, cpu, tg.Log())
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
    ]
    assert clock.times == sorted(clock.times)
    assert clock.elapsed >= clock.times[-1]


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


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("attn", ["flash", "math"])
def test_each_attention_back_end_of_a_cpu_is_the_definition(attn):
    flags = ("flash", "math", "mem_efficient", "cudnn")
    before = [getattr(torch.backends.cuda, f"{f}_sdp_enabled")() for f in flags]
    try:
        rt = tg.Runtime.start(settings(attn=attn))
        q, k, v = (torch.randn(2, 24, heads, 8) for heads in (4, 2, 2))
        keys, values = (x.repeat_interleave(2, dim=2) for x in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) / math.sqrt(8)
        scores = scores.masked_fill(torch.ones(24, 24).triu(1).bool(), -math.inf)
        want = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
        assert rt.attention == attn
        torch.testing.assert_close(rt.attend(q, k, v), want, atol=1e-5, rtol=1e-5)
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
        tg.Runtime.start(settings(attn="fa3"))
    assert ("only supports Hopper" if there else "flash_attn_interface") in str(error.value)


def raises(q, k, v):
    raise RuntimeError("no kernel image")


BROKEN = {
    "no kernel image": raises,
    "it gave NaN": lambda q, k, v: q * math.nan,
    "gave NaN": lambda q, k, v: (q * 0).sqrt(),  # in its gradient alone
}


@pytest.mark.fault(28)
@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("why", BROKEN)
def test_an_attention_that_fails_its_probe_is_left_for_the_next(monkeypatch, why):
    def load(name):
        return BROKEN[why] if name == "flash" else tg.attend_sdpa

    monkeypatch.setattr(tg, "load_attention", load)
    rt = tg.Runtime.start(settings())
    assert (rt.attention, rt.compiled) == ("cudnn", False)  # next in the order; here the fake's
    (note,) = [note for note in rt.notes if note.startswith("attention:")]
    assert note.startswith("attention:flash compiled:False not used: ")
    assert why in note


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    ("capability", "chosen"),
    [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_a_gpu_without_bf16_computes_in_fp32_and_says_so(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(tg, "load_attention", lambda name: tg.attend_sdpa)

    class Asked(BaseException):
        """What would be tried first."""

    class Machine(tg.Runtime):
        def __init__(self, device, dtype, attention, attend, compiled, notes):
            raise Asked(device.type, dtype, notes)

    with pytest.raises(Asked) as error:
        Machine.start(settings())
    device, dtype, notes = error.value.args
    assert (device, dtype) == ("cuda", chosen)
    assert ("dtype:fp32, this GPU has no bf16" in notes) == (capability < (8, 0))


@pytest.mark.fault(29)
@pytest.mark.usefixtures("no_gpu")
def test_a_compiler_that_fails_is_an_error_where_asked_for(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(tg.SettingsError, match=r"COMPILE=1.*\n(.*\n)*.*no C\+\+ compiler"):
        tg.Runtime.start(settings(compile=1))


@pytest.mark.slow
def test_compiled_is_the_same_function(byte_corpus: Path):
    h = settings(data_path=byte_corpus, compile=1, num_layers=2)
    rt = tg.Runtime.start(h)
    assert rt.compiled
    torch.manual_seed(0)
    model = tg.GPT(h, rt.attend)
    ids, targets = torch.randint(4, 260, (2, 4, 64))
    torch.testing.assert_close(rt.compile(model)(ids, targets), model(ids, targets))
    data = load(h)
    scores = [
        tg.evaluate(f(model.forward_logits), data, h, rt, tg.Log(), stride=16)
        for f in (rt.compile, lambda function: function)
    ]
    assert scores[0].nats == pytest.approx(scores[1].nats, rel=1e-6)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_clock_leaves_room_for_the_step_that_still_runs(fake_time, cpu):
    """As on CUDA, where one step is still running when the next could be launched."""
    clock = capped(cpu, 10)
    for _ in range(6):
        fake_time.now += 1.0
        clock.step_launched(LOSS)
    fake_time.now += 2.0
    clock.step_launched(LOSS)  # 8 s elapsed, the slowest step took 2
    clock.agree()
    clock.recent.append(1.0)
    clock.elapsed = 7.5
    assert not clock.spent()
    clock.running.append((None, [*LOSS], torch.ones(1)))
    assert clock.spent()


def test_steps_see_every_token_once(byte_corpus: Path):
    h = settings(data_path=byte_corpus)
    stream = tg.TokenStream(byte_corpus, "train", 260)
    seen = [stream.batch(step, h)[1].flatten() for step in range(8)]
    assert torch.equal(torch.cat(seen), stream.read(1, 8 * h.train_batch_tokens))
    for a, b in itertools.pairwise(stream.batch(s, h) for s in range(4)):
        assert a[1][-1, -1] == b[0][0, 0]
