"""Check a submission folder: every figure against its logs, the rules, and that its program runs.

    python records/check.py records/track_10min_16mb/2026-03-25_Name

Each fault is a line: the file, what it holds, what is needed. Exit status: 0 no fault, 1 faults,
2 no folder. What the program does is tried on a CPU, without a network, in a copy of the folder.
"""

import argparse
import ast
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import figures
import program
from figures import BEGIN, END, FIGURES, LOG_NAME, NEEDS, NON_RECORD, PROGRAM, RECORD, TEXT
from runs import INCIDENTAL, Defaults, Run, by_name, starts_of, train_gpt

RECORD_SEEDS = 3
RECORD_RANKS, RECORD_GPU = 8, "H100"
# All that a folder may hold.
FILES = re.compile(
    r"train_gpt(?:_readable)?\.py|README\.md|submission\.json|requirements\.txt|"
    r"train\S*\.log|\S+\.(?:png|svg)"
)
ABOUT = "author", "github_id", "name", "blurb", "date", "track"
# An absolute path of two names or more: it may say whose machine it is of. In quotes with spaces.
MACHINE_PATH = re.compile(
    r"(?<=\")/[^\"\n/]+/[^\"\n]+(?=\")|(?<=')/[^'\n/]+/[^'\n]+(?=')|"
    r"(?<![\w./\\])(?:~\w*)?(?:/[^\s/:;,'\"()<>|]+){2,}|\b[A-Za-z]:\\[^\s:'\"]+"
)
UNPROVEN = """\
not proven: that the runs took place, on that hardware; which text was scored, but for its bytes,
and those only of the challenge's corpus, or where a log proves all of them; what a program hides
from the rules for its source, which can be evaded; that it does at full size as at the tiny one (no
network, weights that no validation text changes); that a score comes before learning from its
text."""


