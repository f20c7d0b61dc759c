"""Make a submission folder of finished runs.

    python records/submit.py logs/a logs/b logs/c --name Eleven_Layers --author "A. Author" \\
        --github-id author --blurb "What it is, in a line or two."

makes records/track_non_record_16mb/<date>_Eleven_Layers/ with both forms of the program, the logs,
README.md, submission.json and requirements.txt.
Runs in folders `<trial>/seed<N>`, as records/sweep.py makes them, are seeds of that trial; all
other runs are seeds of one trial. With several trials, --main is that of the headline, and --base
that with which the others are compared.
The folder is made only if records/check.py finds no fault in it. Exit status: 0, or 2 after all
reasons against it.
"""

import argparse
import json
import re
import shlex
import shutil
import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import figures
from check import MACHINE_PATH, find_faults
from figures import FIGURES, NEEDS, NON_RECORD, PROGRAM, READABLE, RECORD, TEXT, scored
from program import imported_packages, parse_source
from runs import (
    ROOT,
    SCHEDULE,
    Run,
    RunError,
    by_name,
    is_set_aside,
    read_planned,
    read_run,
    read_text,
    split_name,
)
from tool import tool
from train_gpt import env_form

README = """# {name}

{blurb}

{figures}

{prose}## Files

- `train_gpt.py` is the program as it ran{source}.
- `submission.json` has the figures, and `requirements.txt` the packages that the program needs.
- `train*.log` are the logs of the runs. Paths of the machine are replaced: the folder of a run by
  `logs/<RUN_ID>`, and any other absolute path by `.../` and its last name.
"""


def collect(paths: list[Path], alone: str) -> tuple[list[Run], list[str]]:
    """Returns the runs in these folders, named by trial, and faults of runs that have not ended.

    A run outside a trial's folder gets the name `alone`. Raises ValueError if there are no runs.
    """
    runs: list[Run] = []
    faults: list[str] = []
    marks = ("result.json", "train.log", "output.txt", "command.sh")
    folders = set()
    for path in paths:
        found = {file.parent.resolve() for file in path.rglob("*") if file.name in marks}
        faults += [] if found else [f"{path}: no run is there; give folders of finished runs"]
        folders |= found
    for folder in sorted(folder for folder in folders if not is_set_aside(folder)):
        run = read_planned(folder)
        if run.status in ("waiting", "running") or not read_log_text(folder):
            faults.append(f"{folder}: {run.status}; needed: runs that have ended, with their logs")
            continue
        of_trial = not split_name(folder)[0]  # the folder is named seed<N>
        runs.append(run if of_trial else replace(run, name=alone))
    if not runs:
        raise ValueError("\n".join(faults))
    return runs, faults


def read_log_text(folder: Path) -> str:
    """Returns the log of a run, or what it printed if it failed before it had one."""
    return read_text(folder / "train.log") or read_text(folder / "output.txt")


def hide_paths(text: str, run: Run) -> str:
    """Returns a log without the paths of its machine, as the README says."""
    run_id = "/".join(run.path.parts[-1 - run.path.name.startswith("seed") :])
    for setting in ("run_dir", "data_path", "tokenizer_path", "resume"):  # they may hold spaces
        path = Path(run.settings.get(setting, ""))
        if path.is_absolute():
            shown = f"logs/{run_id}" if setting == "run_dir" else f".../{path.name}"
            text = text.replace(str(path), shown)
    return MACHINE_PATH.sub(lambda m: ".../" + re.split(r"[/\\]", m[0])[-1], text)


def find_disagreements(runs: list[Run]) -> list[str]:
    """Returns the faults that show in the runs' own folders only."""
    faults = []
    programs = [run.path / PROGRAM for run in runs if (run.path / PROGRAM).exists()]
    codes = {str(path): figures.sha256(figures.program_source(path)) for path in programs}
    codes |= {f"{run.path}/result.json": run.code_sha256 for run in runs if run.code_sha256}
    if len(set(codes.values())) != 1:
        found = {code[:8]: path for path, code in codes.items()}
        faults.append(f"{PROGRAM}: {len(found)} of them, {found}; needed: the same in all runs")
    texts = {run.val_sha256[:8] for run in scored(runs)}
    if len(texts) > 1:
        faults.append(f"validation data {sorted(texts)}; needed: the same in all runs")
    for name, of_trial in by_name(runs).items():
        seeds = [run.seed for run in of_trial]
        if len({*seeds}) < len(seeds):
            faults.append(f"{name}: seeds {seeds}; needed: each once")
    for run in runs:
        changed = {k: x for k, x in run.resumed.get("changed", {}).items() if k in SCHEDULE}
        if changed:
            other = f"resumed from a run with {env_form(changed)}"
            faults.append(f"{run.path}: {other}; needed: a training that its command repeats")
        if not (run.path / "train.log").exists():
            continue
        logged = read_run(run.path / "train.log")
        if scored([run, logged]):
            pairs = zip(main_facts(run), main_facts(logged), strict=True)
            faults += [f"{run.path}: result.json has {a}, its log {b}" for a, b in pairs if a != b]
    return faults


def main_facts(run: Run) -> tuple[Any, ...]:
    """Returns what the log and the result of a run must both state."""
    scores = {name: figures.score_figures([score]) for name, score in run.scores.items()}
    return run.status, scores, run.sizes, run.steps, run.seed


