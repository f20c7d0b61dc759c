"""Mutation testing of train_gpt.py: does a test fail when the program is slightly wrong?

    python -m tests.mutants --count 100 --seed 0 --jobs 1 --out FOLDER

The mutations are those of cosmic-ray; annotations and f-strings are left out. The sample takes one
mutant from each of `--count` equal stretches of the file. The command works on clones of the last
commit. It first runs the default suite under coverage, with a comment added to the program: the
tests that fail then depend on the source's text, and are left out. Each mutant is then tested by
the tests that execute its statement, the quickest first, up to `--budget` seconds of their usual
time. FOLDER/mutants.jsonl gets one line a mutant. The same command resumes an interrupted one.
"""

import argparse
import ast
import difflib
import hashlib
import json
import os
import queue
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

import coverage
import pytest
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from parso.tree import NodeOrLeaf
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "train_gpt.py"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
# Replacements that nearly always raise a TypeError, or that change nothing for small integers.
TRIVIAL = re.compile(
    r"(Add|Sub|Mul|Div|Mod|Pow)_(RShift|LShift|Bit\w+)$|USub_(Invert|UAdd)$"
    r"|(RShift|LShift|BitOr|BitAnd|BitXor)_(Add|Sub|Mul|Div|FloorDiv|Mod|Pow)$"
    r"|(Eq|Lt|Gt|LtE|GtE)_Is|(Is|IsNot)_(Lt|Gt)|Is_Eq|IsNot_NotEq"
)


class Mutant(NamedTuple):
    """A change of the program: cosmic-ray's operator, and at which of its places."""

    line: int
    operator: str
    occurrence: int

    def apply(self, source: str) -> str | None:
        """Returns the changed source, or None if it does not compile or is the same program."""
        operator = plugins.get_operator(self.operator)()
        changed = mutate_code(source, operator, self.occurrence)
        try:
            same = ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source))
        except SyntaxError:
            return None
        return None if same else changed


def is_text(node: NodeOrLeaf) -> bool:
    """Returns whether a node is part of an annotation or of an f-string."""
    while node.parent is not None:
        child, node = node, node.parent
        annotation = node.type == "annassign" and child is node.children[1]
        returned = node.type == "funcdef" and child is node.annotation
        if annotation or returned or node.type in ("tfpdef", "fstring"):
            return True
    return False


def sample(source: str, count: int, seed: int) -> list[list[Mutant]]:
    """Returns lists of mutants in the order of the file; one of each list is to be tested."""
    operators = [(name, plugins.get_operator(name)) for name in plugins.operator_names()]
    operators = [(name, kind()) for name, kind in operators if not kind.arguments()]
    places: dict[tuple, list[Mutant]] = defaultdict(list)
    seen: Counter[str] = Counter()
    for node in ast_nodes(get_ast(source)):
        for name, operator in operators:
            for place in operator.mutation_positions(node):
                if not TRIVIAL.search(name) and not is_text(node):
                    places[place].append(Mutant(place[0][0], name, seen[name]))
                seen[name] += 1
    ordered = [places[place] for place in sorted(places)]
    count = min(count, len(ordered))
    generator = random.Random(seed)
    candidates = []
    for i in range(count):
        stretch = ordered[i * len(ordered) // count : (i + 1) * len(ordered) // count]
        generator.shuffle(stretch)
        candidates.append(
            [mutant for place in stretch for mutant in generator.sample(place, len(place))]
        )
    return candidates


class Recorder:
    """A pytest plugin that tells coverage which test runs, and keeps what the tests cost.

    A context is a test's id, or the name of a fixture that several tests share.
    """

    def __init__(self) -> None:
        self.fixtures: dict[str, list[str]] = {}  # the shared fixtures of each test
        self.seconds: Counter[str] = Counter()  # of each context
        self.failed: set[str] = set()
        self.context, self.since = "", time.monotonic()

    def switch(self, context: str) -> None:
        """Changes the context of this process and of those started from now on."""
        now = time.monotonic()
        self.seconds[self.context] += now - self.since
        self.context, self.since = context, now
        os.environ["COVERAGE_CONTEXT"] = context
        coverage.Coverage.current().switch_context(context)
        launch = sys.modules.get("launch")
        if launch:  # its processes get no other environment
            passed = {k: v for k, v in os.environ.items() if k.startswith("COVERAGE_")}
            launch.KEPT.update(passed)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Notes which shared fixtures each test uses."""
        for item in session.items:
            used = [found[-1] for found in item._fixtureinfo.name2fixturedefs.values()]
            self.fixtures[item.nodeid] = [str(f) for f in used if f.scope != "function"]
        forkserver.ensure_running()  # while there is no context that its processes would inherit

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Gives a test its context."""
        self.switch(item.nodeid)
        result = yield
        self.switch("")
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef) -> Iterator[object]:
        """Gives a shared fixture its context."""
        before = self.context
        if fixturedef.scope != "function":
            self.switch(str(fixturedef))
        try:
            return (yield)
        finally:
            self.switch(before)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes a failure."""
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Writes everything to files of this process, which may be a worker of pytest-xdist."""
        measured = coverage.Coverage.current()
        measured.stop()
        measured.save()
        facts = {"fixtures": self.fixtures, "seconds": self.seconds, "failed": sorted(self.failed)}
        path = Path(os.environ["COVERAGE_FACTS"], f"facts-{os.getpid()}.part")
        path.write_text(json.dumps(facts), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    """Lets `-p tests.mutants` record a session."""
    config.pluginmanager.register(Recorder())


def run_pytest(
    arguments: list[str], tree: Path, limit: float, output: Path, env: dict[str, str]
) -> int | None:
    """Runs pytest in a clone; returns its exit status, or None past the limit in seconds."""
    with tempfile.TemporaryDirectory() as folder, open(output, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*PYTEST, f"--basetemp={folder}/tests", *arguments],
            cwd=tree,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **env},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(5)  # torchrun ends its workers, which are in sessions of their own
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None


