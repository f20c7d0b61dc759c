"""Run many trials of train_gpt.py: every combination of settings and seeds, each in its own folder.

    PRESET=cpu python records/sweep.py XSA_LAST_N=0,11 MUON_WD=0.02,0.04 --seeds 1337,42,7 --cpu

Settings in the environment hold for all trials; SETTING=a,b varies. The same command again goes on
where it stopped: finished trials stay, those cut off start anew (or, with CHECKPOINT_EVERY, go on
from their checkpoint). A trial that fails is a row with its reason. The folder (--out) holds
<trial>/seed<N>/, each a run's folder with its command.sh, and the one train_gpt.py that all run.
Values that hold commas need --file.
"""

import argparse
import difflib
import fcntl
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.live
import rich.markup
import rich.table

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from runs import DONE, ROOT, RunError, read_events, read_trial, train_gpt

SETTINGS = [f.name.upper() for f in fields(train_gpt.Hyperparameters)]
OWN = {"SEED": "--seeds", "RUN_ID": "--out", "RUN_DIR": "--out", "RESUME": "CHECKPOINT_EVERY"}
DUE = ("waiting", "cut off", "interrupted")
PATIENCE_SECONDS = 40  # with a trial told to end, which saves first
# Training losses of trials that differ in these do not compare: they are of another text, unit or
# context, or of a step with more tokens behind it. Settings of the JEPA and STP losses are not
# among them: what is logged as train_loss is the cross-entropy alone. LABEL_SMOOTHING changes that.
OF_THE_LOSS = ("corpus", "data_path", "vocab_size", "train_seq_len", "train_batch_tokens")
OF_THE_LOSS += ("label_smoothing",)


class SweepError(ValueError):
    """A sweep that cannot be run as asked."""


@dataclass(frozen=True)
class Trial:
    """One run to be made: a name, the settings it changes and a seed."""

    name: str
    changes: tuple[tuple[str, str], ...]  # SETTING, text
    seed: int


def trial_name(changes: tuple[tuple[str, str], ...]) -> str:
    """A folder's name that says what a trial changes."""
    name = "+".join(f"{setting}={text}" for setting, text in changes) or "base"
    return re.sub(r"[^\w=+.,-]", "_", name)[:150]


def trials_of_axes(axes: list[str], seeds: list[int], one_at_a_time: bool) -> list[Trial]:
    """Trials of axes SETTING=a,b: their grid, or the base and every single change, by seed."""
    pairs = []
    for axis in axes:
        setting, equals, values = axis.partition("=")
        if not (setting and equals):
            raise SweepError(f"{axis}: give SETTING=VALUE or SETTING=A,B")
        pairs.append([(setting, value) for value in values.split(",")])
    if one_at_a_time:
        changes = [(), *((pair,) for axis in pairs for pair in axis)]
    else:
        changes = list(itertools.product(*pairs))
    return [Trial(trial_name(change), change, seed) for seed in seeds for change in changes]


