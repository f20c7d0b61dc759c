"""The table of faults is complete, and each fault has a test."""

import re

import faults
from conftest import ROOT


def numbers_marked() -> set[int]:
    """The numbers in the text of the tests: it is faster than collecting all of them."""
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


def test_the_table_names_faults_without_a_test():
    holders = {n: [faults.Holder(f"test_x.py::test_{n}", ())] for n in faults.FAULTS}
    holders[7] = [faults.Holder(f"test_y.py::test_z[{i}]", ("gpu",)) for i in range(2)]
    text, without = faults.table(holders)
    assert (text.splitlines()[-1], without) == ("56 of 56", [])
    assert "      test_y.py::test_z (2 cases) gpu" in text.splitlines()
    del holders[7], holders[9]
    text, without = faults.table(holders)
    assert (text.splitlines()[-2:], without) == (["54 of 56", "without a test: 7, 9"], [7, 9])
    assert faults.table({**holders, 57: []})[1] == [7, 9, 57]
