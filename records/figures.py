"""What a submission says of its runs, by its train logs alone; who writes and who checks use it.

`submission` gives the figures of submission.json, `block` the part of README.md that holds figures.
"""

import hashlib
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from runs import Run, RunError, Score, by_name, command, read_run, train_gpt

TRAIN_SECONDS_LIMIT = 600.0  # the challenge's
RECORD, NON_RECORD = "track_10min_16mb", "track_non_record_16mb"
PROGRAM, READABLE = train_gpt.PROGRAM, train_gpt.READABLE
FIGURES, NEEDS, TEXT = "submission.json", "requirements.txt", "README.md"
LOG_NAME = re.compile(r"train(?:_(?P<arm>.+?))??(?:_seed(?P<seed>\d+))?\.log")
BEGIN = "<!-- Figures: made of the logs by records/submit.py, compared by records/check.py. -->"
END = "<!-- End of figures. -->"
COLUMNS = (
    *("arm", "seed", "bpb", "nats", "bpb before int6", "bpb plain", "steps", "ms/step"),
    *("training s", "scoring s", "model bytes", "all bytes"),
)
SCORED = {
    "plain": "in windows side by side",
    "sliding": "by a sliding window of stride {}",
    "window": "in one pass with windowed attention, in sequences {} apart",
    "ttt": "by a sliding window of stride {}, learning from text once it is scored",
}


def read_logs(folder: Path) -> tuple[list[Run], list[str]]:
    """The runs of a folder's train logs, named by arm ("" of a lone one); faults of other logs."""
    runs, faults = [], []
    for path in sorted(folder.glob("train*.log")):
        named = LOG_NAME.fullmatch(path.name)
        try:
            run = read_run(path)
        except RunError as error:
            faults.append(
                f"{path.name}: {str(error).removeprefix(f'{path}: ')}; needed: a train log"
            )
            continue
        runs.append(replace(run, name=(named and named["arm"]) or ""))
    return sorted(runs, key=lambda run: (run.name, run.seed or 0)), faults


def scored(runs: Iterable[Run]) -> list[Run]:
    """Those that came to a score of the artifact."""
    return [run for run in runs if run.finished and run.scores.keys() - {"float"}]


def why(run: Run) -> str:
    """The line that tells best why a run has no score."""
    lines = [line for line in run.reason.splitlines() if line.strip()] or ["its log ends too early"]
    return lines[-1 if lines[0].startswith("Traceback") else 0].strip()[:200]


def train_seconds(run: Run) -> float:
    """Seconds of training."""
    return run.seconds.get("train", run.steps * run.step_ms / 1000)


def eval_seconds(run: Run) -> float:
    """Seconds of scoring the artifact."""
    scores = [score.seconds for name, score in run.scores.items() if name != "float"]
    return run.seconds.get("eval", sum(scores))


def hardware(run: Run) -> str | None:
    """What it ran on, as 8x NVIDIA H100; None where it does not tell."""
    device = run.machine.get("device", "")
    cpu = " CPU" * (device in ("x86_64", "AMD64", "aarch64", "arm64"))
    return f"{run.ranks}x {device}{cpu}" if device else None


def over(values: Iterable[float | None], of: Callable[..., float] = statistics.fmean) -> Any:
    """Their mean, or what else `of` gives, to eight decimals; None where that is no number."""
    values = [value for value in values if value is not None]
    value = of(values) if values else math.nan
    return round(value, 8) if math.isfinite(value) else None


def score_figures(scores: list[Score]) -> dict[str, Any]:
    """Both forms of some runs' scores: their means."""
    return {
        "val_loss": over(s.val_loss for s in scores),
        "val_bpb": over(s.val_bpb for s in scores),
    }


def run_figures(run: Run) -> dict[str, Any]:
    """What submission.json says of one run."""
    if run not in scored([run]):
        return {"status": run.status, "reason": why(run)}
    sizes = {"artifact_bytes": run.sizes.get("total"), "steps": run.steps}
    return {**score_figures([run.scores[run.final]]), **sizes, "step_avg_ms": over([run.step_ms])}


def submission(runs: list[Run], main: str, base: str) -> dict[str, Any]:
    """The figures of submission.json: means for scores of the main arm, the most for all else."""
    arms = {name: {str(r.seed): run_figures(r) for r in arm} for name, arm in by_name(runs).items()}
    done = scored(run for run in runs if run.name == main)
    if not done:
        reasons = [f"{run.path.name}: {run.status}: {why(run)}" for run in runs if run.name == main]
        raise ValueError(f"no log tells a score: {'; '.join(reasons)}")
    largest = max(done, key=lambda run: run.sizes.get("total", 0))
    finals = [run.scores[run.final] for run in done]
    before, plain = ([r.scores[s] for r in done if s in r.scores] for s in ("float", "plain"))
    spread = {}
    if len(finals) > 1:
        spread["val_loss_std"] = over((s.val_loss for s in finals), statistics.stdev)
        spread["val_bpb_std"] = over((s.val_bpb for s in finals), statistics.stdev)
    return {
        **score_figures(finals),
        **spread,
        "pre_quant_val_loss": over(s.val_loss for s in before),
        "pre_quant_val_bpb": over(s.val_bpb for s in before),
        "int6_zstd_val_loss": over(s.val_loss for s in plain),
        "int6_zstd_val_bpb": over(s.val_bpb for s in plain),
        "bytes_total": largest.sizes.get("total"),
        "bytes_code": largest.sizes.get("code"),
        "bytes_model_int6_zstd": largest.sizes.get("model"),
        "artifact_bytes_mean": over(run.sizes.get("total") for run in done),
        "artifact_bytes_max": largest.sizes.get("total"),
        "step_stop": max(run.steps for run in done),
        "wallclock_seconds": over(map(train_seconds, done), max),
        "eval_time_seconds": over(map(eval_seconds, done), max),
        "hardware": hardware(done[0]),
        "pytorch_version": done[0].machine.get("torch"),
        "seeds": [*map(int, arms[main])],
        "seed_results": arms[main],
        **({"main": main, "base": base, "arms": arms} if len(arms) > 1 else {}),
    }


