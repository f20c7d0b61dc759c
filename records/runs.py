"""Read a run from its folder or from its train log; all tools of records/ use this reader.

`read_run("logs/<RUN_ID>")` reads result.json. `read_run("train_seed42.log")` reads the challenge's
conventional lines, so it reads logs of the challenge's other scripts as well.
"""

import fcntl
import itertools
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import train_gpt
from train_gpt import Score

SETTING_TYPES: dict[str, Any] = {f.name: f.type for f in fields(train_gpt.Hyperparameters)}

# Settings that say where or how a run was executed, not what was trained.
INCIDENTAL = {"run_id", "run_dir", "resume", "seed", "data_path", "tokenizer_path", "preset"}
# Settings that belong to one run and are left out of the command that repeats it.
OF_ONE_RUN = {"run_id", "run_dir", "resume", "seed"}

DONE = ("ok", "over a limit")  # the statuses of a run that reached its scores

# The log's name of each score.
SCORE_LINES = {
    "float": "DIAGNOSTIC post_ema",
    "plain": "final_int6_roundtrip",
    "sliding": "final_int6_sliding_window",
    "window": "final_int6_window",
    "ttt": "legal_ttt",
}


class RunError(ValueError):
    """A run that cannot be read."""


@dataclass(frozen=True)
class Run:
    """The facts of a run. A value that the run does not state is NaN, 0 or empty."""

    path: Path
    name: str  # of the trial
    status: str  # as in result.json; of a log: ok, over a limit, failed or cut off
    reason: str = ""
    settings: dict[str, Any] = field(default_factory=dict)  # by lower-case name
    changed: dict[str, str] | None = None  # settings stated as changed; None if the log has no list
    scores: dict[str, Score] = field(default_factory=dict)  # by float, plain, sliding, window, ttt
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of code, model and total
    seconds: dict[str, float] = field(default_factory=dict)  # train, calibrate, pack, eval, ...
    verdicts: dict[str, str] = field(default_factory=dict)  # PASS or FAIL
    curve: tuple[tuple[int, float, float], ...] = ()  # (step, training seconds, training loss)
    steps: int = 0
    step_ms: float = math.nan  # the median; of a log the mean
    parameters: int = 0
    machine: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    code_sha256: str = ""
    val_sha256: str = ""
    resumed: dict[str, Any] = field(default_factory=dict)  # step and changed settings, by RESUME

    @property
    def seed(self) -> int | None:
        """The seed of the initial weights, or None."""
        return self.settings.get("seed")

    @property
    def called(self) -> str:
        """Trial and seed, for tables and plots; it contains no path."""
        return self.name if self.seed is None else f"{self.name} seed {self.seed}"

    @property
    def choices(self) -> dict[str, Any]:
        """The settings that define what was trained; of DATA_PATH only the last name."""
        chosen = {key: value for key, value in self.settings.items() if key not in INCIDENTAL}
        data = Path(self.settings.get("data_path") or "").name
        return chosen | ({"data_path": data} if data else {})

    @property
    def finished(self) -> bool:
        """Whether the run reached its scores."""
        return self.status in DONE

    @property
    def repacked(self) -> bool:
        """Whether the run packed and scored the weights of another run (--quantize)."""
        trained = self.steps or self.parameters  # a run logs its parameters before its first step
        return self.finished and not trained and "model_dim" in self.settings

    @property
    def final(self) -> str:
        """The name of the score that counts, which is the last one; empty if there is none."""
        return next((name for name in reversed(SCORE_LINES) if name in self.scores), "")


