"""The figures of a submission, computed from its train logs alone.

submit.py writes them and check.py computes them again: `submission` returns those of
submission.json, `block` the part of README.md that holds figures.
"""

import base64
import hashlib
import lzma
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

from runs import Run, RunError, by_name, command, read_run, train_gpt
from tool import escape
from train_gpt import Score

TRAIN_SECONDS_LIMIT = 600.0  # the challenge's
RECORD, NON_RECORD = "track_10min_16mb", "track_non_record_16mb"
PROGRAM, READABLE = train_gpt.PROGRAM, train_gpt.READABLE
FIGURES, NEEDS, TEXT = "submission.json", "requirements.txt", "README.md"
LOG_NAME = re.compile(r"train(?:_(?P<trial>.+?))??(?:_seed(?P<seed>\d+))?\.log")
BEGIN = "<!-- Figures: made of the logs by records/submit.py, compared by records/check.py. -->"
END = "<!-- End of figures. -->"
COLUMNS = (
    *("trial", "seed", "bpb", "nats", "bpb before int6", "bpb plain", "steps", "ms/step"),
    *("training s", "scoring s", "model bytes", "all bytes"),
)
METHODS = {  # of scoring
    "plain": "in windows that do not overlap",
    "sliding": "with a sliding window of stride {}",
    "window": "in one pass with windowed attention, in sequences that start {} tokens apart",
    "documents": "document by document, longer ones with a sliding window of stride {}",
    "ttt": "with a sliding window of stride {} and training on text that has been scored",
}


def read_logs(folder: Path) -> tuple[list[Run], list[str]]:
    """Returns the runs of a folder's train logs and the faults of logs that cannot be read.

    A run has the name of its trial, "" if the folder has one trial only.
    """
    runs, faults = [], []
    for path in sorted(folder.glob("train*.log")):
        named = LOG_NAME.fullmatch(path.name)
        name = named["trial"] if named else None
        try:
            runs.append(replace(read_run(path), name=name or ""))
        except RunError as error:
            reason = str(error).removeprefix(f"{path}: ")
            faults.append(f"{path.name}: {reason}; needed: a train log")
    return sorted(runs, key=lambda run: (run.name, run.seed or 0)), faults


def scored(runs: Iterable[Run]) -> list[Run]:
    """Returns the runs that have a score of the artifact."""
    return [run for run in runs if run.finished and run.scores.keys() - {"float"}]


def why(run: Run) -> str:
    """Returns the line that tells best why a run has no score."""
    lines = [line for line in run.reason.splitlines() if line.strip()] or ["its log ends too early"]
    return lines[-1 if lines[0].startswith("Traceback") else 0].strip()[:200]


def train_seconds(run: Run) -> float:
    """Returns the seconds of training."""
    return run.seconds.get("train", run.steps * run.step_ms / 1000)


def eval_seconds(run: Run) -> float:
    """Returns the seconds of scoring the artifact."""
    scores = [score.seconds for name, score in run.scores.items() if name != "float"]
    return run.seconds.get("eval", sum(scores))


def hardware(run: Run) -> str | None:
    """Returns the ranks and their device, for example 8x NVIDIA H100; None if it is unknown."""
    device = run.machine.get("device", "")
    is_cpu = device in ("x86_64", "AMD64", "aarch64", "arm64")
    return f"{run.ranks}x {device}{' CPU' if is_cpu else ''}" if device else None


def rounded(values: Iterable[Any], of: Callable[[list[Any]], float] = statistics.fmean) -> Any:
    """Returns the mean of values, or what `of` computes, to eight decimals.

    None is left out. Returns None if nothing remains or the result is not finite.
    """
    known = [value for value in values if value is not None]
    result = of(known) if known else math.nan
    return round(result, 8) if math.isfinite(result) else None


def score_figures(scores: list[Score]) -> dict[str, Any]:
    """Returns the means of scores in both units."""
    return {
        "val_loss": rounded(s.val_loss for s in scores),
        "val_bpb": rounded(s.val_bpb for s in scores),
    }