def build(folder: Path, runs: list[Run], args: argparse.Namespace) -> None:
    """Writes all files of a submission."""
    folder.mkdir(parents=True)
    trials = by_name(runs)
    for run in runs:
        trial = f"_{run.name}" if len(trials) > 1 else ""
        text = hide_paths(read_log_text(run.path), run)
        (folder / f"train{trial}_seed{run.seed}.log").write_text(text, encoding="utf-8")
    first = scored(trials[args.main])[0]
    shutil.copyfile(first.path / PROGRAM, folder / PROGRAM)
    source = figures.program_source(folder / PROGRAM)
    packed = source != (folder / PROGRAM).read_bytes()
    if packed:
        (folder / READABLE).write_bytes(source)
    main, base = (args.main, args.base) if len(trials) > 1 else ("", "")
    logged, _ = figures.read_logs(folder)
    told = figures.submission(logged, main, base)
    of_trials = told.get("trials", {args.main: told["seed_results"]})
    for run in scored(runs):
        hashes = {"code_sha256": run.code_sha256, "val_sha256": run.val_sha256}
        of_trials[run.name][str(run.seed)] |= hashes
    keys = ("author", "github_id", "name", "blurb", "date")
    about = {key: getattr(args, key) for key in keys} | {"track": args.track.removeprefix("track_")}
    text = json.dumps(about | told, indent=2, allow_nan=False, ensure_ascii=False)
    (folder / FIGURES).write_text(text + "\n", encoding="utf-8")
    needs = requirements(source.decode(), first)
    (folder / NEEDS).write_text("\n".join([*needs, ""]), encoding="utf-8")
    prose = read_prose(args.text) + "\n\n" if args.text else ""
    for path in draw_plots(runs, folder, base) if args.plots else []:
        prose += f"![{path.stem}]({path.name})\n\n"
    about |= {"figures": figures.block(logged, main, base), "prose": prose}
    about["source"] = f", packed; `{READABLE}` is its source" if packed else ""
    (folder / TEXT).write_text(README.format(**about), encoding="utf-8")


def read_prose(path: Path) -> str:
    """Returns the text of --text. Raises RunError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise RunError(f"--text: {path}: {error.reason}; save it as UTF-8") from None


def copy_whole(folder: Path, target: Path) -> None:
    """Copies a folder. Raises OSError or RunError and leaves no part of it if that fails."""
    partial = target.with_name(f"{target.name}.part")
    try:
        shutil.copytree(folder, partial)
        partial.rename(target)
    except shutil.Error as error:  # lists source, target and reason of each file
        _, path, reason = error.args[0][0]
        raise RunError(f"{path}: {reason}; make room, or give another --out") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def requirements(source: str, run: Run) -> list[str]:
    """Returns the packages that a program imports: torch as it ran, others as in this project."""
    imported = imported_packages(parse_source(source)) - {"torch"}
    lines = (ROOT / NEEDS).read_text(encoding="utf-8").splitlines()
    needs = [line for line in lines if re.split(r"\W", line)[0] in imported]
    return [f"torch=={run.machine['torch'].partition('+')[0]}", *needs]


def draw_plots(runs: list[Run], folder: Path, base: str) -> list[Path]:
    """Draws the losses, or the bytes of repacked weights, and the scores of several trials.

    Returns the PNG files.
    """
    from plot import draw

    repacked = any(run.scores and not run.steps for run in runs)
    kinds = ["bytes" if repacked else "loss"]
    if base:
        kinds.append("scores")
    return [draw(runs, kind, folder, base=base) for kind in kinds]


def submit(args: argparse.Namespace) -> tuple[Path, list[str]]:
    """Returns the folder made, or the folder that was not made and the faults."""
    runs, faults = collect(args.runs, args.name)
    faults += find_disagreements(runs)
    trials, target = by_name(runs), args.out / args.track / f"{args.date}_{args.name}"
    if len(trials) == 1:
        args.main = next(iter(trials))
    args.base = args.base or args.main
    for option in ("main", "base"):
        name = getattr(args, option)
        if not scored(trials.get(name, [])):
            faults.append(
                f"--{option}: {name}; needed: a trial with scores, of {', '.join(trials)}"
            )
    if target.exists():
        faults.append(f"{target}: it exists; needed: another --name or --date")
    if not re.fullmatch(r"[^\W_][\w.+=-]*", args.name):  # others could be Markdown
        needed = "a letter or digit, then letters, digits and _ . + = -"
        faults.append(f"--name: {args.name}; needed: {needed}")
    of_main = trials.get(args.main, [])
    if not scored(of_main):
        faults += [
            f"{run.path}: {run.status}: {figures.why(run)}; needed: a score" for run in of_main
        ]
        return target, faults
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder, args.track, re.sub(r"[^\w.+=-]", "_", f"{args.date}_{args.name}"))
        build(staged, runs, args)
        faults += find_faults(staged, run=False)
        if not faults:
            copy_whole(staged, target)
    return target, faults


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or that hold some")
    for name in ("name", "author", "github-id", "blurb"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--track", choices=(RECORD, NON_RECORD), default=NON_RECORD)
    parser.add_argument("--main", help="the trial of the headline")
    parser.add_argument("--base", help="the trial that others are compared with (default: --main)")
    parser.add_argument("--date", default=str(date.today()), help="YYYY-MM-DD (default: today)")
    parser.add_argument("--text", type=Path, metavar="FILE.md", help="more text for README.md")
    parser.add_argument(
        "--plots", action="store_true", help="draw the losses, or bytes, and scores of trials"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "records", help="default: records/")
    return parser.parse_args(argv)


@tool
def main(argv: list[str]) -> int:
    """Makes the folder or prints all reasons against it; returns the exit status 0 or 2."""
    args = parse(argv)
    try:
        target, faults = submit(args)
    except ValueError as error:  # of runs, plots and comparisons as well
        target, faults = args.out, [str(error)]
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if not faults:
        print(f"{target}\nnext: python records/check.py {shlex.quote(str(target))}")
    return 2 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