class Check:
    """A submission folder and what is wrong with it; a method for each part of the check."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runs, self.faults = figures.read_logs(folder)
        self.arms = by_name(self.runs)
        path = folder / PROGRAM
        self.size = path.stat().st_size if path.is_file() else 0  # of the twin, where it is one
        self.program = program.read_source(self.expect, folder)
        self.code, self.tree = "", None
        if self.program:
            self.code = figures.sha256(self.program.data)
            self.tree = self.attempt(self.program.file, self.syntax, " by Python 3.10")
        self.needs = self.parsed(NEEDS, str) or ""
        told = self.parsed(FIGURES, lambda text: json.loads(text, parse_constant=no_constant))
        self.told = told if isinstance(told, dict) else {}
        main, base = (str(self.told.get(key, "")) for key in ("main", "base"))
        self.main = main if main in self.arms else next(iter(self.arms), "")
        self.base = base if base in self.arms else self.main
        self.done = figures.scored(self.arms.get(self.main, []))

    def expect(self, holds: object, file: str, found: object, needed: object) -> None:
        """Keep the fault, if it is one."""
        if not holds:
            self.faults.append(" ".join(f"{file}: {found}; needed: {needed}".split()))

    def syntax(self) -> ast.Module:
        """Returns the tree of the program's source, by the oldest Python that runs it."""
        return ast.parse(self.program.data.decode(), feature_version=(3, 10))

    def parsed(self, name: str, parse: Callable[[str], Any]) -> Any:
        """A file as `parse` reads it, or None."""
        path = self.folder / name
        return self.attempt(name, lambda: parse(path.read_text(encoding="utf-8")))

    def attempt(self, name: str, read: Callable[[], Any], by: str = "") -> Any:
        """Returns what read() returns of a file; None, and a fault is kept, where it raises."""
        try:
            return read()
        except Exception as error:  # whatever a strange file raises
            fault = error.strerror if isinstance(error, OSError) else error
            self.expect(False, name, fault, f"a file that can be read{by}")

    def files(self) -> None:
        """That names fit, and nothing is there that should not be."""
        self.expect(self.runs, "train_seed<N>.log", "none", "one for each seed")
        for path in sorted(self.folder.iterdir()):
            plain = path.is_file() and not path.is_symlink()
            self.expect(plain, path.name, "no plain file", "files alone")
            self.expect(
                FILES.fullmatch(path.name), path.name, "beside the program", "logs, pictures"
            )
            if plain and path.suffix in (".log", ".md", ".json", ".txt"):
                found = MACHINE_PATH.search(path.read_text(encoding="utf-8", errors="replace"))
                self.expect(not found, path.name, found and found[0], "no path of a machine")
        track, name = self.told.get("track"), f"{self.told.get('date')}_{self.told.get('name')}"
        at = self.folder.resolve()
        tracks = RECORD, NON_RECORD
        self.expect(at.parent.name in tracks, "folder", f"in {at.parent.name}", " or ".join(tracks))
        self.expect(at.parent.name == f"track_{track}", FIGURES, f"track {track}", at.parent.name)
        self.expect(at.name == name, "folder", at.name, f"{name}, by {FIGURES}")

    def logs(self) -> None:
        """That each log is whole, agrees with itself and the program, and is no copy."""
        texts = [run.path.read_text(encoding="utf-8", errors="replace") for run in self.runs]
        for run, text in zip(self.runs, texts, strict=True):
            file, named = run.path.name, LOG_NAME.fullmatch(run.path.name)
            self.expect(named, file, "its name", "train_seed<N>.log or train_<arm>_seed<N>.log")
            of_name = {named["seed"]} if named and named["seed"] else {str(run.seed)}
            seeds = set(re.findall(r"\bseed:(\d+)", text)) or {*["not told"] * run.finished}
            self.expect(seeds <= of_name, file, f"seed {' '.join(seeds)}", " ".join(of_name))
            if run in figures.scored([run]):
                last = starts_of(text)[-1]
                self.log(run, last)
                if "model_dim" in run.settings:  # of our program
                    self.own_log(run, last, text)
            else:
                found = f"{run.status}: {figures.why(run)}"
                self.expect(run.name != self.main, file, found, "a score")
        for (one, a), (other, b) in combinations(zip(self.runs, texts, strict=True), 2):
            same = ["the text"] * (a == b)
            if one.name == other.name:
                same += ["the scores"] * (exact(one) == exact(other) != {})
                same += ["the losses"] * (losses(one) == losses(other) != [])
            self.expect(
                not same, other.path.name, f"{', '.join(same)} of {one.path.name}", "its own"
            )

    def log(self, run: Run, text: str) -> None:
        """That a log's lines agree."""
        file, trained = run.path.name, run.steps and run.step_ms * run.steps / 1000
        code, model, total = (run.sizes.get(name, -1) for name in ("code", "model", "total"))
        self.expect(code == self.size, file, f"Code size: {code}", f"{self.size}, of {PROGRAM}")
        whole = model > 0 and code + model == total
        self.expect(whole, file, f"{code} + {model} = {total} bytes", "the sum, in three lines")
        lines = re.findall(r"^(.+) val_loss:([\d.]+) val_bpb:([\d.]+)", text, re.M)
        scores = {name: [float(x) for x in score] for name, *score in lines}
        for name in (name for name in scores if f"{name}_exact" in scores):
            short, exact = scores[name], scores[f"{name}_exact"]
            near = all(abs(a - b) < 5.01e-5 for a, b in zip(short, exact, strict=True))
            self.expect(near, file, f"{name} {short}", f"{exact}, as of {name}_exact")
        final = [run.scores[run.final].val_loss, run.scores[run.final].val_bpb]
        last = scores.get("final_int8_zlib_roundtrip_exact", final)
        self.expect(last == final, file, f"last score {last}", f"{final}, by {run.final}")
        told, rounding = figures.train_seconds(run), 0.1 + 1e-5 * run.steps
        found = f"{told:.1f} s of training"
        self.expect(trained <= told + rounding, file, found, f"{trained:.1f}, as of its steps")
        told, of_lines = figures.eval_seconds(run), figures.eval_seconds(replace(run, seconds={}))
        found = f"{told:.1f} s of scoring"
        self.expect(of_lines <= told + rounding, file, found, f"{of_lines:.1f}, as of its scores")

    def own_log(self, run: Run, text: str, whole: str) -> None:
        """That a log of our program, from its last start, agrees; `whole` has all its starts."""
        repacked = run.repacked and run.name != self.main  # the main arm must have been trained
        self.own_limits(run, text, repacked)
        self.own_steps(run, text, whole, repacked)
        if repacked:
            self.own_weights(run)
        self.own_text(run, text)

    def own_limits(self, run: Run, text: str, repacked: bool) -> None:
        """That the verdicts on time and size are there and right."""
        file, settings = run.path.name, run.settings
        verdicts = 2 if repacked or not settings.get("iterations") else 3  # none on no steps
        self.expect(
            len(run.verdicts) == verdicts, file, f"limits: {run.verdicts}", f"{verdicts} verdicts"
        )
        cap = settings.get("max_wallclock_seconds") or math.inf
        limits = {
            "eval_seconds": (figures.eval_seconds(run), train_gpt.EVAL_SECONDS_LIMIT),
            "total_bytes": (run.sizes.get("total", -1), train_gpt.BYTES_LIMIT),
            "train_seconds": (figures.train_seconds(run), cap),
        }
        lines = re.findall(r"^limit:(\w+) (\S+) of (\S+) (\w+)$", text, re.MULTILINE)
        for name, *said, verdict in lines:
            found, most = (float(number.replace(",", "")) for number in said)
            value, allowed = limits.get(name, (math.nan, math.nan))
            right = math.isclose(found, value, rel_tol=0, abs_tol=0.051) and most == allowed
            right = right and (verdict == "PASS" or found >= most)
            right = right and (verdict == "FAIL" or found <= most)
            found = f"limit:{name} {' of '.join(said)} {verdict}"
            self.expect(right, file, found, f"{value:,} of {allowed:,}")
        packed = re.findall(r"^size: (\d+) bytes packed", text, re.MULTILINE)
        right = packed and int(packed[-1]) == run.sizes.get("model")
        found = f"size: {packed[-1] if packed else 'no'} bytes packed"
        self.expect(right, file, found, f"{run.sizes.get('model')}, as Serialized model")

    def own_steps(self, run: Run, text: str, whole: str, repacked: bool) -> None:
        """That it took the steps it was to take, and logged each that it logs."""
        file = run.path.name
        planned, every = (run.settings.get(name) for name in ("iterations", "train_log_every"))
        totals = {int(n) for n in re.findall(r"^step:\d+/(\d+) ", text, re.MULTILINE)}
        self.expect(totals <= {planned}, file, f"steps of {totals}", f"{planned}, by ITERATIONS")
        early = re.findall(r"^stopping_early: .* step:(\d+)/", text, re.MULTILINE)
        end = int(early[-1]) if early else 0 if repacked else planned
        self.expect(run.steps == end, file, f"{run.steps} steps", f"{end}, where it ended")
        began = re.search(r"^(?:resume: step (\d+)|step:)", whole, re.MULTILINE)
        began = int(began[1] or 0) if began else 0
        steps = {
            n for n in range(began + 1, run.steps + 1) if n <= 10 or (every and n % every == 0)
        }
        lost = sorted(steps - {step for step, *_ in run.curve})
        self.expect(not lost, file, f"no line of steps {lost[:10]}", "each step it logged")

    def own_weights(self, run: Run) -> None:
        """That repacked weights are of a run that is here, and no step is hidden."""
        file = run.path.name
        trained = [other for other in self.runs if other.seed == run.seed and other.steps]
        same = any(may_be_of_one(run, other) for other in trained)
        needed = "those of a run of its seed, by the score before int6"
        self.expect(same, file, "weights of no run here", needed)
        own, read = (run.seconds.get(name, 0) for name in ("train", "calibrate"))
        calibrating = run.settings.get("gptq_calib") == "train"  # reads, and counts as, training
        right = not run.curve and own <= (read + 0.1 if calibrating else 0)
        self.expect(right, file, f"{own} s of training", "none, where others trained")

    def own_text(self, run: Run, text: str) -> None:
        """That its scores are of as many bytes as its validation text has."""
        file, settings = run.path.name, run.settings
        of_text = run.scores[run.final].bytes
        told = re.findall(r"^warning: (\d+) bytes of validation text", text, re.MULTILINE)
        proven = re.findall(r"^byte_table:proven against (\d+)", text, re.MULTILINE)
        tokens, apart, needed = run.scores[run.final].tokens, 1e-7, of_text
        if settings.get("corpus") == "fineweb10B":
            needed = int(told[-1]) if told else train_gpt.VAL_BYTES
            apart = apart if told else 1e-4
        elif proven and tokens < train_gpt.PROOF_TOKENS:
            needed = int(proven[-1])
        right = math.isclose(of_text, needed, rel_tol=apart, abs_tol=1)
        self.expect(right, file, f"scores of {of_text} bytes of text", needed)
        if settings.get("vocab_size") == train_gpt.BYTE_VOCAB:
            found = f"scores of {of_text} bytes of text"
            self.expect(of_text <= tokens, file, found, f"at most {tokens}, a byte each")

    def one_text(self) -> None:
        """That all runs were scored on the same text, by its tokens and bytes."""
        runs = figures.scored(self.runs)
        scores = [(f"{run.path.name} {name}", s) for run in runs for name, s in run.scores.items()]
        tokens = {name: score.tokens for name, score in scores}
        found = f"tokens {tokens}"
        self.expect(len({*tokens.values()}) < 2, "train_seed<N>.log", found, "one, as of one text")
        ratios = {name: s.val_loss / s.val_bpb if s.val_bpb else 0 for name, s in scores}
        alike = not ratios or max(ratios.values()) <= min(ratios.values()) * (1 + 1e-6)
        found = f"nats a bit {ratios}"
        self.expect(alike, "train_seed<N>.log", found, "one, as of one text")
        texts = {str(value) for key, value in flat(self.told).items() if key.endswith("val_sha256")}
        self.expect(len(texts) < 2, FIGURES, f"val_sha256 {sorted(texts)}", "one, as of one text")

    def arms_alike(self) -> None:
        """That the runs of an arm differ by their seeds alone."""
        for arm in self.arms.values():
            seeds = [run.seed for run in arm]
            self.expect(
                len({*seeds}) == len(seeds), arm[0].path.name, f"seeds {seeds}", "each once"
            )
            for run in arm[1:]:
                pairs = {name: (run.settings.get(name), of) for name, of in arm[0].settings.items()}
                other = {k: v for k, v in pairs.items() if v[0] != v[1] and k not in INCIDENTAL}
                same = not other or not figures.scored([run])
                self.expect(same, run.path.name, other, f"the settings of {arm[0].path.name}")

    def record(self) -> None:
        """The rules of the record track."""
        if self.folder.resolve().parent.name != RECORD:
            return
        file, seeds = "train_seed<N>.log", len({run.seed for run in self.done})
        self.expect(seeds >= RECORD_SEEDS, file, f"{seeds} seeds", f"{RECORD_SEEDS} or more")
        for run in self.done:
            file, on = run.path.name, figures.hardware(run) or "hardware not told"
            for name, (found, most) in figures.limits_of([run]).items():
                self.expect(found <= most, file, f"{found:,} {name}", f"at most {most:,}")
            self.expect(run.steps, file, "no training", "the steps of its training")
            self.expect(run.status == "ok", file, f"{run.status} {run.verdicts}", "PASS")
            right = run.ranks == RECORD_RANKS and RECORD_GPU in on
            self.expect(right, file, on, f"{RECORD_RANKS}x{RECORD_GPU}")
            size = run.scores[run.final].bytes
            right = math.isclose(size, train_gpt.VAL_BYTES, rel_tol=1e-4)
            self.expect(
                right, file, f"{size} bytes scored", f"{train_gpt.VAL_BYTES}, the challenge's"
            )

    def submission(self) -> None:
        """submission.json: that it says who and what, and each figure as the logs have it."""
        for key in ABOUT:
            value = self.told.get(key)
            self.expect(
                isinstance(value, str) and value.strip(), FIGURES, f"{key}: {value}", "text"
            )
        blurb = str(self.told.get("blurb"))
        hides = re.search(r"\n|<[a-zA-Z!/]", blurb)
        self.expect(not hides, FIGURES, f"blurb: {blurb}", "one line without marks")
        day = str(self.told.get("date"))
        try:
            right = str(date.fromisoformat(day)) == day
        except ValueError:
            right = False
        self.expect(right, FIGURES, f"date: {day}", "YYYY-MM-DD")
        self.expect(self.done, "train_seed<N>.log", "no run with a score", "one in the main arm")
        if not self.done:
            return
        needed = flat(figures.submission(self.runs, self.main, self.base))
        told = flat(self.told)
        for key, value in needed.items():
            found = told.get(key, "missing")
            same = type(found) is type(value) and found == value
            self.expect(
                same,
                FIGURES,
                f"{key}: {found}",
                f"{'null' if value is None else value}, by the logs",
            )
        known = {*needed, *ABOUT}
        for key in (key for key in needed if key.endswith(".val_bpb")):
            at = key.removesuffix("val_bpb")
            known |= {f"{at}code_sha256", f"{at}val_sha256"}
            found = told.get(f"{at}code_sha256")
            self.expect(
                found == self.code,
                FIGURES,
                f"{at}code_sha256: {found}",
                f"{self.code}, of the source",
            )
            found = str(told.get(f"{at}val_sha256"))
            right = re.fullmatch("[0-9a-f]{64}", found)
            self.expect(
                right, FIGURES, f"{at}val_sha256: {found}", "the SHA-256 of the text scored"
            )
        for key in sorted(told.keys() - known):
            self.expect(False, FIGURES, f"{key}: {told[key]}", "only what the logs have")

    def readme(self) -> None:
        """README: that its figures are those made of the logs, and what it shows is there."""
        text = self.parsed(TEXT, str) or ""
        found = re.search(f"{re.escape(BEGIN)}.*{re.escape(END)}", text, re.DOTALL)
        self.expect(found, TEXT, "no block of figures", f"{BEGIN} ... {END}")
        head = f"# {self.told.get('name')}\n\n{self.told.get('blurb')}\n\n{BEGIN}\n"
        first = text.partition(BEGIN)[0]
        self.expect(text.startswith(head), TEXT, f"first {first!r:.200}", "name, blurb, figures")
        results = re.findall(
            r"^[ >]*#+ *(?:results|scores?)\b.*", text, re.MULTILINE | re.IGNORECASE
        )
        self.expect(len(results) < 2, TEXT, f"headings {results}", "one")
        if found and self.done:
            defaults = Defaults(self.tree or ast.Module([], []))
            needed = figures.block(self.runs, self.main, self.base, defaults).splitlines()
            for a, b in zip_longest(found[0].splitlines(), needed, fillvalue="no line"):
                self.expect(a == b, TEXT, a, f"{b}, by the logs")
        for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
            self.expect(
                "://" in name or (self.folder / name).is_file(),
                TEXT,
                f"{name}, which is missing",
                "a picture",
            )

    def source(self) -> None:
        """The program as it reads."""
        if self.tree:
            program.check_source(self.expect, self.tree, self.needs, self.program.file)
        for run in self.done[:1]:
            torch = f"torch=={run.machine.get('torch', '').partition('+')[0]}"
            right = torch in self.needs.split() or not run.machine
            self.expect(right, NEEDS, self.needs, f"{torch}, as it ran")

    def imports(self) -> None:
        """The program as reviewers import it; one whose source is not known is not executed."""
        if self.program:
            program.check_import(self.expect, self.folder)

    def runs_alone(self) -> None:
        """The program as it runs; one whose source is not known is not executed."""
        if self.program:
            program.check_run(self.expect, self.folder)


