"""Benchmarks: the plain loop equals the trainer, tables are complete, reports keep their form."""

import dataclasses
import json
import math
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from bench import __main__ as program
from bench import forecast, harness, int6, parts, probe, reading, reference, step, tables
from bench.harness import Row, Scale, Table
from conftest import TINY, randomize, settings, trainer
from safetensors.torch import save_file

import train_gpt as tg

TINY_TEXT = " ".join(f"{name}={value}" for name, value in TINY.items())
TINY_TEXT += " MICRO_BATCH_TOKENS=1024 GPTQ_CALIB_TOKENS=256"
SMALL = "VOCAB_SIZE=260 NUM_LAYERS=2 MODEL_DIM=32 NUM_HEADS=4 ROPE_DIMS=4"
SCALE = Scale(
    device="cpu",
    rounds=2,
    calls=2,
    settings=TINY_TEXT,
    byte_settings=f"{TINY_TEXT} JEPA_CHUNK_SIZE=4",
    frontier_settings=f"{TINY_TEXT} NUM_LAYERS=4 NUM_LOOPS=2 LOOP_START=1 LOOP_END=2",
    eager="MICRO_BATCH_TOKENS=512",
    matrices=SMALL,
    ranks=f"{SMALL} TRAIN_SEQ_LEN=16 TRAIN_BATCH_TOKENS=16",
    attention=((1, 16),),
    heads=(4, 2, 8),
    val_tokens=300,
    codes=4096,
    square=32,
)
# Rows that each benchmark must have.
ROWS = {
    "kernels": {"all", "aten::mul"},
    "step": {"step", "step, cut", "  forward", "  Muon", "speed", "model FLOP utilisation"},
    "attention": {"1 x 16, forward: flash", "1 x 16, forward and backward: math"},
    "muon": {"step, stacked", "step, matrix by matrix", "Newton-Schulz, stacked"},
    "gptq": {"rounding", "GPTQ, collecting Hessians", "GPTQ, solving"},
    "loop": {"plain loop", "train_gpt.py, eager", "train_gpt.py, compiled"},
    "scoring": {"sliding, a window at a time", "plain, scored", "one pass", "one pass, scored"},
    "packing": {"zstd", "lzma", "zlib", "order-0 entropy", "the artifact"},
    "bytes": {"step", "  backward", "speed"},
    "frontier": {"step", "step without repeated layers", "FLOPs without repeated layers"},
    "startup": {"import of train_gpt.py", "settings", "first step", "peak memory, training"},
    "ranks": {"backward alone", "one all-reduce after it", "DDP's buckets within it"},
}


@pytest.fixture
def machine(cpu: tg.Device) -> harness.Machine:
    return harness.Machine(cpu)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


# ---- The references ----


@pytest.mark.parametrize(
    "changes",
    [
        # So that a gradient's length matters.
        {"grad_clip_norm": 0.05, "adam_eps": 1e-3, "tie_embeddings": 0, "stp_enabled": 1},
        {"jepa_chunk_size": 4, "jepa_lr": 0.02, "grad_clip_norm": 0, "ema_enabled": 0},
        # The frontier's: layers repeat from the fifth step on.
        {"num_loops": 2, "loop_start": 1, "loop_end": 1, "enable_looping_at": 0.4, "embed_wd": 0.5}
        | {"muon_row_normalize": 1, "muon_coefficients": "polar_express", "min_lr": 0.3},
    ],
)
def test_the_plain_loop_takes_the_steps_of_the_trainer(changes, machine):
    """Losses and averaged weights agree while the momentum rises and the rates fall."""
    h = settings(iterations=10, muon_momentum_warmup_steps=6, num_layers=2, **changes)
    data = harness.random_data(h)
    model, plain = (harness.random_model(h, machine).train() for _ in range(2))
    ours, loop = trainer(model, data, machine.device), reference.Loop(plain, h)
    assert ours.grad_accum == 2
    losses = []
    for n in range(h.iterations):
        phase = tg.schedule(tg.Progress(n, h.iterations, 0.0, math.inf), h)
        phase = phase._replace(jepa_weight=0.01 * (n % 2) if h.jepa_chunk_size else 0.0)
        batch, ours.step = data.train.batch(n % 3), n
        terms = ours.take_step(phase, *batch)
        ours.average.update(n, phase.lr_scale)
        auxiliary = partial(tg.auxiliary_inputs, phase, h, n, device=machine.device)
        plain_loss = loop.step(n, phase, *batch, auxiliary)
        losses.append((terms["train_loss"].item(), plain_loss))
    found, expected = zip(*losses, strict=True)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found[-1] < found[0] - 0.1  # it learns
    weights = torch.cat([w.flatten() for w in ours.average.weights.values()])
    same = torch.cat([w.flatten() for w in loop.average])
    torch.testing.assert_close(same, weights, atol=2e-4, rtol=0)


