"""Read a run from its folder or from its train log; all tools of records/ use this reader.

`read_run("logs/<RUN_ID>")` reads result.json. `read_run("train_seed42.log")` reads the challenge's
conventional lines, so it reads logs of the challenge's other scripts as well.
"""

import itertools
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Container, Iterable
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
SCHEDULE = ("iterations", "max_wallclock_seconds")  # what RESUME may change of a training
# Settings that belong to one run and are left out of the command that repeats it.
OF_ONE_RUN = {"run_id", "run_dir", "resume", "seed"}

NO_RUNS, GIVE_RUNS = "it has no result.json and no .log", "give finished runs"
DONE = ("ok", "over a limit")  # the statuses of a run that reached its scores

# The score lines of train_gpt.py, by the names of its scores. Any other line has its own name.
SCORE_LINES = {
    "float": "DIAGNOSTIC post_ema",
    "plain": "final_int6_roundtrip",
    "sliding": "final_int6_sliding_window",
    "window": "final_int6_window",
    "documents": "final_int6_documents",
    "ttt": "legal_ttt",
}
NUMBER = r"[-+]?(?:\d+(?:\.\d+)?(?:e[-+]?\d+)?|nan|inf)\b(?![.,]\d)"
# The values of a score, and names of what is no score of an artifact.
LOSS, BPB = (re.compile(rf"\bval_{unit}\s*[:=]\s*({NUMBER})", re.I) for unit in ("loss", "bpb"))
UNQUANTIZED = re.compile(r"pre[-_ ]?quant|post[-_ ]ema|unquantized", re.IGNORECASE)
DIAGNOSTIC = re.compile("^float$|diagnostic", re.IGNORECASE)
PROGRESS = re.compile(
    r"(?<![\d/])\d+/\d+(?![\d/])|\d%|\b(step|epoch|iter\w*)s?\W*\d|\brunning", re.IGNORECASE
)
RESERVE = r"^gptq: ([\d.]+) s are kept"
MIN_BPB = 0.5  # smaller numbers are differences
# A number of two decimals or more beside the name of the unit: perhaps a score.
ANY_BPB = re.compile(
    r"(?<!running_)(?<!batch_)(?:bpb|bits[ _-]per[ _-]byte)[^\w\n-]{0,12}"
    r"(?:\d+\.\d+ *(?:->|\u2192) *)?(\d+\.\d\d+|nan\b|inf\b)|"
    r"\b(\d+\.\d\d+) (?:bpb|bits per byte)\b",
    re.IGNORECASE,
)

Step = tuple[int, float, float]  # number, training seconds at its end, training loss
# What launchers, loggers and progress bars put before a line: rank, time, level, bar.
PREFIX = re.compile(
    r"^(?:\[(?:rank|default)\d+\]: ?|\d+: |\d{10}\.\d+ |.*?\d%\|[^|\n]*\|[^\[\n]*\[[^\]\n]*\]|"
    r"\[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[\d.,:Z+]*\]?(?:\[[^\]\n]*\]| -)* |[A-Z]+:\w+:)+",
    re.MULTILINE,
)


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
    # By float, plain, sliding, window, documents, ttt, or the name in a log of another script; in
    # its order.
    scores: dict[str, Score] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of code, model and total
    seconds: dict[str, float] = field(default_factory=dict)  # train, calibrate, pack, eval, ...
    verdicts: dict[str, str] = field(default_factory=dict)  # PASS or FAIL
    curve: tuple[Step, ...] = ()
    steps: int = 0
    step_ms: float = math.nan  # the median; of a log the mean
    reserve: float = 0.0  # seconds of training that were kept for calibration
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
        return next(reversed(self.scores), "")


