"""Run many trials of train_gpt.py: every combination of settings and seeds, each in its own folder.

    PRESET=cpu python records/sweep.py XSA_LAST_N=0,11 MUON_WD=0.02,0.04 --seeds 1337,42,7 --cpu

Settings in the environment hold for all trials; SETTING=a,b varies. The same command again goes on
where it stopped: finished trials stay, those cut off start anew (or, with CHECKPOINT_EVERY, go on
from their checkpoint). A trial that fails is a row with its reason. The folder (--out) holds
<trial>/seed<N>/, each a run's folder with its command.sh, and the one train_gpt.py that all run.
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
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.live
import rich.markup
import rich.table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import train_gpt
from runs import RunError, read_events, read_run

SETTINGS = [f.name.upper() for f in fields(train_gpt.Hyperparameters)]
OWN = {"SEED": "--seeds", "RUN_ID": "--out", "RUN_DIR": "--out", "RESUME": "CHECKPOINT_EVERY"}
DUE = ("waiting", "cut off", "interrupted")
DONE = ("ok", "over a limit")
PATIENCE_SECONDS = 40  # of a trial told to end, which saves first


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
		seeds = seeds or content.get("seeds", [1337])
		named = {name: tuple(texts(x).items()) for name, x in content["trials"].items()}
		base = texts(content.get("base", {}))
	except (OSError, KeyError, AttributeError, TypeError, tomllib.TOMLDecodeError) as error:
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
		if len({(trial.name, trial.seed) for trial in self.trials}) < len(self.trials):
			raise SweepError("two trials have one name and seed; give each value and seed once")

	def folder_of(self, trial: Trial) -> Path:
		"""The run folder of a trial."""
		return self.folder.resolve() / trial.name / f"seed{trial.seed}"

	def prepare(self) -> None:
		"""Create the folder, or go on with the one there: plan, script, a command.sh each."""
		before = read_plan(self.folder)
		known = {(trial.name, trial.seed): trial for trial in before.trials} if before else {}
		if before and before.base != self.base:
			differ = sorted(set(before.base.items()) ^ set(self.base.items()))
			raise SweepError(
				f"--out {self.folder} was made with other settings for all trials: "
				f"{' '.join(f'{key}={value}' for key, value in differ)} differ; "
				"set them as they were, or choose another --out"
			)
		for trial in self.trials:
			there = known.setdefault((trial.name, trial.seed), trial)
			if there.changes != trial.changes:
				raise SweepError(f"{trial.name} was {dict(there.changes)}; choose another name")
			self.folder_of(trial).mkdir(parents=True, exist_ok=True)
			self.write_command(trial)
		if not before:
			shutil.copyfile(ROOT / "train_gpt.py", self.folder / "train_gpt.py")
		plan = {"base": self.base, "ranks": self.ranks, "weights": str(self.weights or "")}
		plan["trials"] = [[t.name, dict(t.changes), t.seed] for t in known.values()]
		train_gpt.write_atomically(self.folder / "sweep.json", json.dumps(plan, indent=1).encode())

	def write_command(self, trial: Trial) -> None:
		"""Write the script that makes one trial, the same by hand, here and under a scheduler."""
		folder = self.folder_of(trial)
		settings = {**self.base, **dict(trial.changes), "SEED": trial.seed, "RUN_DIR": folder}
		if settings.get("CHECKPOINT_EVERY", "0") != "0":
			settings["RESUME"] = "auto"
		exports = " ".join(f"{key}={shlex.quote(str(value))}" for key, value in settings.items())
		torchrun = ["torchrun", "--standalone", f"--nproc_per_node={self.ranks}"]
		program = [
			*(torchrun if self.ranks > 1 else ["python"]),
			self.folder.resolve() / "train_gpt.py",
		]
		if self.weights:
			weights = self.weights / folder.name / train_gpt.FINAL_MODEL
			program += ["--quantize", weights.resolve()]
		script = f"""#!/usr/bin/env bash
# {trial.name}, seed {trial.seed}
cd {shlex.quote(str(ROOT))}
PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH
unset {" ".join(SETTINGS)}
export {exports}
{shlex.join(str(x) for x in program)} > {shlex.quote(f"{folder}/output.txt")} 2>&1
echo $? > {shlex.quote(f"{folder}/exit_status")}
"""
		(folder / "command.sh").write_text(script, encoding="utf-8")

	def write_slurm(self, options: str) -> Path:
		"""Write the trials that are due as a Slurm job array; its path."""
		due = [
			self.folder_of(trial) for trial in self.trials if state(self.folder_of(trial))[0] in DUE
		]
		for folder in due:
			make_room(folder)
		(self.folder / "trials.txt").write_text("".join(f"{x}/command.sh\n" for x in due))
		folder, path = self.folder.resolve(), self.folder / "array.sbatch"
		asked = "".join(f"#SBATCH {option}\n" for option in shlex.split(options))
		path.write_text(f"""#!/usr/bin/env bash
