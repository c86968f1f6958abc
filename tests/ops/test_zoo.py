"""Tests of many cases in one name those that fail."""

from __future__ import annotations

import pytest

from tests.ops.zoo import Case, each, zoo


def test_all_cases_run_and_those_that_fail_are_named() -> None:
    seen: list[str] = []

    @each(zoo((2, 5)), slow=(5,))
    def check(case: Case) -> None:
        seen.append(case.name)
        assert "huge" not in case.name
        assert "tiny" not in case.name

    (mark,) = check.pytestmark
    groups = {group.id: (group.values[0], [marker.name for marker in group.marks]) for group in mark.args[1]}
    assert {name: (len(cases), marks) for name, (cases, marks) in groups.items()} == {
        "all": (22, []),
        "slow": (22, ["slow"]),
    }
    with pytest.raises(AssertionError) as failure:
        check(cases=groups["all"][0])
    assert len(seen) == 22
    assert failure.value.__notes__ == ["2 of 22 cases fail: tiny-T2, huge-T2"]
