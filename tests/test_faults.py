"""The table of faults: complete, each with a test, and guards whose removal is noticed."""

import re

import faults
import pytest
from conftest import ROOT


def numbers_marked() -> set[int]:
    """Read from the tests' text: to collect them all would take longer than this suite."""
    found = []
    for path in (ROOT / "tests").glob("test_*.py"):
        for numbers in re.findall(r"\bfault\(([\d, ]+)\)", path.read_text(encoding="utf-8")):
            found += map(int, numbers.split(","))
    return set(found)


def test_every_fault_has_a_test():
    assert list(faults.FAULTS) == list(range(1, 57))
    assert max(map(len, faults.FAULTS.values())) <= 96
    marked = numbers_marked()
    assert not faults.FAULTS.keys() - marked - faults.PENDING, "no test holds these"
    assert not faults.PENDING & marked, "these have a test and are no longer PENDING"
    assert not marked - faults.FAULTS.keys(), "no such faults"


def test_the_readme_shows_the_table():
    assert all(text.count(" -> ") == 1 for text in faults.FAULTS.values())
    assert faults.readme_table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_guard_to_remove_is_there_once():
    assert len(faults.REMOVALS) >= 30
    for edit in faults.REMOVALS.values():
        assert faults.removed(edit) != (ROOT / edit.file).read_text(encoding="utf-8")


@pytest.mark.parametrize("guard", ["no such line of code", "return"])
def test_a_guard_that_is_not_there_once_is_an_error(guard):
    with pytest.raises(ValueError, match=r"train_gpt\.py has \d+ times, not once: "):
        faults.removed(faults.Edit(guard, "pass"))


def test_the_table_tells_what_has_no_test():
    holders = {n: [faults.Holder(f"test_x.py::test_{n}", ())] for n in faults.FAULTS}
    holders[7] = [faults.Holder(f"test_y.py::test_z[{i}]", ("gpu",)) for i in range(2)]
    text, without = faults.table(holders)
    assert (text.splitlines()[-1], without) == ("56 of 56", [])
    assert "      test_y.py::test_z (2 cases) gpu" in text.splitlines()
    del holders[7], holders[9]
    text, without = faults.table(holders)
    assert (text.splitlines()[-2:], without) == (["54 of 56", "without a test: 7, 9"], [7, 9])
    assert faults.table({**holders, 57: []})[1] == [7, 9, 57]


@pytest.mark.slow
def test_a_removed_guard_is_noticed_and_a_changed_comment_is_not(capsys):
    name = "tests/test_data.py::test_a_damaged_shard_is_refused_by_name"
    holders = {n: [faults.Holder(name, ())] for n in (4, 5, 6)}
    harmless = faults.Edit("# ---- Data: what it eats ----", "# ---- Data: its food ----")
    edits = {4: faults.REMOVALS[4], 5: harmless, 6: faults.Edit("not there", "")}
    assert faults.remove_guards(edits, holders) == [5, 6]
    told = capsys.readouterr().out
    assert f"fails: {name}" in told
    assert "ERROR: train_gpt.py has 0 times, not once" in told
