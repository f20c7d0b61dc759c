"""Read a run, from its folder or from its train log alone: the one reader of all tools here.

`read_run("logs/<RUN_ID>")` takes result.json; `read_run("train_seed42.log")` takes the conventional
lines, so it reads the logs of the challenge's other scripts too, as far as they say.
"""

import ast
import fcntl
import itertools
import json
import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import train_gpt

KINDS = {f.name: f.type for f in fields(train_gpt.Hyperparameters)}

# Settings that say where or how a run went, not what it is; of DATA_PATH all but the last name.
INCIDENTAL = {"run_id", "run_dir", "resume", "seed", "data_path", "tokenizer_path", "preset"}

DONE = ("ok", "over a limit")  # what a run that came to its scores says of itself

# The score lines of a log, by our names of the scores.
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
class Score:
    """One score over the validation text: nats a token, bits per byte, and the sums behind them."""

    val_loss: float
    val_bpb: float
    tokens: int = 0  # 0: not said
    bytes: int = 0
    stride: int = 0
    seconds: float = math.nan


@dataclass(frozen=True)
class Run:
    """What a run says of itself; NaN, 0 or empty where it does not say."""

    path: Path
    name: str  # of the trial: what it changes
    status: str  # of result.json; a log has ok, over a limit, failed or cut off
    reason: str = ""
    settings: dict = field(default_factory=dict)  # by lower-case name
    scores: dict = field(default_factory=dict)  # Score by float, plain, sliding, ttt
    sizes: dict = field(default_factory=dict)  # bytes of code, model, total
    seconds: dict = field(default_factory=dict)  # of train, calibrate, pack, diagnose, eval
    verdicts: dict = field(default_factory=dict)  # PASS or FAIL
    curve: tuple = ()  # (step, training seconds, training loss) as logged
    steps: int = 0
    step_ms: float = math.nan  # median; of a log the mean
    parameters: int = 0
    machine: dict = field(default_factory=dict)
    ranks: int = 1
    code_sha256: str = ""
    val_sha256: str = ""

    @property
    def seed(self) -> int | None:
        """The seed of the initial weights, or None."""
        return self.settings.get("seed")

    @property
    def called(self) -> str:
        """Trial and seed: for tables and pictures, which name no path of a machine."""
        return self.name if self.seed is None else f"{self.name} seed {self.seed}"

    @property
    def choices(self) -> dict[str, Any]:
        """The settings that say what it is; of DATA_PATH the last name, which says the data."""
        chosen = {key: value for key, value in self.settings.items() if key not in INCIDENTAL}
        data = Path(self.settings.get("data_path") or "").name
        return chosen | ({"data_path": data} if data else {})

    @property
    def finished(self) -> bool:
        """Whether it came to its scores."""
        return self.status in DONE

    @property
    def repacked(self) -> bool:
        """Whether it packed and scored weights that another run trained (--quantize)."""
        trained = self.steps or self.parameters  # which a run counts before its first step
        return self.finished and not trained and "model_dim" in self.settings

    @property
    def final(self) -> str | None:
        """The name of the score that counts, the last one made, or None."""
        return next((name for name in reversed(SCORE_LINES) if name in self.scores), None)


