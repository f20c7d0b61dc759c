"""Draw runs of train_gpt.py as PNG files.

    python records/plot.py logs/sweep --kind scores --base none --out logs/plots/

RUNS are run folders, folders that contain run folders, or train logs; runs of one name are seeds of
one trial. The kinds of plot:

    loss      training loss over --x, and its difference to --base
    scores    the score of each trial and seed by --score, and its difference to --base
    bytes     what quantizing loses over the bytes of the artifact, by trials that share their
              first words
    schedule  learning-rate scale, Muon's momentum, JEPA's weight and repeated layers over --x
"""

import argparse
import io
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which needs a display
from matplotlib.rcsetup import cycler

from compare import (
    LAST,
    SCORE_HELP,
    CompareError,
    check_group,
    common_score,
    compare,
    counted,
    failures,
    same_tokens,
    with_last,
)
from runs import ROOT, Run, RunError, read_runs, train_gpt
from tool import describe, tool

Trials = dict[str, list[Run]]
Curve = dict[int, tuple[float, float]]  # x and y by step

# Okabe and Ito's colours, which colour-blind readers can tell apart. Lines and markers
# differ without colour. The numbers of them have no common factor, so that combinations last.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
LINES, MARKERS = ("-", "--", "-.", ":"), ("o", "s", "^", "D", "v")
STYLES = [
    {"color": COLOURS[i % 7], "ls": LINES[i % 4], "marker": MARKERS[i % 5]} for i in range(140)
]
RC = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": cycler(**{key: [look[key] for look in STYLES] for key in STYLES[0]}),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": "0.9",
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "savefig.dpi": 150,
    "text.parse_math": False,  # the name of a trial may contain a $
}
AXES = {"steps": "steps", "tokens": "million training tokens", "seconds": "seconds of training"}
POINTS = 300  # of a line, at most


class PlotError(RunError):
    """Runs of which a plot cannot be drawn."""


# ---- Names, styles and legends ----


def label(name: str) -> str:
    """Returns the name of a trial in short lines."""
    shown = name.encode(errors="replace").decode()  # a folder's name may be no text
    text = textwrap.fill(shown.replace("+", " +"), 32).replace(" +", "+")
    return f" {text}" if text.startswith("_") else text  # matplotlib hides names with a first _


def add_legend(figure: Figure, title: str, handles: Iterable[Any], names: Iterable[str]) -> None:
    """Adds title and legend above all axes, and the height that they need."""
    labels = [label(name) for name in names]
    lines = [line for text in labels for line in text.split("\n")]
    columns = max(84 // (max(map(len, lines)) + 6), 1)
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(lines) / columns))
    legend = figure.legend([*handles], labels, loc="outside upper left", title=title, ncols=columns)
    legend.set_alignment("left")


def pairs_by_seed(runs: list[Run], base: list[Run]) -> list[tuple[Run, Run]]:
    """Returns the finished runs of a trial with the base's run of the same seed."""
    of_base = {run.seed: run for run in base if run.seed is not None}
    return [(run, of_base[run.seed]) for run in runs if run.seed in of_base and run.finished]


# ---- Loss and schedule over the course of a run ----


def elapsed(run: Run, steps: np.ndarray) -> np.ndarray:
    """Returns the training seconds at each number of steps, interpolated between logged ones."""
    known = [(0, 0.0)] + [(step, s) for step, s, _ in run.curve if math.isfinite(s)]
    if run.steps > known[-1][0] and "train" in run.seconds:
        calibrates = run.settings.get("gptq_enabled") and run.settings["gptq_calib"] == "train"
        calibration = run.seconds.get("calibrate", 0.0) if calibrates else 0.0
        known.append((run.steps, run.seconds["train"] - calibration))
    logged_steps, seconds = np.array(known).T
    return np.interp(steps, logged_steps, seconds)