def trials_of_file(path: Path, seeds: list[int]) -> tuple[dict[str, str], list[Trial]]:
    """The [base] settings and the [trials.NAME] of a .toml; its `seeds` where none are given."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib

    def texts(table: dict[str, Any]) -> dict[str, str]:
        return {key: str(int(x) if isinstance(x, bool) else x) for key, x in table.items()}

    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        seeds = seeds or [int(seed) for seed in content.get("seeds", [1337])]
        named = {name: tuple(texts(x).items()) for name, x in content["trials"].items()}
        base = texts(content.get("base", {}))
    except (OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise SweepError(f"--file {path}: {error!r}; see records/studies/*.toml") from None
    return base, [Trial(name, changes, seed) for seed in seeds for name, changes in named.items()]


@dataclass(frozen=True)
class Sweep:
    """A folder of trials: what is to be run and how to run one."""

    folder: Path
    base: dict[str, str]  # settings of all trials
    trials: list[Trial]
    ranks: int = 1  # processes, and GPUs, of each trial
    weights: Path | None = None  # a trial's folder: repack its weights, seed by seed

    def check(self) -> None:
        """SweepError for trials that no train_gpt.py could run as named."""
        settings = {*self.base, *(setting for trial in self.trials for setting, _ in trial.changes)}
        for name in sorted(settings - set(SETTINGS)):
            near = difflib.get_close_matches(name, SETTINGS, n=1)
            raise SweepError(f"{name} is no setting{f'; is {near[0]} meant?' if near else ''}")
        for name in sorted(settings & set(OWN)):
            raise SweepError(f"{name} is set for each trial by the sweep; use {OWN[name]}")
        if not self.trials:
            raise SweepError("no trials: give SETTING=A,B, --file, or the --out of a sweep")
        seen = set()
        for trial in self.trials:
            if not re.fullmatch(r"[\w=+.,-]+", trial.name) or re.search(r"^\.|\.cut\d", trial.name):
                raise SweepError(f"[trials.{trial.name}]: a name is of letters, digits and _=+.,-")
            if trial.seed < 0 or (trial.name, trial.seed) in seen:
                raise SweepError(f"{trial.name}, seed {trial.seed}: seeds are from 0, each once")
            seen.add((trial.name, trial.seed))
            try:
                train_gpt.Hyperparameters.from_env(self.base | dict(trial.changes))
            except train_gpt.SettingsError as error:
                raise SweepError(f"{trial.name}: {error}") from None

    def folder_of(self, trial: Trial) -> Path:
        """The run folder of a trial."""
        return self.folder.resolve() / trial.name / f"seed{trial.seed}"

    def state(self, trial: Trial) -> str:
        """What became of a trial so far."""
        return read_trial(self.folder_of(trial)).status

    def prepare(self) -> None:
        """Create the folder, or go on with the one there: plan, script, a command.sh each."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "sweep.lock", "w") as lock:  # another may add its trials now
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = read_plan(self.folder)
            known = {(trial.name, trial.seed): trial for trial in before.trials} if before else {}
            if before and before.of_all() != self.of_all():
                differ = sorted(before.of_all().items() ^ self.of_all().items())
                raise SweepError(
                    f"--out {self.folder} was made otherwise for all trials: "
                    f"{' '.join(f'{key}={value}' for key, value in differ)} differ; "
                    "set them as they were, or choose another --out"
                )
            for trial in self.trials:
                there = known.setdefault((trial.name, trial.seed), trial)
                if there.changes != trial.changes:
                    raise SweepError(f"{trial.name} was {dict(there.changes)}; choose another name")
            if not before:
                shutil.copyfile(ROOT / "train_gpt.py", self.folder / "train_gpt.py")
            plan = {"base": self.base, "ranks": self.ranks, "weights": str(self.weights or "")}
            plan["trials"] = [[t.name, dict(t.changes), t.seed] for t in known.values()]
            text = json.dumps(plan, indent=1)
            train_gpt.write_atomically(self.folder / "sweep.json", text.encode())
        for trial in self.trials:
            if self.state(trial) not in (*DONE, "running"):
                self.write_command(trial)

    def of_all(self) -> dict[str, str]:
        """What holds for all trials."""
        return self.base | {"--ranks": str(self.ranks), "--quantize": str(self.weights or "")}

    def write_command(self, trial: Trial) -> None:
        """Write the script that makes one trial, the same by hand, here and under a scheduler."""
        folder = self.folder_of(trial)
        settings = {**self.base, **dict(trial.changes), "SEED": trial.seed, "RUN_DIR": folder}
        if goes_on := settings.get("CHECKPOINT_EVERY", "0") != "0":
            settings["RESUME"] = "auto"
        exports = " ".join(f"{key}={shlex.quote(str(value))}" for key, value in settings.items())
        torchrun = ["torchrun", "--standalone", f"--nproc_per_node={self.ranks}"]
        program = [
            *(torchrun if self.ranks > 1 else ["python"]),
            self.folder.resolve() / "train_gpt.py",
        ]
        if self.weights:
            program += ["--quantize", self.weights / folder.name / train_gpt.FINAL_MODEL]
        aside = """if [ -e "$folder/train.log" ]; then  # a run was cut off: keep it aside
	n=1; while [ -e "$folder.cut$n" ]; do n=$((n + 1)); done
	mv "$folder" "$folder.cut$n"; mkdir "$folder"; cp "$folder.cut$n/command.sh" "$folder"
fi"""
        script = f"""#!/usr/bin/env bash
# {trial.name}, seed {trial.seed}
folder={shlex.quote(str(folder))}
trap : TERM  # this shell outlives the signal: the program saves first
exec 9>> "$folder.lock"
if command -v flock > /dev/null; then flock -w 10 9 || exit 75; fi  # 75: it runs already
{"" if goes_on else aside}
rm -f "$folder/exit_status" "$folder/stopped"
cd {shlex.quote(str(ROOT))} || exit
PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH
unset {" ".join(SETTINGS)}
export {exports}
{shlex.join(str(x) for x in program)} > "$folder/output.txt" 2>&1
echo $? > "$folder/exit_status"
"""
        folder.mkdir(parents=True, exist_ok=True)
        train_gpt.write_atomically(folder / "command.sh", script.encode())

    def commands(self) -> list[Path]:
        """The command.sh of all trials that are due; SweepError if none is."""
        due = [trial for trial in self.trials if self.state(trial) in DUE]
        if not due:
            raise SweepError(f"--out {self.folder}: nothing is due; --show prints the table")
        return [self.folder_of(trial) / "command.sh" for trial in due]

    def write_slurm(self, options: str) -> Path:
        """Write the trials that are due as a Slurm job array; its path."""
        due = self.commands()
        (self.folder / "trials.txt").write_text("".join(f"{path}\n" for path in due))
        folder, path = self.folder.resolve(), self.folder / "array.sbatch"
        asked = "".join(f"#SBATCH {option}\n" for option in shlex.split(options))
        path.write_text(f"""#!/usr/bin/env bash
#SBATCH --job-name={shlex.quote(self.folder.name)}
#SBATCH --array=1-{len(due)}
#SBATCH --output={shlex.quote(f"{folder}/slurm-%A_%a.out")}
{asked}bash "$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {shlex.quote(f"{folder}/trials.txt")})"
""")
        return path


