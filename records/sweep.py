"""Run many trials of train_gpt.py: every combination of settings and seeds, each in its own folder.

    PRESET=cpu python records/sweep.py XSA_LAST_N=0,11 MUON_WD=0.02,0.04 --seeds 1337,42,7 --cpu

Settings given in the environment hold for all trials; SETTING=a,b varies. The same command again
goes on where it stopped: finished trials stay, those that were cut off start anew (or go on from
their checkpoint, with CHECKPOINT_EVERY). A trial that fails is a row with its reason.
"""

import argparse
import fcntl
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
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import rich.live
import rich.table

import train_gpt
from runs import RunError, read_run

SETTINGS = [f.name.upper() for f in fields(train_gpt.Hyperparameters)]
OWN = ("SEED", "RUN_ID", "RUN_DIR", "RESUME")  # that each trial sets itself


class SweepError(ValueError):
	"""A sweep that cannot be run as asked."""


@dataclass(frozen=True)
class Trial:
	"""One run to be made: settings beyond those of all trials, and a seed."""

	name: str
	settings: tuple  # of pairs (SETTING, text)
	seed: int

	def folder(self, sweep):
		"""Where its run is."""
		return sweep / self.name / f"seed{self.seed}"


def trial_name(settings):
	"""A folder's name that says what a trial changes."""
	name = "+".join(f"{key}={value}" for key, value in settings) or "base"
	return re.sub(r"[^\w=+.,-]", "_", name)[:120]


def plan(axes, seeds, one_at_a_time):
	"""Trials of the axes {SETTING: values}: the grid, or the base and every single change."""
	if one_at_a_time:
		changes = [()] + [((key, value),) for key, values in axes.items() for value in values]
	else:
		pairs = [[(key, value) for value in values] for key, values in axes.items()]
		changes = list(product(*pairs))
	return [Trial(trial_name(change), change, seed) for seed in seeds for change in changes]


def plan_of_file(path, seeds):
	"""The settings of all trials, and the trials, of a sweep.toml; its seeds unless given."""
	import tomllib

	try:
		text = tomllib.loads(path.read_text(encoding="utf-8"))
	except (OSError, tomllib.TOMLDecodeError) as error:
		raise SweepError(f"--file {path}: {error}") from None

	def texts(table):
		return {key: str(int(x) if isinstance(x, bool) else x) for key, x in table.items()}

	base, seeds = texts(text.get("base", {})), seeds or text.get("seeds", [1337])
	trials = {name: tuple(texts(table).items()) for name, table in text.get("trials", {}).items()}
	return base, [Trial(name, changes, seed) for seed in seeds for name, changes in trials.items()]