def x_values(run: Run, steps: np.ndarray, x: str) -> np.ndarray:
    """Returns steps in the unit of the x axis. Raises PlotError if the run does not state it."""
    tokens, seconds = run.settings.get("train_batch_tokens", 0), elapsed(run, steps)
    if (x == "tokens" and not tokens) or (x == "seconds" and not seconds.any()):
        raise PlotError(f"{run.path}: the {x} of a step are unknown; use --x steps")
    return {"steps": steps, "tokens": steps * tokens / 1e6, "seconds": seconds}[x]


def draw_curves(axes: Axes, curves: dict[str, list[Curve]], window: int) -> list[Any]:
    """Draws the mean of each name's curves at their common steps, in a band of all seeds.

    The values are moving means of `window` points. Returns the lines.
    """
    handles: list[Any] = []
    seen: list[float] = []
    for name in curves:
        (line,) = axes.plot([], [])  # takes a style even without data
        handles.append(line)
        common = sorted(set.intersection(*(set(curve) for curve in curves[name] or [{}])))
        width = window if len(common) >= window else 1
        if common:
            rows = np.array([[curve[step] for step in common] for curve in curves[name]])
            values = np.stack(
                [np.convolve(row, np.full(width, 1 / width), "valid") for row in rows[:, :, 1]]
            )
            x = rows[:, :, 0].mean(0)[width // 2 :][: values.shape[1]]
            line.set_data(x, values.mean(0))
            line.set_markevery(max(len(x) // 8, 1))
            axes.fill_between(
                x, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, lw=0
            )
            seen += values[:, len(x) // 20 :].ravel().tolist()  # the start would flatten the rest
    axes.autoscale_view()
    finite = [value for value in seen if math.isfinite(value)]
    if finite:
        margin = 0.05 * (max(finite) - min(finite)) or 0.01
        axes.set_ylim(min(finite) - margin, max(finite) + margin)
    axes.xaxis.set_major_formatter("{x:,.10g}")
    return handles


def loss_curve(run: Run, x: str, base: Run | None = None) -> Curve:
    """Returns the training loss of a run, or its difference to that of `base` at the same step."""
    steps = np.array([step for step, _, _ in run.curve])
    of_base = {step: loss for step, _, loss in base.curve} if base else {}
    return {
        step: (at, loss - of_base.get(step, 0.0))
        for (step, _, loss), at in zip(run.curve, x_values(run, steps, x).tolist(), strict=True)
        if not base or step in of_base
    }


def draw_loss(figure: Figure, trials: Trials, base: str, x: str, chosen: str | None) -> list[str]:
    """Draws the training loss of each trial, and its difference to the base's of the same seed."""
    every = [run for runs in trials.values() for run in runs]
    window = max(len(run.curve) for run in every) // 25 | 1
    curves = {name: [loss_curve(run, x) for run in runs] for name, runs in trials.items()}
    differences: dict[str, list[Curve]] = {}
    for name, runs in trials.items():
        pairs = pairs_by_seed(runs, trials.get(base, [])) if name != base else []
        compared = [loss_curve(run, x, other) for run, other in pairs]
        differences[name] = [curve for curve in compared if curve]
    paired = any(differences.values())
    figure.set_figheight(4 + 2.6 * paired)
    axes, *others = figure.subplots(1 + paired, 1, sharex=True, squeeze=False)[:, 0]
    handles = draw_curves(axes, curves, window)
    for other in others:
        draw_curves(other, differences, window)
        other.axhline(0, color="black", ls="-", lw=0.8, marker="", zorder=1)
        other.set_ylabel(f"difference to {label(base)},\nsame seed and step")
    averaged = f",\nmean of {window} points" if window > 1 else ""
    axes.set_ylabel(f"training loss (nats a token{averaged})")
    [axes, *others][-1].set_xlabel(AXES[x])
    names = [f"{name} ({len(runs)})" for name, runs in trials.items()]
    add_legend(figure, "Training loss (number of seeds)", handles, names)
    notes = ["Lines are means over seeds; bands go from the lowest to the highest seed."]
    apart = [name for name, of in curves.items() if not set.intersection(*map(set, of))]
    if apart:
        notes.append(f"The seeds have no logged step in common: {', '.join(apart)}.")
    if len({run.settings.get("vocab_size") for run in every}) > 1:
        notes.append("The vocabularies differ, so losses a token cannot be compared.")
    return notes


def settings_of(run: Run) -> train_gpt.Hyperparameters:
    """Returns the settings of a run. Raises PlotError if train_gpt.py does not accept them."""
    names = train_gpt.Hyperparameters.__dataclass_fields__
    try:
        return train_gpt.Hyperparameters(**{k: v for k, v in run.settings.items() if k in names})
    except train_gpt.SettingsError as error:
        raise PlotError(f"{run.path}: train_gpt.py does not accept its settings: {error}") from None


def draw_schedule(
    figure: Figure, trials: Trials, base: str, x: str, chosen: str | None
) -> list[str]:
    """Draws the schedule of each trial's first run; trials with equal values share a line."""
    panels: dict[str, dict[Any, list[str]]] = {}  # by title and line, the trials
    for name, (run, *_) in trials.items():
        h = settings_of(run)
        deadline = h.training_seconds - run.reserve
        last = max((run.steps or h.iterations) - 1, 0)
        steps = np.unique(np.linspace(0, last, POINTS).round().astype(int))
        phases = [
            train_gpt.schedule(train_gpt.Progress(step, h.iterations, s, deadline), h)
            for step, s in zip(steps.tolist(), elapsed(run, steps).tolist(), strict=True)
        ]
        values = {"learning-rate scale": [phase.lr_scale for phase in phases]}
        values["Muon's momentum"] = [phase.muon_momentum for phase in phases]
        if h.jepa_chunk_size:
            values["JEPA's weight"] = [phase.jepa_weight for phase in phases]
        if h.num_loops:
            values["loops"] = [phase.loops for phase in phases]
        for title, line in values.items():
            curve = tuple(x_values(run, steps, x)), tuple(np.round(line, 9))
            panels.setdefault(title, {}).setdefault(curve, []).append(name)
    figure.set_figheight(0.8 + 1.7 * len(panels))
    all_axes = figure.subplots(len(panels), 1, sharex=True)
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        for curve, names in lines.items():
            text = "\n".join(label(name) for name in names)
            if len(names) == len(trials) > 1:
                text = f"all {len(trials)} trials"
            axes.plot(*curve, label=text, markevery=0.12)
        axes.set_ylabel(title)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    all_axes[0].set_title("Schedule", loc="left")
    all_axes[-1].set_xlabel(AXES[x])
    all_axes[-1].xaxis.set_major_formatter("{x:,.10g}")
    return []


# ---- Scores ----


def draw_scores(figure: Figure, trials: Trials, base: str, x: str, chosen: str | None) -> list[str]:
    """Draws the score of each seed and the mean, and the differences of compare.py."""
    runs = [run for of_trial in trials.values() for run in of_trial]
    score = common_score(runs, chosen)
    notes = []
    if not chosen and any(run.final != score for run in runs):
        notes.append(f"Some runs have a later score than {score}: see --score.")
    notes += [f"{line}." for of_trial in trials.values() for line in failures(of_trial, score)]
    trials = {name: counted(of_trial, score) for name, of_trial in trials.items()}
    trials = {name: of_trial for name, of_trial in trials.items() if of_trial}
    if not trials:
        raise PlotError(f"scores: {notes[-1]} Give other runs.")
    first, *others = [run for of_trial in trials.values() for run in of_trial]
    try:
        for run in others:
            same_tokens(first, run, score)
    except CompareError as error:
        notes.append(f"The scores cannot be compared: {error}.")
    scores = {name: [r.scores[score].val_bpb for r in runs] for name, runs in trials.items()}
    differences = {}
    for name in [n for n in trials if n != base] if base in trials else ():
        try:
            differences[name] = compare(trials[name], trials[base], score)
        except CompareError as error:
            notes.append(f"{name} is not compared: {error}.")
    order = sorted(trials, key=lambda name: float(np.mean(scores[name])))
    axes, *right = figure.subplots(1, 1 + bool(differences), sharey=True, squeeze=False)[0]
    dots = {"ls": "none", "marker": "o", "mfc": "none", "color": COLOURS[0]}
    bar = {"marker": "|", "ms": 15, "mew": 2.5, "color": "black"}
    for row, name in enumerate(order):
        seeds = axes.plot(scores[name], [row] * len(scores[name]), **dots)
        means = axes.plot(np.mean(scores[name]), row, **bar)
        if name in differences:
            c = differences[name]
            if c.method == "paired t":
                pairs = pairs_by_seed(trials[name], trials[base])
                each = [a.scores[score].val_bpb - b.scores[score].val_bpb for a, b in pairs]
                right[0].plot(each, [row] * len(each), **dots)
            half = c.bpb.high - c.bpb.mean
            right[0].errorbar(c.bpb.mean, row, xerr=half, capsize=4, lw=1.2, **bar)
    handles, names = seeds + means, ["one seed", "mean of seeds"]
    texts = [f"{label(n)}\n{np.mean(scores[n]):.4f} ({len(scores[n])})" for n in order]
    if score == LAST:
        texts = [f"{text}, {trials[n][0].final}" for text, n in zip(texts, order, strict=True)]
    axes.set_yticks(range(len(texts)), texts)
    axes.set_ylim(len(texts) - 0.5, -0.5)
    figure.set_figheight(1.5 + 0.45 * len(texts))
    axes.set_xlabel(f"bits per byte ({score})")
    notes.insert(0, "Below each name: mean and number of seeds.")
    if base in trials:
        for panel, zero in zip((axes, *right), (np.mean(scores[base]), 0), strict=False):
            line = panel.axvline(zero, color=COLOURS[1], ls="--", marker="", zorder=1)
        handles, names = [*handles, line], [*names, f"mean of {base}"]
    if right:
        right[0].set_xlabel(f"difference to {label(base)}\nin bits per byte")
        notes.append("Right: differences with their 95 % intervals by compare.py; dots are pairs.")
    add_legend(figure, "Scores", handles, names)
    return notes


def family(name: str) -> str:
    """Returns the name of a trial without the size at its end: `std` of std_3.0_bits."""
    return re.sub(r"_[\d.]+_(bits|kB)$", "", name)


def draw_bytes(figure: Figure, trials: Trials, base: str, x: str, chosen: str | None) -> list[str]:
    """Draws what quantizing loses over the bytes of the artifact, a line for each family."""
    score, axes = chosen or "plain", figure.subplots()
    points: dict[str, list[tuple[float, float]]] = {}
    for name, of_trial in trials.items():
        lost = [
            (run.sizes["model"], run.scores[score].val_bpb - run.scores["float"].val_bpb)
            for run in of_trial
            if run.sizes and {"float", score} <= run.scores.keys()
        ]
        size, bpb = np.mean(lost, axis=0) if lost else (0, 0)
        if bpb > 0:
            points.setdefault(family(name), []).append((size / 1000, bpb))
    if not points:
        raise PlotError(f"bytes: no run has bytes and a {score} score worse than before int6.")
    handles = [axes.plot(*np.transpose(sorted(found)))[0] for found in points.values()]
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("kilobytes of the artifact")
    axes.set_ylabel(f"bits per byte lost ({score} - float)")
    add_legend(figure, "Quantization", handles, map(label, points))
    return ["Means over seeds; a logarithmic axis."]


# ---- Figures, files and the command line ----

# By kind: the function that draws and returns notes, what a run must have, and whether it has it.
KINDS: dict[str, tuple[Callable[..., list[str]], str, Callable[[Run], Any]]] = {
    "loss": (draw_loss, "training losses", lambda run: run.curve),
    "scores": (draw_scores, "scores", lambda run: run.scores),
    "schedule": (draw_schedule, "settings", lambda run: "iterations" in run.settings),
    "bytes": (draw_bytes, "scores before quantization", lambda run: "float" in run.scores),
}


def left_out(runs: list[Run], kind: str) -> list[str]:
    """Returns lines that name the runs that a plot does not count, by reason."""
    _, needed, has_it = KINDS[kind]
    reasons: dict[str, list[str]] = {}
    for run in runs:
        if not run.finished:
            why = f": {run.reason.splitlines()[-1][:100]}" if run.reason else ""
            reasons.setdefault(f"Not finished ({run.status}{why})", []).append(run.called)
        elif not has_it(run):
            reasons.setdefault(f"Without {needed}", []).append(run.called)
    return [f"{why}: {', '.join(names)}." for why, names in reasons.items()]


def make(
    runs: list[Run], kind: str, base: str = "", x: str = "steps", score: str | None = None
) -> Figure:
    """Returns the figure of a kind, a key of KINDS; `x` is a key of AXES.

    `score` is the name of a score that all runs have, or LAST; by default the last such score.
    A run that is not finished counts in no trial; its losses are a line of their own. Raises
    PlotError if the runs lack what the kind needs, CompareError if a trial mixes settings.
    """
    draw_kind, needed, has_it = KINDS[kind]
    trials: Trials = {}
    for run in sorted(with_last(runs), key=lambda run: not run.finished):
        if has_it(run) and (run.finished or kind == "loss"):
            name = run.name if run.finished else f"{run.called}, {run.status}"
            trials.setdefault(name, []).append(run)
    notes = left_out(runs, kind)
    if not trials:
        raise PlotError(f"{kind}: give finished runs with {needed}. {' '.join(notes)}")
    for of_trial in trials.values():
        check_group(of_trial)
    if base and base not in trials:
        raise PlotError(f"--base {base}: {kind} has no such trial, only {', '.join(trials)}")
    with style.context(["default", RC]):
        figure = Figure(figsize=(7.5, 4), layout="constrained")
        notes = draw_kind(figure, trials, base, x, score) + notes
        texts = [note.encode(errors="replace").decode() for note in notes]
        lines = [line for text in texts for line in textwrap.wrap(text, 115)]
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7.5, color="0.25")
        figure.set_figheight(figure.get_figheight() + 0.15 * len(lines))
    return figure


def draw(runs: list[Run], kind: str, out: Path, **options: Any) -> Path:
    """Writes the figure of `make` as <kind>.png in the folder `out`; returns its path."""
    figure, path, png = make(runs, kind, **options), out / f"{kind}.png", io.BytesIO()
    with style.context(["default", RC]):
        figure.savefig(png, metadata={"Software": None})  # the same bytes from any version
    train_gpt.write_atomically(path, png.getvalue())
    return path


@tool
def main(argv: list[str]) -> int:
    """Runs the program; returns 0, or 2 if nothing was drawn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders or logs")
    parser.add_argument("--kind", default="all", choices=[*KINDS, "all"], help="default: all")
    parser.add_argument("--x", default="steps", choices=AXES, help="axis of loss and schedule")
    parser.add_argument("--base", default="", metavar="TRIAL", help="the trial to compare with")
    parser.add_argument("--score", metavar="NAME", help=SCORE_HELP)
    out = ROOT / "logs/plots"
    parser.add_argument("--out", type=Path, default=out, help="folder (default: logs/plots)")
    args = parser.parse_args(argv)
    kinds, errors = [*KINDS] if args.kind == "all" else [args.kind], []
    runs = read_runs(args.runs)
    args.out.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        try:
            path = draw(runs, kind, args.out, base=args.base, x=args.x, score=args.score)
        except (RunError, OSError) as error:
            errors.append(f"error: {describe(error)}")
        else:
            print(path)
    for line in dict.fromkeys(line for kind in kinds for line in left_out(runs, kind)):
        print(line)
    for line in dict.fromkeys(errors):
        print(line, file=sys.stderr)
    return 2 if len(errors) == len(kinds) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
