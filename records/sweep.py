"""Run train_gpt.py for every combination of settings and seeds, each run in its own folder.

    PRESET=cpu python records/sweep.py XSA_LAST_N=0,11 MUON_WD=0.02,0.04 --seeds 1337,42,7 --cpu

Settings in the environment hold for all runs; SETTING=A,B varies (values with commas: --file).
The same command again continues: finished runs stay; interrupted ones start again, or continue
from their checkpoint with CHECKPOINT_EVERY. A failed run is a row with its reason. --out contains
<trial>/seed<N>/, each a run folder with its command.sh, and the train_gpt.py that all runs use.
"""

import argparse
import difflib
import fcntl
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.table

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from runs import DONE, ROOT, SETTING_TYPES, RunError, read_planned, split_name, train_gpt
from tool import tool

SETTINGS = [name.upper() for name in SETTING_TYPES]
OWN = {"SEED": "--seeds", "RUN_ID": "--out", "RUN_DIR": "--out", "RESUME": "CHECKPOINT_EVERY"}
DUE = ("waiting", "cut off", "interrupted")
SAVE_SECONDS = 40  # for a run to save after SIGTERM
# What starts one run, by hand as under a scheduler.
COMMAND = """#!/usr/bin/env bash
# {title}
folder={folder}
trap : TERM  # this shell outlives the signal: the program saves first
exec 9>> "$folder.lock"
if command -v flock > /dev/null; then flock -w 10 9 || exit 75; fi  # 75: it is running already
{set_aside}rm -f "$folder/exit_status"
cd {root} || exit
PATH={python}:$PATH
unset {settings}
export {exports}
{program} > "$folder/output.txt" 2>&1
echo $? > "$folder/exit_status"
"""
SET_ASIDE = """if [ -e "$folder/train.log" ]; then  # keep an earlier attempt
  n=1; while [ -e "$folder.cut$n" ]; do n=$((n + 1)); done
  mv "$folder" "$folder.cut$n"; mkdir "$folder"; cp "$folder.cut$n/command.sh" "$folder"
fi
"""
ARRAY = """#!/usr/bin/env bash
{options}
runs=(
{runs}
)
exec bash "${{runs[SLURM_ARRAY_TASK_ID - 1]}}"  # Slurm's SIGTERM must not end a shell here
"""


class SweepError(RunError):
    """A sweep that cannot be run as asked. The message names the remedy."""