def by_name(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each trial, by its name."""
    trials: dict[str, list[Run]] = {}
    for run in runs:
        trials.setdefault(run.name, []).append(run)
    return trials


CLASSES = "ModelSettings", "Hyperparameters"  # of a program; they hold its settings
MUTATORS = {"clear", "pop", "popitem", "setdefault", "update"}  # methods that change a dict


class Defaults:
    """The defaults and presets of a program, read from its source, which is not executed.

    Two forms are read: `name = default, "meaning"` with presets as text (`A=1 B=2`), and
    `name: type = setting(default, ...)` with presets as dicts. A value that cannot be read, or that
    the program changes later, is unknown; a command then names the setting.
    """

    def __init__(self, tree: ast.Module) -> None:
        constants, changed = literals(tree.body, {}), changed_in_place(tree)
        presets = {} if "PRESETS" in changed else constants.get("PRESETS")
        byte_rules = {} if "BYTE_RULES" in changed else constants.get("BYTE_RULES")
        self.byte_rules = as_settings(byte_rules)
        self.presets = presets if isinstance(presets, dict) else {}
        self.presets = {name: as_settings(preset) for name, preset in self.presets.items()}
        self.defaults: dict[str, Any] = {}
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name in CLASSES:
                names = {getattr(part, "id", "") for part in ast.walk(node)}
                kept = {name: x for name, x in self.defaults.items() if name not in names}
                self.defaults = kept | literals(node.body, constants)
        for node in ast.walk(tree):  # as Hyperparameters.seed = 7
            owner = getattr(getattr(node, "value", None), "id", "")
            if owner in CLASSES and isinstance(getattr(node, "ctx", None), ast.Store):
                self.defaults.pop(getattr(node, "attr", ""), None)

    def settings(self, env: dict[str, str]) -> dict[str, Any]:
        """Returns all settings by precedence: `env`, its PRESET, rule of bytes, default."""
        given = {name.lower(): text for name, text in env.items()}
        given = self.presets.get(env.get("PRESET"), {}) | given
        if str(given.get("vocab_size")) == str(train_gpt.BYTE_VOCAB):
            given = self.byte_rules | given
        kinds = {name: type(x) for name, x in self.defaults.items() if x is not None}
        return self.defaults | {
            name: typed(x, kinds.get(name)) if isinstance(x, str) else x
            for name, x in given.items()
            if name in self.defaults
        }

    def command(self, run: Run) -> str:
        """Returns the shortest command that gives a run's settings, without its names.

        SEED is first. `--quantize` runs of older programs have one sequence as their step.
        """
        told = run.settings
        env = {"PRESET": preset} if (preset := told.get("preset", "")) else {}
        if told.get("vocab_size") == train_gpt.BYTE_VOCAB:
            env["VOCAB_SIZE"] = str(train_gpt.BYTE_VOCAB)
        given, left_out = self.settings(env), ["run_id", "run_dir", "resume", "seed"]
        if run.repacked and told.get("train_batch_tokens") == told.get("train_seq_len"):
            left_out.append("train_batch_tokens")
        for name, value in told.items():
            if name not in left_out and value != given.get(name):
                env[name.upper()] = str(int(value)) if isinstance(value, bool) else str(value)
        pairs = [f"{name}={shlex.quote(value)}" for name, value in env.items()]
        many = f"torchrun --standalone --nproc_per_node={run.ranks}"
        launcher = many if run.ranks > 1 else "python"
        weights = ["--quantize", f"final_model_seed{run.seed}.safetensors"] * run.repacked
        return " ".join([f"SEED={run.seed}", *pairs, launcher, "train_gpt.py", *weights])


def literals(body: list[ast.stmt], constants: dict[str, Any]) -> dict[str, Any]:
    """Returns the values that a body assigns once, as literals, by name; of a setting, its default.

    Names of `constants`, and those assigned before, may stand in the place of numbers and texts.
    """
    known, times = dict(constants), Counter()
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        names = (part for part in ast.walk(node) if isinstance(part, ast.Name))
        stored = [part.id for part in names if not isinstance(part.ctx, ast.Load)]
        times.update(stored)
        known = {name: value for name, value in known.items() if name not in stored}
        name, value = assignment(node)
        with suppress(ValueError, TypeError, MemoryError, RecursionError):  # it is no literal
            known[name] = evaluate(value, known)
    return {name: value for name, value in known.items() if times[name] == 1}


def assignment(node: ast.stmt) -> tuple[str, ast.expr | None]:
    """Returns the name that a statement assigns, and the expression of its value or default."""
    match node:
        case ast.Assign(targets=[ast.Name(id=name), *_], value=ast.Tuple(elts=[default, *_])):
            return name, default
        case ast.Assign(targets=[ast.Name(id=name), *_], value=value):
            return name, value
        case ast.AnnAssign(
            target=ast.Name(id=name),
            value=ast.Call(func=ast.Name(id="setting"), args=[default, *_]),
        ):
            return name, default
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.Dict() as value):
            return name, value
    return "", None


def evaluate(node: ast.expr | None, constants: dict[str, Any]) -> Any:
    """Returns the value of a literal, in which names of constants may stand; ValueError if none."""
    match node:
        case ast.Name(id=name) if isinstance(constants.get(name), (str, int, float)):
            return constants[name]
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return {evaluate(key, constants): evaluate(x, constants) for key, x in pairs}
        case ast.expr():
            return ast.literal_eval(node)
    raise ValueError("not an expression")


def changed_in_place(tree: ast.Module) -> set[str]:
    """Returns the names of values that a program changes, as in A["x"] = 1 or A.update(x=1)."""
    names = set()
    for node in ast.walk(tree):
        stored = not isinstance(getattr(node, "ctx", ast.Load()), ast.Load)
        if stored or getattr(node, "attr", "") in MUTATORS:
            inner: Any = node
            while isinstance(inner, (ast.Attribute, ast.Subscript)):
                inner = inner.value
            if inner is not node:
                names.add(getattr(inner, "id", ""))
    return names


def as_settings(preset: Any) -> dict[str, Any]:
    """Returns a preset as settings by lower-case name: of a dict, or of a text `A=1 B=2`."""
    if isinstance(preset, dict):
        return {name: value for name, value in preset.items() if isinstance(name, str)}
    try:
        pairs = dict(pair.split("=", 1) for pair in preset.split())
    except (ValueError, AttributeError):
        return {}
    return {name.lower(): text for name, text in pairs.items()}


def typed(text: str, kind: type | None) -> Any:
    """A setting as a log has it, of its kind; where that is not known, as it looks."""
    text = {"True": "1", "False": "0"}.get(text, text) if kind is bool else text
    if kind:
        return train_gpt.parse_value(text, kind)
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def read_run(path: str | Path) -> Run:
    """The Run of a folder with result.json, or of a train log; RunError if it is neither."""
    path = Path(path)
    try:
        run, (_, seed) = read_folder(path) if path.is_dir() else read_log(path), named(path)
        told = {} if seed is None else {"seed": seed}
        return replace(run, settings=told | run.settings)
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: not a run: {error or type(error).__name__}") from None


def named(path: Path) -> tuple[str, int | None]:
    """Trial ("" if not said) and seed by the last name of a run's folder or log.

    Such names are seed7, trial_seed7, train_seed7.log, train_trial_seed7.log.
    """
    name, seed = re.fullmatch(
        r"(.*?)(?:(?:^|[-_.])seed_?(-?\d+))?(?:\.log|\.txt)?", path.name
    ).groups()
    if path.suffix in (".log", ".txt"):
        name = re.sub(r"^train(?:[-_.]|$)", "", name)
    return name, None if seed is None else int(seed)


def trial_of(path: Path) -> str:
    """The name of a run's trial: as its folder or log says, else of the folder that holds it."""
    path = path.absolute()
    return named(path)[0] or (trial_of(path.parent) if path.name else "")


def read_folder(path: Path) -> Run:
    """The Run of a folder with result.json."""
    result = json.loads((path / "result.json").read_text(encoding="utf-8"))
    known = [f.name for f in fields(Score)]
    scores = {
        name: Score(**{key: score[key] for key in known})
        for name, score in result.get("scores", {}).items()
    }
    curve = {step: (seconds, loss) for step, seconds, loss in read_events(path)}
    losses = enumerate(result.get("train_losses", []), 1)
    return Run(
        path=path,
        name=trial_of(path),
        status=result["status"],
        reason=result.get("reason", "").strip(),
        settings=result.get("settings", {}),
        scores=scores,
        sizes=result.get("bytes", {}),
        seconds=result.get("seconds", {}),
        verdicts=result.get("verdicts", {}),
        curve=tuple((step, curve.get(step, (math.nan,))[0], loss) for step, loss in losses)
        or tuple((step, *values) for step, values in curve.items()),
        steps=result.get("steps", 0),
        step_ms=result.get("step_ms", {}).get("p50", math.nan),
        parameters=result.get("parameters", 0),
        machine=result.get("machine", {}),
        ranks=world_size(path),
        code_sha256=result.get("code_sha256", ""),
        val_sha256=result.get("val_sha256", ""),
    )


def read_events(folder: Path) -> list[tuple[int, float, float]]:
    """The (step, training seconds, training loss) lines of a run, which may still be going on."""
    try:
        lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    steps = []
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):  # cut, or of something else
            event = json.loads(line)
            steps.append((event["step"], event["seconds"], event["train_loss"]))
    return steps


