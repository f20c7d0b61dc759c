"""Draw runs of train_gpt.py, each picture as PNG and SVG.

    python records/plot.py logs/sweep --kind scores --base none --out logs/plots/

RUNS are run folders, folders of them, or train logs; runs of one name are seeds of one trial.
Pictures can be read in black and white, and the same runs give the same bytes.

    loss      training loss over --x, and its difference to --base
    scores    the final score by trial and seed, and its difference to --base
    size      the score over the bytes that count
    schedule  learning-rate factor, Muon's momentum and JEPA's weight over --x
    bytes     what of an artifact is attention, MLP, embeddings ...
    seconds   what of a run is training, calibration, packing and scoring
"""

import argparse
import math
import sys
import textwrap
from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import numpy as np
import torch
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot: no display, and nothing is kept between calls

from compare import CompareError, common_score, compare, counts, one_thing, same_tokens
from runs import ROOT, Run, RunError, read_runs, train_gpt
from train_gpt import ARTIFACT

Trials = dict[str, list[Run]]
Curve = tuple[np.ndarray, np.ndarray]  # x and y

# Okabe and Ito's colours, which all eyes tell apart. The counts have no common factor, so that many
# trials still differ in line or marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "////", "..", "xxxx", "\\\\\\\\", "++++", "oo", "----", "**")
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9,
    "grid.color": "0.9",
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "svg.hashsalt": "plot.py",  # else ids are drawn by chance
    "text.parse_math": False,  # a trial's name may hold a $
}
AXES = {"steps": "steps", "tokens": "million training tokens", "seconds": "seconds of training"}
POINTS = 300  # of a line, at most


class PlotError(ValueError):
    """A picture that cannot be drawn of these runs."""


# ---- Names and looks ----


def looks(names: Iterable[Any]) -> dict[Any, tuple[dict[str, Any], dict[str, Any]]]:
    """How to draw a line and a bar, by name."""
    of_all = zip(*map(cycle, (COLOURS, LINES, MARKERS, HATCHES)), strict=True)
    return {
        name: (
            {"color": colour, "ls": line, "lw": 1.2, "marker": marker, "ms": 4},
            {"color": colour, "alpha": 0.55, "edgecolor": "black", "hatch": hatch},
        )
        for name, (colour, line, marker, hatch) in zip(names, of_all, strict=False)
    }


def label(name: str) -> str:
    """A trial's name in short lines."""
    text = textwrap.fill(name.replace("+", " +"), 32).replace(" +", "+")
    return f" {text}" if text.startswith("_") else text  # which a legend would leave out