def block(runs: list[Run], main: str, base: str) -> str:
    """The part of README that holds all figures, marks included."""
    arms, told = by_name(runs), submission(runs, main, base)
    done = scored(arms[main])
    score = done[0].scores[done[0].final]
    of = f"mean of {len(done)} seeds" if len(done) > 1 else "one seed"
    if "val_bpb_std" in told:
        of += f", standard deviation {told['val_bpb_std']:.5f}"
    text = f"**{told['val_bpb']:.5f} bits per byte** ({of}), {told['val_loss']:.5f} nats a token: "
    text += f"the score of the artifact over {score.tokens:,} tokens, {score.bytes / 1e6:.3f} MB, "
    text += SCORED[done[0].final].format(score.stride) + f"; the arm is `{main}`" * bool(main)
    lines = [BEGIN, "## Results", "", *textwrap.wrap(f"{text}.", 100), ""]
    if len(arms) > 1:
        from compare import markdown_table

        try:
            lines += [markdown_table(runs, base, done[0].final).strip(), ""]
        except ValueError as error:  # as where an arm has one seed
            lines += [f"The arms are not compared: {str(error).splitlines()[0]}.", ""]
    lines += [*runs_table(runs), "", *limits_table(done), "", "## Commands", ""]
    seeds = "Each seed of the table takes its place in SEED."
    if any(run.repacked for run in runs):
        seeds += " `final_model_seed<N>.safetensors` is the `final_model.safetensors` of the run"
        seeds += " of seed N that was trained to the same bpb before int6."
    lines += [seeds, ""]
    for name, arm in arms.items():
        first = (scored(arm) or arm)[0]
        lines += [*[f"`{name}`:", ""] * bool(name), f"    {command(first)}", ""]
    lines += ["## Machines", ""]
    lines += dict.fromkeys(f"- {machine_of(run)}" for run in runs if run.machine)
    return "\n".join([*lines, "", END])


def machine_of(run: Run) -> str:
    """Hardware, choices and versions."""
    others = [f"{name} {value}" for name, value in run.machine.items() if name != "device"]
    return ", ".join([str(hardware(run)), *others])


def runs_table(runs: list[Run]) -> list[str]:
    """A row for every run; of one without a score, the reason."""
    rows = [f"| {' | '.join(COLUMNS)} |", "|---|" + "--:|" * (len(COLUMNS) - 1)]
    for run in runs:
        cells = [run.name or "all", str(run.seed)]
        if run in scored([run]):
            score, sizes = run.scores[run.final], run.sizes
            plain = [run.scores.get(name) for name in ("float", "plain")]
            cells += [f"{score.val_bpb:.5f}", f"{score.val_loss:.5f}"]
            cells += [f"{s.val_bpb:.5f}" if s else "" for s in plain]
            cells += [str(run.steps), f"{run.step_ms:.2f}", f"{train_seconds(run):.1f}"]
            cells += [f"{eval_seconds(run):.1f}"]
            cells += [f"{sizes.get(name, math.nan):,}" for name in ("model", "total")]
        else:
            cells += [f"{run.status}: {why(run)}".replace("|", "\\|"), *[""] * (len(COLUMNS) - 3)]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def limits_of(runs: list[Run]) -> dict[str, tuple[float, float]]:
    """The most of these runs, and what the challenge allows, of all that it limits."""
    sizes = [run.sizes.get("total", math.nan) for run in runs]
    return {
        "training seconds": (max(map(train_seconds, runs)), TRAIN_SECONDS_LIMIT),
        "scoring seconds": (max(map(eval_seconds, runs)), train_gpt.EVAL_SECONDS_LIMIT),
        "bytes of code and artifact": (max(sizes), train_gpt.BYTES_LIMIT),
    }


def limits_table(runs: list[Run]) -> list[str]:
    """A row for each limit."""
    rows = ["| limit of the challenge | most here | allowed | |", "|---|--:|--:|---|"]
    for name, (most, allowed) in limits_of(runs).items():
        verdict = "PASS" if most <= allowed else "FAIL"
        rows.append(f"| {name} | {round(most, 1):,} | {allowed:,} | {verdict} |")
    return rows


def program_source(path: Path) -> bytes:
    """Returns the source of a program's file: what its packed twin decodes to, or the file itself.

    Raises ValueError for a twin that cannot be decoded.
    """
    file = path.read_bytes()
    try:
        source = train_gpt.unpacked_source(file)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return file if source is None else source


def sha256(data: bytes) -> str:
    """Returns the SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
