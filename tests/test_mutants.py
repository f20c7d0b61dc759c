"""Mutation testing: which changes are drawn, and a whole run on a small program."""

import json
import subprocess
from pathlib import Path

import mutants
import pytest

PROGRAM = '''"""A program with a string that is {1 + 1}."""

import sys

LIMIT: int = 3


def add(a: int | None, b: int = 2) -> int | None:
    """Adds 1 and 1."""
    if a > LIMIT:
        return a + b
    return f"{a + b}"


def never_called(x):
    return x * 2


if __name__ == "__main__":
    print(add(int(sys.argv[1]), 5))
'''
TESTS = """import subprocess, sys
import pytest
import train_gpt

@pytest.fixture(scope="session")
def total():
    return train_gpt.add(6, 1)

def test_uses_fixture_first(total):
    pass

def test_uses_fixture_too(total):
    assert total == 7

def test_text():
    assert open(train_gpt.__file__).read().endswith(", 5))\\n")

def test_command():
    command = [sys.executable, "train_gpt.py", "4"]
    assert subprocess.run(command, capture_output=True).stdout == b"9\\n"
"""


def test_sample_has_changed_programs_without_annotations_and_strings():
    stretches = [stretch for seed in range(3) for stretch in mutants.sample(PROGRAM, 6, seed)]
    drawn = [next(filter(None, (m.apply(PROGRAM) for m in stretch))) for stretch in stretches]
    assert len(set(drawn)) > 6
    assert all(text != PROGRAM and text.count("int | None") == 2 for text in drawn)
    assert all('f"{a + b}"' in text and "Adds 1 and 1" in text for text in drawn)
    assert mutants.sample(PROGRAM, 6, 1) == mutants.sample(PROGRAM, 6, 1)


@pytest.mark.slow
def test_run_finds_killed_and_survived_mutants(tmp_path: Path):
    root = tmp_path / "project"
    (root / "tests").mkdir(parents=True)
    (root / "train_gpt.py").write_text(PROGRAM)
    (root / "tests" / "test_it.py").write_text(TESTS)
    (root / "tests" / "mutants.py").write_bytes(Path(mutants.__file__).read_bytes())
    (root / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    gpu\n")
    user = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*user, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    arguments = ["--count", "7", "--out", str(tmp_path / "out")]
    assert mutants.main(arguments, root) == 0
    path = tmp_path / "out" / "mutants.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    results = [json.loads(line) for line in lines]
    by_line = {r["line"]: (r["outcome"], r["tests"]) for r in results}
    assert by_line[11] == ("killed", "3 of 3")  # the shared fixture's lines are those of two tests
    assert by_line[16] == ("no test", "0 of 0")
    assert by_line[20] == ("killed", "1 of 1") and "test_command" in results[-1]["killer"]
    assert (root / "train_gpt.py").read_text() == PROGRAM

    path.write_text("".join(lines[:5]) + '{"numb')  # as an interrupted run leaves it
    assert mutants.main(arguments, root) == 0
    resumed = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["outcome"] for r in resumed] == [r["outcome"] for r in results]
    with pytest.raises(SystemExit, match="7 mutants of seed 0"):
        mutants.main(["--count", "8", "--out", str(tmp_path / "out")], root)