def by_name(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Returns the runs of each trial, by its name."""
    trials: dict[str, list[Run]] = {}
    for run in runs:
        trials.setdefault(run.name, []).append(run)
    return trials


def command(run: Run) -> str:
    """Returns the shell command that repeats a run; SEED comes first.

    The command sets what the run's log states as changed, but for the names of the run. Logs of
    older programs have no such line; for them the command sets every setting of the run.
    """
    settings = run.settings if run.changed is None else run.changed
    chosen: dict[str, Any] = {} if run.seed is None else {"seed": run.seed}
    chosen |= {name: value for name, value in settings.items() if name not in OF_ONE_RUN}
    launcher = "python"
    if run.ranks > 1:
        launcher = f"torchrun --standalone --nproc_per_node={run.ranks}"
    words = [train_gpt.env_form(chosen), launcher, "train_gpt.py"]
    if run.repacked:
        words += ["--quantize", f"final_model_seed{run.seed}.safetensors"]
    return " ".join(filter(None, words))


def parse_changed_settings(log: str) -> dict[str, str] | None:
    """Returns the settings that a log states as changed, by lower-case name, or None.

    As an environment they give all settings of the run, PRESET and the rule of VOCAB_SIZE included.
    """
    lines = re.findall(r"^changed_settings:(.*)$", log, re.MULTILINE)
    if not lines:
        return None
    pairs = (word.partition("=") for word in shlex.split(lines[-1]))
    return {name.lower(): value for name, _, value in pairs}


def parse_setting(name: str, text: str) -> Any:
    """Returns the value of a setting from its text in a log.

    A setting that train_gpt.py does not have stays a text, unless it is True or False.
    """
    if text in ("True", "False"):
        return text == "True"
    return train_gpt.parse_value(text, SETTING_TYPES.get(name, str))


def read_run(path: str | Path) -> Run:
    """Returns the run of a folder with result.json, or of a train log.

    Raises RunError if the path is neither.
    """
    path = Path(path)
    try:
        run = read_folder(path) if path.is_dir() else read_log(path)
        _, seed = split_name(path)
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: not a run: {error or type(error).__name__}") from None
    named = {} if seed is None else {"seed": seed}
    return replace(run, settings=named | run.settings)


def split_name(path: Path) -> tuple[str, int | None]:
    """Returns trial ("" if not named) and seed (or None) from the name of a run's folder or log.

    Such names are seed7, trial_seed7, train_seed7.log, train_trial_seed7.log.
    """
    name = path.stem if path.suffix in (".log", ".txt") else path.name
    found = re.fullmatch(r"(.*?)(?:^|[-_.])seed_?(-?\d+)", name)
    name, seed = (found[1], int(found[2])) if found else (name, None)
    if path.suffix in (".log", ".txt"):
        name = re.sub(r"^train(?:[-_.]|$)", "", name)
    return name, seed


def trial_of(path: Path) -> str:
    """Returns the trial of a run: by its folder or log, else by the folder that holds it."""
    path = path.absolute()
    return split_name(path)[0] or (trial_of(path.parent) if path.name else "")


def read_text(path: Path) -> str:
    """Returns the text of a file; empty if there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_folder(path: Path) -> Run:
    """Returns the run of a folder with result.json."""
    result = json.loads((path / "result.json").read_text(encoding="utf-8"))
    scores = {
        name: Score(**{key: score[key] for key in Score._fields})
        for name, score in result.get("scores", {}).items()
    }
    events = read_events(path)
    seconds = {step: elapsed for step, elapsed, _ in events}
    losses = enumerate(result.get("train_losses", []), 1)
    curve = [(step, seconds.get(step, math.nan), loss) for step, loss in losses]
    log = read_text(path / "train.log")
    return Run(
        path=path,
        name=trial_of(path),
        status=result["status"],
        reason=result.get("reason", "").strip(),
        settings=result.get("settings", {}),
        changed=parse_changed_settings(log),
        scores=scores,
        sizes=result.get("bytes", {}),
        seconds=result.get("seconds", {}),
        verdicts=result.get("verdicts", {}),
        curve=tuple(curve or events),
        steps=result.get("steps", 0),
        step_ms=result.get("step_ms", {}).get("p50", math.nan),
        parameters=result.get("parameters", 0),
        machine=result.get("machine", {}),
        ranks=last_number(log, r"^world_size:(\d+)", int) or 1,
        code_sha256=result.get("code_sha256", ""),
        val_sha256=result.get("val_sha256", ""),
        resumed=result.get("resumed", {}),
    )


def read_events(folder: Path) -> list[tuple[int, float, float]]:
    """Returns (step, training seconds, training loss) of each step logged so far."""
    steps = []
    for line in read_text(folder / "events.jsonl").splitlines():
        with suppress(ValueError, KeyError, TypeError):  # an incomplete line, or another event
            event = json.loads(line)
            steps.append((event["step"], event["seconds"], event["train_loss"]))
    return steps


def split_starts(log: str) -> list[str]:
    """Returns a log in parts, one for each start of its run: RESUME=auto appends to the log."""
    at = [found.start() for found in re.finditer(r"^[^:\n]*\btrain\.log$", log, re.MULTILINE)]
    return [log[a:b] for a, b in itertools.pairwise([0, *at[1:], len(log)])]


def read_curve(starts: Iterable[str]) -> tuple[tuple[int, float, float], ...]:
    """Returns (step, training seconds, loss) of each logged step of a log in parts.

    A step that a later start repeated counts once, as it was repeated.
    """
    line = r"^step:(\d+)/\d+ train_loss:(\S+).* train_time:(\d+)ms"
    steps: list[tuple[int, float, float]] = []
    for text in starts:
        found = re.findall(line, text, re.MULTILINE)
        own = [(int(step), int(ms) / 1000, float(loss)) for step, loss, ms in found]
        resumed = last_number(text, r"^resume: step (\d+)", int)
        if own or resumed:
            steps = [step for step in steps if step[0] <= (resumed or 0)] + own
    return tuple(steps)


def last_number(text: str, pattern: str, kind: Callable[[str], Any] = float) -> Any:
    """Returns the last number that fits a pattern, or None."""
    found = re.findall(pattern, text, re.MULTILINE)
    return kind(found[-1]) if found else None


def read_pairs(text: str, first: str, within: str = "") -> dict[str, str]:
    """Returns the name:value pairs of the line that begins with a name; values may hold spaces."""
    line = re.search(rf"^{first}:.*{within}.*$", text, re.MULTILINE)
    parts = re.split(r"(?:^| )([a-z_0-9]+):", line[0]) if line else [""]
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def read_scores(text: str) -> dict[str, Score]:
    """Returns the scores of a log. Tokens, bytes and stride are 0 where it does not state them."""
    tokens = last_number(text, r"^val_loader:.* tokens:(\d+)", int) or 0
    scores = {}
    for name, line in SCORE_LINES.items():
        exact = re.findall(rf"^{line}_exact val_loss:(\S+) val_bpb:(\S+)", text, re.MULTILINE)
        if exact:
            loss, bpb = map(float, exact[-1])
            nats = tokens * loss
            scores[name] = Score(
                val_loss=loss,
                val_bpb=bpb,
                nats=nats,
                tokens=tokens,
                bytes=round(nats / (math.log(2) * bpb)) if bpb else 0,
                seconds=(last_number(text, rf"^{line} .*eval_time:(\d+)ms") or math.nan) / 1000,
                stride=last_number(text, rf"^{line} .*stride:(\d+)", int) or 0,
            )
    return scores


def read_log(path: Path) -> Run:
    """Returns the run of a train log: its last start, and the steps that this one continued."""
    starts = split_starts(path.read_text(encoding="utf-8", errors="replace"))
    text = starts[-1]
    settings = {name: parse_setting(name, x) for name, x in read_pairs(text, "corpus").items()}
    seed = last_number(text, r"\bseed:(\d+)", int)
    if seed is not None:
        settings.setdefault("seed", seed)
    scores = read_scores(text)
    ends = re.findall(r"^step:(\d+)/\d+ .*train_time:(\d+)ms step_avg:(\S+)ms", text, re.MULTILINE)
    verdicts = dict(re.findall(r"^limit:(\w+) .* (PASS|FAIL)$", text, re.MULTILINE))
    status = "over a limit" if "FAIL" in verdicts.values() else "ok" if scores else "cut off"
    error = re.search(r"^error: (.*)", text, re.MULTILINE | re.DOTALL)
    sizes = {
        "code": last_number(text, r"^Code size: (\d+) bytes", int),
        "model": last_number(text, r"^Serialized model int6\+\w+: (\d+) bytes", int),
        "total": last_number(text, r"^Total submission size int6\+\w+: (\d+) bytes", int),
    }
    return Run(
        path=path,
        name=trial_of(path),
        status="failed" if error else status,
        reason=error[1].strip() if error else "",
        settings=settings,
        changed=parse_changed_settings(text),
        scores=scores,
        sizes={name: size for name, size in sizes.items() if size is not None},
        seconds={name: float(x) for name, x in read_pairs(text, "seconds").items() if x},
        verdicts=verdicts,
        curve=read_curve(starts),
        steps=int(ends[-1][0]) if ends else 0,
        step_ms=float(ends[-1][2]) if ends else math.nan,
        parameters=last_number(text, r"^model_params:(\d+)", int) or 0,
        machine=read_pairs(text, "device", " dtype:"),
        ranks=last_number(text, r"^world_size:(\d+)", int) or 1,
    )


def is_locked(folder: Path) -> bool:
    """Returns whether a sweep's trial is running: its command.sh holds a lock."""
    try:
        with open(f"{folder}.lock", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no lock, or no file that can be one
        return False
    return False


def read_trial(folder: Path) -> Run:
    """Returns the run of a sweep's trial, whatever became of it.

    The status is that of result.json, or waiting, running, cut off, stopped (by the sweep), or
    failed (it was killed or could not start). The seed is known by the folder's name.
    """
    has_result = (folder / "result.json").exists()
    try:
        run = read_run(folder if has_result else folder / "train.log")
        status = run.status if has_result else "cut off"
    except RunError as error:
        begun = any((folder / name).exists() for name in ("train.log", "output.txt"))
        status = "failed" if has_result else "cut off" if begun else "waiting"
        reason = str(error).removeprefix(f"{folder}: ") if has_result else ""
        run = Run(folder, "", status, reason)
    _, seed = split_name(folder)
    settings = ({} if seed is None else {"seed": seed}) | run.settings
    reason, code = run.reason, read_text(folder / "exit_status").strip()
    if is_locked(folder):
        status, reason = "running", ""
    elif (folder / "stopped").exists():
        status, reason = "stopped", read_text(folder / "stopped").strip()
    elif code and not has_result:
        killed = code.isdigit() and int(code) > 128
        how = f"killed by signal {int(code) - 128}" if killed else f"exit status {code}"
        last = read_text(folder / "output.txt").strip().splitlines()[-1:]
        status, reason = "failed", "; ".join([how, *last])
    return replace(
        run, path=folder, name=trial_of(folder), status=status, reason=reason, settings=settings
    )


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Returns the runs of run folders, logs, and folders that hold either, at any depth, in order.

    Trials of a sweep (they have a command.sh) are included whether they ran or not. Raises RunError
    for a path without runs.
    """
    runs = []
    for path in map(Path, paths):
        if path.is_file() or (path / "result.json").exists():
            runs.append(read_run(path))
            continue
        found = {file.parent for name in ("result.json", "command.sh") for file in path.rglob(name)}
        inner = sorted(found) or sorted(path.glob("*.log"))
        if not inner:
            raise RunError(f"{path}: it has no result.json and no .log; give finished runs")
        for run in inner:
            if not is_set_aside(run):
                planned = (run / "command.sh").exists()
                runs.append(read_trial(run) if planned else read_run(run))
    return runs


def is_set_aside(folder: Path) -> bool:
    """Returns whether a folder holds an earlier attempt that sweep.py renamed, as seed7.cut1."""
    return re.search(r"\.cut\d+$", folder.name) is not None