def read_plan(folder: Path) -> Sweep | None:
    """The sweep that a folder holds, if any."""
    try:
        plan = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        trials = [Trial(name, tuple(x.items()), seed) for name, x, seed in plan["trials"]]
        weights = Path(plan["weights"]) if plan["weights"] else None
        return Sweep(folder, plan["base"], trials, plan["ranks"], weights)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SweepError(f"{folder}/sweep.json: {error!r}; choose another --out") from None


def hopeless(losses: dict[int, float], rivals: list[dict[int, float]], limit: float) -> str:
    """Why a trial is not worth its end, if so: its loss grows, or is `limit` nats above another's.

    Losses, by step, are compared at the last step that both logged (TRAIN_LOG_EVERY).
    """
    step = max(losses, default=0)
    if step < 20:
        return ""
    first = losses.get(1, math.inf)
    if losses[step] > first + limit:
        return f"diverged: loss {losses[step]:.3f} at step {step}, {first:.3f} at the first"
    best = min((rival[step] for rival in rivals if step in rival), default=losses[step])
    if losses[step] > best + limit:
        return f"hopeless: loss {losses[step]:.3f} at step {step}, another trial's {best:.3f}"
    return ""


def end(processes: list[subprocess.Popen]) -> None:
    """End trials and all they started: by SIGTERM, on which they save; Ctrl-C ends them at once."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + PATIENCE_SECONDS
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        with suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
            for process in processes:
                process.wait(max(deadline - time.monotonic(), 0))


class Runner:
    """Trials on the devices of this machine, several at once, with a live table."""

    def __init__(
        self, sweep: Sweep, devices: list[str], stop_worse: float | None, retry: bool
    ) -> None:
        self.sweep, self.devices, self.stop_worse = sweep, devices, stop_worse
        self.threads = max((os.cpu_count() or 1) // len(devices), 1)
        self.retried = {t for t in sweep.trials if retry and sweep.state(t) not in DONE}
        self.running: dict[Trial, tuple[subprocess.Popen, str]] = {}  # and its device
        self.started: set[Trial] = set()  # once by each command, whatever becomes of it

    def is_due(self, trial: Trial) -> bool:
        """Whether a trial is still to be started."""
        state = self.sweep.state(trial)
        again = trial in self.retried and state not in (*DONE, "running")
        return trial not in self.started and (again or state in DUE)

    def start(self, trial: Trial, device: str) -> None:
        """Start a trial."""
        self.started.add(trial)
        folder = self.sweep.folder_of(trial)
        env = dict(os.environ, CUDA_VISIBLE_DEVICES=device)
        if not device:
            env.setdefault("OMP_NUM_THREADS", str(self.threads))
        if not (folder / "command.sh").exists():  # someone has tidied up
            self.sweep.write_command(trial)
        process = subprocess.Popen(
            ["bash", folder / "command.sh"],
            env=env,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # bash would name a killed program amid the table
            start_new_session=True,
        )
        self.running[trial] = process, device

    def losses(self, trial: Trial) -> dict[int, float]:
        """The training loss of a trial by step, as far as it is logged."""
        return {step: loss for step, _, loss in read_events(self.sweep.folder_of(trial))}

    def stop_hopeless(self) -> None:
        """Stop trials that are too far behind those whose loss means the same."""

        def kind(trial: Trial) -> list[Any]:
            h = train_gpt.Hyperparameters.from_env(self.sweep.base | dict(trial.changes))
            return [getattr(h, name) for name in OF_THE_LOSS]

        for trial, (process, _) in list(self.running.items()):
            rivals = [t for t in self.sweep.trials if t != trial and kind(t) == kind(trial)]
            why = hopeless(self.losses(trial), list(map(self.losses, rivals)), self.stop_worse)
            folder = self.sweep.folder_of(trial)
            if why and not (folder / "result.json").exists():
                end([process])
                (folder / "stopped").write_text(why, encoding="utf-8")

    def run(self) -> None:
        """Run all that is due. Ctrl-C or SIGTERM ends the trials, which can go on later."""
        watched, shown = sys.stdout.isatty(), {}
        with rich.live.Live(auto_refresh=watched, transient=True) as live:
            try:
                while True:
                    self.running = {t: x for t, x in self.running.items() if x[0].poll() is None}
                    if self.stop_worse:
                        self.stop_hopeless()
                    free = list(self.devices)
                    for _, device in self.running.values():
                        free.remove(device)
                    due = [trial for trial in self.sweep.trials if self.is_due(trial)]
                    for trial, device in zip(due, free, strict=False):
                        self.start(trial, device)
                    states = {trial: self.sweep.state(trial) for trial in self.sweep.trials}
                    if watched:
                        live.update(table(self.sweep, running_first=True))
                    else:
                        shown = tell(states, shown)
                    # Also wait for those that run without this program.
                    if not (due or self.running or "running" in states.values()):
                        return
                    time.sleep(1)
            finally:
                end([process for process, _ in self.running.values()])


def tell(states: dict[Trial, str], shown: dict[Trial, str]) -> dict[Trial, str]:
    """Print a line for every trial whose state has changed, where no table can be shown."""
    for trial, state in states.items():
        if shown.get(trial, "waiting") != state:
            print(
                f"{time.strftime('%H:%M:%S')} {trial.name} seed {trial.seed}: {state}", flush=True
            )
    return states


def table(sweep: Sweep, running_first: bool = False) -> rich.table.Table:
    """The state of every trial; a screen may be too low for all."""
    grid = rich.table.Table(title=str(sweep.folder), box=rich.box.SIMPLE_HEAD)
    for column in ("trial", "seed", "state", "step", "loss", "bpb", "seconds", "reason"):
        grid.add_column(column, overflow="fold")
    runs = [read_trial(sweep.folder_of(trial)) for trial in sweep.trials]
    order = ("running", "failed", "stopped", *DUE)
    if running_first:
        runs.sort(key=lambda run: order.index(run.status) if run.status in order else len(order))
    for run in runs:
        step = loss = bpb = seconds = ""
        if steps := read_events(run.path):
            step, seconds, loss = str(steps[-1][0]), f"{steps[-1][1]:.0f}", f"{steps[-1][2]:.4f}"
        if run.finished and run.final:
            bpb = f"{run.scores[run.final].val_bpb:.4f} {run.final}"
        reason = rich.markup.escape(run.reason.splitlines()[-1] if run.reason else "")
        grid.add_row(run.name, str(run.seed), run.status, step, loss, bpb, seconds, reason)
    return grid


def show(sweep: Sweep) -> None:
    """Print the table, wide where no terminal limits it."""
    rich.console.Console(width=None if sys.stdout.isatty() else 150).print(table(sweep))


def parse(argv: list[str], env: Mapping[str, str]) -> tuple[Sweep, argparse.Namespace]:
    """The sweep that a command line and environment ask for, and its options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("axes", nargs="*", metavar="SETTING=A,B", help="a setting and its values")
    parser.add_argument("--seeds", default="", metavar="A,B", help="default: 1337, or the file's")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--grid", action="store_true", help="every combination (the default)")
    how.add_argument("--one-at-a-time", action="store_true", help="the base, and each change alone")
    how.add_argument("--file", type=Path, metavar="TOML", help="named trials, as records/studies/")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpus", metavar="A,B", help="run on these GPUs (default: all there are)")
    where.add_argument("--cpu", nargs="?", type=int, const=1, metavar="N", help="N at once, no GPU")
    where.add_argument(
        "--slurm", nargs="?", const="", metavar="OPTIONS", help="write a job array for sbatch"
    )
    where.add_argument("--list", action="store_true", help="print the commands, run nothing")
    where.add_argument("--show", action="store_true", help="print the table, run nothing")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="GPUs for each trial")
    parser.add_argument("--out", type=Path, default=Path("logs/sweep"), help="default: logs/sweep")
    parser.add_argument(
        "--quantize", type=Path, metavar="TRIAL", help="repack the weights of TRIAL/seed<N>/"
    )
    parser.add_argument(
        "--stop-worse", type=float, metavar="NATS", help="end trials whose loss is so far above"
    )
    parser.add_argument("--retry", action="store_true", help="run failed and stopped trials again")
    args = parser.parse_args(argv)
    try:
        seeds = [int(seed) for seed in args.seeds.split(",") if seed]
    except ValueError:
        raise SweepError(f"--seeds {args.seeds}: give whole numbers, as 1337,42,7") from None
    if min(1 if args.cpu is None else args.cpu, args.ranks) < 1:
        raise SweepError("--cpu and --ranks must be at least 1")
    if args.stop_worse is not None and not args.stop_worse > 0:
        raise SweepError(f"--stop-worse {args.stop_worse}: give nats, as 0.5")
    there = read_plan(args.out)
    base = {key: env[key] for key in SETTINGS if key in env and key not in OWN}
    if there and not (args.axes or args.file or seeds or args.quantize or args.ranks > 1):
        if other := {key: value for key, value in base.items() if there.base.get(key) != value}:
            raise SweepError(f"--out {args.out} was made without {other}; unset them")
        return there, args
    if args.file:
        of_file, trials = trials_of_file(args.file, seeds)
        base = of_file | base
    elif args.axes:
        trials = trials_of_axes(args.axes, seeds or [1337], args.one_at_a_time)
    else:
        trials = [Trial("base", (), seed) for seed in seeds]
    weights = args.quantize and args.quantize.resolve()
    return Sweep(args.out, base, trials, args.ranks, weights), args