def check_names(names: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raises SweepError if a name is not known; the message has the nearest one, in any case."""
    by_case = {name.upper(): name for name in known}
    for name in sorted({*names} - {*known}):
        near = difflib.get_close_matches(name.upper(), by_case, n=1)
        if name in train_gpt.UNSUPPORTED_SETTINGS:
            reason = "is a setting of published scripts that train_gpt.py does not have"
        elif near:
            reason = f"is not known; did you mean {by_case[near[0]]}?"
        elif name.upper() in SETTINGS:
            reason = "stands outside [base] and [trials.NAME]"
        else:
            reason = f"is not {'a setting' if known is SETTINGS else 'one of ' + ', '.join(known)}"
        raise SweepError(f"{where}{name} {reason}")


# ---- Planned runs ----


@dataclass(frozen=True)
class PlannedRun:
    """One run of a sweep: the name of its trial, the settings that this changes, and a seed."""

    name: str
    changes: tuple[tuple[str, str], ...]  # setting and text
    seed: int


def make_runs(axes: list[str], seeds: list[int], one_at_a_time: bool) -> list[PlannedRun]:
    """Returns the runs of axes SETTING=A,B: their grid, or the base and each change alone."""
    pairs: list[list[tuple[str, str]]] = []
    for axis in axes:
        setting, equals, values = axis.partition("=")
        if not (setting and equals):
            raise SweepError(f"{axis}: give SETTING=VALUE or SETTING=A,B")
        texts = values.split(",")
        if setting in (done[0][0] for done in pairs):
            raise SweepError(f"{axis}: {setting} is there twice; give all its values as A,B")
        if len(texts) > 1 and (setting == "VE_LAYERS" or not all(texts)):
            raise SweepError(f"{axis}: an empty value, or one with commas, belongs into --file")
        pairs.append([(setting, text) for text in texts])
    changes = list(itertools.product(*pairs))
    if one_at_a_time:
        changes = [(), *((pair,) for axis in pairs for pair in axis)]
    runs = []
    for seed, change in itertools.product(seeds, changes):
        name = "+".join(f"{setting}={text}" for setting, text in change) or "base"
        runs.append(PlannedRun(re.sub(r"[^\w=+.,-]", "_", name)[:150], change, seed))
    return runs


def read_file(path: Path, seeds: list[int]) -> tuple[dict[str, str], list[PlannedRun]]:
    """Returns [base] and the [trials.NAME] of a TOML file; its `seeds` if none are given."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # type: ignore[import-not-found]

    def texts(table: Any, name: str) -> dict[str, str]:
        if not isinstance(table, dict):
            raise SweepError(f"--file {path}: {name} is no table of settings; write [{name}]")
        check_names(table, SETTINGS, f"--file {path}: [{name}]: ")
        for key, value in table.items():
            kinds = [str, int, float] + [bool] * (SETTING_TYPES[key.lower()] is bool)
            if type(value) not in kinds:
                needed = ", ".join(kind.__name__ for kind in kinds)
                raise SweepError(f"--file {path}: [{name}]: {key} = {value!r}: give {needed}")
        return {key: str(int(x) if isinstance(x, bool) else x) for key, x in table.items()}

    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise SweepError(f"--file {path}: {error}; see records/studies/*.toml") from None
    check_names(content, ["seeds", "base", "trials"], f"--file {path}: ")
    seeds, runs = seeds or content.get("seeds", [1337]), content.get("trials", {})
    if not isinstance(seeds, list) or {*map(type, seeds)} - {int}:
        raise SweepError(f"--file {path}: seeds = {seeds!r}: give whole numbers, as [1337, 42]")
    if not isinstance(runs, dict):
        raise SweepError(f"--file {path}: trials is no table; write [trials.NAME] for each")
    changes = {name: tuple(texts(x, f"trials.{name}").items()) for name, x in runs.items()}
    base = texts(content.get("base", {}), "base")
    return base, [
        PlannedRun(name, change, seed) for seed in seeds for name, change in changes.items()
    ]


@dataclass(frozen=True)
class Sweep:
    """A folder of runs, and what holds for all of them."""

    folder: Path
    base: dict[str, str]  # settings of all runs
    runs: list[PlannedRun]
    ranks: int = 1  # processes, and GPUs, of each run
    weights: Path | None = None  # a trial's folder whose weights are quantized, seed by seed

    def check(self) -> None:
        """Raises SweepError if train_gpt.py does not accept a run, or two have one folder."""
        settings = {*self.base, *(setting for run in self.runs for setting, _ in run.changes)}
        check_names(settings, SETTINGS, "")
        for name in sorted(settings & {*OWN}):
            raise SweepError(f"{name} is set for each run by the sweep; use {OWN[name]}")
        if not self.runs:
            raise SweepError("no runs: give SETTING=A,B, --file, or the --out of a sweep")
        if len({(run.name.casefold(), run.seed) for run in self.runs}) < len(self.runs):
            raise SweepError("two runs have the same name, in any case, and seed; give each once")
        for run in self.runs:
            if not re.fullmatch(r"[\w=+,-][\w=+.,-]*", run.name) or ".cut" in run.name:
                raise SweepError(f"[trials.{run.name}]: use letters, digits and _=+.,- in names")
            if split_name(Path(run.name)) != (run.name, None):
                raise SweepError(
                    f"{run.name}: a trial's name ends in no seed; use seeds, or rename"
                )
            if run.seed < 0:
                raise SweepError(f"seed {run.seed}: seeds must be at least 0")
            try:
                h = train_gpt.Hyperparameters.from_env(self.base | dict(run.changes))
                train_gpt.check_settings(h, self.ranks)
            except train_gpt.SettingsError as error:
                raise SweepError(f"{run.name}: {error}") from None

    def folder_of(self, run: PlannedRun) -> Path:
        """Returns the folder of a run."""
        return self.folder.resolve() / run.name / f"seed{run.seed}"

    def state(self, run: PlannedRun) -> str:
        """Returns the status of a run."""
        return read_planned(self.folder_of(run)).status

    def due(self, retry: bool) -> list[PlannedRun]:
        """Returns the runs to be started; with `retry` those that failed as well."""
        states = {run: self.state(run) for run in self.runs}
        kept = {*DONE, "running"}
        return [t for t in states if states[t] in DUE or (retry and states[t] not in kept)]

    def weights_of(self, run: PlannedRun) -> Path | None:
        """Returns the weights that a run quantizes. Raises SweepError if they do not exist."""
        if not self.weights:
            return None
        path = self.weights / f"seed{run.seed}" / train_gpt.FINAL_MODEL
        if not path.is_file():
            raise SweepError(f"--quantize: {path}: no such file; give a trial that has seed<N>/")
        return path

    def common(self) -> dict[str, str]:
        """Returns what holds for all runs, by setting or option."""
        return self.base | {"--ranks": str(self.ranks), "--quantize": str(self.weights or "")}

    def prepare(self) -> None:
        """Creates the folder or adds runs to it: sweep.json, train_gpt.py, each command.sh.

        Raises SweepError if the folder has another sweep.
        """
        unfinished = self.due(retry=True)
        for run in unfinished:
            self.weights_of(run)
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "sweep.lock", "w") as lock:  # another process may add its runs
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = read_plan(self.folder)
            known = {(run.name, run.seed): run for run in before.runs} if before else {}
            if before and before.common() != self.common():
                differ = dict(sorted(before.common().items() ^ self.common().items()))
                raise SweepError(
                    f"--out {self.folder} has a sweep with other values of {', '.join(differ)}; "
                    "set them as before, or choose another --out"
                )
            for run in self.runs:
                if known.setdefault((run.name, run.seed), run).changes != run.changes:
                    raise SweepError(f"{run.name} has other settings in --out; rename it")
            if not before:
                shutil.copyfile(ROOT / "train_gpt.py", self.folder / "train_gpt.py")
            plan = {"base": self.base, "ranks": self.ranks, "weights": str(self.weights or "")}
            plan["trials"] = [[t.name, dict(t.changes), t.seed] for t in known.values()]
            text = json.dumps(plan, indent=1)
            train_gpt.write_atomically(self.folder / "sweep.json", text.encode())
        for run in unfinished:
            self.write_command(run)

    def write_command(self, run: PlannedRun) -> None:
        """Writes the script that starts one run."""
        folder = self.folder_of(run)
        settings = self.base | dict(run.changes)
        settings |= {"SEED": str(run.seed), "RUN_DIR": str(folder)}
        resumes = settings.get("CHECKPOINT_EVERY", "0") != "0"
        if resumes:
            settings["RESUME"] = "auto"
        program = ["python"]
        if self.ranks > 1:
            program = ["torchrun", "--standalone", f"--nproc_per_node={self.ranks}"]
        program += [str(self.folder.resolve() / "train_gpt.py")]
        weights = self.weights_of(run)
        if weights:
            program += ["--quantize", str(weights)]
        script = COMMAND.format(
            title=f"{run.name}, seed {run.seed}",
            folder=shlex.quote(str(folder)),
            set_aside="" if resumes else SET_ASIDE,
            root=shlex.quote(str(ROOT)),
            python=shlex.quote(str(Path(sys.executable).parent)),
            settings=" ".join(SETTINGS),
            exports=" ".join(f"{key}={shlex.quote(text)}" for key, text in settings.items()),
            program=shlex.join(program),
        )
        folder.mkdir(parents=True, exist_ok=True)
        train_gpt.write_atomically(folder / "command.sh", os.fsencode(script))

    def commands(self, retry: bool) -> list[str]:
        """Returns the quoted command.sh of each run that is due; SweepError if none is."""
        paths = [str(self.folder_of(run) / "command.sh") for run in self.due(retry)]
        if not paths:
            raise SweepError(f"--out {self.folder}: nothing is due; --show prints the table")
        return [shlex.quote(path) for path in paths]

    def write_slurm(self, options: str, limit: int, retry: bool) -> list[Path]:
        """Writes Slurm job arrays of at most `limit` runs, all that are due; returns their paths.

        A script contains its runs, so what is written later does not change a queued array.
        """
        commands, given = self.commands(retry), slurm_options(options)
        folder = self.folder.resolve()
        output = str(folder).replace("%", "%%") + "/slurm-%A_%a.out"
        parts = [commands[i : i + limit] for i in range(0, len(commands), limit)]
        for old in self.folder.glob("array*.sbatch"):
            old.unlink()
        paths = []
        for number, part in enumerate(parts, 1):
            name = "array.sbatch" if len(parts) == 1 else f"array{number}.sbatch"
            own = [f"--job-name={folder.name}"], [f"--array=1-{len(part)}"], [f"--output={output}"]
            text = ARRAY.format(
                options="\n".join(map(sbatch_line, [*own, *given])), runs="\n".join(part)
            )
            train_gpt.write_atomically(folder / name, os.fsencode(text))
            paths.append(folder / name)
        return paths


