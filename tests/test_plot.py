"""records/plot.py: files, titles and data of each kind of plot, and what cannot be drawn."""

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import ROOT, settings
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy import stats

sys.path.insert(0, str(ROOT / "records"))

import compare
import plot
from runs import read_run, read_runs

LONG = "XSA_LAST_N=0+MUON_WD=0.02+MATRIX_LR=0.03"
SCORES = {  # by trial and seed
    "none": {1337: 2.50, 42: 2.56, 7: 2.53},
    LONG: {42: 2.551, 1337: 2.488, 7: 2.524},
    "_$odd$": {7: 2.60, 42: 2.61, 99: 2.70},
}


def write_run(folder, seed=1337, losses=None, bpb=None, h=None, **changes):
    """A run's folder with what plot.py reads; `changes` replace keys of its result."""
    losses, bpb = losses or (3 + seed / 1000, 2.0, 1.5), bpb or 2.5 + seed / 1e6
    h, folder = replace(h or settings(), seed=seed), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    score = {"val_loss": bpb / 2, "val_bpb": bpb, "nats": bpb * 4.5, "tokens": 9, "bytes": 9}
    score |= {"stride": 0, "seconds": 1.0}
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
        for n, loss in enumerate(losses[:2], 1)
    ]
    text = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "events.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A folder of three trials of three seeds, and one run that failed."""
    h, folder = settings(jepa_chunk_size=8), tmp_path_factory.mktemp("plot") / "sweep"
    for name, of_seed in SCORES.items():
        for seed, bpb in of_seed.items():
            losses = [bpb + 3 / n + 0.01 * math.sin(n * seed) for n in range(1, 61)]
            write_run(folder / name / f"seed{seed}", seed, losses, bpb, h)
    failed = {"status": "nan", "reason": "Traceback\nstep 3: the loss is nan", "scores": {}}
    write_run(folder / "none/seed99", 99, (3.0, 2.0, math.nan), bytes={}, **failed)
    return folder


def runs_of(tmp_path, name="a", **of_seed):
    """Writes and reads runs of one trial, by seed with keyword arguments of write_run."""
    for seed, changes in of_seed.items():
        write_run(tmp_path / name / seed, int(seed.removeprefix("seed")), **changes)
    return read_runs([tmp_path / name])


def note_of(figure):
    return " ".join(figure.get_supxlabel().split())


def names_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def points_of(figure, panel=0, line=0):
    return dict(zip(*figure.axes[panel].lines[line].get_data(), strict=True))


# ---- All kinds ----


@pytest.mark.parametrize("kind", plot.KINDS)
def test_nothing_is_clipped_and_nothing_overlaps(kind, sweep):
    runs = read_runs([sweep])
    more = [replace(run, name=f"{run.name}-{i}") for i in range(3) for run in runs]
    for base, of in (("none", runs), ("none-0", more)):
        figure = plot.make(of, kind, base=base)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        box, (width, height) = figure.get_tightbbox(canvas.get_renderer()), figure.get_size_inches()
        assert min(box.x0, box.y0) >= -0.02  # inches
        assert box.x1 <= width + 0.02 and box.y1 <= height + 0.02
        assert min(axes.get_window_extent().height for axes in figure.axes) > 60  # pixels
        parts = [axes.get_tightbbox() for axes in figure.axes]
        parts += [legend.get_window_extent() for legend in figure.legends]
        for i, one in enumerate(parts):
            for other in parts[:i]:
                overlap = one.intersection(one, other)
                assert overlap is None or min(overlap.width, overlap.height) < 3