def run_coverage(tree: Path, out: Path, jobs: int) -> None:
    """Runs the default suite in a clone; writes out/coverage.db and out/facts.json."""
    program = tree / PROGRAM
    source = program.read_text(encoding="utf-8")
    program.write_text(f"{source.rstrip()} #changes nothing\n", encoding="utf-8")
    config = out / "coveragerc"
    config.write_text(
        f"[run]\nparallel = true\ndata_file = {out}/coverage.db\ninclude = */{PROGRAM}\n"
        "context = ${COVERAGE_CONTEXT-}\npatch = fork, _exit\n"
    )
    env = {"COVERAGE_PROCESS_START": str(config), "COVERAGE_FACTS": str(out)}
    arguments = ["-p", "tests.mutants", "--tb=short", "-n", str(jobs if jobs > 1 else 0)]
    arguments += ["-m", "not gpu and not slow"]
    print(f"running the default suite under coverage, see {out}/coverage.log", file=sys.stderr)
    if run_pytest(arguments, tree, 3600, out / "coverage.log", env) not in (0, 1):
        raise SystemExit(f"the default suite cannot be run: {out}/coverage.log")
    measured = coverage.Coverage(config_file=str(config))
    measured.combine()
    measured.save()
    facts: dict[str, dict] = {"fixtures": {}, "seconds": {}, "failed": {}}
    for path in out.glob("facts-*.part"):
        part = json.loads(path.read_text(encoding="utf-8"))
        facts["fixtures"].update(part["fixtures"])
        facts["failed"].update(dict.fromkeys(part["failed"]))
        for context, seconds in part["seconds"].items():
            facts["seconds"][context] = max(seconds, facts["seconds"].get(context, 0.0))
        path.unlink()
    print("left out, as they failed:", *facts["failed"], sep="\n  ", file=sys.stderr)
    (out / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


class Coverage:
    """Which tests execute a line, and how long they take."""

    def __init__(self, out: Path, source: str) -> None:
        facts = json.loads((out / "facts.json").read_text(encoding="utf-8"))
        self.seconds: dict[str, float] = Counter(facts["seconds"])
        self.fixtures = {t: f for t, f in facts["fixtures"].items() if t not in facts["failed"]}
        # The tests that a context belongs to. The empty one is that of the program's import.
        self.users = defaultdict(set, {"": set(self.fixtures)})
        for test, fixtures in self.fixtures.items():
            for context in (test, *fixtures):
                self.users[context].add(test)
        self.contexts: dict[int, set[str]] = defaultdict(set)  # of each line
        data = coverage.CoverageData(str(out / "coverage.db"))
        data.read()
        for file in data.measured_files():
            for line, contexts in data.contexts_by_lineno(file).items():
                self.contexts[line].update(contexts)
        self.statements = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.stmt)]

    def tests_of(self, line: int) -> set[str]:
        """Returns the tests that execute a line's statement: all, if the import executes it."""
        around = [n for n in self.statements if n.lineno <= line <= n.end_lineno]
        lines = range(line, line + 1)
        if around and not hasattr(around[-1], "body"):  # simple, on one line or several
            lines = range(around[-1].lineno, around[-1].end_lineno + 1)
        return {test for n in lines for c in self.contexts[n] for test in self.users[c]}

    def choose(self, tests: set[str], budget: float) -> tuple[list[str], float]:
        """Returns the tests that fit into the budget, the quickest first, and their seconds."""
        price = {t: sum(self.seconds[context] for context in (t, *self.fixtures[t])) for t in tests}
        chosen: list[str] = []
        paid: set[str] = set()
        total = 0.0
        for test in sorted(tests, key=lambda test: (price[test], test)):
            contexts = {test, *self.fixtures[test]} - paid
            total += sum(self.seconds[context] for context in contexts)
            if chosen and total > budget:
                break
            paid |= contexts
            chosen.append(test)
        return chosen, total