def legend(figure: Figure, title: str, handles: Iterable[Any], names: Iterable[str]) -> None:
    """Title and legend above all axes, where they cover nothing; the figure grows by them."""
    names = [*map(label, names)]
    lines = [line for name in names for line in name.split("\n")]
    columns = max(84 // (max(map(len, lines)) + 6), 1)
    figure.set_figheight(figure.get_figheight() + 0.2 * math.ceil(len(lines) / columns))
    of = {"loc": "outside upper left", "alignment": "left", "title_fontsize": "large"}
    figure.legend([*handles], names, title=title, ncols=columns, **of)


def rows(figure: Figure, axes: Axes, names: list[str], height: float) -> None:
    """Name the rows of a picture, the first above, in a figure high enough for them."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    figure.set_figheight(1.5 + height * len(names))


def pairs(trials: Trials, base: str) -> dict[str, list[tuple[Run, Run]]]:
    """The finished runs of each trial but the base, with the base's run of the same seed."""
    of_base = {run.seed: run for run in trials.get(base, []) if run.seed is not None}
    return {
        name: [
            (run, of_base[run.seed])
            for run in runs
            if run.seed in of_base and run.finished and name != base
        ]
        for name, runs in trials.items()
    }


# ---- Loss and schedule: over the course of a run ----


def stages(run: Run) -> dict[str, float]:
    """Seconds by stage, none counted twice."""
    seconds = dict(run.seconds)
    if run.settings.get("gptq_enabled") and run.settings.get("gptq_calib") == "train":
        seconds["train"] -= seconds.get("calibrate", 0.0)  # it counts as training
    return seconds


def elapsed(run: Run, steps: np.ndarray) -> np.ndarray:
    """Training seconds when so many steps were done, straight between those logged; 0: not said."""
    known = [(0, 0.0)] + [(step, seconds) for step, seconds, _ in run.curve if seconds == seconds]
    if run.steps > known[-1][0] and "train" in run.seconds:
        known.append((run.steps, stages(run)["train"]))
    return np.interp(steps, *zip(*known, strict=True))


def along(run: Run, steps: np.ndarray, x: str) -> np.ndarray:
    """Where on the axis so many steps were done."""
    tokens, clock = run.settings.get("train_batch_tokens", 0), elapsed(run, np.array([math.inf]))
    if (x == "tokens" and not tokens) or (x == "seconds" and not clock[0]):
        raise PlotError(f"{run.path}: does not say the {x} of a step; take --x steps")
    return {"steps": steps, "tokens": steps * tokens / 1e6, "seconds": elapsed(run, steps)}[x]


def loss_curve(run: Run, x: str, window: int, base: Run | None = None) -> Curve:
    """Training loss over the axis, less the base's of the same step if given.

    It is the mean of so many steps around, if none of them is missing.
    """
    of_base = {step: loss for step, _, loss in base.curve} if base else {}
    points = [
        (step, loss - of_base.get(step, 0.0))
        for step, _, loss in run.curve
        if not base or step in of_base
    ]
    steps, losses = np.array(points).reshape(-1, 2).T
    if len(steps) >= max([window, *steps[-1:]]):
        losses = np.convolve(losses, np.full(window, 1 / window), "valid")
        steps = steps[window // 2 :][: len(losses)]
    return along(run, steps, x), losses


def together(curves: list[Curve]) -> Curve:
    """Points of the sparsest curve [n], at most POINTS, where all run; their values [curves, n]."""
    x = min((x for x, _ in curves), key=len)
    x = x[(x >= max(x[0] for x, _ in curves)) & (x <= min(x[-1] for x, _ in curves))]
    x = x[np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).round().astype(int))]
    return x, np.stack([np.interp(x, *curve) for curve in curves])