def test_the_program_writes_one_png_of_each_kind(sweep, tmp_path, capsys):
    out = tmp_path / "a" / "b"
    assert plot.main([str(sweep), "--base", "none", "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:-1] == [f"{out}/{kind}.png" for kind in plot.KINDS]
    assert printed[-1] == "Not finished (nan: step 3: the loss is nan): none seed 99."
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{k}.png" for k in plot.KINDS)
    again = plot.draw(read_runs([sweep]), "scores", tmp_path, base="none")
    assert again == tmp_path / "scores.png"
    assert again.read_bytes() == (out / "scores.png").read_bytes()
    assert again.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", plot.KINDS)
def test_a_failed_run_is_named_and_counts_in_no_mean(kind, sweep):
    figure = plot.make(read_runs([sweep]), kind)
    assert "Not finished (nan: step 3: the loss is nan): none seed 99." in note_of(figure)
    if kind == "loss":
        assert {"none (3)", "none seed 99, nan (1)"} < {*names_of(figure)}


def test_the_losses_of_a_failed_run_are_not_compared(tmp_path):
    runs = runs_of(tmp_path, "a", seed1={"status": "nan"}) + runs_of(tmp_path, "b", seed1={})
    figure = plot.make(runs, "loss", base="b")
    assert len(figure.axes) == 1
    assert names_of(figure) == ["b (1)", "a seed 1, nan (1)"]


def test_a_run_is_read_from_its_log(finished):
    folder = finished / "tiny/seed42"
    for kind in ("loss", "scores", "schedule"):
        assert plot.make([read_run(folder / "train.log")], kind).axes
    figure = plot.make([read_run(folder / "train.log")], "loss", x="tokens")
    assert names_of(figure) == ["tiny (1)"]
    assert [*points_of(figure)] == pytest.approx([0.001024 * n for n in range(1, 7)])


# ---- Bytes ----


def test_what_quantizing_loses_is_a_line_for_trials_that_differ_in_size(tmp_path):
    for name, size, lost in (
        ("std_3.0_bits", 650, 0.01),
        ("std_2.4_bits", 600, 0.02),
        ("trellis_3.0_bits", 640, 0.008),
        ("better_3.0_bits", 700, -0.001),
    ):
        for seed, more in ((1, 0.001), (2, -0.001)):
            sizes = {"code": 1, "model": 1000 * size, "total": 1000 * size + 1}
            folder = write_run(tmp_path / name / f"seed{seed}", seed, bpb=2.0, bytes=sizes)
            result = json.loads((folder / "result.json").read_text())
            result["scores"]["float"]["val_bpb"] = 2.0 - lost - more
            (folder / "result.json").write_text(json.dumps(result))
    figure = plot.make(read_runs([tmp_path]), "bytes")
    assert names_of(figure) == ["std", "trellis"]
    assert points_of(figure, line=0) == pytest.approx({600: 0.02, 650: 0.01})
    assert points_of(figure, line=1) == pytest.approx({640: 0.008})


# ---- Loss and schedule ----


def test_loss_is_the_mean_of_seeds_in_a_band(tmp_path):
    losses = {"seed1": {"losses": (3.0, 2.0, 1.0)}, "seed2": {"losses": (5.0, 3.0, 1.5)}}
    axes = plot.make(runs_of(tmp_path, **losses, seed3={"losses": (4.0, 2.2, 0.5)}), "loss").axes[0]
    assert axes.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert axes.lines[0].get_ydata() == pytest.approx([4.0, 2.4, 1.0])
    x, y = axes.collections[0].get_paths()[0].vertices.T
    band = [(y[x == step].min(), y[x == step].max()) for step in (1, 2, 3)]
    assert band == [(3.0, 5.0), (2.0, 3.0), (0.5, 1.5)]
    assert axes.get_ylabel() == "training loss (nats a token)"


def test_a_long_loss_is_a_moving_mean_as_its_label_says(tmp_path):
    losses = [n**2 / 1000 for n in range(1, 101)]
    figure = plot.make([read_run(write_run(tmp_path / "a", losses=losses))], "loss")
    assert "mean of 5 points" in figure.axes[0].get_ylabel()
    points = points_of(figure)
    assert [*points] == [*range(3, 99)]
    assert points[50] == pytest.approx(sum(losses[47:52]) / 5)


@pytest.mark.parametrize(
    ("x", "expected", "label"),
    [
        ("tokens", [0.001024 * n for n in (1, 2, 3, 4)], "million training tokens"),
        ("seconds", [2, 4, 7, 10], "seconds of training"),  # 1 and 2 are logged, 4 is the end
    ],
)
def test_loss_over_tokens_and_seconds(x, expected, label, tmp_path):
    changes = {"losses": (4.0, 3.0, 2.0, 1.0), "seconds": {"train": 10.0}}
    figure = plot.make(runs_of(tmp_path, seed1=changes), "loss", x=x)
    assert [*points_of(figure)] == pytest.approx(expected)
    assert [*points_of(figure).values()] == [4.0, 3.0, 2.0, 1.0]
    assert figure.axes[0].get_xlabel() == label


def test_the_difference_of_losses_is_by_seed_and_step(tmp_path):
    base = {"seed1": {"losses": (3.0, 2.0)}, "seed2": {"losses": (5.0, 4.0)}}
    other = {"seed2": {"losses": (5.5, 4.1)}, "seed1": {"losses": (3.1, 2.3)}}
    runs = runs_of(tmp_path, "base", **base) + runs_of(tmp_path, "new", **other)
    runs += runs_of(tmp_path, "alone", seed3={"losses": (9.0, 9.0)})
    log = tmp_path / "log_seed1.log"
    log.write_text(
        "step:2/9 train_loss:2.5 train_time:9ms\nstep:9/9 train_loss:1.0 train_time:9ms\n"
        "final_int6_roundtrip_exact val_loss:1.5 val_bpb:2.0\n"
    )
    figure = plot.make([*runs, read_run(log)], "loss", base="base")
    lines = {
        name: line.get_data()
        for name, line in zip(names_of(figure), figure.axes[1].lines, strict=False)
    }
    assert lines["new (2)"][1] == pytest.approx([0.3, 0.2])
    assert [list(values) for values in lines["log (1)"]] == [[2], [0.5]]
    assert len(lines["alone (1)"][0]) == len(lines["base (2)"][0]) == 0


def test_seeds_without_a_common_step_are_named(tmp_path):
    for seed in (1, 2):
        step = f"step:{seed}/9 train_loss:3.{seed} train_time:9ms\n"
        score = f"final_x val_loss:1.{seed} val_bpb:2.{seed}\n"
        (tmp_path / f"a_seed{seed}.log").write_text(step + score)
    figure = plot.make(read_runs([tmp_path]), "loss")
    assert "The seeds have no logged step in common: a." in note_of(figure)


def test_losses_of_different_vocabularies_cannot_be_compared(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", h=settings(vocab_size=300))
    assert "cannot be compared" not in note_of(plot.make([read_run(a)], "loss"))
    assert "cannot be compared" in note_of(plot.make([read_run(a), read_run(b)], "loss"))


def test_the_schedule_by_steps(tmp_path):
    h = settings(
        iterations=100, warmdown_iters=40, jepa_chunk_size=8, muon_momentum_warmup_steps=80
    )
    figure = plot.make([read_run(write_run(tmp_path / "a", losses=[1.0] * 100, h=h))], "schedule")
    titles = [axes.get_ylabel() for axes in figure.axes]
    assert titles == ["learning-rate scale", "Muon's momentum", "JEPA's weight"]
    rates, momenta, weights = (points_of(figure, panel) for panel in range(3))
    assert [*rates] == [*range(100)]
    assert (rates[0], rates[60], rates[80]) == (1.0, 1.0, 0.5)
    assert momenta[40] == pytest.approx((0.92 + 0.99) / 2)
    assert momenta[80] == momenta[99] == pytest.approx(0.99)
    assert 0.0009 < weights[79] < 0.001 and weights[80] == 0


def test_the_schedule_has_loops_and_the_least_rate_of_a_run_that_repeats_layers(tmp_path):
    """A trial without loops has no line in their panel."""
    h = settings(iterations=100, num_layers=2, num_loops=2, loop_start=0, loop_end=0)
    h = replace(h, enable_looping_at=0.35, warmdown_frac=0.5, min_lr=0.1)
    folders = [write_run(tmp_path / "looped", losses=[1.0] * 100, h=h)]
    folders.append(write_run(tmp_path / "plain", losses=[1.0] * 100, h=replace(h, num_loops=0)))
    figure = plot.make([read_run(folder) for folder in folders], "schedule")
    titles = [axes.get_ylabel() for axes in figure.axes]
    assert titles == ["learning-rate scale", "Muon's momentum", "loops"]
    rates, loops = points_of(figure, 0), points_of(figure, 2)
    assert (rates[50], rates[75], rates[99]) == (1.0, 0.5, 0.1)
    assert (loops[34], loops[35], loops[99]) == (0, 2, 2)
    assert [line.get_label() for line in figure.axes[2].lines] == ["looped"]


def test_the_schedule_by_the_clock(tmp_path):
    h = settings(iterations=1000, warmdown_iters=40, max_wallclock_seconds=200)
    runs = [read_run(write_run(tmp_path / "a", losses=[1.0] * 100, h=h))]  # 2 s a step
    rates = points_of(plot.make(runs, "schedule"))
    assert rates[80] == pytest.approx(0.5)  # by ITERATIONS it would still be 1
    assert points_of(plot.make(runs, "schedule", x="seconds"))[160.0] == rates[80]
    kept = replace(h, gptq_enabled=True, gptq_calib="train")
    seconds = {"train": 183.0, "calibrate": 3.0}
    folder = write_run(tmp_path / "b", losses=[1.0] * 90, h=kept, seconds=seconds)
    (folder / "train.log").write_text("gptq: 20.0 s are kept for 4 calibration batches\n")
    runs = [read_run(folder)]
    assert points_of(plot.make(runs, "schedule"))[70] == pytest.approx(0.5)  # of 180 seconds


def test_equal_schedules_share_a_line(tmp_path):
    paths = [write_run(tmp_path / name) for name in ("a", "b")]
    paths.append(write_run(tmp_path / "c", h=settings(warmdown_iters=2, iterations=3)))
    figure = plot.make([read_run(path) for path in paths], "schedule")
    assert [len(axes.lines) for axes in figure.axes] == [2, 1]
    assert [line.get_label() for line in figure.axes[0].lines] == ["a\nb", "c"]


# ---- Scores ----


def test_scores_are_sorted_with_means_and_paired_differences(sweep):
    left, right = plot.make(read_runs([sweep]), "scores", base="none").axes
    names = [text.get_text().split("\n")[0] for text in left.get_yticklabels()]
    assert names == ["XSA_LAST_N=0+MUON_WD=0.02", "none", " _$odd$"]
    for row, name in enumerate((LONG, "none", "_$odd$")):
        dots, mean = left.lines[2 * row : 2 * row + 2]
        assert sorted(dots.get_xdata()) == sorted(SCORES[name].values())
        assert mean.get_xdata() == pytest.approx([sum(SCORES[name].values()) / 3])
    dots = {line.get_ydata()[0]: line for line in right.lines if line.get_marker() == "o"}
    bars = {bar[0].get_ydata()[0]: bar for bar in right.containers}
    expected = {0: [-0.012, -0.009, -0.006], 2: [0.05, 0.07]}  # the base has no seed 99
    assert dots.keys() == bars.keys() == expected.keys()
    for row, values in expected.items():
        assert sorted(dots[row].get_xdata()) == pytest.approx(values)
        interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        (segment,) = bars[row][2][0].get_segments()
        assert segment[:, 0] == pytest.approx([interval.low, interval.high])


def test_differences_of_scores_are_those_of_compare(tmp_path):
    of_base = {"seed1": {"bpb": 2.0}, "seed2": {"bpb": 2.1}, "seed3": {"bpb": 2.4}}
    runs = runs_of(tmp_path, "base", **of_base)
    runs += runs_of(tmp_path, "alien", seed4={"bpb": 2.2}, seed5={"bpb": 2.3})
    runs += runs_of(tmp_path, "lone", seed1={"bpb": 2.35})
    runs += runs_of(tmp_path, "nan", seed1={"bpb": 2.36}, seed2={"bpb": math.nan})
    figure = plot.make(runs, "scores", base="base")
    c = compare.compare([run for run in runs if run.name == "alien"], runs[:3])
    right = figure.axes[1]
    (bar,) = right.containers
    (segment,) = bar[2][0].get_segments()
    assert segment[:, 0] == pytest.approx([c.bpb.low, c.bpb.high])
    assert not [line for line in right.lines if line.get_marker() == "o"]  # no pairs
    notes = note_of(figure)
    assert "lone is not compared: only seed 1 has a score" in notes
    assert "NOT COUNTED: nan seed 2: no finite score." in notes
    assert str(tmp_path) not in notes


def test_the_score_is_the_last_that_all_runs_have(tmp_path):
    a, b = runs_of(tmp_path, "a", seed1={"bpb": 2.0}) + runs_of(tmp_path, "b", seed1={"bpb": 3.0})
    b = replace(b, scores={"float": b.scores["float"]}, val_sha256="cd")
    figure = plot.make([a, b], "scores")
    assert figure.axes[0].lines[0].get_xdata() == pytest.approx([1.9])
    assert figure.axes[0].get_xlabel() == "bits per byte (float)"
    assert "Some runs have a later score than float: see --score." in note_of(figure)
    assert "different validation data: a seed 1: 9 tokens" in note_of(figure)


@pytest.mark.parametrize(
    ("score", "means", "name"),
    [(None, [3.0, 5.0], "plain"), ("float", [2.9, 4.9], "float"), ("last", [2.0, 3.0], "last")],
)
def test_scores_of_a_chosen_pass(tmp_path, score, means, name):
    a, b = runs_of(tmp_path, "a", seed1={"bpb": 3.0}) + runs_of(tmp_path, "b", seed1={"bpb": 5.0})
    b = replace(b, scores=b.scores | {"ttt": b.scores["plain"]._replace(val_bpb=2.0)})
    figure = plot.make([a, b], "scores", score=score)
    axes = figure.axes[0]
    assert [line.get_xdata()[0] for line in axes.lines[1::2]] == means
    assert axes.get_xlabel() == f"bits per byte ({name})"
    assert ("see --score" in note_of(figure)) == (score is None)
    shown = [text.get_text().split("\n")[1] for text in axes.get_yticklabels()]
    passes = [", ttt", ", plain"] if score == "last" else ["", ""]
    assert shown == [f"{mean:.4f} (1){by}" for mean, by in zip(means, passes, strict=True)]


# ---- Errors ----

LOG = "step:1/9 train_loss:3.0 train_time:0ms step_avg:0.0ms\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["absent"], ["absent", "give finished runs"]),
        (["good", "--kind", "scores", "--base", "x"], ["--base x", "only good"]),
        (["good", "--kind", "scores", "--score", "ttt"], ["the score ttt", "good seed 1337"]),
        (["good", "other/good"], ["a seed is twice in one group"]),
        (["failed"], ["(oom: no memory): failed seed 1337", "give finished runs"]),
        (["strange", "--kind", "schedule"], ["strange", "ITERATIONS"]),
        (["good", "--out", "file/x"], ["file", "Not a directory; give another path"]),
        (["good", "--out", "file"], ["file: File exists"]),
        (["good", "--out", "dangling"], ["dangling: File exists"]),
        (["dangling"], ["dangling: it has no result.json"]),
        (["good", "--kind", "loss", "--out", "taken"], ["taken/loss.png: Is a directory"]),
        (["a.log", "--kind", "loss", "--x", "tokens"], ["a.log", "tokens", "--x steps"]),
        (["a.log", "--kind", "loss", "--x", "seconds"], ["a.log", "seconds", "--x steps"]),
        (["empty.log", "--kind", "loss"], ["(cut off): empty", "training losses"]),
    ],
)
def test_what_cannot_be_drawn_is_an_error(tmp_path, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    for name in ("good", "other/good"):
        write_run(tmp_path / name)
    (tmp_path / "taken/loss.png").mkdir(parents=True)
    (tmp_path / "dangling").symlink_to("absent")
    failed = {"status": "oom", "reason": "no memory", "scores": {}, "train_losses": []}
    (write_run(tmp_path / "failed", **failed) / "events.jsonl").unlink()
    write_run(tmp_path / "strange", settings={"iterations": "many"})
    for name, text in (("file", ""), ("a.log", LOG), ("empty.log", "nothing\n")):
        (tmp_path / name).write_text(text)
    assert plot.main([*argv, *([] if "--out" in argv else ["--out", "plots"])]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert all(word in error for word in words), error
    assert not [path for path in tmp_path.rglob("*.png") if path.is_file()]


def test_a_kind_that_cannot_be_drawn_leaves_the_others(tmp_path, capsys):
    folder = write_run(tmp_path / "a\udcff", settings={"seed": 1337})
    assert plot.main([str(folder), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert len([*tmp_path.glob("*.png")]) == 3
    assert "Without settings: a\\udcff seed 1337." in printed.out
    assert printed.err.startswith("error: schedule: ")