def run_figures(run: Run) -> dict[str, Any]:
    """Returns the figures of one run."""
    if not scored([run]):
        return {"status": run.status, "reason": why(run)}
    sizes = {"artifact_bytes": run.sizes.get("total"), "steps": run.steps}
    step_ms = {"step_avg_ms": rounded([run.step_ms])}
    return score_figures([run.scores[run.final]]) | sizes | step_ms


def submission(runs: list[Run], main: str, base: str) -> dict[str, Any]:
    """Returns the figures of submission.json: means of the main trial's scores, else maxima.

    Raises ValueError if no run of the main trial has a score.
    """
    trials = {
        name: {str(run.seed): run_figures(run) for run in of_trial}
        for name, of_trial in by_name(runs).items()
    }
    of_main = [run for run in runs if run.name == main]
    done = scored(of_main)
    if not done:
        reasons = [f"{run.path.name}: {run.status}: {why(run)}" for run in of_main]
        raise ValueError(f"no log has a score: {'; '.join(reasons)}")
    sizes = max(done, key=lambda run: run.sizes.get("total", 0)).sizes
    finals = [run.scores[run.final] for run in done]
    unquantized, plain = ([r.scores[s] for r in done if s in r.scores] for s in ("float", "plain"))
    figures = score_figures(finals)
    if len(finals) > 1:
        figures["val_loss_std"] = rounded((s.val_loss for s in finals), statistics.stdev)
        figures["val_bpb_std"] = rounded((s.val_bpb for s in finals), statistics.stdev)
    figures |= {f"pre_quant_{key}": x for key, x in score_figures(unquantized).items()}
    figures |= {f"int6_zstd_{key}": x for key, x in score_figures(plain).items()}
    figures |= {
        "bytes_total": sizes.get("total"),
        "bytes_code": sizes.get("code"),
        "bytes_model_int6_zstd": sizes.get("model"),
        "artifact_bytes_mean": rounded(run.sizes.get("total") for run in done),
        "artifact_bytes_max": sizes.get("total"),
        "step_stop": max(run.steps for run in done),
        "wallclock_seconds": rounded(map(train_seconds, done), max),
        "eval_time_seconds": rounded(map(eval_seconds, done), max),
        "hardware": hardware(done[0]),
        "pytorch_version": done[0].machine.get("torch"),
        "seeds": [int(seed) for seed in trials[main]],
        "seed_results": trials[main],
    }
    if len(trials) > 1:
        figures |= {"main": main, "base": base, "trials": trials}
    return figures


def block(runs: list[Run], main: str, base: str) -> str:
    """Returns the part of README.md that holds all figures, with its marks."""
    trials, figures = by_name(runs), submission(runs, main, base)
    done = scored(trials[main])
    final = done[0].final
    score = done[0].scores[final]
    method = METHODS.get(final, final).format(score.stride)
    seeds = f"mean of {len(done)} seeds" if len(done) > 1 else "one seed"
    if "val_bpb_std" in figures:
        seeds += f", standard deviation {figures['val_bpb_std']:.5f}"
    headline = (
        f"**{figures['val_bpb']:.5f} bits per byte** ({seeds}), {figures['val_loss']:.5f} nats a "
        f"token: the score of the artifact on {score.tokens:,} tokens, {score.bytes / 1e6:.3f} MB, "
        f"{method}{f'; the trial is `{main}`' if main else ''}."
    )
    lines = [BEGIN, "## Results", "", *textwrap.wrap(headline, 100), ""]
    if len(trials) > 1:
        from compare import CompareError, markdown_table

        try:
            lines += [markdown_table(runs, base, final).strip(), ""]
        except CompareError as error:
            lines += [f"The trials are not compared: {str(error).splitlines()[0]}.", ""]
    lines += [*runs_table(runs), "", *limits_table(done), "", "## Commands", ""]
    lines += ["SEED is the seed of the run; the table lists them."]
    if any(run.repacked for run in runs):
        lines += ["", "`final_model_seed<N>.safetensors` is the `final_model.safetensors` of the"]
        lines += ["run that trained seed N, with the same bpb before int6."]
    lines += [""]
    for name, of_trial in trials.items():
        first = (scored(of_trial) or of_trial)[0]
        lines += [f"`{name}`:", ""] if name else []
        lines += [f"    {command(first)}", ""]
    machines = dict.fromkeys(machine(run) for run in runs if run.machine)
    return "\n".join([*lines, "## Machines", "", *(f"- {text}" for text in machines), "", END])