def no_constant(name: str) -> None:
    """Refuse what is no JSON."""
    raise ValueError(f"{name} is no number")


def flat(told: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of figures by dotted keys."""
    leaves = {}
    for key, value in told.items():
        inner = isinstance(value, dict) and value
        leaves |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return leaves


def exact(run: Run) -> dict[str, Any]:
    """The scores of a run, to the last digit."""
    return {name: (score.val_loss, score.val_bpb) for name, score in run.scores.items()}


def may_be_of_one(run: Run, other: Run) -> bool:
    """Whether scores before int6 may be of the same weights: of windows of one length, equal."""
    lengths = {r.settings.get("eval_seq_len") for r in (run, other)}
    a, b = (exact(r).get("float", (math.nan,))[0] for r in (run, other))
    return len(lengths) > 1 or math.isclose(a, b, rel_tol=1e-5)


def losses(run: Run) -> list[float]:
    """The training losses of a run."""
    return [loss for _, _, loss in run.curve]


def check(folder: Path, run: bool = True) -> Check:
    """The folder checked; without `run`, nothing of its program is run."""
    found = Check(folder)
    parts = [found.files, found.logs, found.arms_alike, found.one_text, found.record]
    parts += [
        found.submission,
        found.readme,
        found.source,
        *[found.imports, found.runs_alone] * run,
    ]
    for part in parts:
        try:
            part()
        except Exception as error:  # whatever a strange folder raises
            found.expect(False, "folder", f"{part.__name__}: {error!r:.300}", "what can be checked")
    return found


def faults_of(folder: Path, run: bool = True) -> list[str]:
    """All that is wrong with a submission folder, a line each."""
    return check(folder, run).faults


def main(argv: list[str]) -> int:
    """The program; its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--no-run", action="store_true", help="run nothing of the program")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        print(f"error: {args.folder}: no folder", file=sys.stderr)
        return 2
    found = check(args.folder, not args.no_run)
    ran = "nothing of it was run" if args.no_run else "it was imported and run twice"
    print("\n".join(found.faults or [f"ok: files, logs, figures, rules, source of program; {ran}"]))
    print(UNPROVEN)
    return int(bool(found.faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
