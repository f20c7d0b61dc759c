"""Make a submission folder of finished runs.

    python records/submit.py logs/a logs/b logs/c --name Eleven_Layers --author "A. Author" \\
        --github-id author --blurb "What it is, in a line or two."

makes records/track_non_record_16mb/<date>_Eleven_Layers/. Runs in folders `<trial>/seed<N>`, as
records/sweep.py leaves them, are arms by trial; all others are one arm. Of several arms --main
gives the headline, and --base is what the others are compared with. Every figure is read from the
logs in the folder, so that records/check.py can make it again; it must find no fault.
"""

import argparse
import ast
import json
import re
import shutil
import sys
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from check import MACHINE_PATH, faults_of
from figures import (
    FIGURES,
    NEEDS,
    NON_RECORD,
    PROGRAM,
    READABLE,
    RECORD,
    TEXT,
    block,
    program_source,
    read_logs,
    score_figures,
    scored,
    sha256,
    submission,
    why,
)
from program import modules_of
from runs import ROOT, Defaults, Run, by_name, named, read_run, read_trial

README = """# {name}

{blurb}

{figures}

{prose}## Files

`train_gpt.py` is the program exactly as it ran{source}. submission.json holds the figures. The logs
are those of the runs but for paths of their machine: a run's folder is written `logs/<RUN_ID>`, and
of any other absolute path only the last name stays: `.../name`.
"""


def collect(paths: list[Path], alone: str) -> tuple[list[Run], list[str]]:
    """The runs in these folders, named by arm; faults of those not run to an end."""
    runs, faults = [], []
    marks = ("result.json", "train.log", "output.txt", "command.sh")
    found = {path: [x.parent for x in path.rglob("*") if x.name in marks] for path in paths}
    faults += [f"{path}: no run is there" for path, folders in found.items() if not folders]
    for folder in sorted({folder.resolve() for folders in found.values() for folder in folders}):
        if re.search(r"\.cut\d+$", folder.name):  # put aside by sweep.py
            continue
        run = read_trial(folder)
        if run.status in ("waiting", "running") or not log_of(folder):
            faults.append(f"{folder}: {run.status}; needed: runs that have ended, with their logs")
            continue
        of_trial = not named(folder)[0]  # it is seed<N>
        runs.append(run if of_trial else replace(run, name=alone))
    if not runs:
        raise ValueError("\n".join(faults))
    return runs, faults


def log_of(folder: Path) -> Path | None:
    """A run's log, or what it put on the screen if it failed before it had one."""
    logs = (folder / name for name in ("train.log", "output.txt"))
    return next((log for log in logs if log.exists()), None)


def scrubbed(text: str, run: Run) -> str:
    """A log without its machine's paths; README's template says how."""
    run_id = "/".join(run.path.parts[-1 - run.path.name.startswith("seed") :])
    for setting in ("run_dir", "data_path", "tokenizer_path", "resume"):  # they may hold spaces
        path = Path(run.settings.get(setting, ""))
        if path.is_absolute():
            shown = f"logs/{run_id}" if setting == "run_dir" else f".../{path.name}"
            text = text.replace(str(path), shown)
    return MACHINE_PATH.sub(lambda m: ".../" + re.split(r"[/\\]", m[0])[-1], text)


def disagreements(runs: list[Run]) -> list[str]:
    """What only the runs' own folders show to be wrong."""
    faults = []
    programs = {run.path: run.path / PROGRAM for run in runs if (run.path / PROGRAM).exists()}
    codes = {path: sha256(program_source(program)) for path, program in programs.items()}
    codes |= {run.path / "result.json": run.code_sha256 for run in runs if run.code_sha256}
    if len(set(codes.values())) != 1:
        of = {code[:8]: str(path) for path, code in codes.items()}
        faults.append(f"{PROGRAM}: {len(of)} of them, {of}; needed: the same in all runs")
    texts = {run.val_sha256[:8] for run in scored(runs)}
    if len(texts) > 1:
        faults.append(f"validation data {sorted(texts)}; needed: the same in all runs")
    for name, arm in by_name(runs).items():
        if len({run.seed for run in arm}) < len(arm):
            faults.append(f"{name}: seeds {[run.seed for run in arm]}; needed: each once")
    for run in runs:
        logged = read_run(log_of(run.path))
        if not scored([run, logged]):
            continue
        pairs = zip(essence(run), essence(logged), strict=True)
        faults += [f"{run.path}: result.json has {a}, its log {b}" for a, b in pairs if a != b]
    return faults


def essence(run: Run) -> tuple[Any, ...]:
    """What the log and the result of a run must both say."""
    scores = {name: score_figures([score]) for name, score in run.scores.items()}
    return run.status, scores, run.sizes, run.steps, run.seed