def world_size(folder: Path) -> int:
    """The processes of a run, which only its log says."""
    try:
        log = (folder / "train.log").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 1
    return int((re.findall(r"^world_size:(\d+)", log, re.MULTILINE) or [1])[-1])


def starts_of(log: str) -> list[str]:
    """The parts of a log, one for each start of its run: RESUME=auto goes on in the same log."""
    at = [found.start() for found in re.finditer(r"^[^:\n]*\btrain\.log$", log, re.MULTILINE)]
    return [log[a:b] for a, b in itertools.pairwise([0, *at[1:], len(log)])]


def steps_of(starts: Iterable[str]) -> list[tuple[str, str, str]]:
    """Step, loss and milliseconds of each logged step, less those that a later start did again."""
    steps: list[tuple[str, str, str]] = []
    for text in starts:
        line = r"^step:(\d+)/\d+ train_loss:(\S+).* train_time:(\d+)ms"
        own = re.findall(line, text, re.MULTILINE)
        resumed = re.search(r"^resume: step (\d+)", text, re.MULTILINE)
        if own or resumed:
            kept = int(resumed[1]) if resumed else 0
            steps = [step for step in steps if int(step[0]) <= kept] + own
    return steps


def read_log(path: Path) -> Run:
    """The Run of a train log: its last start, and the earlier steps that this went on from."""
    *before, text = starts_of(path.read_text(encoding="utf-8", errors="replace"))

    def number(pattern: str, kind: Callable[[str], Any] = float) -> Any:
        """The last such number of the log, or None."""
        found = re.findall(pattern, text, re.MULTILINE)
        return kind(found[-1]) if found else None

    def pairs(first: str, within: str = "") -> dict[str, str]:
        """The name:value pairs of the line that begins so; values may hold spaces."""
        line = re.search(rf"^{first}:.*{within}.*$", text, re.MULTILINE)
        parts = re.split(r"(?:^| )([a-z_0-9]+):", line[0]) if line else [""]
        return dict(zip(parts[1::2], parts[2::2], strict=True))

    settings = {name: typed(value, KINDS.get(name)) for name, value in pairs("corpus").items()}
    if "seed" not in settings and (seed := number(r"\bseed:(\d+)", int)) is not None:
        settings["seed"] = seed
    tokens = number(r"^val_loader:.* tokens:(\d+)", int) or 0
    scores = {}
    for name, line in SCORE_LINES.items():
        exact = re.findall(rf"^{line}_exact val_loss:(\S+) val_bpb:(\S+)", text, re.MULTILINE)
        if exact:
            loss, bpb = map(float, exact[-1])
            scores[name] = Score(
                loss,
                bpb,
                tokens,
                round(tokens * loss / (math.log(2) * bpb)) if bpb else 0,
                number(rf"^{line} .*stride:(\d+)", int) or 0,
                (number(rf"^{line} .*eval_time:(\d+)ms") or math.nan) / 1000,
            )
    steps = steps_of([*before, text])
    ends = re.findall(r"^step:(\d+)/\d+ .*train_time:(\d+)ms step_avg:(\S+)ms", text, re.MULTILINE)
    verdicts = dict(re.findall(r"^limit:(\w+) .* (PASS|FAIL)$", text, re.MULTILINE))
    error = re.search(r"^error: (.*)", text, re.MULTILINE | re.DOTALL)
    status = "over a limit" if "FAIL" in verdicts.values() else "ok" if scores else "cut off"
    sizes = {
        "code": number(r"^Code size: (\d+) bytes", int),
        "model": number(r"^Serialized model int6\+\w+: (\d+) bytes", int),
        "total": number(r"^Total submission size int6\+\w+: (\d+) bytes", int),
    }
    return Run(
        path=path,
        name=trial_of(path),
        status="failed" if error else status,
        reason=error[1].strip() if error else "",
        settings=settings,
        scores=scores,
        sizes={name: size for name, size in sizes.items() if size is not None},
        seconds={name: float(value) for name, value in pairs("seconds").items() if value},
        verdicts=verdicts,
        curve=tuple((int(step), int(ms) / 1000, float(loss)) for step, loss, ms in steps),
        steps=int(ends[-1][0]) if ends else 0,
        step_ms=float(ends[-1][2]) if ends else math.nan,
        parameters=number(r"^model_params:(\d+)", int) or 0,
        machine=pairs("device", " dtype:"),
        ranks=number(r"^world_size:(\d+)", int) or 1,
    )