def test_flops_a_token_are_those_counted_by_hand():
    block = 2 * 512 * 512 + 2 * 512 * 256 + 2 * 512 * 1536
    n = 11 * block + 1024 * 512 + 128 * 512 + 128 * 256
    for text in ("", "TIE_EMBEDDINGS=0"):
        h = SCALE.h(text)
        with torch.device("meta"):
            flops = step.flops_per_token(tg.GPT(h), 0)
        assert flops == 6 * n + 6 * 11 * 2048 * 512 == 228_655_104


def test_flops_of_repeated_layers_are_those_of_their_visits():
    """Three layers come three times each; the rest of the frontier's model once."""
    block = 2 * 512 * 512 + 2 * 512 * 256 + 2 * 512 * 2048 + 12 * 8
    h = SCALE.h("PRESET=frontier")
    with torch.device("meta"):
        model = tg.GPT(h)
    counts = {}
    for loops in (0, 2):
        count = 11 + 3 * loops
        n = count * block + 8192 * 512 + 12  # the head, and the gate of SmearGate
        counts[loops] = step.flops_per_token(model, loops)
        assert counts[loops] == 6 * n + 6 * count * 2048 * 512
    assert counts[2] / counts[0] == pytest.approx(1.4972, abs=1e-4)
    assert "11 layers in 17 visits x 512" in step.described(h)


# ---- The benchmarks ----


ONCE = ("gptq", "packing", "kernels", "startup")  # these take no rounds
NAMES = [*(n for n in program.BENCHMARKS if n != "ranks")]