#SBATCH --job-name={self.folder.name}
#SBATCH --array=1-{len(due)}
#SBATCH --output={folder}/slurm-%A_%a.out
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


def state(folder: Path) -> tuple[str, str]:
	"""What became of a trial, and why: DUE, DONE, stopped, or a failure."""
	if (folder / "stopped").exists():
		return "stopped", (folder / "stopped").read_text(encoding="utf-8")
	if (folder / "result.json").exists():
		run = read_run(folder)
		return run.status, run.reason.splitlines()[-1] if run.reason else ""
	try:
		code = int((folder / "exit_status").read_text())
	except (OSError, ValueError):
		return ("cut off" if (folder / "train.log").exists() else "waiting"), ""
	output = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
	how = f"killed by signal {code - 128}" if code > 128 else f"exit status {code}"
	return "failed", "; ".join([how, *output.splitlines()[-1:]])


def make_room(folder: Path) -> None:
	"""Ready a trial's folder for a start: a run cut off is kept aside, unless it can go on."""
	command = (folder / "command.sh").read_bytes()
	if (folder / "train.log").exists() and b"RESUME=auto" not in command:
		aside = (folder.with_name(f"{folder.name}.cut{n}") for n in itertools.count(1))
		folder.rename(next(path for path in aside if not path.exists()))
		folder.mkdir()
		(folder / "command.sh").write_bytes(command)
	for name in ("exit_status", "stopped"):
		(folder / name).unlink(missing_ok=True)


def hopeless(folder: Path, others: list[Path], limit: float) -> str:
	"""Why a trial is not worth its end, if so: its loss grows, or is `limit` nats above another's.

	Losses are compared at the last step that both logged (TRAIN_LOG_EVERY), on the same tokens.
	"""
	losses = {step: loss for step, _, loss in read_events(folder)}
	step = max(losses, default=0)
	if step < 20:
		return ""
	if losses[step] > losses[1] + limit:
		return f"diverged: loss {losses[step]:.3f} at step {step}, {losses[1]:.3f} at the first"
	rivals = [{step: loss for step, _, loss in read_events(other)} for other in others]
	best = min((rival[step] for rival in rivals if step in rival), default=losses[step])
	if losses[step] > best + limit:
		return f"hopeless: loss {losses[step]:.3f} at step {step}, another trial's {best:.3f}"
	return ""


@dataclass
class Running:
	"""A trial that is being run: its processes, its device, and the lock on its folder."""

	process: subprocess.Popen
	device: str
	lock: Any

	def end(self) -> None:
		"""End it and all it started: by SIGTERM, on which it saves, or in the end by SIGKILL."""
		for number in (signal.SIGTERM, signal.SIGKILL):
			try:
				os.killpg(self.process.pid, number)
				self.process.wait(PATIENCE_SECONDS)
			except (ProcessLookupError, subprocess.TimeoutExpired):
				continue