def is_locked(folder: Path) -> bool:
    """Whether a sweep's trial is running: its command.sh holds a lock."""
    try:
        with open(f"{folder}.lock", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def read_trial(folder: Path) -> Run:
    """The Run of a run's folder, as a sweep's trial, whatever became of it.

    Beside those of result.json its status is waiting, running, cut off, stopped (by the sweep) or
    failed, where it was killed or could not start. Its seed is known by the folder's name.
    """

    def text(name: str) -> str:
        try:
            return (folder / name).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""

    try:
        run = read_run(folder if (folder / "result.json").exists() else folder / "train.log")
        status = run.status if run.path == folder else "cut off"
    except RunError as error:
        broken = (folder / "result.json").exists()
        begun = any((folder / name).exists() for name in ("train.log", "output.txt"))
        status = "failed" if broken else "cut off" if begun else "waiting"
        reason = str(error).removeprefix(f"{folder}: ") if broken else ""
        run = Run(folder, "", status, reason)
    _, seed = named(folder)
    settings = ({} if seed is None else {"seed": seed}) | run.settings
    reason, code = run.reason, text("exit_status")
    if is_locked(folder):
        status, reason = "running", ""
    elif (folder / "stopped").exists():
        status, reason = "stopped", text("stopped")
    elif code and not (folder / "result.json").exists():
        killed = code.isdigit() and int(code) > 128
        how = f"killed by signal {int(code) - 128}" if killed else f"exit status {code}"
        status, reason = "failed", "; ".join([how, *text("output.txt").splitlines()[-1:]])
    return replace(
        run, path=folder, name=trial_of(folder), status=status, reason=reason, settings=settings
    )


def read_runs(paths: Iterable[str | Path]) -> list[Run]:
    """The Runs of run folders, logs, and folders that hold either, at any depth, in order.

    Trials of a sweep (they have a command.sh) are there whether they ran or not.
    """
    runs = []
    for path in map(Path, paths):
        if path.is_file() or (path / "result.json").exists():
            runs.append(read_run(path))
            continue
        found = {file.parent for name in ("result.json", "command.sh") for file in path.rglob(name)}
        inner = sorted(found) or sorted(path.glob("*.log"))
        if not inner:
            raise RunError(f"{path}: no result.json and no .log is in it; give finished runs")
        for run in inner:
            if re.search(r"\.cut\d+$", run.name):
                continue  # put aside by sweep.py
            planned = (run / "command.sh").exists()
            runs.append(read_trial(run) if planned else read_run(run))
    return runs