@pytest.mark.parametrize("name", [*NAMES, pytest.param("ranks", marks=pytest.mark.slow)])
def test_a_benchmark_gives_finite_rows(name, machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(parts, "STAGES", {"step": "training"})  # the others: see below
    table = program.BENCHMARKS[name](SCALE, machine)
    assert {row.what for row in table.rows} >= ROWS[name]
    assert table.sizes
    for row in table.rows:
        assert 0 <= row.low <= row.median <= row.high < math.inf, row
        assert row.rounds in (1, 2)
        assert row.unit in ("s", "bytes", "MiB", "tokens/s", "TFLOP/s", "%")
        assert row.ratio is None or all(map(math.isfinite, row.ratio))
    assert any(row.rounds == 2 for row in table.rows) or name in ONCE


@pytest.mark.parametrize("stage", ["score", "quantize"])
def test_a_probe_prints_seconds_and_memory(stage, capsys):
    assert stage in parts.STAGES
    probe.main(stage, json.dumps(dataclasses.asdict(SCALE)))
    printed = json.loads(capsys.readouterr().out)
    assert all(seconds > 0 for seconds in printed["seconds"].values())
    assert {"settings", f"first {stage}", f"second {stage}"} <= printed["seconds"].keys()
    assert 100 < printed["peak_mib"] < 20_000


def test_stages_are_parts_of_an_unchanged_step(machine):
    h = SCALE.h(SCALE.settings)
    one, other = (step.Ours(h, machine, harness.random_data(h)) for _ in range(2))
    functions, cut = (tg.Ranks.all_reduce_, tg.TrainingBatches.batch), step.Cut(other)
    for _ in range(3):
        one()
        began = machine.device.now()
        cut()
        took = machine.device.now() - began
    assert [x.item() for x in one.losses] == [x.item() for x in other.losses]
    assert (tg.Ranks.all_reduce_, tg.TrainingBatches.batch) == functions  # nothing stays patched
    assert tuple(cut.times[-1]) == step.STAGES
    assert 0.5 * took < sum(cut.times[-1].values()) <= took
    assert min(cut.times[-1].values()) > 0
    assert cut.times[-1]["backward"] > cut.times[-1]["gradient reduction"]
    with pytest.raises(ValueError, match="one micro-batch"):
        step.step(SCALE, machine, f"{SCALE.settings} {SCALE.eager}")


def test_unequal_results_are_refused(machine, monkeypatch):
    harness.equal([1.0, 2.0], [1.0, 2.0 + 1e-6], 1e-5, "x")
    for one, other in (([1.0, 2.0], [1.0, 2.1]), ([math.nan], [1.0])):
        with pytest.raises(ValueError, match="x: differ"):
            harness.equal(one, other, 1e-3, "x")
    monkeypatch.setattr(reference, "score", lambda *_: 1.0)
    with pytest.raises(ValueError, match="sliding scores: differ"):
        parts.scoring(SCALE, machine)


def test_variants_take_turns_and_the_first_rounds_are_not_counted():
    clock, turns = [0.0], []

    def act(name: str, seconds: float) -> None:
        turns.append(name)
        clock[0] += seconds * len(turns)

    ways = {"a": partial(act, "a", 1.0), "b": partial(act, "b", 10.0)}
    seconds = harness.in_turns(ways, 2, lambda: clock[0], warm=1)
    assert turns == ["a", "b", "b", "a", "a", "b"]
    assert seconds == {"a": [4.0, 5.0], "b": [30.0, 60.0]}
    first, second = harness.rows_of(seconds)
    assert first == Row("a", "s", 4.5, 4.0, 5.0, 2, [1.0, 1.0, 1.0])
    assert second == Row("b", "s", 45.0, 30.0, 60.0, 2, [9.75, 7.5, 12.0])


def test_the_sizes_are_legal():
    for (device, _), scale in harness.SCALES.items():
        assert scale.device == device
        steps = scale.settings, scale.byte_settings, scale.frontier_settings
        for text in (*steps, scale.matrices, scale.ranks):
            scale.h(text)
        assert scale.val_tokens > scale.h(scale.settings).train_seq_len


# ---- The forecast ----


@pytest.mark.parametrize(("ratio", "start"), [(1.5, 0.35), (1.5, 0.0), (1.0, 0.35), (2.0, 1.0)])
def test_the_steps_of_a_run_with_loops_take_the_mean_time(ratio, start):
    before, after = forecast.step_times(121.7, ratio, start)
    assert after == pytest.approx(ratio * before)
    assert 1 / (start / before + (1 - start) / after) == pytest.approx(121.7)


def test_the_forecast_of_an_artifact_has_every_weight_and_its_k(capsys):
    changes = "SCALE_RULE=std MATRIX_CLIP_SIGMAS=9 EMBED_CLIP_SIGMAS=14 EMBED_BITS=7"
    h = SCALE.h(f"{TINY_TEXT} {changes}")
    model = harness.synthetic_weights(tg.GPT(h))
    blob = tg.pack_to_fit(
        model, tg.weight_stacks(model, {}, tg.Ranks()), 10**7, tg.Ranks(), tg.Log(silent=True)
    )
    arrays = tg.unpack_artifact(blob, h)[1]
    parts = forecast.artifact_parts(model, arrays, h.compressor)
    assert sum(part.weights for part in parts.values()) == sum(
        p.numel() for p in model.parameters()
    )
    assert {role: part.bits for role, part in parts.items()} == {
        "embed": 7,
        "scalar": 16,
        "matrix": 6,
    }
    assert parts["matrix"].sigmas == pytest.approx(9, rel=1e-3)
    assert parts["embed"].sigmas == pytest.approx(14, rel=1e-3)
    names = [n for n, role in tg.parameter_roles(model).items() if role == "matrix"]
    bits = [8 * tg.code_entropy(arrays[f"{name}.codes"]) for name in names]
    assert parts["matrix"].entropy == pytest.approx(sum(bits) / parts["matrix"].weights)
    stored = sum(part.codes + part.scales for part in parts.values())
    assert stored == pytest.approx(len(blob), rel=0.15)  # less the header; the roles are apart
    forecast.main([f"{TINY_TEXT} {changes}"])
    printed = capsys.readouterr().out
    assert printed.count("Forecast") == 2
    assert re.search(rf"embed .*14\.0.*{parts['embed'].codes:,}", printed)


def test_the_forecast_of_steps_returns_the_published_ones():
    """PR #1855 published 4,931 steps in 600 s, PR #1124 6,898."""
    steps = {}
    for name, (text, _) in forecast.PUBLISHED.items():
        lines = forecast.step_table(SCALE.h(text))
        (line,) = [line for line in lines if line.startswith(f"| {name} |")]
        steps[name] = int(line.split("|")[5].replace(",", ""))
    assert steps == {"PR #1124": 6897, "PR #1855": 4930}


# ---- Reports ----


@pytest.fixture
def report(tmp_path, monkeypatch) -> Path:
    """A report of two benchmarks, one of which fails."""

    def good(scale: Scale, machine: harness.Machine) -> Table:
        """What is good."""
        return Table("small", [harness.row("x", "s", [0.5, 1.5], [1.0, 1.0])])

    def bad(scale: Scale, machine: harness.Machine) -> Table:
        """What is bad."""
        raise RuntimeError("it broke")

    monkeypatch.setattr(program, "BENCHMARKS", {"bad": bad, "good": good})
    path = tmp_path / "deeper" / "report.json"
    assert program.main(["--device", "cpu", "--quick", "--out", str(path)]) == 1
    return path


def test_a_report_states_its_machine_and_keeps_the_other_benchmarks(report):
    written = json.loads(report.read_text())
    assert (written["kind"], written["quick"]) == ("cpu", True)
    assert written["device"]["attention"] in ("flash", "cudnn", "math")
    assert written["versions"]["torch"] == torch.__version__
    assert written["command"].startswith("python -m tests.bench")
    assert {"cores", "threads", "load", "date", "code_sha256"} <= written.keys()
    assert "it broke" in written["benchmarks"]["bad"]["error"]
    (row,) = written["benchmarks"]["good"]["rows"]
    assert Row(**row) == Row("x", "s", 1.0, 0.5, 1.5, 2, [1.0, 0.5, 1.5])


def test_markdown_fills_the_block_of_its_device_alone(report, tmp_path):
    readme = tmp_path / "README.md"
    text = program.README.read_text(encoding="utf-8")
    start, end = "<!-- cpu: filled by --markdown, not by hand -->\n", "<!-- end of cpu -->"
    head, tail = text.partition(start)[0], text.rpartition(end)[2]
    for _ in range(2):  # the second time replaces the block
        readme.write_text(text)
        program.write_markdown(report, readme)
        text = readme.read_text()
    assert text.startswith(head + start)
    assert text.endswith(end + tail)
    assert text.count("### good: What is good") == 1
    assert "| x | 1.00 s | 500 ms to 1.50 s | 1.000 (0.500 to 1.500) | 2 |\n" in text
    assert "### bad: failed" in text
    assert "<!-- end of cuda -->" in tables.fill(text, "cuda", "")
    with pytest.raises(ValueError, match="no marks"):
        tables.fill("nothing", "cpu", "")


def test_the_readme_describes_every_benchmark():
    text = program.README.read_text(encoding="utf-8")
    for name in program.BENCHMARKS:
        assert f"| `{name}` |" in text, name


@pytest.mark.parametrize("argv", [["--only", "step,nothing"], ["--device", "gpu"]])
def test_unknown_names_are_refused(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        program.main(argv)
    assert argv[1].rpartition(",")[2] in capsys.readouterr().err


def test_int6_prints_the_cost_of_each_quantizer(tmp_path, byte_corpus, monkeypatch, capsys):
    h = settings(gptq_calib_tokens=256)
    weights = randomize(tg.GPT(h)).state_dict()
    stated = {"settings": json.dumps(tg.model_settings(h))}
    save_file(weights, tmp_path / "model.safetensors", stated)
    for name, value in {**TINY, "GPTQ_CALIB_TOKENS": "256", "DATA_PATH": str(byte_corpus)}.items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    int6.main(str(tmp_path / "model.safetensors"))
    line = r"^(\S.*?)  +(all|matrices alone) +(\S+) \+- (\S+) bpb"
    printed = re.findall(line, capsys.readouterr().out, re.M)
    ways = ("rounding", "GPTQ, random", "GPTQ, train")
    assert [row[:2] for row in printed] == [
        (way, what) for way in ways for what in ("all", "matrices alone")
    ]
    assert all(abs(float(lost)) < 1 and 0 < float(error) < 1 for *_, lost, error in printed)


def test_reading_times_every_order_and_removes_its_shards(tmp_path, monkeypatch, capsys):
    argv = ["reading", str(tmp_path), "--shards=2", "--shard-tokens=9000"]
    monkeypatch.setattr(sys, "argv", argv)
    reading.main()
    printed = capsys.readouterr().out
    for order in ("shuffled", "sequential"):
        for windows in (384, 48):
            for state in ("cold", "warm"):
                assert f"| {order}, {windows} windows, {state} |" in printed
    assert not [*tmp_path.iterdir()]