class Runner:
	"""Trials on the devices of this machine, several at once, with a live table."""

	def __init__(
		self, sweep: Sweep, devices: list[str], stop_worse: float | None, retry: bool
	) -> None:
		self.sweep, self.devices, self.stop_worse = sweep, devices, stop_worse
		self.threads = max((os.cpu_count() or 1) // len(devices), 1)
		self.again = {t for t in sweep.trials if retry and self.state(t) not in DONE}
		self.running: dict[Trial, Running] = {}

	def state(self, trial: Trial) -> str:
		"""What became of a trial so far."""
		return state(self.sweep.folder_of(trial))[0]

	def is_due(self, trial: Trial) -> bool:
		"""Whether a trial is still to be started."""
		return trial not in self.running and (trial in self.again or self.state(trial) in DUE)

	def start(self, trial: Trial, device: str) -> bool:
		"""Start a trial, unless it runs already: left by a killed sweep, or by another one."""
		folder = self.sweep.folder_of(trial)
		lock = open(folder.with_name(f"{folder.name}.lock"), "w")
		try:
			fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
		except OSError:
			return False
		if not self.is_due(trial):  # it has just ended
			return False
		self.again.discard(trial)
		make_room(folder)
		env = dict(os.environ, CUDA_VISIBLE_DEVICES=device)
		if not device:
			env.setdefault("OMP_NUM_THREADS", str(self.threads))
		process = subprocess.Popen(  # it holds the lock even if this program is killed
			["bash", folder / "command.sh"],
			env=env,
			stdin=subprocess.DEVNULL,
			stderr=subprocess.DEVNULL,  # bash would name a killed program amid the table
			start_new_session=True,
			pass_fds=[lock.fileno()],
		)
		self.running[trial] = Running(process, device, lock)
		return True

	def poll(self) -> None:
		"""Take in trials that have ended, and stop hopeless ones."""
		for trial, running in list(self.running.items()):
			folder = self.sweep.folder_of(trial)
			if running.process.poll() is not None:
				running.lock.close()
				del self.running[trial]
			elif self.stop_worse is not None:
				others = [self.sweep.folder_of(t) for t in self.sweep.trials if t != trial]
				if why := hopeless(folder, others, self.stop_worse):
					running.end()
					(folder / "stopped").write_text(why, encoding="utf-8")

	def run(self) -> None:
		"""Run all that is due. Ctrl-C or SIGTERM ends the trials, which can go on later."""
		watched, shown = sys.stdout.isatty(), {}
		with rich.live.Live(auto_refresh=watched, transient=True) as live:
			try:
				while True:
					self.poll()
					free = list(self.devices)
					for running in self.running.values():
						free.remove(running.device)
					due = [trial for trial in self.sweep.trials if self.is_due(trial)]
					for trial in due:
						if free and self.start(trial, free[0]):
							free.pop(0)
					if watched:
						live.update(table(self.sweep, self.running))
					else:
						shown = self.tell(shown)
					if not due and not self.running:
						return
					time.sleep(1)
			finally:
				for running in self.running.values():
					running.end()

	def tell(self, shown: dict[Trial, str]) -> dict[Trial, str]:
		"""Print a line for every trial whose state has changed, where no table can be shown."""
		now = {t: "running" if t in self.running else self.state(t) for t in self.sweep.trials}
		for trial, status in now.items():
			if shown.get(trial, "waiting") != status:
				print(
					f"{time.strftime('%H:%M:%S')} {trial.name} seed {trial.seed}: {status}",
					flush=True,
				)
		return now


def table(sweep: Sweep, running: Mapping[Trial, Running] | None = None) -> rich.table.Table:
	"""The state of every trial."""
	grid = rich.table.Table(title=str(sweep.folder), box=rich.box.SIMPLE_HEAD)
	for column in ("trial", "seed", "state", "step", "loss", "bpb", "seconds", "reason"):
		grid.add_column(column, overflow="fold")
	for trial in sweep.trials:
		folder = sweep.folder_of(trial)
		status, reason = state(folder)
		step = loss = bpb = seconds = ""
		if steps := read_events(folder):
			step, seconds, loss = str(steps[-1][0]), f"{steps[-1][1]:.0f}", f"{steps[-1][2]:.4f}"
		if status in DONE:
			run = read_run(folder)
			bpb = f"{run.scores[run.final].val_bpb:.4f} {run.final}"
		elif trial in (running or {}):
			status = "running"
		grid.add_row(
			trial.name,
			str(trial.seed),
			status,
			step,
			loss,
			bpb,
			seconds,
			rich.markup.escape(reason),
		)
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
	there = read_plan(args.out)
	if there and not (args.axes or args.file):
		return there, args
	base = {key: env[key] for key in SETTINGS if key in env and key not in OWN}
	if args.file:
		of_file, trials = trials_of_file(args.file, seeds)
		base = of_file | base
	elif args.axes:
		trials = trials_of_axes(args.axes, seeds or [1337], args.one_at_a_time)
	else:
		trials = [Trial("base", (), seed) for seed in seeds]
	return Sweep(args.out, base, trials, args.ranks, args.quantize), args


def devices(args: argparse.Namespace) -> list[str]:
	"""What CUDA_VISIBLE_DEVICES is for each of the trials that run at once."""
	import torch

	if args.cpu:
		return [""] * args.cpu
	gpus = args.gpus.split(",") if args.gpus else [str(i) for i in range(torch.cuda.device_count())]
	if gpus and len(gpus) < args.ranks:
		raise SweepError(f"--ranks {args.ranks}: only {len(gpus)} GPUs are there")
	starts = range(0, len(gpus) - args.ranks + 1, args.ranks)
	return [",".join(gpus[i : i + args.ranks]) for i in starts] or [""]


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
			for trial in sweep.trials:
				print(f"bash {shlex.quote(str(sweep.folder_of(trial) / 'command.sh'))}")
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
	return int(any(state(sweep.folder_of(trial))[0] not in DONE for trial in sweep.trials))


if __name__ == "__main__":
	signal.signal(signal.SIGTERM, signal.default_int_handler)
	sys.exit(main(sys.argv[1:], os.environ))