def devices(args: argparse.Namespace) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is for each of the trials that run at once."""
    import torch

    if args.cpu:
        return [""] * args.cpu
    there = [str(i) for i in range(torch.cuda.device_count())]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        there = visible.split(",")
    gpus = args.gpus.split(",") if args.gpus else there
    if len(gpus) < args.ranks or set(gpus) - set(there):
        raise SweepError(
            f"--gpus {','.join(gpus)} --ranks {args.ranks}: of GPUs there are {there or 'none'}; "
            "give --cpu to run without"
        )
    return [
        ",".join(gpus[i : i + args.ranks]) for i in range(0, len(gpus) - args.ranks + 1, args.ranks)
    ]


def main(argv: list[str], env: Mapping[str, str]) -> int:
    """The program; status 0, 1 where a trial failed, 2 for a sweep that cannot be, 5 by Ctrl-C."""
    try:
        sweep, args = parse(argv, env)
        sweep.check()
        if args.show:
            show(sweep)
            return 0
        sweep.prepare()
        if args.list:
            for path in sweep.commands():
                print(f"bash {shlex.quote(str(path))}")
            return 0
        if args.slurm is not None:
            print(f"sbatch {shlex.quote(str(sweep.write_slurm(args.slurm)))}")
            return 0
        Runner(sweep, devices(args), args.stop_worse, args.retry).run()
    except (SweepError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 5
    show(sweep)
    print(f"python records/compare.py {sweep.folder}")
    return int(any(sweep.state(trial) not in DONE for trial in sweep.trials))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:], os.environ))