class Sweep:
	"""A folder of trials: what is to be run, what has been, and how to run one."""

	def __init__(self, folder, base, trials, ranks=1, weights=None):
		self.folder, self.base, self.trials = folder, base, trials
		self.ranks, self.weights = ranks, weights
		names = {key for trial in trials for key, _ in trial.settings} | set(base)
		for name in sorted(names - set(SETTINGS)):
			raise SweepError(f"{name} is no setting of train_gpt.py; its --help lists them")
		for name in sorted(names & set(OWN)):
			raise SweepError(f"{name} is set by the sweep for each trial; seeds are --seeds")
		if not trials:
			raise SweepError("no trials: give SETTING=a,b or --file, and at least one seed")
		if len({(t.name, t.seed) for t in trials}) < len(trials):
			raise SweepError("two trials have one name and seed; name a value or a seed once")

	def prepare(self):
		"""Create the folder or go on with the one there; every trial gets its command.sh."""
		self.folder.mkdir(parents=True, exist_ok=True)
		plan_path, script = self.folder / "sweep.json", self.folder / "train_gpt.py"
		if plan_path.exists():
			before = json.loads(plan_path.read_text(encoding="utf-8"))
			if before["base"] != self.base:
				changed = sorted(set(before["base"].items()) ^ set(self.base.items()))
				raise SweepError(
					f"{self.folder} was made under other settings for all trials: "
					f"{', '.join(f'{key}={value}' for key, value in changed)}; "
					"set them as they were, or choose another --out"
				)
			known = {(t["name"], t["seed"]): t for t in before["trials"]}
		else:
			known = {}
			shutil.copyfile(ROOT / "train_gpt.py", script)
		for trial in self.trials:
			known[trial.name, trial.seed] = json.loads(json.dumps(asdict(trial)))
			folder = trial.folder(self.folder)
			folder.mkdir(parents=True, exist_ok=True)
			(folder / "command.sh").write_text(self.command(trial), encoding="utf-8")
		text = json.dumps({"base": self.base, "trials": list(known.values())}, indent="\t")
		train_gpt.write_atomically(plan_path, text.encode())

	def command(self, trial):
		"""The script that makes one trial, alike by hand, here or under a scheduler."""
		folder = trial.folder(self.folder).resolve()
		script = shlex.quote(str((self.folder / "train_gpt.py").resolve()))
		settings = {**self.base, **dict(trial.settings), "SEED": str(trial.seed)}
		settings["RUN_DIR"] = str(folder)
		if settings.get("CHECKPOINT_EVERY", "0") != "0":
			settings["RESUME"] = "auto"
		line = f"python {script}"
		if self.ranks > 1:
			line = f"torchrun --standalone --nproc_per_node={self.ranks} {script}"
		if self.weights:
			weights = (self.weights / f"seed{trial.seed}" / train_gpt.FINAL_MODEL).resolve()
			line += f" --quantize {shlex.quote(str(weights))}"
		exports = " ".join(f"{key}={shlex.quote(value)}" for key, value in settings.items())
		output = shlex.quote(str(folder / "output.txt"))
		status = shlex.quote(str(folder / "exit_status"))
		return f"""#!/usr/bin/env bash
# {trial.name}, seed {trial.seed}
cd {shlex.quote(str(ROOT))}
unset {" ".join(SETTINGS)}
PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH
export {exports}
{line} > {output} 2>&1
echo $? > {status}
"""

	def slurm(self, options):
		"""Write the trials as a Slurm job array; its path."""
		commands = [trial.folder(self.folder).resolve() / "command.sh" for trial in self.trials]
		(self.folder / "trials.txt").write_text("".join(f"{path}\n" for path in commands))
		lines = "".join(f"#SBATCH {option}\n" for option in shlex.split(options))
		path = self.folder / "array.sbatch"
		folder = self.folder.resolve()
		path.write_text(f"""#!/usr/bin/env bash
#SBATCH --job-name={self.folder.name}
#SBATCH --array=1-{len(commands)}
#SBATCH --output={folder}/slurm-%A_%a.out
{lines}bash "$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {shlex.quote(str(folder / "trials.txt"))})"
""")
		return path


def progress(folder):
	"""The (step, seconds, loss) lines of a run so far."""
	try:
		lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
	except OSError:
		return []
	events = [json.loads(line) for line in lines if line.endswith("}")]
	steps = [e for e in events if e["event"] == "step"]
	return [(e["step"], e["seconds"], e["train_loss"]) for e in steps]


def state(folder):
	"""What became of a trial: waiting, cut off, a status of result.json, stopped or killed."""
	stopped = folder / "stopped"
	if stopped.exists():
		return "stopped", stopped.read_text(encoding="utf-8")
	try:
		run = read_run(folder)
		return run.status, run.reason
	except RunError:
		pass
	try:
		code = int((folder / "exit_status").read_text())
	except (OSError, ValueError):
		return ("cut off" if (folder / "train.log").exists() else "waiting"), ""
	last = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()
	how = f"killed by signal {code - 128}" if code > 128 else f"exit status {code}"
	return "failed", "; ".join([how, *last[-1:]])


def hopeless(folder, others, limit):
	"""Why a running trial is not worth its end, if so: it diverges, or is far behind the best.

	Compared are means over 20 steps, of the same steps; nothing is judged before step 40.
	"""
	steps = [loss for _, _, loss in progress(folder)]
	if len(steps) < 40:
		return ""
	now, end = sum(steps[-20:]) / 20, len(steps)
	if now > max(steps[0], 1.0) + limit:
		return f"diverged: loss {now:.3f} at step {end}, {steps[0]:.3f} at the first"
	rivals = [[loss for _, _, loss in progress(other)][:end] for other in others]
	best = min((sum(r[-20:]) / 20 for r in rivals if len(r) == end), default=now)
	if now > best + limit:
		return f"hopeless: loss {now:.3f} at step {end}, the best trial had {best:.3f}"
	return ""