def machine(run: Run) -> str:
    """Returns hardware, back ends and versions in one line."""
    others = [f"{name} {value}" for name, value in run.machine.items() if name != "device"]
    return ", ".join([str(hardware(run)), *others])


def runs_table(runs: list[Run]) -> list[str]:
    """Returns the lines of a table with a row for every run; one without a score has its reason."""
    rows = [f"| {' | '.join(COLUMNS)} |", "|---|" + "--:|" * (len(COLUMNS) - 1)]
    for run in runs:
        cells = [run.name or "all", str(run.seed)]
        if scored([run]):
            score, sizes = run.scores[run.final], run.sizes
            others = [run.scores.get(name) for name in ("float", "plain")]
            cells += [f"{score.val_bpb:.5f}", f"{score.val_loss:.5f}"]
            cells += [f"{other.val_bpb:.5f}" if other else "" for other in others]
            cells += [str(run.steps), f"{run.step_ms:.2f}", f"{train_seconds(run):.1f}"]
            cells += [f"{eval_seconds(run):.1f}"]
            cells += [f"{sizes.get(name, math.nan):,}" for name in ("model", "total")]
        else:
            cells += [escape(f"{run.status}: {why(run)}"), *[""] * (len(COLUMNS) - 3)]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def limits_of(runs: list[Run]) -> dict[str, tuple[float, float]]:
    """Returns the largest value of these runs, and the challenge's limit, by what is limited."""
    sizes = [run.sizes.get("total", math.nan) for run in runs]
    return {
        "training seconds": (max(map(train_seconds, runs)), TRAIN_SECONDS_LIMIT),
        "scoring seconds": (max(map(eval_seconds, runs)), train_gpt.EVAL_SECONDS_LIMIT),
        "bytes of code and artifact": (max(sizes), train_gpt.BYTES_LIMIT),
    }


def limits_table(runs: list[Run]) -> list[str]:
    """Returns the lines of a table with a row for each limit."""
    rows = ["| limit of the challenge | largest value | allowed | |", "|---|--:|--:|---|"]
    for name, (value, allowed) in limits_of(runs).items():
        verdict = "PASS" if value <= allowed else "FAIL"
        rows.append(f"| {name} | {round(value, 1):,} | {allowed:,} | {verdict} |")
    return rows


def unpacked_source(twin: bytes) -> bytes | None:
    """Returns the source inside a packed twin, without executing it; None if it is not a twin.

    Raises ValueError if the literal is damaged or decodes to more than TWIN_DICTIONARY bytes.
    """
    head, tail = train_gpt.TWIN_TEMPLATE.encode().split(b"%s")
    if not (twin.startswith(head) and twin.endswith(tail)):
        return None
    most = train_gpt.TWIN_DICTIONARY
    try:
        packed = base64.b85decode(twin[len(head) : -len(tail)])
        filters = train_gpt.lzma_filters(most)
        decoder = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters)
        source = decoder.decompress(packed, max_length=most)
    except (ValueError, lzma.LZMAError) as error:
        raise ValueError(f"the packed source cannot be decoded: {error}") from None
    train_gpt.check(
        decoder.eof and not decoder.unused_data, "the packed source does not end where it should"
    )
    return source


def program_source(path: Path) -> bytes:
    """Returns the source of a program's file: what its packed twin decodes to, or the file itself.

    Raises ValueError for a twin that cannot be decoded.
    """
    file = path.read_bytes()
    try:
        source = unpacked_source(file)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return file if source is None else source


def sha256(data: bytes) -> str:
    """Returns the SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