def slurm_options(text: str) -> list[list[str]]:
    """Returns the options of a text, split as a shell does it, each with its values.

    Raises SweepError if it does not begin with an option, or sets what the sweep sets.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise SweepError(f"--slurm={text}: {error}; close the quotation") from None
    options: list[list[str]] = []
    for word in words:
        if re.match(r"-\D", word):
            options.append([word])
        elif options and len(options[-1]) == 1 and "=" not in options[-1][0]:
            options[-1].append(word)
        else:
            raise SweepError(f"--slurm={text}: {word} is no option; give options that begin with -")
        if re.match("-a|--ar", options[-1][0]):
            raise SweepError(
                f"--slurm={text}: {word}: the sweep sets --array; `scontrol update "
                "JobId=N ArrayTaskThrottle=2` limits the runs at a time"
            )
    return options


def sbatch_line(words: list[str]) -> str:
    """Returns the line of a script that gives these words to sbatch.

    In quotes of either kind, sbatch takes the character after a backslash as it is. Raises
    SweepError for a word of several lines.
    """
    plain = re.compile(r"[\w@%+=,./-][\w@%+=:,./-]*")
    quoted = [
        w if plain.fullmatch(w) else "'" + re.sub(r"([\\'])", r"\\\1", w) + "'" for w in words
    ]
    if any("\n" in word for word in words):
        raise SweepError(f"--slurm: {shlex.join(words)}: an option has one line")
    return " ".join(["#SBATCH", *quoted])


def read_plan(folder: Path) -> Sweep | None:
    """Returns the sweep of a folder, or None. Raises SweepError if its sweep.json is damaged."""
    try:
        plan = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        runs = [PlannedRun(name, tuple(x.items()), seed) for name, x, seed in plan["trials"]]
        weights = Path(plan["weights"]) if plan["weights"] else None
        return Sweep(folder, plan["base"], runs, plan["ranks"], weights)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SweepError(f"{folder}/sweep.json: {error!r}; choose another --out") from None


# ---- Running on this machine ----


def stop(processes: list[subprocess.Popen]) -> None:
    """Stops runs and their children: SIGTERM, on which they save, then SIGKILL.

    Ctrl-C ends the wait.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + SAVE_SECONDS
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        with suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
            for process in processes:
                process.wait(max(deadline - time.monotonic(), 0))