def try_mutant(
    number: int, candidates: list[Mutant], source: str, facts: Coverage, tree: Path, budget: float
) -> dict[str, object]:
    """Tests the first candidate that is another program; returns its line of mutants.jsonl."""
    changes = ((mutant, mutant.apply(source)) for mutant in candidates)
    mutant, changed = next(change for change in changes if change[1])
    (tree / PROGRAM).write_text(changed, encoding="utf-8")
    tests = facts.tests_of(mutant.line)
    chosen, usual = facts.choose(tests, budget)
    outcome, killer, started = "no test", "", time.monotonic()
    if chosen:
        output = tree.with_suffix(".log")
        arguments = ["-x", "--tb=no", "-rfE", "--hypothesis-seed=0", *chosen]
        status = run_pytest(arguments, tree, 60 + 4 * usual, output, {})
        outcome = {0: "survived", None: "timeout"}.get(status, "killed")
        if outcome == "killed":
            said = output.read_text(encoding="utf-8").splitlines()
            failures = [line for line in said if line.startswith(("FAILED ", "ERROR "))]
            killer = [*failures, *said[-1:]][0]
    lines = difflib.unified_diff(
        source.splitlines(), changed.splitlines(), PROGRAM, PROGRAM, "", "", 1, ""
    )
    return {
        "number": number,
        "line": mutant.line,
        "operator": mutant.operator,
        "outcome": outcome,
        "killer": killer,
        "tests": f"{len(chosen)} of {len(tests)}",
        "seconds": round(time.monotonic() - started, 1),
        "diff": "\n".join(lines),
    }


def read_results(path: Path) -> dict[int, dict]:
    """Returns the results so far by their number; drops a line that was cut off."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    path.write_text("".join(whole), encoding="utf-8")
    return {result["number"]: result for result in map(json.loads, whole)}


def summary(results: dict[int, dict]) -> str:
    """Returns the diffs of the mutants that no test killed, then the counts."""
    parts = []
    for number, result in sorted(results.items()):
        if result["outcome"] in ("survived", "no test"):
            parts.append(f"{number}: {result['outcome']}, tests: {result['tests']}")
            parts.append(result["diff"] + "\n")
    counts = Counter(result["outcome"] for result in results.values())
    parts += [f"{counts[k]:4} {k}" for k in ("killed", "timeout", "survived", "no test")]
    return "\n".join(parts)


def check_stamp(path: Path, source: str, args: argparse.Namespace) -> None:
    """Raises SystemExit if the folder holds results of another program or sample."""
    digest = hashlib.sha256(source.encode()).hexdigest()
    stamp = f"{PROGRAM} {digest}, {args.count} mutants of seed {args.seed}\n"
    if path.exists() and path.read_text() != stamp:
        raise SystemExit(f"{path.parent} holds results of {path.read_text()}Take another --out.")
    path.write_text(stamp)


def main(argv: list[str], root: Path = ROOT) -> int:
    """Tests the sample of mutants and prints the summary; returns 0."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--count", type=int, default=100, help="mutants in the sample")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--jobs", type=int, default=1, help="mutants tested at once")
    parser.add_argument("--budget", type=float, default=120, help="seconds of tests for one mutant")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for i in range(args.jobs):
            tree = Path(folder) / f"tree{i}"
            subprocess.run(["git", "clone", "-q", str(root), str(tree)], check=True)
            trees.put(tree)
        source = (tree / PROGRAM).read_text(encoding="utf-8")
        check_stamp(out / "stamp.txt", source, args)
        if not (out / "facts.json").exists():
            run_coverage(tree, out, args.jobs)
        facts, candidates = Coverage(out, source), sample(source, args.count, args.seed)
        results = read_results(out / "mutants.jsonl")

        def work(number: int) -> dict[str, object]:
            tree = trees.get()
            try:
                return try_mutant(number, candidates[number], source, facts, tree, args.budget)
            finally:
                trees.put(tree)

        pool = ThreadPoolExecutor(args.jobs)
        try:
            left = [pool.submit(work, n) for n in range(len(candidates)) if n not in results]
            with open(out / "mutants.jsonl", "a", encoding="utf-8") as file:
                for future in tqdm(as_completed(left), total=len(candidates), initial=len(results)):
                    result = future.result()
                    results[result["number"]] = result
                    file.write(json.dumps(result) + "\n")
                    file.flush()
        finally:
            pool.shutdown(cancel_futures=True)
    print(summary(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
