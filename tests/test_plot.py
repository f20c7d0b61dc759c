"""records/plot.py: what each picture shows, that it is whole, and what it says it cannot show."""

import functools
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib
import pytest
import torch
from conftest import ROOT, TINY, randomize, settings
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy import stats

import train_gpt as tg

sys.path.insert(0, str(ROOT / "records"))

import plot
from compare import CompareError, compare
from runs import read_run, read_runs

plot.group_bytes = functools.cache(plot.group_bytes)  # half a second for a layout

LONG = "XSA_LAST_N=0+MUON_WD=0.02+MATRIX_LR=0.03"
SCORES = {  # by trial and seed, not in the order of seeds
    "none": {1337: 2.50, 42: 2.56, 7: 2.53},
    LONG: {42: 2.551, 1337: 2.488, 7: 2.524},
    "_$odd$": {7: 2.60, 42: 2.61, 99: 2.70},
}


def write_run(folder, seed=1337, losses=(3.0, 2.0, 1.5), bpb=2.5, h=None, **changes):
    """A run's folder with what plot.py reads; `changes` replace keys of its result."""
    h, folder = replace(h or settings(), seed=seed), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    score = {
        "val_loss": bpb / 2,
        "val_bpb": bpb,
        "tokens": 9,
        "bytes": 9,
        "stride": 0,
        "seconds": 1.0,
    }
    result = {
        "status": "ok",
        "scores": {"float": {**score, "val_bpb": bpb - 0.1}, "plain": score},
        "bytes": {"code": 80_000, "model": 400_000 + seed, "total": 480_000 + seed},
        "seconds": {"train": 2.0 * len(losses), "calibrate": 3.0, "pack": 1.0, "eval": 5.0},
        "settings": asdict(h),
        "steps": len(losses),
        "train_losses": list(losses),
        "val_sha256": "ab",
        **changes,
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    events = [
        {"event": "step", "step": n, "seconds": 2.0 * n, "train_loss": loss}
        for n, loss in enumerate(losses, 1)
        if n <= 2
    ]
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "events.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def artifact():
    """The bytes of a real artifact with all parts a model can have."""
    h = settings(jepa_chunk_size=8, jepa_latent_dim=16, jepa_proj_hidden=16, bigram_vocab_size=512)
    torch.manual_seed(0)
    return tg.pack_artifact(h, quantized(h), "zstd")


def quantized(h):
    """The arrays of an artifact of random weights."""
    return tg.quantize_model(randomize(tg.GPT(h)), {}, tg.Ranks())[0]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, artifact):
    """A folder of three trials of three seeds, two artifacts, and one run that failed."""
    h, tmp_path = settings(jepa_chunk_size=8), tmp_path_factory.mktemp("plot")
    for name, of_seed in SCORES.items():
        for seed, bpb in of_seed.items():
            losses = [bpb + 3 / n + 0.01 * math.sin(n * seed) for n in range(1, 61)]
            folder = write_run(tmp_path / "sweep" / name / f"seed{seed}", seed, losses, bpb, h)
            if seed == 42 and name != LONG:
                (folder / "final_model.int6.ptz").write_bytes(artifact)
    failed = tmp_path / "sweep" / "none" / "seed99"
    why = "nan", "Traceback\nstep 3: the loss is nan"
    write_run(failed, 99, (3.0, 2.0, math.nan), status=why[0], reason=why[1], scores={}, bytes={})
    return tmp_path / "sweep"


def runs_of(tmp_path, name="a", **of_seed):
    """Read runs of one trial, each written with keyword arguments of write_run, by seed."""
    for seed, changes in of_seed.items():
        write_run(tmp_path / name / seed, int(seed.removeprefix("seed")), **changes)
    return read_runs([tmp_path / name])


def note_of(figure):
    return " ".join(figure.get_supxlabel().split())


def band_of(axes):
    """Lowest and highest of the first band at each x."""
    x, y = axes.collections[0].get_paths()[0].vertices.T
    return [value for at in sorted({*x}) for value in (y[x == at].min(), y[x == at].max())]


# ---- All kinds ----