class Runner:
    """Starts runs on the devices of this machine, one on each device at a time."""

    def __init__(self, sweep: Sweep, devices: list[str], retry: bool) -> None:
        self.sweep, self.devices, self.retry = sweep, devices, retry
        self.threads = max((os.cpu_count() or 1) // len(devices), 1)
        self.started: set[PlannedRun] = set()
        self.running: dict[PlannedRun, tuple[subprocess.Popen, str]] = {}  # process and device
        self.shown: dict[PlannedRun, str] = {}

    def start(self, run: PlannedRun, device: str) -> None:
        """Starts a run on a device, once by each command."""
        self.started.add(run)
        env = dict(os.environ, CUDA_VISIBLE_DEVICES=device)
        if not device:
            env.setdefault("OMP_NUM_THREADS", str(self.threads))
        process = subprocess.Popen(
            ["bash", self.sweep.folder_of(run) / "command.sh"],
            env=env,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # bash would report a killed program
            start_new_session=True,
        )
        self.running[run] = process, device

    def print_changes(self) -> bool:
        """Prints each state that has changed; returns whether a run is running anywhere."""
        states = {run: self.sweep.state(run) for run in self.sweep.runs}
        for run, state in states.items():
            if self.shown.get(run, "waiting") != state:
                now = time.strftime("%H:%M:%S")
                with suppress(OSError):  # a full disk or a closed pipe must not end the runs
                    print(f"{now} {run.name} seed {run.seed}: {state}", flush=True)
        self.shown = states
        return "running" in states.values()

    def run(self) -> None:
        """Starts all that is due and waits, for runs of other processes as well.

        Ctrl-C and SIGTERM stop the runs, which can continue later.
        """
        try:
            while True:
                self.running = {t: x for t, x in self.running.items() if x[0].poll() is None}
                free = list(self.devices)
                for _, device in self.running.values():
                    free.remove(device)
                due = [t for t in self.sweep.due(self.retry) if t not in self.started]
                for run, device in zip(due, free, strict=False):
                    self.start(run, device)
                if not (self.print_changes() or due or self.running):
                    return
                time.sleep(1)
        finally:
            stop([process for process, _ in self.running.values()])


def find_devices(args: argparse.Namespace) -> list[str]:
    """Returns the value of CUDA_VISIBLE_DEVICES for each run that runs at the same time."""
    import torch

    if args.cpu:
        return [""] * args.cpu
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    gpus = args.gpus.split(",") if args.gpus else there
    if len(gpus) < args.ranks or {*gpus} - {*there}:
        raise SweepError(
            f"--gpus {','.join(gpus)} --ranks {args.ranks}: the GPUs are {there or 'none'}; "
            "use --cpu to run without"
        )
    starts = range(0, len(gpus) - args.ranks + 1, args.ranks)
    return [",".join(gpus[i : i + args.ranks]) for i in starts]


# ---- Command line ----


def show(sweep: Sweep) -> None:
    """Prints the table of runs with the last state of each, wide if the output is no terminal."""
    print(sweep.folder)  # in one line, as a title of the table would not be
    grid = rich.table.Table(box=rich.box.SIMPLE_HEAD)
    for column in ("trial", "seed", "state", "step", "loss", "bpb", "seconds", "reason"):
        grid.add_column(column, overflow="fold")
    for run in (read_planned(sweep.folder_of(run)) for run in sweep.runs):
        step = loss = bpb = seconds = ""
        if run.curve:
            last, at, value = run.curve[-1]
            step, loss = str(last), f"{value:.4f}"
            seconds = f"{run.seconds.get('train', at):.0f}"
        if run.finished and run.final:
            bpb = f"{run.scores[run.final].val_bpb:.4f} {run.final}"
        reason = run.reason.splitlines()[-1] if run.reason else ""
        grid.add_row(run.name, str(run.seed), run.status, step, loss, bpb, seconds, reason)
    width = None if sys.stdout.isatty() else 150
    rich.console.Console(width=width, markup=False, emoji=False, highlight=False).print(grid)


def parse(argv: list[str], env: Mapping[str, str]) -> tuple[Sweep, argparse.Namespace]:
    """Returns the sweep that a command line and environment ask for, and the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("axes", nargs="*", metavar="SETTING=A,B", help="a setting and its values")
    add("--seeds", metavar="A,B", help="default: 1337, or those of --file")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--one-at-a-time", action="store_true", help="the base, and each change alone")
    how.add_argument("--file", type=Path, metavar="TOML", help="named trials, see records/studies/")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpus", metavar="A,B", help="run on these GPUs (default: all)")
    where.add_argument("--cpu", nargs="?", type=int, const=1, metavar="N", help="N at once, no GPU")
    where.add_argument("--slurm", nargs="?", const="", metavar="OPTIONS", help="write job arrays")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="print the commands, start nothing")
    instead.add_argument("--show", action="store_true", help="print the table, start nothing")
    add("--array-limit", type=int, default=1000, metavar="N", help="runs of a job array")
    add("--ranks", type=int, default=1, metavar="N", help="GPUs of each run")
    add("--out", type=Path, default=Path("logs/sweep"), help="folder (default: logs/sweep)")
    add("--quantize", type=Path, metavar="TRIAL", help="quantize the weights of TRIAL/seed<N>/")
    add("--retry", action="store_true", help="run failed runs again")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        raise SweepError(f"{shlex.join(unknown)}: unknown; settings are given as NUM_LAYERS=3")
    if args.file and args.axes:
        raise SweepError(f"{args.axes[0]}: --file has the trials; set it there or before python")
    try:
        seeds = [int(seed) for seed in args.seeds.split(",")] if args.seeds is not None else []
    except ValueError:
        raise SweepError(f"--seeds {args.seeds}: give whole numbers, as 1337,42,7") from None
    if min(1 if args.cpu is None else args.cpu, args.ranks, args.array_limit) < 1:
        raise SweepError("--cpu, --ranks and --array-limit must be at least 1")
    for note in train_gpt.settings_notes(train_gpt.Hyperparameters(), env):
        print(note, file=sys.stderr)  # another program's variable may have a similar name
    before = read_plan(args.out)
    base = {key: env[key] for key in SETTINGS if key in env}
    if before and not (args.axes or args.file or seeds or args.quantize or args.ranks > 1):
        other = [key for key, value in base.items() if before.base.get(key) != value]
        if other:
            raise SweepError(f"--out {args.out} has a sweep without {', '.join(other)}; unset them")
        return before, args
    if args.file:
        of_file, runs = read_file(args.file, seeds)
        base = of_file | base
    elif args.axes:
        runs = make_runs(args.axes, seeds or [1337], args.one_at_a_time)
    else:
        runs = [PlannedRun("base", (), seed) for seed in seeds]
    weights = args.quantize.resolve() if args.quantize else None
    return Sweep(args.out, base, runs, args.ranks, weights), args


@tool
def main(argv: list[str], env: Mapping[str, str]) -> int:
    """Runs the program; returns 0, 1 if a run failed, 2 for a bad command, 5 after Ctrl-C."""
    sweep, args = parse(argv, env)
    sweep.check()
    if not args.show:
        sweep.prepare()
    if args.list:
        without_gpu = "CUDA_VISIBLE_DEVICES= " if args.cpu else ""
        print("\n".join(f"{without_gpu}bash {path}" for path in sweep.commands(args.retry)))
        return 0
    if args.slurm is not None:
        arrays = sweep.write_slurm(args.slurm, args.array_limit, args.retry)
        if len(arrays) > 1:
            print(f"# {len(arrays)} arrays, each of at most {args.array_limit} runs")
        for path in arrays:
            print(shlex.join(["sbatch", str(path)]))
        return 0
    if not args.show:
        Runner(sweep, find_devices(args), args.retry).run()
    show(sweep)
    if args.show:
        return 0
    print(shlex.join(["python", str(Path(__file__).with_name("compare.py")), str(sweep.folder)]))
    return int(any(sweep.state(run) not in DONE for run in sweep.runs))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:], os.environ))
