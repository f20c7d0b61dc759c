"""Check a submission folder: its figures against its logs, the rules, and what its program does.

    python records/check.py records/track_10min_16mb/2026-03-25_Name

Each fault is one line: the file, what was found, what is needed. Exit status: 0 no fault, 1 faults,
2 no folder that can be read. The program is decoded without executing it, and compared with its
readable source. Then a copy of it is imported and run twice on a CPU with a tiny model. Of the
source itself only the syntax and the imported packages are checked: it is not searched for
forbidden code, so the check shows what the program did in these runs and nothing else. A README's
command may omit settings if the logs, of an older program, do not state which were changed.
"""

import argparse
import json
import math
import re
import shlex
import sys
from collections.abc import Callable
from datetime import date
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import figures
import program
from figures import BEGIN, END, FIGURES, LOG_NAME, NEEDS, NON_RECORD, PROGRAM, RECORD, TEXT
from runs import (
    INCIDENTAL,
    SCORE_LINES,
    Run,
    RunError,
    by_name,
    is_one_training,
    parse_setting,
    read_text,
    split_starts,
    train_gpt,
)
from tool import tool

RECORD_SEEDS = 3
RECORD_RANKS, RECORD_GPU = 8, "H100"
LOGS = "train_seed<N>.log"  # in faults of several logs
# All files that a folder may hold.
FILES = re.compile(
    r"train_gpt(?:_readable)?\.py|README\.md|submission\.json|requirements\.txt|"
    r"train\S*\.log|\S+\.png"
)
ABOUT = "author", "github_id", "name", "blurb", "date", "track"
# An absolute path of two names or more, which may tell whose machine it is; in quotes with spaces.
MACHINE_PATH = re.compile(
    r"(?<=\")/[^\"\n/]+/[^\"\n]+(?=\")|(?<=')/[^'\n/]+/[^'\n]+(?=')|"
    r"(?<![\w./\\])(?:~\w*)?(?:/[^\s/:;,'\"()<>|]+){2,}|\b[A-Za-z]:\\[^\s:'\"]+"
)
UNPROVEN = """\
not proven: that the runs took place, on that hardware; which text was scored, except for its number
of bytes where the corpus is the challenge's or a log proves all of them; what the program does in a
real run, because its source is not judged and only two tiny runs were observed: a program that
recognises them, or starts another program to use the network, is not found; that each token is
scored before the model learns from it. A person must read the source."""