@pytest.mark.parametrize("kind", plot.KINDS)
def test_nothing_is_clipped_or_covers_anything(kind, sweep):
    runs = read_runs([sweep])
    more = [replace(run, name=f"{run.name}-{i}") for i in range(3) for run in runs]
    one = [run for run in runs if (run.name, run.seed) == ("none", 42)]
    for base, of in (("none", runs), ("", one), ("none-0", more)):
        figure = plot.make(of, kind, base=base)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        box, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
        assert box.x0 >= -0.02 and box.y0 >= -0.02  # inches
        assert box.x1 <= width + 0.02 and box.y1 <= height + 0.02
        parts = [axes.get_tightbbox() for axes in figure.axes]
        assert (
            min(axes.get_window_extent().height for axes in figure.axes) > 60
        )  # pixels of 100/inch
        parts += [legend.get_window_extent() for legend in figure.legends]
        parts.append(figure._supxlabel.get_window_extent())
        for i, one in enumerate(parts):
            for other in parts[:i]:
                over = one.intersection(one, other)
                assert over is None or min(over.width, over.height) < 3


def test_the_same_runs_give_the_same_files_in_any_process(sweep, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND")}
    environment |= {"PYTHONHASHSEED": "17", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "records" / "plot.py", sweep, "--base", "none", "--out"]
    told = subprocess.run(
        [*command, f"{tmp_path}/a/b/"], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    there, here = tmp_path / "a" / "b", tmp_path
    assert told[:12] == [f"{there}/{kind}.{end}" for kind in plot.KINDS for end in ("png", "svg")]
    assert told[12] == "Not finished (nan: step 3: the loss is nan): none seed 99."
    assert told[13].startswith("Without final_model.int6.ptz: ")
    assert told[14:] == []
    for kind in ("loss", "scores", "bytes"):  # which have all there is to draw
        with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": "x", "figure.dpi": 30}):
            png, svg = plot.draw(read_runs([sweep]), kind, here, base="none")
        for path in (png, svg):
            assert path.read_bytes() == (there / path.name).read_bytes()
        assert png.read_bytes().startswith(b"\x89PNG")
        assert svg.read_bytes().startswith(b"<?xml")
        assert b"date" not in svg.read_bytes()


def test_draw_writes_two_files_beside_or_inside_and_gives_their_paths(tmp_path):
    runs = runs_of(tmp_path, seed1={})
    inside = plot.draw(runs, "seconds", tmp_path)
    beside = plot.draw(runs, "seconds", tmp_path / "v1.2")
    assert inside == [tmp_path / "seconds.png", tmp_path / "seconds.svg"]
    assert beside == [tmp_path / "v1.2-seconds.png", tmp_path / "v1.2-seconds.svg"]
    assert all(path.stat().st_size for path in inside + beside)


@pytest.mark.parametrize("kind", plot.KINDS)
def test_a_failed_run_is_named_and_counts_in_no_mean(kind, sweep):
    figure = plot.make(read_runs([sweep]), kind)
    assert "Not finished (nan: step 3: the loss is nan): none seed 99." in note_of(figure)
    if kind == "loss":
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert "none (3)" in names
        assert "none seed 99, nan (1)" in names


def test_the_losses_of_a_failed_run_are_drawn_last_and_not_compared(tmp_path):
    runs = runs_of(tmp_path, "a", seed1={"status": "nan"}) + runs_of(tmp_path, "b", seed1={})
    figure = plot.make(runs, "loss", base="b")
    assert len(figure.axes) == 1
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["b (1)", "a seed 1, nan (1)"]


def test_trials_of_a_sweep_that_wait_or_were_killed_are_named(tmp_path, capsys):
    write_run(tmp_path / "a" / "seed1", 1)
    for folder in ("seed2", "seed3", "seed4", "seed5.cut1"):
        (tmp_path / "a" / folder).mkdir()
        (tmp_path / "a" / folder / "command.sh").touch()
    log = "seed:2\nstep:1/9 train_loss:3.0 train_time:10ms step_avg:10.0ms\n"
    (tmp_path / "a" / "seed2" / "train.log").write_text(log)
    assert plot.main([str(tmp_path / "a"), "--kind", "loss", "--out", f"{tmp_path}/"]) == 0
    told = capsys.readouterr().out.splitlines()[2:]
    assert told == [
        "Not finished (cut off): a seed 2.",
        "Not finished (waiting): a seed 3, a seed 4.",
    ]


def test_a_log_of_ours_is_read_and_named_by_its_trial(tmp_path):
    log = tmp_path / "trial" / "seed8" / "train.log"
    log.parent.mkdir(parents=True)
    h = settings(iterations=2, seed=8)
    log.write_text(
        " ".join(f"{name}:{value}" for name, value in asdict(h).items())
        + "\nstep:1/2 train_loss:3.0 train_time:10ms step_avg:10.0ms\n"
        "step:2/2 train_loss:2.0 train_time:20ms step_avg:10.0ms\n"
        "step:2/2 val_loss:2.0 val_bpb:1.5 train_time:20ms step_avg:10.0ms\n"
        "final_int6_roundtrip_exact val_loss:1.5 val_bpb:2.0\n"
        "Total submission size int6+zstd: 99 bytes\n"
        "seconds: train:0.5 calibrate:0.0 eval:2.0\n"
    )
    (run,) = runs = read_runs([log])
    assert (run.name, run.seed, run.seconds) == (
        "trial",
        8,
        {"train": 0.5, "calibrate": 0, "eval": 2},
    )
    for kind in set(plot.KINDS) - {"bytes"}:
        assert plot.make(runs, kind).axes
    line = plot.make(runs, "loss", x="tokens").axes[0].lines[0]
    assert line.get_xdata() == pytest.approx([0.001024, 0.002048])


# ---- Loss and schedule ----


def test_loss_is_the_mean_of_seeds_in_a_band(tmp_path):
    losses = {"seed1": {"losses": (3.0, 2.0, 1.0)}, "seed2": {"losses": (5.0, 3.0, 1.5)}}
    axes = plot.make(runs_of(tmp_path, **losses, seed3={"losses": (4.0, 2.2, 0.5)}), "loss").axes[0]
    assert axes.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert axes.lines[0].get_ydata() == pytest.approx([4.0, 2.4, 1.0])
    assert band_of(axes) == pytest.approx([3.0, 5.0, 2.0, 3.0, 0.5, 1.5])
    assert axes.get_ylabel() == "training loss (nats a token)"


def test_loss_is_averaged_as_the_label_says_only_where_all_steps_are_known(tmp_path):
    losses = [n**2 / 1000 for n in range(1, 101)]
    folder = write_run(tmp_path / "dense", losses=losses)
    lines = [
        f"step:{n}/100 train_loss:{n}.0 train_time:{n}ms step_avg:1ms\n" for n in range(1, 101, 3)
    ]
    sparse = tmp_path / "sparse.log"
    sparse.write_text("".join(lines))
    axes = plot.make([read_run(folder), read_run(sparse)], "loss").axes[0]
    dense, drawn = axes.lines
    assert "mean of 5 steps" in axes.get_ylabel()
    assert dense.get_xdata().tolist() == [*range(3, 99)]
    assert dense.get_ydata() == pytest.approx(
        [sum(losses[n - 3 : n + 2]) / 5 for n in range(3, 99)]
    )
    assert drawn.get_ydata().tolist() == [*range(1, 101, 3)]


@pytest.mark.parametrize(
    ("x", "expected", "label"),
    [
        ("tokens", [0.001024 * n for n in (1, 2, 3, 4)], "million training tokens"),
        ("seconds", [2, 4, 7, 10], "seconds of training"),  # 1 and 2 logged, 4 the end
    ],
)
def test_loss_over_tokens_and_seconds(x, expected, label, tmp_path):
    changes = {"losses": (4.0, 3.0, 2.0, 1.0), "seconds": {"train": 10.0}}
    axes = plot.make(runs_of(tmp_path, seed1=changes), "loss", x=x).axes[0]
    assert axes.lines[0].get_xdata() == pytest.approx(expected)
    assert axes.lines[0].get_ydata().tolist() == [4.0, 3.0, 2.0, 1.0]
    assert axes.get_xlabel() == label


def test_loss_differs_from_the_base_seed_by_seed(tmp_path):
    base = {"seed1": {"losses": (3.0, 2.0)}, "seed2": {"losses": (5.0, 4.0)}}
    other = {"seed2": {"losses": (5.5, 4.1)}, "seed1": {"losses": (3.1, 2.3)}}
    runs = runs_of(tmp_path, "base", **base) + runs_of(tmp_path, "new", **other)
    runs += runs_of(tmp_path, "alone", seed3={"losses": (9.0, 9.0)})
    axes = plot.make(runs, "loss", base="base").axes[1]
    (line,) = [
        line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_marker() != "None"
    ]
    assert line.get_ydata() == pytest.approx([0.3, 0.2])
    assert band_of(axes) == pytest.approx([0.1, 0.5, 0.1, 0.3])


def test_a_log_differs_from_the_base_where_both_have_a_step(tmp_path):
    base = read_run(write_run(tmp_path / "base", 5, [2.0 + n / 100 for n in range(1, 101)]))
    log = tmp_path / "log.log"
    lines = [
        f"step:{n}/100 train_loss:{3 + n / 100} train_time:{n}ms\n" for n in (1, 2, 50, 100, 150)
    ]
    scored = "final_int6_roundtrip_exact val_loss:1.5 val_bpb:2.0\n"
    log.write_text(f"seed:5\n{''.join(lines)}{scored}")
    figure = plot.make([base, read_run(log)], "loss", base="base")
    (line,) = [line for line in figure.axes[1].lines if len(line.get_xdata()) == 4]
    assert line.get_xdata().tolist() == [1, 2, 50, 100]
    assert line.get_ydata() == pytest.approx([1.0] * 4)  # of single steps, no mean beside one
    assert line.get_color() == figure.axes[0].lines[1].get_color()
    log.write_text(f"seed:5\nstep:300/300 train_loss:1.0 train_time:9ms\n{scored}")
    assert len(plot.make([base, read_run(log)], "loss", base="base").axes) == 1


def test_losses_of_different_vocabularies_are_said_not_to_compare(tmp_path):
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", h=settings(vocab_size=300))
    assert "do not compare" not in note_of(plot.make([read_run(a)], "loss"))
    assert "do not compare" in note_of(plot.make([read_run(a), read_run(b)], "loss"))


def drawn(figure, number=0):
    """Values by step or seconds of the first line of a panel."""
    return dict(zip(*figure.axes[number].lines[0].get_data(), strict=True))


def test_the_schedule_is_that_of_training_by_steps(tmp_path):
    h = settings(
        iterations=100, warmdown_iters=40, jepa_chunk_size=8, muon_momentum_warmup_steps=80
    )
    runs = [read_run(write_run(tmp_path / "a", losses=[1.0] * 100, h=h))]
    figure = plot.make(runs, "schedule")
    rates, momenta, weights = (drawn(figure, n) for n in range(3))
    assert [*rates] == [*range(100)]
    for step in (0, 30, 59, 60, 61, 80, 99):
        phase = tg.schedule(tg.Progress(step, 100, 0.0, math.inf), h)
        assert rates[step] == pytest.approx(phase.lr_scale)
        assert weights[step] == pytest.approx(phase.jepa_weight / 0.001, abs=1e-9)
    assert (rates[0], rates[80]) == (1.0, 0.5)
    assert 0.9 < weights[79] < 1 and weights[80] == 0
    assert momenta[0] == 0.92
    assert momenta[40] == pytest.approx((0.92 + 0.99) / 2)
    assert momenta[80] == momenta[99] == pytest.approx(0.99)


def test_the_schedule_is_that_of_training_by_the_clock(tmp_path):
    h = settings(iterations=1000, warmdown_iters=40, max_wallclock_seconds=200)
    runs = [read_run(write_run(tmp_path / "a", losses=[1.0] * 100, h=h))]  # 2 s a step
    rates = drawn(plot.make(runs, "schedule"))
    over_seconds = drawn(plot.make(runs, "schedule", x="seconds"))
    for step in (0, 1, 59, 61, 80, 99):
        scale = tg.lr_scale(tg.Progress(step, 1000, 2.0 * step, 200.0), 40, 0.6)
        assert rates[step] == over_seconds[2.0 * step] == pytest.approx(scale)
    assert rates[80] == pytest.approx(0.5)  # by ITERATIONS it would still be 1
    kept = replace(h, gptq_enabled=True, gptq_calib="train", gptq_reserve_seconds=20.0)
    seconds = {"train": 183.0, "calibrate": 3.0}
    runs = [read_run(write_run(tmp_path / "b", losses=[1.0] * 90, h=kept, seconds=seconds))]
    rates = drawn(plot.make(runs, "schedule"))
    assert rates[70] == pytest.approx(0.5)  # of 180 seconds


def test_the_schedule_is_what_the_steps_of_a_run_were_told(byte_corpus, tmp_path, monkeypatch):
    told, take_step = [], tg.Trainer.take_step

    def record(trainer, phase, *batch):
        told.append(phase)
        return take_step(trainer, phase, *batch)

    monkeypatch.setattr(tg.Trainer, "take_step", record)
    changes = {"ITERATIONS": "12", "WARMDOWN_ITERS": "6", "MUON_MOMENTUM_WARMUP_STEPS": "10"}
    changes |= {"JEPA_CHUNK_SIZE": "8", "DATA_PATH": str(byte_corpus), "RUN_DIR": str(tmp_path)}
    assert tg.main([], {**TINY, **changes}) == 0
    figure = plot.make([read_run(tmp_path)], "schedule")
    rates, momenta, weights = (drawn(figure, n) for n in range(3))
    assert len(told) == len(rates) == 12
    for step, phase in enumerate(told):
        assert rates[step] == pytest.approx(phase.lr_scale)
        assert momenta[step] == pytest.approx(phase.muon_momentum)
        assert weights[step] == pytest.approx(phase.jepa_weight / 0.001, abs=1e-9)
    for values in zip(*told, strict=True):
        assert len(set(values)) > 3 or set(values) == {0.0}  # STP is off


def test_equal_schedules_are_one_line(tmp_path):
    paths = [write_run(tmp_path / name) for name in ("a", "b")]
    paths.append(write_run(tmp_path / "c", h=settings(warmdown_iters=2, iterations=3)))
    figure = plot.make([read_run(path) for path in paths], "schedule")
    assert [len(axes.lines) for axes in figure.axes] == [2, 1]
    assert [line.get_label() for line in figure.axes[0].lines] == ["a\nb", "c"]


# ---- Scores and size ----


def test_scores_are_sorted_with_means_and_paired_differences(sweep):
    figure = plot.make(read_runs([sweep]), "scores", base="none")
    left, right = figure.axes
    names = [text.get_text().split("\n")[0] for text in left.get_yticklabels()]
    assert names == ["XSA_LAST_N=0+MUON_WD=0.02", "none", " _$odd$"]
    trials = [SCORES[LONG], SCORES["none"], SCORES["_$odd$"]]
    for row, of_seed in enumerate(trials):
        dots, mean = left.lines[2 * row : 2 * row + 2]
        assert sorted(dots.get_xdata()) == sorted(of_seed.values())
        assert {*dots.get_ydata()} == {row}
        assert mean.get_xdata() == pytest.approx([sum(of_seed.values()) / 3])
    assert left.lines[6].get_xdata() == pytest.approx([2.53, 2.53])
    assert left.get_ylim() == (2.5, -0.5)  # the best above
    expected = {0: [-0.012, -0.009, -0.006], 2: [0.05, 0.07]}  # no 99 beside the base's
    dots = {line.get_ydata()[0]: line for line in right.lines if line.get_marker() == "o"}
    bars = {bar[0].get_ydata()[0]: bar for bar in right.containers}
    assert dots.keys() == bars.keys() == expected.keys()
    for row, values in expected.items():
        assert sorted(dots[row].get_xdata()) == pytest.approx(values)
        (segment,) = bars[row][2][0].get_segments()
        interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert segment[:, 0] == pytest.approx([interval.low, interval.high])
    assert right.lines[-1].get_xdata() == [0, 0]


def test_scores_without_a_common_seed_or_base_have_no_differences(tmp_path):
    runs = runs_of(tmp_path, "a", seed1={}, seed2={}) + runs_of(tmp_path, "b", seed3={})
    assert len(plot.make(runs, "scores").axes) == 1
    figure = plot.make(runs, "scores", base="a")
    assert len(figure.axes) == 1
    assert "b is not compared: one run with a score, seed 3, of 1" in note_of(figure)


def test_runs_that_do_not_say_their_seed_are_not_paired(tmp_path):
    lines = (
        "step:3/3 x train_time:9ms step_avg:3ms\nfinal_int6_roundtrip_exact val_loss:1.5 val_bpb:"
    )
    for name, bpb in {"a": 2.0, "b": 2.5}.items():
        (tmp_path / f"{name}.log").write_text(f"{lines}{bpb}\n")
    figure = plot.make(read_runs([tmp_path]), "scores", base="a")
    assert [*figure.axes[0].lines[0].get_xdata(), *figure.axes[0].lines[2].get_xdata()] == [
        2.0,
        2.5,
    ]
    assert len(figure.axes) == 1


def test_scores_differ_from_the_base_as_compare_says(tmp_path):
    """Of trials without common seeds too; no difference of other texts, of one seed, of copies."""
    of_base = {"seed1": {"bpb": 2.0}, "seed2": {"bpb": 2.1}, "seed3": {"bpb": 2.4}}
    runs = runs_of(tmp_path, "base", **of_base)
    runs += runs_of(tmp_path, "alien", seed4={"bpb": 2.2}, seed5={"bpb": 2.3})
    runs += runs_of(tmp_path, "copy", seed1={"bpb": 2.1}, seed2={"bpb": 2.5})
    runs += runs_of(tmp_path, "lone", seed1={"bpb": 2.35})
    runs += runs_of(tmp_path, "nan", seed1={"bpb": 2.36}, seed2={"bpb": math.nan})
    figure = plot.make(runs, "scores", base="base")
    c = compare([run for run in runs if run.name == "alien"], runs[:3])
    right = figure.axes[1]
    (bar,) = right.containers
    assert bar[0].get_data() == ([c.bpb_diff], [1])
    (segment,) = bar[2][0].get_segments()
    assert segment[:, 0] == pytest.approx([c.low, c.high])
    assert not [line for line in right.lines if line.get_marker() == "o"]  # no pairs
    notes = note_of(figure)
    assert "lone is not compared: one run with a score, seed 1, of 1" in notes
    assert "copy is not compared: copy seed 1 and base seed 2 have the same score" in notes
    assert "Without a finite score: nan seed 2." in notes
    assert str(tmp_path) not in notes


def test_a_mean_is_of_seeds_of_one_thing(tmp_path):
    run, other = runs_of(tmp_path, seed1={}, seed2={"h": settings(matrix_lr=0.5)})
    again = replace(other, settings=run.settings | {"seed": 2})
    assert plot.make([run, again], "loss").axes
    for kind in set(plot.KINDS) - {"bytes"}:
        with pytest.raises(CompareError, match="MATRIX_LR is"):
            plot.make([run, other], kind)


def test_the_score_drawn_is_the_last_that_all_runs_have(tmp_path):
    a, b = runs_of(tmp_path, "a", seed1={"bpb": 2.0}) + runs_of(tmp_path, "b", seed1={"bpb": 3.0})
    figure = plot.make(
        [a, replace(b, scores={"float": b.scores["float"]}, val_sha256="cd")], "scores"
    )
    assert figure.axes[0].lines[0].get_xdata() == pytest.approx([1.9])
    assert figure.axes[0].get_xlabel() == "bits per byte (float)"
    assert "Some runs have a later score than float." in note_of(figure)
    assert "different validation data (0: not said): a seed 1: 9 tokens" in note_of(figure)


@pytest.mark.parametrize(
    ("total", "seen"), [(480_000, False), (15_900_000, True), (17_000_000, True)]
)
def test_size_is_drawn_with_the_limit_if_that_is_near(total, seen, tmp_path):
    runs = runs_of(tmp_path, seed1={"bytes": {"total": total}, "bpb": 1.25}, seed2={"bpb": 1.5})
    figure = plot.make(runs, "size")
    marks, *limit = figure.axes[0].lines
    assert marks.get_data()[0].tolist() == [total, 480_002]
    assert marks.get_data()[1].tolist() == [1.25, 1.5]
    assert [line.get_xdata() for line in limit] == [[16_000_000] * 2] * seen
    assert ("far to the right" in note_of(figure)) == (not seen)


# ---- Bytes and seconds ----


def test_bytes_are_those_of_the_artifact(tmp_path, artifact):
    folder = write_run(tmp_path / "a")
    (folder / "final_model.int6.ptz").write_bytes(artifact)
    figure = plot.make([read_run(folder)], "bytes")
    widths = [bar.get_width() for bar in figure.axes[0].containers[0]]
    groups = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    sizes = dict(zip(groups, widths, strict=True))
    assert widths == sorted(widths, reverse=True)
    assert sizes.keys() == {
        *("attn", "mlp", "tok_emb", "bigram", "value_embedding", "jepa"),
        *("scales of rows", "gains and gates", "header"),
    }
    # Apart they are smaller, for each has a code of its own; in larger models by less.
    assert sum(widths) == pytest.approx(len(artifact), rel=0.1)
    gap = f"a seed 1337 {len(artifact):,} ({sum(widths) / len(artifact) - 1:+.1%})"
    assert gap in note_of(figure)


def test_bytes_are_those_of_the_codec_that_packed_the_artifact(tmp_path):
    h = settings(compressor="lzma")
    folder = write_run(tmp_path / "a", h=h)
    (folder / "final_model.int6.ptz").write_bytes(tg.pack_artifact(h, quantized(h), "lzma"))
    figure = plot.make([read_run(folder)], "bytes")
    widths = {bar.get_width() for bar in figure.axes[0].containers[0]}
    header = len(tg.pack_artifact(h, {}, "lzma"))
    assert header in widths and header != len(tg.pack_artifact(h, {}, "zstd"))


def test_every_array_is_counted_in_one_group(tmp_path, artifact, monkeypatch):
    (tmp_path / "artifact").write_bytes(artifact)
    _, arrays = tg.unpack_artifact(artifact, settings())
    by_name = {name: array.nbytes for name, array in arrays.items()}
    monkeypatch.setattr(
        tg,
        "pack_artifact",
        lambda h, arrays, compressor: bytes(7 + sum(a.nbytes for a in arrays.values())),
    )
    sizes, whole = plot.group_bytes(tmp_path / "artifact")
    assert whole == len(artifact)
    assert sizes.pop("header") == 7
    assert sum(sizes.values()) == sum(by_name.values())
    attention = [size for name, size in by_name.items() if ".attn." in name and ".codes" in name]
    assert sizes["attn"] == sum(attention)
    assert sizes["bigram"] == by_name["bigram.embed.weight.codes"] + by_name["bigram.proj.weight"]
    assert sizes["scales of rows"] == sum(n for name, n in by_name.items() if ".scales" in name)


def test_bytes_put_trials_beside_one_another(sweep):
    figure = plot.make(read_runs([sweep]), "bytes")
    bars = figure.axes[0].containers
    assert len(bars) == 2
    assert len({bar.get_y() for container in bars for bar in container}) == 2 * len(bars[0])
    assert len({container[0].get_hatch() for container in bars}) == 2


def test_seconds_are_means_end_to_end_and_none_is_counted_twice(tmp_path):
    kept = settings(gptq_enabled=1, gptq_calib="train", max_wallclock_seconds=600)
    runs = runs_of(tmp_path, "a", seed1={}, seed2={"seconds": {"train": 8.0, "calibrate": 5.0}})
    runs += runs_of(tmp_path, "b", seed1={"h": kept})
    figure = plot.make(runs, "seconds")
    stages = {
        text.get_text(): [(bar.get_x(), bar.get_width()) for bar in container]
        for text, container in zip(
            figure.legends[0].get_texts(), figure.axes[0].containers, strict=True
        )
    }
    assert stages == {
        "train": [(0, 7.0), (0, 3.0)],  # 3 of its 6 were calibration
        "calibrate": [(7.0, 4.0), (3.0, 3.0)],
        "pack": [(11.0, 0.5), (6.0, 1.0)],
        "eval": [(11.5, 2.5), (7.0, 5.0)],
    }


# ---- Errors ----


def spoil(tmp_path, what):
    """Arguments of the command line that it cannot draw, and what it must say."""
    good = write_run(tmp_path / "a" / "seed1", 1)
    if what == "no folder":
        return [tmp_path / "none"], ["none", "give finished runs"]
    if what == "no such base":
        return [good, "--kind", "scores", "--base", "x"], ["--base x", "only a"]
    if what == "no artifact":
        return [good, "--kind", "bytes"], ["bytes", "final_model.int6.ptz", "a seed 1"]
    if what == "damaged artifact":
        (good / "final_model.int6.ptz").write_bytes(b"PGOLFGPT" * 100)
        return [good, "--kind", "bytes"], [f"{good}/final_model.int6.ptz", "artifact"]
    if what == "one seed twice":
        other = write_run(tmp_path / "b" / "a" / "seed1", 1)
        return [good, other], ["a/seed1 and b/a/seed1", "give one of them"]
    if what == "all failed":
        bad = write_run(
            tmp_path / "c", status="oom", reason="no memory", scores={}, train_losses=[]
        )
        (bad / "events.jsonl").unlink()
        return [bad], ["(oom: no memory): c seed 1337", "give finished runs"]
    if what == "settings of another program":
        bad = write_run(tmp_path / "d", settings={"iterations": "many"})
        return [bad, "--kind", "schedule"], [str(bad), "ITERATIONS"]
    if what == "no place":
        (tmp_path / "file").write_text("")
        return [good, "--out", f"{tmp_path}/file/x/"], [f"{tmp_path}/file"]
    log = tmp_path / "x.log"
    log.write_text("step:1/9 train_loss:3.0 train_time:0ms step_avg:0.0ms\n")
    if what == "no tokens":
        return [log, "--kind", "loss", "--x", "tokens"], [str(log), "tokens", "--x steps"]
    if what == "no seconds":
        return [log, "--kind", "loss", "--x", "seconds"], [str(log), "seconds", "--x steps"]
    log.write_text("nothing\n")
    return [log, "--kind", "loss"], ["(cut off): x", "training losses"]


@pytest.mark.parametrize(
    "what",
    [
        *("no folder", "no such base", "no artifact", "damaged artifact", "one seed twice"),
        *("all failed", "settings of another program", "no place", "no tokens", "no seconds"),
        "an empty log",
    ],
)
def test_what_cannot_be_drawn_is_said_with_status_2(what, tmp_path, capsys):
    arguments, words = spoil(tmp_path, what)
    given = [] if "--out" in arguments else ["--out", f"{tmp_path}/out/"]
    assert plot.main([*map(str, arguments), *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert all(word in error for word in words), error
    assert not [*tmp_path.rglob("*.png")]


def test_kinds_that_cannot_be_drawn_do_not_hinder_the_others(tmp_path, capsys):
    folder = write_run(tmp_path / "a")
    assert plot.main([str(folder), "--out", f"{tmp_path}/"]) == 0
    told = capsys.readouterr()
    assert len([*tmp_path.glob("*.png")]) == 5
    assert "Without final_model.int6.ptz: a seed 1337." in told.out
    assert told.err.startswith("error: bytes: ")


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as end:
        plot.main(["--help"])
    assert end.value.code == 0
    assert "python records/plot.py logs/sweep --kind scores" in capsys.readouterr().out