def is_one_training(x: Run, y: Run) -> bool:
    """Returns whether two runs have weights of one training, which was resumed or quantized again.

    Their scores before quantization are equal, or the first losses that both have.
    """
    a, b = (run.scores.get("float") for run in (x, y))
    if a and b and (a.val_loss, a.val_bpb) == (b.val_loss, b.val_bpb):
        return True
    losses_x, losses_y = ({step: loss for step, _, loss in run.curve} for run in (x, y))
    steps = sorted(losses_x.keys() & losses_y.keys())[:3]
    # Logs have four decimals. Few steps may be equal by chance.
    return len(steps) > 2 and all(abs(losses_x[n] - losses_y[n]) < 1e-4 for n in steps)


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
    except OSError as error:
        reason = f"{error.strerror}; give the folder of a run, or a log, that can be read"
        raise RunError(f"{error.filename or path}: not a run: {reason}") from None
    except (ArithmeticError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: not a run: {error or type(error).__name__}") from None
    named = {} if seed is None else {"seed": seed}
    return replace(run, settings=named | run.settings)


def split_name(path: Path) -> tuple[str, int | None]:
    """Returns trial ("" if not named) and seed (or None) from the name of a run's folder or log.

    Such names are seed7, trial_seed7, train_seed7.log, train_trial_seed7.log.
    """
    name = path.stem if path.suffix in (".log", ".txt") else path.name
    found = re.fullmatch(r"(.*?)(?:^|[-_.])seed[-_]?(\d+)", name)
    name, seed = (found[1], int(found[2])) if found else (name, None)
    if path.suffix in (".log", ".txt"):
        name = re.sub(r"^train(?:[-_.]|$)", "", name)
    return name, seed


def trial_of(path: Path, seed: int | None = None) -> str:
    """Returns the trial of a run: by its folder or log, else by the folder that holds it.

    A name may end in `seed`, which the log states, as in log_42.txt.
    """
    path = path.absolute()
    name = split_name(path)[0]
    if seed is not None:
        name = re.sub(rf"(?:[-_.]s?|^train){seed}$", "", name)
    return name or (trial_of(path.parent) if path.name else "")


def decode(path: Path) -> str:
    """Returns the text of a file, in UTF-8 or after a byte order mark in UTF-16.

    Colours and what PREFIX describes are left out. What cannot be decoded is replaced.
    """
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text = re.sub(r"\r\n?", "\n", data.decode(encoding, errors="replace"))
    return PREFIX.sub("", re.sub(r"\x1b\[[\d;]*m", "", text))


def read_text(path: Path) -> str:
    """Returns the text of a file; empty if there is no such file."""
    try:
        return decode(path)
    except OSError:
        return ""


def without_source(log: str) -> str:
    """Returns a log without the program's source, which many scripts print before a line of =."""
    parts = re.split(r"^={80,}$", log, flags=re.MULTILINE)
    is_source = re.compile(r"^(?:import|from) \w", re.MULTILINE)
    return "".join(part for part in parts if len(parts) == 1 or not is_source.search(part))


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
        curve=tuple(curve) or events,
        steps=result.get("steps", 0),
        step_ms=result.get("step_ms", {}).get("p50", math.nan),
        reserve=last_number(log, RESERVE) or 0.0,
        parameters=result.get("parameters", 0),
        machine=result.get("machine", {}),
        ranks=last_number(log, r"^world_size:(\d+)", int) or 1,
        code_sha256=result.get("code_sha256", ""),
        val_sha256=result.get("val_sha256", ""),
        resumed=result.get("resumed", {}),
    )


def read_events(folder: Path) -> tuple[Step, ...]:
    """Returns each step logged so far."""
    steps = []
    for line in read_text(folder / "events.jsonl").splitlines():
        with suppress(ValueError, KeyError, TypeError):  # an incomplete line, or another event
            event = json.loads(line)
            steps.append((event["step"], event["seconds"], event["train_loss"]))
    return without_repeated(steps)


def split_starts(log: str) -> list[str]:
    """Returns a log in parts, one for each start of its run: RESUME=auto appends to the log."""
    at = [found.start() for found in re.finditer(r"^[^:\n]*\btrain\.log$", log, re.MULTILINE)]
    return [log[a:b] for a, b in itertools.pairwise([0, *at[1:], len(log)])]


def read_curve(log: str) -> tuple[Step, ...]:
    """Returns each logged step of a log."""
    line = r"^(?:step:)?(\d+)/\d+ (?:train_)?loss: ?(\S+).* (?:train_time|t): ?([\d.]+)(ms|s|m)\b"
    unit = {"ms": 0.001, "s": 1, "m": 60}
    found = re.findall(line, log, re.MULTILINE)
    return without_repeated((int(n), float(time) * unit[u], float(x)) for n, x, time, u in found)