def draw_curves(axes: Axes, curves: dict[str, list[Curve]]) -> list[Any]:
    """A line a name, the mean of its curves, in a band from the lowest to the highest."""
    handles, seen = [], []
    for number, (name, (line, _)) in enumerate(looks(curves).items()):
        if curves[name]:
            at, values = together(curves[name])
            band = {"color": line["color"], "alpha": 0.15, "lw": 0}
            axes.fill_between(at, values.min(0), values.max(0), **band)
            every = max(len(at) // 8, 1)
            marks = (number * every // len(curves), every)  # not one over another
            handles += axes.plot(at, values.mean(0), markevery=marks, **line)
            seen.extend(values[:, len(at) // 20 :].flat)  # the start would flatten the rest
    if seen := [value for value in seen if math.isfinite(value)]:
        air = 0.05 * (max(seen) - min(seen)) or 0.01
        axes.set_ylim(min(seen) - air, max(seen) + air)
    axes.xaxis.set_major_formatter("{x:,.10g}")
    return handles


def draw_loss(figure: Figure, trials: Trials, base: str, x: str) -> list[str]:
    """Training loss by trial, and its difference to the base's of the same seed."""
    every = [run for runs in trials.values() for run in runs]
    window = max(len(run.curve) for run in every) // 25 | 1
    curves = {name: [loss_curve(run, x, window) for run in trials[name]] for name in trials}
    differences = {
        name: [
            curve for run, other in of_trial if (curve := loss_curve(run, x, window, other))[0].size
        ]
        for name, of_trial in pairs(trials, base).items()
    }
    paired = any(differences.values())
    figure.set_figheight(4 + 2.6 * paired)
    axes, *others = figure.subplots(1 + paired, 1, sharex=True, squeeze=False)[:, 0]
    handles = draw_curves(axes, curves)
    for other in others:
        draw_curves(other, differences)
        other.axhline(0, color="black", lw=0.8, zorder=1)
        other.set_ylabel(f"less that of {label(base)},\nsame seed and step")
    averaged = f",\nmean of {window} steps" if window > 1 else ""
    axes.set_ylabel(f"training loss (nats a token{averaged})")
    [axes, *others][-1].set_xlabel(AXES[x])
    names = [f"{name} ({len(runs)})" for name, runs in trials.items()]
    legend(figure, "Training loss (number of seeds)", handles, names)
    notes = ["Lines are means of seeds, bands go from the lowest to the highest."]
    notes += ["A start outside the frame is left out; a run with steps not logged is not averaged."]
    if len({run.settings.get("vocab_size") for run in every}) > 1:
        notes.append("Vocabularies differ, so losses a token do not compare.")
    return notes


def settings_of(run: Run) -> train_gpt.Hyperparameters:
    """Returns the settings of a run. Raises PlotError where train_gpt.py does not take them."""
    names = train_gpt.Hyperparameters.__dataclass_fields__
    try:
        return train_gpt.Hyperparameters(**{k: v for k, v in run.settings.items() if k in names})
    except train_gpt.SettingsError as error:
        raise PlotError(f"{run.path}: train_gpt.py does not take its settings: {error}") from None


def phases(run: Run, h: train_gpt.Hyperparameters, steps: np.ndarray) -> list[train_gpt.Phase]:
    """Returns what the schedule gives a run when so many steps are done."""
    deadline = h.training_seconds - h.gptq_reserve_seconds * h.calibrates_on_text
    moments = zip(steps.tolist(), elapsed(run, steps).tolist(), strict=True)
    return [
        train_gpt.schedule(train_gpt.Progress(step, h.iterations, seconds, deadline), h)
        for step, seconds in moments
    ]


def draw_schedule(figure: Figure, trials: Trials, base: str, x: str) -> list[str]:
    """What changes by step or clock, of each trial's first run; equal lines are one."""
    panels: dict[str, dict[Any, list[str]]] = {}  # by title and line, the trials
    peaks = {name: runs[0].settings.get("jepa_lambda_max") for name, runs in trials.items()}
    for name, (run, *_) in trials.items():
        h = settings_of(run)
        last = max((run.steps or h.iterations) - 1, 0)
        steps = np.unique(np.linspace(0, last, POINTS).round().astype(int))
        at, told = along(run, steps, x), phases(run, h, steps)
        values = {"learning-rate factor": [phase.lr_scale for phase in told]}
        values["Muon's momentum"] = [phase.muon_momentum for phase in told]
        if h.jepa_chunk_size and h.jepa_lambda_max:
            weights = [phase.jepa_weight / h.jepa_lambda_max for phase in told]
            values["JEPA's weight / peak"] = weights
        for title, line in values.items():
            lines = panels.setdefault(title, {})
            lines.setdefault((tuple(at), tuple(np.round(line, 9))), []).append(name)
    figure.set_figheight(0.8 + 1.7 * len(panels))
    all_axes, of_trial = figure.subplots(len(panels), 1, sharex=True), looks(trials)
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        for curve, names in lines.items():
            text = "\n".join(label(n + f" ({peaks[n]:g})" * ("JEPA" in title)) for n in names)
            who = f"all {len(trials)} trials" if len(names) == len(trials) > 1 else text
            axes.plot(*curve, label=who, markevery=0.12, **of_trial[names[0]][0])
        axes.set_ylabel(title)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.align_ylabels()
    all_axes[0].set_title("Schedule", loc="left")
    all_axes[-1].set_xlabel(AXES[x])
    all_axes[-1].xaxis.set_major_formatter("{x:,.10g}")
    return ["After a name: the peak of JEPA's weight."] * (len(panels) > 2)


# ---- Scores and size: how it ended ----


def scored(trials: Trials) -> tuple[str, Trials, list[str]]:
    """The last score that all runs have, the runs where it is a number, what speaks against it."""
    runs = [run for of_trial in trials.values() for run in of_trial]
    score = common_score(runs, None)
    notes = [f"Some runs have a later score than {score}."] * any(r.final != score for r in runs)
    if without := [run.called for run in runs if not counts(run, score)]:
        notes.append(f"Without a finite score: {', '.join(without)}.")
    trials = {name: [r for r in of if counts(r, score)] for name, of in trials.items()}
    trials = {name: of_trial for name, of_trial in trials.items() if of_trial}
    first, *others = [run for of_trial in trials.values() for run in of_trial] or [None]
    if not first:
        raise PlotError(f"scores: {notes[-1]} Give other runs.")
    try:
        for run in others:
            same_tokens(first, run, score)
    except CompareError as error:
        notes.append(f"The scores do not compare: {error}.")
    return score, trials, notes


def draw_scores(figure: Figure, trials: Trials, base: str, x: str) -> list[str]:
    """The final score, a dot a seed and the mean; and differences to the base, by compare.py."""
    score, trials, notes = scored(trials)
    scores = {name: [r.scores[score].val_bpb for r in runs] for name, runs in trials.items()}
    differences = {}
    for name in [n for n in trials if n != base] if base in trials else ():
        try:
            differences[name] = compare(trials[name], trials[base], score)
        except CompareError as error:
            notes.append(f"{name} is not compared: {error}.")
    of_seed = {
        name: [run.scores[score].val_bpb - other.scores[score].val_bpb for run, other in both]
        for name, both in pairs(trials, base).items()
    }
    order = sorted(trials, key=lambda name: np.mean(scores[name]))
    axes, *others = figure.subplots(1, 1 + bool(differences), sharey=True, squeeze=False)[0]
    dots, bar = {"mfc": "none", "color": COLOURS[0]}, {"ms": 15, "mew": 2.5, "color": "black"}
    for row, name in enumerate(order):
        seeds = axes.plot(scores[name], [row] * len(scores[name]), "o", **dots)
        means = axes.plot(np.mean(scores[name]), row, "|", **bar)
        if c := differences.get(name):
            if c.method == "paired t":
                others[0].plot(of_seed[name], [row] * c.n_a, "o", **dots)
            half = c.high - c.bpb_diff
            others[0].errorbar(c.bpb_diff, row, xerr=half, fmt="|", capsize=4, lw=1.2, **bar)
    handles, names = seeds + means, ["one seed", "mean of seeds"]
    texts = [f"{label(n)}\n{np.mean(scores[n]):.4f} ({len(scores[n])})" for n in order]
    rows(figure, axes, texts, 0.45)
    axes.set_xlabel(f"bits per byte ({score})")
    notes.insert(0, "Under each name: mean, and number of seeds.")
    if base in trials:
        for panel, zero in zip((axes, *others), (np.mean(scores[base]), 0), strict=False):
            line = panel.axvline(zero, color=COLOURS[1], ls="--", zorder=1)
        handles, names = [*handles, line], [*names, f"mean of {base}"]
    if others:
        others[0].set_xlabel(f"bits per byte less those of\n{label(base)}")
        notes.append(
            "Right: differences and their 95 % intervals by Student's t; dots: by seed, of pairs."
        )
    legend(figure, "Scores", handles, names)
    return notes


def draw_size(figure: Figure, trials: Trials, base: str, x: str) -> list[str]:
    """The score over the bytes of code and artifact, a mark a run."""
    score, trials, notes = scored(trials)
    axes, handles, limit = figure.subplots(), {}, train_gpt.BYTES_LIMIT
    for name, (line, _) in looks(trials).items():
        at = zip(*((r.sizes["total"], r.scores[score].val_bpb) for r in trials[name]), strict=True)
        (handles[name],) = axes.plot(*at, **line | {"ls": "none", "mfc": "none", "ms": 6})
    if max(run.sizes["total"] for runs in trials.values() for run in runs) >= limit / 2:
        handles[f"limit, {limit:,}"] = axes.axvline(limit, color="black", ls="--")
    else:
        notes.append(f"The limit, {limit:,} bytes, is far to the right.")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="bytes of code and artifact", ylabel=f"bits per byte ({score})")
    legend(figure, "Score and size, a mark a run", handles.values(), handles)
    return notes


# ---- Bytes and seconds: where they went ----


def group_of(array: str) -> str:
    """What an array of an artifact is part of: for weights, their module or its kind of layer."""
    parts = array.split(".")
    if parts[-1] not in ("codes", "weight"):
        return "scales of rows" if parts[-1] == "scales" else "gains and gates"
    return parts[2] if parts[0] == "blocks" else parts[0]


def group_bytes(path: Path, compressor: str = "zstd") -> tuple[dict[str, int], int]:
    """Returns the bytes of each group of an artifact's arrays, packed alone, and of the whole."""
    try:
        blob = path.read_bytes()
        h, arrays = train_gpt.unpack_artifact(memoryview(blob), train_gpt.Hyperparameters())
    except Exception as error:  # whatever a damaged file raises
        raise PlotError(f"{path}: cannot be read as an artifact: {error!r:.200}") from None
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, array in arrays.items():
        groups.setdefault(group_of(name), {})[name] = array

    def packed_size(part: dict[str, torch.Tensor]) -> int:
        return len(train_gpt.pack_artifact(h, part, compressor))

    header = packed_size({})  # with the settings
    sizes = {group: packed_size(part) - header for group, part in groups.items()}
    return {**sizes, "header": header}, len(blob)


def draw_bytes(figure: Figure, trials: Trials, base: str, x: str) -> list[str]:
    """What each group of arrays takes when packed alone, of each trial's first run."""
    axes, bar, sizes, gaps = figure.subplots(), 0.8 / len(trials), {}, []
    for name, (run, *_) in trials.items():
        compressor = run.settings.get("compressor", "zstd")
        sizes[name], whole = group_bytes(run.path / ARTIFACT, compressor)
        gaps.append(f"{run.called} {whole:,} ({sum(sizes[name].values()) / whole - 1:+.1%})")
    groups = {
        group: max(of.get(group, 0) for of in sizes.values())
        for group in dict.fromkeys(group for of in sizes.values() for group in of)
    }
    groups = sorted(groups, key=lambda group: -groups[group])
    for place, (name, (_, look)) in enumerate(looks(sizes).items()):
        values = np.array([sizes[name].get(group, 0) for group in groups])
        bars = axes.barh(np.arange(len(groups)) - 0.4 + bar * (place + 0.5), values, bar, **look)
        texts = [f" {n:,} ({n / values.sum():.1%})" if n else "" for n in values]
        axes.bar_label(bars, texts, fontsize=7)
    rows(figure, axes, groups, max(0.16 * len(sizes), 0.3))
    axes.margins(x=0.18)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("bytes of the group's arrays, compressed without the others")
    legend(figure, "Bytes of the artifact", axes.containers, sizes)
    return [f"Whole artifacts, and by what their groups' sum differs: {', '.join(gaps)}."]


def draw_seconds(figure: Figure, trials: Trials, base: str, x: str) -> list[str]:
    """Seconds of each stage, means over the seeds, end to end."""
    axes, ends = figure.subplots(), np.zeros(len(trials))
    of_run = [stages(run) for runs in trials.values() for run in runs]
    stage_looks = looks(dict.fromkeys(stage for seconds in of_run for stage in seconds))
    for stage, (_, look) in stage_looks.items():
        means = [np.mean([stages(run).get(stage, 0.0) for run in runs]) for runs in trials.values()]
        bars = axes.barh(range(len(trials)), means, 0.6, ends, **look)
        ends += means
    axes.bar_label(bars, [f" {end:,.0f}" for end in ends])
    rows(figure, axes, [f"{label(name)} ({len(runs)})" for name, runs in trials.items()], 0.4)
    axes.margins(x=0.1)
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.set_xlabel("seconds, mean of seeds (their number after the name)")
    legend(figure, "Seconds by stage", axes.containers, stage_looks)
    return ["Loading, compiling and validation in training are not counted."]


# ---- A picture, its files, and the command line ----

# By kind: what draws it and returns notes, what a run must have for it, and whether it has.
KINDS: dict[str, tuple[Callable[..., list[str]], str, Callable[[Run], Any]]] = {
    "loss": (draw_loss, "training losses", lambda run: run.curve),
    "scores": (draw_scores, "scores", lambda run: run.scores),
    "size": (draw_size, "bytes", lambda run: run.scores and run.sizes.get("total")),
    "schedule": (draw_schedule, "settings", lambda run: "iterations" in run.settings),
    "bytes": (draw_bytes, ARTIFACT, lambda run: (run.path / ARTIFACT).is_file()),
    "seconds": (draw_seconds, "seconds", lambda run: run.seconds),
}


def left_out(runs: list[Run], kind: str) -> list[str]:
    """Lines that name the runs a picture does not count, by the reason."""
    reasons: dict[str, list[str]] = {}
    for run in runs:
        if not run.finished:
            why = f": {run.reason.splitlines()[-1][:100]}" if run.reason else ""
            reasons.setdefault(f"Not finished ({run.status}{why})", []).append(run.called)
        elif not KINDS[kind][2](run):
            reasons.setdefault(f"Without {KINDS[kind][1]}", []).append(run.called)
    return [f"{why}: {', '.join(names)}." for why, names in reasons.items()]


def make(runs: list[Run], kind: str, base: str = "", x: str = "steps") -> Figure:
    """The figure of a kind, one of KINDS; PlotError if the runs do not have what it needs.

    `base` is the trial that others are compared with, `x` one of AXES. A run that is not finished
    counts in no trial: its losses are a line of their own.
    """
    drawer, needs, has = KINDS[kind]
    trials: Trials = {}
    for run in sorted(runs, key=lambda run: not run.finished):  # looks do not depend on others
        if has(run) and (run.finished or kind == "loss"):
            name = run.name if run.finished else f"{run.called}, {run.status}"
            trials.setdefault(name, []).append(run)
    notes = left_out(runs, kind)
    if not trials:
        raise PlotError(f"{kind}: give finished runs with {needs}. {' '.join(notes)}")
    for of_trial in trials.values():
        one_thing(of_trial)
    if base and base not in trials:
        raise PlotError(f"--base {base}: {kind} has no such trial, only {', '.join(trials)}")
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(7.5, 4), layout="constrained")
        notes = drawer(figure, trials, base, x) + notes
        lines = [line for note in notes for line in textwrap.wrap(note, 115)]
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=7.5, color="0.25")
        figure.set_figheight(figure.get_figheight() + 0.15 * len(lines))
    return figure


def draw(runs: list[Run], kind: str, out: Path, **options: str) -> list[Path]:
    """Write the picture of `make` as <kind>.png and .svg in a folder, else as <out>-<kind>.png."""
    figure = make(runs, kind, **options)
    stem = str(out / kind if out.is_dir() else f"{out}-{kind}")
    files = {  # without the day and matplotlib's version
        Path(f"{stem}.png"): {"Software": None},
        Path(f"{stem}.svg"): {"Date": None, "Creator": None},
    }
    with style.context(["default", STYLE]):
        for path, metadata in files.items():
            figure.savefig(path, metadata=metadata)
    return [*files]


def main(argv: list[str]) -> int:
    """The program; its exit status: 0, or 2 if there is nothing to draw or no place for it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders or logs")
    parser.add_argument("--kind", default="all", choices=[*KINDS, "all"], help="(default: all)")
    parser.add_argument("--x", default="steps", choices=AXES, help="axis of loss and schedule")
    parser.add_argument("--base", default="", metavar="TRIAL", help="to compare the others with")
    about = "how the files' names begin, or a folder with / at its end (default: logs/plots/)"
    parser.add_argument("--out", default=f"{ROOT}/logs/plots/", metavar="PREFIX", help=about)
    args = parser.parse_args(argv)
    out, errors, kinds = Path(args.out), [], [*KINDS] if args.kind == "all" else [args.kind]
    try:
        (out if args.out.endswith("/") else out.parent).mkdir(parents=True, exist_ok=True)
        runs = read_runs(args.runs)
        for kind in kinds:
            try:
                print(*draw(runs, kind, out, base=args.base, x=args.x), sep="\n")
            except (PlotError, CompareError) as error:
                errors.append(str(error))
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in dict.fromkeys(line for kind in kinds for line in left_out(runs, kind)):
        print(line)
    for error in dict.fromkeys(errors):
        print(f"error: {error}", file=sys.stderr)
    return 2 if len(errors) == len(kinds) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