def build(folder: Path, runs: list[Run], args: argparse.Namespace) -> None:
    """Writes all files of a submission."""
    folder.mkdir(parents=True)
    arms = by_name(runs)
    for run in runs:
        text = log_of(run.path).read_text(encoding="utf-8", errors="replace")
        name = f"train{f'_{run.name}' * (len(arms) > 1)}_seed{run.seed}.log"
        (folder / name).write_text(scrubbed(text, run), encoding="utf-8")
    first = scored(arms[args.main])[0]
    shutil.copyfile(first.path / PROGRAM, folder / PROGRAM)
    source = program_source(folder / PROGRAM)
    packed = source != (folder / PROGRAM).read_bytes()
    if packed:
        (folder / READABLE).write_bytes(source)
    tree = ast.parse(source.decode())
    main, base = (args.main, args.base) if len(arms) > 1 else ("", "")
    logged, _ = read_logs(folder)
    told = submission(logged, main, base)
    of_arms = told.get("arms", {args.main: told["seed_results"]})
    for run in scored(runs):
        hashes = {"code_sha256": run.code_sha256, "val_sha256": run.val_sha256}
        of_arms[run.name][str(run.seed)] |= hashes
    keys = ("author", "github_id", "name", "blurb", "date")
    about = {key: getattr(args, key) for key in keys} | {"track": args.track.removeprefix("track_")}
    text = json.dumps(about | told, indent=2, allow_nan=False, ensure_ascii=False)
    (folder / FIGURES).write_text(text + "\n", encoding="utf-8")
    (folder / NEEDS).write_text("\n".join([*requirements(tree, first), ""]), encoding="utf-8")
    prose = args.text.read_text(encoding="utf-8").strip() + "\n\n" if args.text else ""
    for path in drawn(runs, folder, base) if args.plots else []:
        prose += f"![{path.stem}]({path.name})\n\n"
    about |= {"figures": block(logged, main, base, Defaults(tree)), "prose": prose}
    about["source"] = f", packed; `{READABLE}` is its source" * packed
    (folder / TEXT).write_text(README.format(**about), encoding="utf-8")


def requirements(tree: ast.Module, run: Run) -> list[str]:
    """Returns the packages that a program imports, with versions: torch as it ran, others ours."""
    imported = modules_of(tree) - {"torch"}
    lines = (ROOT / NEEDS).read_text(encoding="utf-8").splitlines()
    needs = [line for line in lines if re.match(r"\w*", line)[0] in imported]
    return [f"torch=={run.machine['torch'].partition('+')[0]}", *needs]


def drawn(runs: list[Run], folder: Path, base: str) -> list[Path]:
    """Pictures of the runs; of several arms, where each stands to the base."""
    from plot import draw

    kinds = ("loss", "scores") if base else ("loss",)
    paths = [path for kind in kinds for path in draw(runs, kind, folder, base=base)]
    return [path for path in paths if path.suffix == ".png"]


def submit(args: argparse.Namespace) -> tuple[Path, list[str]]:
    """The folder made, or the faults for which it is not."""
    runs, faults = collect(args.runs, args.name)
    faults += disagreements(runs)
    arms, target = by_name(runs), args.out / args.track / f"{args.date}_{args.name}"
    if len(arms) == 1:
        args.main = next(iter(arms))
    args.base = args.base or args.main
    for option in ("main", "base"):
        if not scored(arms.get(name := getattr(args, option), [])):
            faults.append(f"--{option}: {name}; needed: an arm with scores, of {', '.join(arms)}")
    if target.exists():
        faults.append(f"{target}: is there; needed: another --name or --date")
    if not re.fullmatch(r"[\w.+=-]+", args.name):
        faults.append(f"--name: {args.name}; needed: letters, digits and _ . + = -")
    if not scored(arms.get(args.main, [])):
        of_main = arms.get(args.main, [])
        faults += [f"{run.path}: {run.status}: {why(run)}; needed: a score" for run in of_main]
        return target, faults
    with tempfile.TemporaryDirectory() as folder:
        staged = Path(folder, args.track, re.sub(r"[^\w.+=-]", "_", f"{args.date}_{args.name}"))
        build(staged, runs, args)
        faults += faults_of(staged, run=False)
        if not faults:
            shutil.copytree(staged, target)
    return target, faults


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or that hold some")
    for name in ("name", "author", "github-id", "blurb"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--track", choices=(RECORD, NON_RECORD), default=NON_RECORD)
    parser.add_argument("--main", help="the arm of the headline")
    parser.add_argument("--base", help="the arm that others are compared with (default: --main)")
    parser.add_argument("--date", default=str(date.today()), help="YYYY-MM-DD (default: today)")
    parser.add_argument("--text", type=Path, metavar="FILE.md", help="prose for README")
    parser.add_argument("--plots", action="store_true", help="draw losses, and scores of arms")
    parser.add_argument("--out", type=Path, default=ROOT / "records", help="default: records/")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """The program; its exit status: 0, or 2 with all reasons why there is no folder."""
    try:
        target, faults = submit(parse(argv))
    except (OSError, ValueError) as error:  # of runs, plots and comparisons too
        target, faults = Path(), [str(error)]
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if not faults:
        print(f"{target}\nnext: python records/check.py {target}")
    return 2 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
