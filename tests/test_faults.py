"""The table of faults: complete, shown in tests/README.md, each fault held by the default suite."""

from types import SimpleNamespace

import faults
import pytest
from conftest import ROOT


def test_table_is_complete():
    assert list(faults.FAULTS) == list(range(1, 57))
    assert all(text.count(" -> ") == 1 for text in faults.FAULTS.values())


def test_tests_readme_shows_the_table():
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    assert faults.markdown() in text, "run `python tests/faults.py --markdown`"


def test_default_suite_holds_every_fault(request: pytest.FixtureRequest):
    """In a run of the whole suite; another one has not collected all tests."""
    if request.config.option.file_or_dir or request.config.option.keyword:
        pytest.skip("needs the whole suite")
    assert faults.without_test(faults.holders(request.session.items)) == []


def test_slow_and_gpu_tests_alone_hold_no_fault():
    def item(name: str, number: int, *kinds: str) -> SimpleNamespace:
        marks = [pytest.mark.fault(number).mark]
        return SimpleNamespace(
            nodeid=name, get_closest_marker=lambda kind: kind in kinds, iter_markers=lambda _: marks
        )

    items = [item("a[0]", 1, "slow"), item("a[1]", 1), item("a[2]", 1, "slow")]
    items += [item("b", 2, "gpu"), item("c", 3)]
    found = faults.holders(items)
    assert found[1] == {"a": ""} and found[2] == {"b": "gpu"}
    assert faults.without_test(found) == [2, *range(4, 57)]