class Runner:
	"""Trials on the devices of this machine, several at once, with a live table."""

	def __init__(self, sweep, devices, threads, stop_worse, retry):
		self.sweep, self.devices, self.threads = sweep, devices, threads
		self.stop_worse, self.retry = stop_worse, retry
		self.running = {}  # trial: (process, device, lock)

	def is_due(self, trial):
		"""Whether a trial is still to be run."""
		status, _ = state(trial.folder(self.sweep.folder))
		due = ("waiting", "cut off", "interrupted")
		return status in due or (self.retry and status not in ("ok", "over a limit"))

	def start(self, trial, device):
		"""Launch a trial, unless another sweep is at it."""
		folder = trial.folder(self.sweep.folder)
		lock = open(folder / "lock", "w")
		try:
			fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
		except OSError:
			lock.close()
			return
		if not self.is_due(trial):
			lock.close()
			return
		clear(folder, self.sweep.command(trial))
		env = dict(os.environ, CUDA_VISIBLE_DEVICES=device)
		if not device:
			env.setdefault("OMP_NUM_THREADS", str(self.threads))
		process = subprocess.Popen(
			["bash", folder / "command.sh"],
			env=env,
			stdin=subprocess.DEVNULL,
			start_new_session=True,
			pass_fds=[lock.fileno()],
		)
		self.running[trial] = process, device, lock

	def poll(self):
		"""Take in what has ended, and stop what is hopeless; the devices that are free."""
		for trial, (process, _, lock) in list(self.running.items()):
			folder = trial.folder(self.sweep.folder)
			if process.poll() is not None:
				lock.close()
				del self.running[trial]
			elif self.stop_worse:
				others = [t.folder(self.sweep.folder) for t in self.sweep.trials if t != trial]
				if why := hopeless(folder, others, self.stop_worse):
					(folder / "stopped").write_text(why, encoding="utf-8")
					end(process)
		busy = [device for _, device, _ in self.running.values()]
		free = list(self.devices)
		for device in busy:
			free.remove(device)
		return free

	def run(self):
		"""Run all that is due; on Ctrl-C or SIGTERM the trials are ended and can go on later."""
		with rich.live.Live(refresh_per_second=1, transient=False) as live:
			try:
				while True:
					free = self.poll()
					due = [t for t in self.sweep.trials if t not in self.running and self.is_due(t)]
					for trial in due:
						if not free:
							break
						self.start(trial, free[0])
						if trial in self.running:
							free.pop(0)
					live.update(table(self.sweep, self.running))
					if not due and not self.running:
						return
					time.sleep(1)
			finally:
				for process, _, _ in self.running.values():
					end(process)
				live.update(table(self.sweep, {}))


def end(process):
	"""End a trial and all it started: SIGTERM, by which it saves, and after 40 s SIGKILL."""
	for number, patience in ((signal.SIGTERM, 40), (signal.SIGKILL, 10)):
		try:
			os.killpg(process.pid, number)
			process.wait(patience)
		except (ProcessLookupError, subprocess.TimeoutExpired):
			continue


def clear(folder, command):
	"""Make a trial's folder ready for a start; a run cut off is kept aside, or gone on with."""
	if (folder / "train.log").exists() and not (folder / train_gpt.CHECKPOINT).exists():
		number = 1
		while (aside := folder.with_name(f"{folder.name}.cut{number}")).exists():
			number += 1
		folder.rename(aside)
		folder.mkdir()
		(folder / "command.sh").write_text(command, encoding="utf-8")
	for name in ("exit_status", "stopped"):
		(folder / name).unlink(missing_ok=True)


def table(sweep, running):
	"""The state of every trial."""
	grid = rich.table.Table(title=str(sweep.folder), show_edge=False)
	for column in ("trial", "seed", "state", "step", "loss", "score (bpb)", "seconds", "reason"):
		grid.add_column(column, overflow="fold")
	for trial in sweep.trials:
		folder = trial.folder(sweep.folder)
		status, reason = state(folder)
		step, seconds, loss = (progress(folder) or [("", math.nan, math.nan)])[-1]
		score = ""
		if status in ("ok", "over a limit"):
			run = read_run(folder)
			score = f"{run.last_score} {run.scores[run.last_score].val_bpb:.4f}"
		elif trial in running:
			status = "running"
		cells = (f"{x:.4g}" if x == x else "" for x in (loss, seconds))
		loss, seconds = cells
		grid.add_row(
			trial.name, str(trial.seed), status, str(step), loss, score, seconds, reason[-200:]
		)
	return grid