def without_repeated(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Returns logged steps without those from which a run was resumed at an earlier one."""
    kept: list[Step] = []
    for step in steps:
        while kept and kept[-1][0] >= step[0]:
            kept.pop()
        kept.append(step)
    return tuple(kept)


def last_number(text: str, pattern: str, kind: Callable[[str], Any] = float) -> Any:
    """Returns the last number that fits a pattern, or None."""
    found = re.findall(pattern, text, re.MULTILINE)
    return kind(found[-1]) if found else None


def read_pairs(text: str, first: str, within: str = "") -> dict[str, str]:
    """Returns the name:value pairs of the line that begins with a name; values may hold spaces."""
    line = re.search(rf"^{first}:.*{within}.*$", text, re.MULTILINE)
    parts = re.split(r"(?:^| )([a-z_0-9]+):", line[0]) if line else [""]
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def read_score(line: str) -> tuple[str, str, str] | None:
    """Returns name, nats a token and bits per byte of a line that states a score, or None.

    Such a line has a name, one val_loss and one val_bpb, as in `final_roundtrip val_loss:2.1
    val_bpb:1.2`. Lines of training and of progress state no score.
    """
    losses, bpbs = [*LOSS.finditer(line)], [*BPB.finditer(line)]
    if len(losses) != 1 or len(bpbs) != 1:
        return None
    before = line[: min(losses[0].start(), bpbs[0].start())]
    words = [word.strip(":|-[]()") for word in before.split() if not re.search(r"[:=]\d", word)]
    name = " ".join(word for word in words if re.search("[A-Za-z]", word))
    if not name or PROGRESS.search(before):
        return None
    return name.replace("_exact", ""), losses[0][1], bpbs[0][1]


def is_rounded(text: str, exact: float) -> bool:
    """Returns whether a decimal number is the exact one to the digits that it has."""
    decimals = len(text.partition(".")[2])
    return abs(float(text) - exact) <= 0.501 * 10.0**-decimals


def read_scores(text: str) -> dict[str, Score]:
    """Returns the scores of a log in its order; the last one is that of the run.

    Tokens, bytes and stride are 0 where the log does not state them. A line of another name that
    repeats the last score is no score of its own. Raises ValueError for a score that is not finite,
    and for a line after the last score that seems to state another one.
    """
    scores: dict[str, tuple[float, float]] = {}
    lines: dict[str, str] = {}
    keys: dict[str, str] = {}
    unread = ""
    for line in text.splitlines():
        score = read_score(line)
        if score is None:
            known = [bpb for _, bpb in scores.values()]
            unread = line.strip() if may_be_score(line, known) else unread
            continue
        unread, (name, loss, bpb) = "", score
        if not math.isfinite(float(loss) + float(bpb)):
            raise ValueError(f"a score of NaN or infinity: {line.strip()}")
        key = keys.setdefault(name, name_of(name, scores))
        repeated = [
            other
            for other, values in scores.items()
            if is_rounded(loss, values[0]) and is_rounded(bpb, values[1])
        ]
        repeats_last = bool(scores) and [*scores][-1] in repeated
        if repeats_last and key not in scores and key not in SCORE_LINES:
            continue
        before = scores.pop(key, None)
        scores[key] = before if before and key in repeated else (float(loss), float(bpb))
        lines[key] = f"{lines.get(key, '')}{line}\n"
    if unread:
        raise ValueError(f"a line that seems to be a score is not understood: {unread:.200}")
    tokens = last_number(text, r"(?:^val_loader:.* tokens|\bval_tokens): ?(\d+)", int) or 0
    return {name: make_score(*scores[name], tokens, lines[name]) for name in scores}


def name_of(line: str, known: Container[str]) -> str:
    """Returns the name of a score whose line begins so; `known` are names that are taken."""
    for name, start in SCORE_LINES.items():
        if f" {line}".endswith(f" {start}"):
            return name
    return "float" if UNQUANTIZED.search(line) and "float" not in known else line


def may_be_score(line: str, known: Iterable[float]) -> bool:
    """Returns whether a line has a number of bits per byte that is none of the known ones."""
    for number in ANY_BPB.finditer(line):
        text, before = number[1] or number[2], line[: number.start()]
        repeats = any(is_rounded(text, bpb) for bpb in known)
        if not (float(text) < MIN_BPB or repeats or PROGRESS.search(before)):
            return True
    return False


def make_score(loss: float, bpb: float, tokens: int, lines: str) -> Score:
    """Returns a score from its two units, the tokens scored, and its lines in the log."""
    nats = tokens * loss
    ms = last_number(lines, r"\b(?:eval_)?time[:=](\d+)ms")
    return Score(
        val_loss=loss,
        val_bpb=bpb,
        nats=nats,
        tokens=tokens,
        bytes=round(nats / (math.log(2) * bpb)) if bpb else 0,
        seconds=math.nan if ms is None else ms / 1000,
        stride=last_number(lines, r"\bstride[:=](\d+)", int) or 0,
    )


def read_log(path: Path) -> Run:
    """Returns the run of a train log: its last start, and the steps that this one continued."""
    log = without_source(decode(path))
    text = split_starts(log)[-1]
    settings = {name: parse_setting(name, x) for name, x in read_pairs(text, "corpus").items()}
    seed = last_number(text, r"(?i)\bseed[\"']?\s*[:=]\s*(\d+)\b(?!\.)", int)
    if seed is not None:
        settings.setdefault("seed", seed)
    scores = read_scores(text)
    steps = last_number(text, r"^(?:step:)?(\d+)/\d+ .*loss:", int)
    verdicts = dict(re.findall(r"^limit:(\w+) .* (PASS|FAIL)$", text, re.MULTILINE))
    # train_gpt.py states its verdicts last. Other scripts state nothing behind their last score.
    final = [name for name in scores if not DIAGNOSTIC.search(name)]
    ended = final and (verdicts or not settings.keys() - {"seed"})
    status = "over a limit" if "FAIL" in verdicts.values() else "ok" if ended else "cut off"
    error = re.search(r"^(?:error: |(?=Traceback \(most recent))(.*)", text, re.M | re.S)
    sizes = {
        "code": last_number(text, r"^Code size: (\d+) bytes", int),
        "model": last_number(text, r"^Serialized model \S+: (\d+) bytes", int),
        "total": last_number(text, r"^Total submission size(?: \S+)?: (\d+) bytes", int),
    }
    return Run(
        path=path,
        name=trial_of(path, settings.get("seed")),
        status="failed" if error else status,
        reason=error[1].strip() if error else "",
        settings=settings,
        changed=parse_changed_settings(text),
        scores=scores,
        sizes={name: size for name, size in sizes.items() if size is not None},
        seconds={name: float(x) for name, x in read_pairs(text, "seconds").items() if x},
        verdicts=verdicts,
        curve=read_curve(log),
        steps=steps or 0,
        step_ms=last_number(text, r"^step:.* step_avg: ?([\d.]+)ms") or math.nan,
        reserve=last_number(text, RESERVE) or 0.0,
        parameters=last_number(text, r"^model_params:(\d+)", int) or 0,
        machine=read_pairs(text, "device", " dtype:"),
        ranks=last_number(text, r"^world_size:(\d+)", int) or 1,
    )


def is_locked(folder: Path) -> bool:
    """Returns whether a run of a sweep is running: its command.sh holds a lock."""
    try:
        import fcntl

        with open(f"{folder}.lock", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, ImportError):  # no lock, no file that can be one, or Windows
        return False
    return False


def read_planned(folder: Path) -> Run:
    """Returns a run that a sweep planned, whatever became of it.

    The status is that of result.json, or waiting, running, cut off, or failed (it was killed or
    could not start). The seed is known by the folder's name.
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

    Those that a sweep planned (they have a command.sh) are included whether they began or not.
    Raises RunError for a path without runs.
    """
    runs = []
    for path in map(Path, paths):
        if path.is_file() or (path / "result.json").exists():
            runs.append(read_run(path))
        else:
            for run in find(path):
                planned = (run / "command.sh").exists()
                runs.append(read_planned(run) if planned else read_run(run))
    return runs


def find(folder: Path) -> list[Path]:
    """Returns the folders of runs in a folder, at any depth, or else its logs, in order.

    The logs are those of the folder, or else of the folders in it. A copy of another log is left
    out. Raises RunError if there are none.
    """
    names = ("result.json", "command.sh")
    try:
        list(folder.iterdir())  # rglob finds nothing in a folder that cannot be read
        found = sorted({file.parent for name in names for file in folder.rglob(name)})
        for logs in (folder.glob("*"), folder.rglob("*")):
            found = found or distinct([path for path in sorted(logs) if is_log(path)])
    except OSError as error:
        raise RunError(f"{error.filename}: {NO_RUNS}: {error.strerror}; {GIVE_RUNS}") from None
    if not found:
        raise RunError(f"{folder}: {NO_RUNS}; {GIVE_RUNS}")
    return [run for run in found if not is_set_aside(run)]


def is_log(path: Path) -> bool:
    """Returns whether a path is a file named as a log: a .log, or a .txt with "log" or "train"."""
    name = path.name.lower()
    named = re.search("(?:log|train).*[.]txt$", f"{path.parent.name}/{name}".lower())
    return not path.is_dir() and (name.endswith(".log") or bool(named and "require" not in name))


def distinct(logs: list[Path]) -> list[Path]:
    """Returns logs without copies; of equal logs the one whose name has a seed, or the first."""
    by_text: dict[bytes, Path] = {}
    for path in sorted(logs, key=lambda path: split_name(path)[1] is None):
        by_text.setdefault(path.read_bytes(), path)
    return sorted(by_text.values())


def is_set_aside(folder: Path) -> bool:
    """Returns whether a folder holds an earlier attempt that sweep.py renamed, as seed7.cut1."""
    return re.search(r"\.cut\d+$", folder.name) is not None