class Check:
    """A submission folder and its faults; a method for each part of the check."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs, self.faults = figures.read_logs(folder)
        self.trials = by_name(self.runs)
        path = folder / PROGRAM
        self.size = path.stat().st_size if path.is_file() else 0  # of the twin, if it is one
        self.program = program.read_source(self.expect, folder)
        told = self.read(FIGURES, lambda text: json.loads(text, parse_constant=refuse_constant))
        self.told: dict[str, Any] = told if isinstance(told, dict) else {}
        main, base = (str(self.told.get(key, "")) for key in ("main", "base"))
        self.main = main if main in self.trials else next(iter(self.trials), "")
        self.base = base if base in self.trials else self.main
        self.done = figures.scored(self.trials.get(self.main, []))

    def expect(self, holds: object, file: str, found: object, needed: object) -> None:
        """Adds a fault unless `holds` is true."""
        if not holds:
            self.faults.append(" ".join(f"{file}: {found}; needed: {needed}".split()))

    def read(self, name: str, parse: Callable[[str], Any], by: str = "") -> Any:
        """Returns what `parse` makes of a file's text; None, with a fault, if that fails."""
        try:
            return parse((self.folder / name).read_text(encoding="utf-8-sig"))
        except Exception as error:  # a strange file may raise any
            fault = error.strerror if isinstance(error, OSError) else error
            self.expect(False, name, fault, f"a file that can be read{by}")

    def check_files(self) -> None:
        """Checks names of folder and files."""
        self.expect(self.runs, LOGS, "none", "one for each seed")
        for path in sorted(self.folder.iterdir()):
            plain = path.is_file() and not path.is_symlink()
            self.expect(plain, path.name, "no plain file", "files only")
            known = FILES.fullmatch(path.name)
            self.expect(known, path.name, "beside the program", "logs and pictures only")
            if plain and path.suffix in (".log", ".md", ".json", ".txt"):
                found = MACHINE_PATH.search(read_text(path))
                self.expect(not found, path.name, found and found[0], "no path of a machine")
        track, name = self.told.get("track"), f"{self.told.get('date')}_{self.told.get('name')}"
        at, tracks = self.folder.resolve(), (RECORD, NON_RECORD)
        self.expect(at.parent.name in tracks, "folder", f"in {at.parent.name}", " or ".join(tracks))
        self.expect(at.parent.name == f"track_{track}", FIGURES, f"track {track}", at.parent.name)
        self.expect(at.name == name, "folder", at.name, f"{name}, by {FIGURES}")

    def check_logs(self) -> None:
        """Checks that each log is complete, consistent with itself and the program, and no copy."""
        texts = [read_text(run.path) for run in self.runs]
        for run, text in zip(self.runs, texts, strict=True):
            file, named = run.path.name, LOG_NAME.fullmatch(run.path.name)
            self.expect(named, file, "its name", f"{LOGS} or train_<trial>_seed<N>.log")
            of_name = {named["seed"]} if named and named["seed"] else {str(run.seed)}
            seeds = set(re.findall(r"\bseed:(\d+)", text))
            if run.finished and not seeds:
                seeds = {"not stated"}
            self.expect(seeds <= of_name, file, f"seed {' '.join(seeds)}", " ".join(of_name))
            if run not in figures.scored([run]):
                found = f"{run.status}: {figures.why(run)}"
                self.expect(run.name != self.main, file, found, "a score")
                continue
            last = split_starts(text)[-1]
            self.check_log(run, last)
            if "model_dim" in run.settings:  # a log of train_gpt.py
                repacked = run.repacked and run.name != self.main  # the main trial must be trained
                self.check_settings(run)
                self.check_limits(run, last)
                self.check_steps(run, last, text, repacked)
                self.check_text(run, last)
                if repacked:
                    self.check_weights(run)
        for (one, a), (other, b) in combinations(zip(self.runs, texts, strict=True), 2):
            same = ["the text"] if a == b else []
            if one.name == other.name:
                if exact_scores(one) == exact_scores(other) != {}:
                    same.append("the scores")
                if is_one_training(one, other):
                    same.append("the training")
            found = f"{', '.join(same)} of {one.path.name}"
            self.expect(not same, other.path.name, found, "its own")

    def check_log(self, run: Run, text: str) -> None:
        """Checks that sizes, scores and seconds of a log agree."""
        file = run.path.name
        code, model, total = (run.sizes.get(name, -1) for name in ("code", "model", "total"))
        self.expect(code == self.size, file, f"Code size: {code}", f"{self.size}, of {PROGRAM}")
        whole = model > 0 and code + model == total
        self.expect(whole, file, f"{code} + {model} = {total} bytes", "the sum, in three lines")
        lines = re.findall(r"^(.+) val_loss:([\d.]+) val_bpb:([\d.]+)", text, re.M)
        scores = {name: [float(x) for x in score] for name, *score in lines}
        known = run.final in SCORE_LINES or "model_dim" not in run.settings
        self.expect(known, file, f"last score {run.final}", f"one of {', '.join(SCORE_LINES)}")
        for name, short in scores.items():
            exact = scores.get(f"{name}_exact", short)
            near = all(abs(a - b) < 5.01e-5 for a, b in zip(short, exact, strict=True))
            self.expect(near, file, f"{name} {short}", f"{exact}, as of {name}_exact")
        rounding = 0.1 + 1e-5 * run.steps
        trained = run.steps * run.step_ms / 1000 if run.steps else 0
        scored = sum(score.seconds for name, score in run.scores.items() if name != "float")
        for name, stated, of_lines in (
            ("training", figures.train_seconds(run), trained),
            ("scoring", figures.eval_seconds(run), scored),
        ):
            found, needed = f"{stated:.1f} s of {name}", f"{of_lines:.1f}, the sum of its lines"
            self.expect(of_lines <= stated + rounding, file, found, needed)

    def check_settings(self, run: Run) -> None:
        """Checks that the settings stated as changed are those of the run."""
        for name, text in (run.changed or {}).items():
            value = parse_setting(name, text)
            found, needed = f"changed_settings: {name.upper()}={text}", run.settings.get(name)
            self.expect(value == needed, run.path.name, found, f"{needed}, by its settings")

    def check_limits(self, run: Run, text: str) -> None:
        """Checks that the verdicts on time and size are complete and right."""
        file, settings = run.path.name, run.settings
        limits = {
            "eval_seconds": (figures.eval_seconds(run), train_gpt.EVAL_SECONDS_LIMIT),
            "total_bytes": (run.sizes.get("total", -1), train_gpt.BYTES_LIMIT),
        }
        if run.steps or "train_seconds" in run.verdicts:
            most = settings.get("max_wallclock_seconds") or math.inf
            limits["train_seconds"] = (figures.train_seconds(run), most)
        found = f"limits: {run.verdicts}"
        self.expect(len(run.verdicts) == len(limits), file, found, f"{len(limits)} verdicts")
        lines = re.findall(r"^limit:(\w+) (\S+) of (\S+) (\w+)$", text, re.MULTILINE)
        for name, *stated, verdict in lines:
            value, limit = limits.get(name, (math.nan, math.nan))
            verdicts = {"PASS": value <= limit, "FAIL": value >= limit}  # rounded, so both if equal
            right = stated == [f"{value:,}", f"{limit:,}"] and verdicts.get(verdict)
            found = f"limit:{name} {' of '.join(stated)} {verdict}"
            needed = f"{value:,} of {limit:,} {'PASS' if value <= limit else 'FAIL'}"
            self.expect(right, file, found, needed)
        packed, model = re.findall(r"^size: (\d+) bytes packed", text, re.M), run.sizes.get("model")
        found = f"size: {' '.join(packed[-1:])} bytes packed"
        self.expect(packed[-1:] == [str(model)], file, found, f"{model}, as Serialized model")

    def check_steps(self, run: Run, text: str, whole: str, repacked: bool) -> None:
        """Checks that a run took the steps that it planned, and logged each that it had to log.

        `text` is the log's last start, `whole` all of it.
        """
        file = run.path.name
        planned, every = (run.settings.get(name) for name in ("iterations", "train_log_every"))
        totals = {int(n) for n in re.findall(r"^step:\d+/(\d+) ", text, re.MULTILINE)}
        self.expect(totals <= {planned}, file, f"steps of {totals}", f"{planned}, by ITERATIONS")
        early = re.findall(r"^stopping_early: .* step:(\d+)/", text, re.MULTILINE)
        end = int(early[-1]) if early else 0 if repacked else planned
        self.expect(run.steps == end, file, f"{run.steps} steps", f"{end}, where it ended")
        begun = re.search(r"^(?:resume: step (\d+)|step:)", whole, re.MULTILINE)
        first = int(begun[1] or 0) + 1 if begun else 1
        due = {n for n in range(first, run.steps + 1) if n <= 10 or (every and n % every == 0)}
        lost = sorted(due - {step for step, *_ in run.curve})
        self.expect(not lost, file, f"no line of steps {lost[:10]}", "each step it logged")

    def check_weights(self, run: Run) -> None:
        """Checks that repacked weights are those of a run in this folder, with no hidden steps."""
        file = run.path.name
        trained = [other for other in self.runs if other.seed == run.seed and other.steps]
        same = any(may_share_weights(run, other) for other in trained)
        needed = "those of a run of its seed, by the score before int6"
        self.expect(same, file, "weights of no run here", needed)
        calibrating = run.settings.get("gptq_calib") == "train"
        tuning = run.settings.get("tune_scales") or run.settings.get("sensitivity_tokens")
        allowed = 0.0  # reading training text counts as training
        if calibrating or tuning:
            allowed = run.seconds.get("calibrate", 0) + 0.1
        if tuning:
            allowed += run.seconds.get("pack", 0)
        own = run.seconds.get("train", 0)
        idle = not run.curve and own <= allowed
        self.expect(idle, file, f"{own} s of training", "none, where others trained")

    def check_text(self, run: Run, text: str) -> None:
        """Checks that the scores are of as many bytes as the validation text has."""
        file, settings, score = run.path.name, run.settings, run.scores[run.final]
        stated = re.findall(r"^warning: (\d+) bytes of validation text", text, re.MULTILINE)
        proven = re.findall(r"^byte_table:proven against (\d+)", text, re.MULTILINE)
        needed, apart = score.bytes, 1e-7
        if settings.get("corpus") == "fineweb10B":
            needed = int(stated[-1]) if stated else train_gpt.VAL_BYTES
            apart = apart if stated else 1e-4
        elif proven and score.tokens < train_gpt.PROOF_TOKENS:
            needed = int(proven[-1])
        right = math.isclose(score.bytes, needed, rel_tol=apart, abs_tol=1)
        found = f"scores of {score.bytes} bytes of text"
        self.expect(right, file, found, needed)
        if settings.get("vocab_size") == train_gpt.BYTE_VOCAB:
            possible = score.bytes <= score.tokens
            self.expect(possible, file, found, f"at most {score.tokens}, a byte each")

    def check_one_text(self) -> None:
        """Checks that all runs were scored on one text, by its tokens and bytes."""
        runs = figures.scored(self.runs)
        scores = {f"{r.path.name} {name}": s for r in runs for name, s in r.scores.items()}
        tokens = {name: score.tokens for name, score in scores.items()}
        self.expect(len({*tokens.values()}) < 2, LOGS, f"tokens {tokens}", "one, as of one text")
        ratios = {name: s.val_loss / s.val_bpb if s.val_bpb else 0 for name, s in scores.items()}
        alike = not ratios or max(ratios.values()) <= min(ratios.values()) * (1 + 1e-6)
        self.expect(alike, LOGS, f"nats a bit {ratios}", "one, as of one text")
        leaves = flatten(self.told).items()
        texts = {str(value) for key, value in leaves if key.endswith("val_sha256")}
        self.expect(len(texts) < 2, FIGURES, f"val_sha256 {sorted(texts)}", "one, as of one text")

    def check_trials(self) -> None:
        """Checks that the runs of a trial differ by their seeds only."""
        for first, *others in self.trials.values():
            seeds = [run.seed for run in (first, *others)]
            self.expect(len({*seeds}) == len(seeds), first.path.name, f"seeds {seeds}", "each once")
            for run in figures.scored(others):
                pairs = {name: (run.settings.get(name), x) for name, x in first.settings.items()}
                other = {k: v for k, v in pairs.items() if v[0] != v[1] and k not in INCIDENTAL}
                self.expect(not other, run.path.name, other, f"the settings of {first.path.name}")

    def check_record(self) -> None:
        """Checks the rules of the record track."""
        if self.folder.resolve().parent.name != RECORD:
            return
        seeds = len({run.seed for run in self.done})
        self.expect(seeds >= RECORD_SEEDS, LOGS, f"{seeds} seeds", f"{RECORD_SEEDS} or more")
        for run in self.done:
            file, on = run.path.name, figures.hardware(run) or "hardware not stated"
            for name, (found, most) in figures.limits_of([run]).items():
                self.expect(found <= most, file, f"{found:,} {name}", f"at most {most:,}")
            self.expect(run.steps, file, "no training", "the steps of its training")
            self.expect(run.status == "ok", file, f"{run.status} {run.verdicts}", "PASS")
            right = run.ranks == RECORD_RANKS and RECORD_GPU in on
            self.expect(right, file, on, f"{RECORD_RANKS}x{RECORD_GPU}")
            size, needed = run.scores[run.final].bytes, train_gpt.VAL_BYTES
            right = math.isclose(size, needed, rel_tol=1e-4)
            self.expect(right, file, f"{size} bytes scored", f"{needed}, the challenge's")

    def check_submission(self) -> None:
        """Checks submission.json: who and what, and each figure as the logs have it."""
        for key in ABOUT:
            value = self.told.get(key)
            text = isinstance(value, str) and value.strip()
            self.expect(text, FIGURES, f"{key}: {value}", "text")
        blurb, day = (str(self.told.get(key)) for key in ("blurb", "date"))
        marks = re.search(r"\n|<[a-zA-Z!/]", blurb)
        self.expect(not marks, FIGURES, f"blurb: {blurb}", "one line without marks")
        self.expect(is_date(day), FIGURES, f"date: {day}", "YYYY-MM-DD")
        self.expect(self.done, LOGS, "no run with a score", "one in the main trial")
        if not self.done:
            return
        needed = flatten(figures.submission(self.runs, self.main, self.base))
        told = flatten(self.told)
        code = figures.sha256(self.program.data) if self.program else "none"
        for at in [key.removesuffix("val_bpb") for key in needed if key.endswith(".val_bpb")]:
            needed[f"{at}code_sha256"] = code
            text = str(told.pop(f"{at}val_sha256", "missing"))
            right = re.fullmatch("[0-9a-f]{64}", text)
            self.expect(right, FIGURES, f"{at}val_sha256: {text}", "the SHA-256 of the text scored")
        for key in (*needed, *sorted(told.keys() - {*needed, *ABOUT})):
            found, value = told.get(key, "missing"), needed.get(key, "nothing")
            same = key in needed and type(found) is type(value) and found == value
            shown = "null" if value is None else value
            self.expect(same, FIGURES, f"{key}: {found}", f"{shown}, by the logs")

    def check_readme(self) -> None:
        """Checks that README has the figures of the logs first, and the pictures that it shows."""
        text = self.read(TEXT, str) or ""
        found = re.search(f"{re.escape(BEGIN)}.*{re.escape(END)}", text, re.DOTALL)
        self.expect(found, TEXT, "no block of figures", f"{BEGIN} ... {END}")
        head = f"# {self.told.get('name')}\n\n{self.told.get('blurb')}\n\n{BEGIN}\n"
        first = text.partition(BEGIN)[0]
        self.expect(text.startswith(head), TEXT, f"first {first!r:.200}", "name, blurb, figures")
        heading = r"^[ >]*#+ *(?:results|scores?)\b.*"
        results = re.findall(heading, text, re.MULTILINE | re.IGNORECASE)
        self.expect(len(results) < 2, TEXT, f"headings {results}", "one")
        if found and self.done:
            needed = figures.block(self.runs, self.main, self.base).splitlines()
            stated = any(run.changed is not None for run in self.runs)
            for a, b in zip_longest(found[0].splitlines(), needed, fillvalue="no line"):
                same = a == b or (not stated and is_part_of_command(a, b))
                self.expect(same, TEXT, a, f"{b}, by the logs")
        for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
            there = "://" in name or (self.folder / name).is_file()
            self.expect(there, TEXT, f"{name}, which is missing", "a picture")

    def check_requirements(self) -> None:
        """Checks requirements.txt, and that Python 3.10 parses the program."""
        needs = self.read(NEEDS, str) or ""
        if self.program:
            tree = self.read(self.program.file, program.parse_source, " by Python 3.10")
            if tree:
                program.check_requirements(self.expect, tree, needs)
        for run in self.done[:1]:
            torch = f"torch=={run.machine.get('torch', '').partition('+')[0]}"
            right = torch in needs.split() or not run.machine
            self.expect(right, NEEDS, needs, f"{torch}, as it ran")

    def check_program(self) -> None:
        """Imports and runs the program, unless its source is not known."""
        if self.program:
            program.check_import(self.expect, self.folder)
            program.check_run(self.expect, self.folder)