def parse(argv, env):
	"""The command line's Sweep and options."""
	parser = argparse.ArgumentParser(
		description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
	)
	parser.add_argument("axes", nargs="*", metavar="SETTING=A,B", help="a setting and its values")
	parser.add_argument("--seeds", default="", help="1337,42,7 (default 1337)")
	how = parser.add_mutually_exclusive_group()
	how.add_argument("--grid", action="store_true", help="every combination (the default)")
	how.add_argument("--one-at-a-time", action="store_true", help="the base, and each change alone")
	how.add_argument("--file", type=Path, help="trials named in a .toml (records/README.md)")
	where = parser.add_mutually_exclusive_group()
	where.add_argument("--cpu", nargs="?", type=int, const=1, metavar="N", help="N at once")
	where.add_argument("--gpus", metavar="0,1,..", help="one trial on each (default: all)")
	where.add_argument("--slurm", nargs="?", const="", metavar="OPTIONS", help="write a job array")
	where.add_argument("--list", action="store_true", help="print the commands, run nothing")
	where.add_argument("--show", action="store_true", help="print the table, run nothing")
	parser.add_argument("--ranks", type=int, default=1, metavar="N", help="GPUs for each trial")
	parser.add_argument("--out", type=Path, default=ROOT / "logs" / "sweep", help="its folder")
	parser.add_argument("--quantize", type=Path, metavar="FOLDER", help="weights, by seed")
	parser.add_argument("--stop-worse", type=float, metavar="NATS", help="end trials so far behind")
	parser.add_argument("--retry", action="store_true", help="run failed trials again")
	args = parser.parse_args(argv)
	base = {key: env[key] for key in SETTINGS if key in env and key not in OWN}
	seeds = [int(seed) for seed in args.seeds.split(",") if seed]
	if args.file:
		of_file, trials = plan_of_file(args.file, seeds)
		base = of_file | base
	else:
		axes = dict(axis.partition("=")[::2] for axis in args.axes)
		axes = {key: values.split(",") for key, values in axes.items()}
		trials = plan(axes, seeds or [1337], args.one_at_a_time)
	return Sweep(args.out, base, trials, args.ranks, args.quantize), args


def main(argv, env):
	"""The program; its exit status: 0, 1 with failed trials, 2 for a sweep that cannot be."""
	try:
		sweep, args = parse(argv, env)
		if not args.show:
			sweep.prepare()
		if args.list:
			for trial in sweep.trials:
				print(
					f"bash {shlex.quote(str(trial.folder(sweep.folder).resolve() / 'command.sh'))}"
				)
		elif args.slurm is not None:
			print(f"sbatch {shlex.quote(str(sweep.slurm(args.slurm)))}")
		elif args.show:
			rich.print(table(sweep, {}))
		else:
			devices = [""] * (args.cpu or 1)
			if not args.cpu and (gpus := args.gpus or all_gpus()):
				names = gpus.split(",")
				devices = [
					",".join(names[i : i + args.ranks]) for i in range(0, len(names), args.ranks)
				]
			threads = max((os.cpu_count() or 1) // len(devices), 1)
			Runner(sweep, devices, threads, args.stop_worse, args.retry).run()
	except (SweepError, RunError) as error:
		print(f"error: {error}", file=sys.stderr)
		return 2
	statuses = [state(trial.folder(sweep.folder))[0] for trial in sweep.trials]
	return int(any(status not in ("ok", "over a limit", "waiting") for status in statuses))


def all_gpus():
	"""The numbers of this machine's GPUs."""
	import torch

	return ",".join(map(str, range(torch.cuda.device_count())))


if __name__ == "__main__":
	signal.signal(signal.SIGTERM, signal.default_int_handler)
	sys.exit(main(sys.argv[1:], os.environ))