def refuse_constant(name: str) -> None:
    """Raises ValueError: NaN and Infinity are not JSON."""
    raise ValueError(f"{name} is no number")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of a tree of dicts by dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, dict) and value
        leaves |= flatten(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return leaves


def is_date(text: str) -> bool:
    """Returns whether a text is a date as YYYY-MM-DD."""
    try:
        return str(date.fromisoformat(text)) == text
    except ValueError:
        return False


def is_part_of_command(found: str, whole: str) -> bool:
    """Returns whether a README's command is another one without some of its settings."""
    if not (found.startswith("    SEED=") and whole.startswith("    SEED=")):
        return False
    words, all_words = shlex.split(found), shlex.split(whole)
    omitted = [word for word in all_words if word not in words]
    kept = [word for word in all_words if word in words]
    return sorted(kept) == sorted(words) and all(re.match("[A-Z_0-9]+=", x) for x in omitted)


def exact_scores(run: Run) -> dict[str, tuple[float, float]]:
    """Returns the scores of a run to the last digit."""
    return {name: (score.val_loss, score.val_bpb) for name, score in run.scores.items()}


def may_share_weights(run: Run, other: Run) -> bool:
    """Returns whether scores before int6 are equal, or of other windows or another mask."""
    ways = {tuple(map(r.settings.get, ("eval_seq_len", "canonical_mask"))) for r in (run, other)}
    a, b = (exact_scores(r).get("float", (math.nan,))[0] for r in (run, other))
    return len(ways) > 1 or math.isclose(a, b, rel_tol=1e-5)


def find_faults(folder: Path, run: bool = True) -> list[str]:
    """Returns all faults of a submission folder, a line each; the program runs only with `run`.

    Raises OSError if there is no room for a copy of the program.
    """
    check = Check(folder)
    parts = [check.check_files, check.check_logs, check.check_trials, check.check_one_text]
    parts += [check.check_record, check.check_submission, check.check_readme]
    parts += [check.check_requirements]
    if run:
        parts += [check.check_program]
    for part in parts:
        try:
            part()
        except Exception as error:  # a strange folder may raise any
            if part == check.check_program and isinstance(error, OSError):
                raise
            check.expect(False, "folder", f"{part.__name__}: {error!r:.300}", "what can be checked")
    return check.faults


@tool
def main(argv: list[str]) -> int:
    """Prints all faults of a folder; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--no-run", action="store_true", help="do not import or run the program")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        raise RunError(f"{args.folder}: no such folder; give the folder of a submission")
    list(args.folder.iterdir())  # raises OSError if it cannot be read
    faults = find_faults(args.folder, run=not args.no_run)
    ran = "the program was not run" if args.no_run else "the program was imported and run twice"
    print("\n".join(faults or [f"ok: files, logs, figures and rules; {ran}"]))
    print(UNPROVEN)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
