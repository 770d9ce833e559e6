"""Checks of configs, and where fields lie."""

import math
from typing import Any

import pytest

from towers import checks
from towers.fields import columns, side_by_side, width_of


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (checks.check_counts, [1, 9], [0, -1]),
        (checks.check_positive, [1e-9, 5], [0.0, -1.0, math.nan, math.inf]),
        (checks.check_widths, [(1,), (4, 2)], [(), (0,), (4, -1)]),
        (lambda x: checks.check_widths(least=0, x=x), [(), (4, 2)], [(0,), (4, -1)]),
        (checks.check_dropout, [0.0, 0.9], [1.0, -0.1, math.nan]),
        (lambda x: checks.check_choice("x", x, "a", "b"), ["a", "b"], ["c", ""]),
    ],
)
def test_checks(check: Any, good: list[Any], bad: list[Any]) -> None:
    named = check in (checks.check_counts, checks.check_positive, checks.check_widths)
    for value in good:
        check(**{"x": value}) if named else check(value)
    for value in bad:
        with pytest.raises(ValueError, match=r"^(x|dropout) must be"):
            check(**{"x": value}) if named else check(value)


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_fusion_weights_are_finite(weight: float) -> None:
    checks.check_fusion({"click": 0.0, "like": -1.5}, {})
    with pytest.raises(ValueError, match=r"^fusion weight of like"):
        checks.check_fusion({"click": 1.0, "like": weight}, {})
    with pytest.raises(ValueError, match=r"^fusion weight of like"):
        checks.check_fusion({}, {"3": {"like": weight}})


@pytest.mark.parametrize(("group", "said"), [("new", "'new'"), ("-1", "'-1'"), ("01", "'01'"), ("²", "'²'")])
def test_a_user_group_is_a_number(group: str, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^fusion_by_group: expected the number of a user group, found {said}"):
        checks.check_fusion({}, {group: {"like": 1.0}})
    with pytest.raises(ValueError, match=r"group 2 names no task"):
        checks.check_fusion({}, {"2": {}})


def test_fields() -> None:
    fields = side_by_side({"user": 3, "age": 1}, {"item": 2})
    assert list(fields) == ["user", "age", "item"]
    assert width_of(fields) == 6
    assert columns(fields, ["item", "nowhere", "user"]) == [slice(4, 6), slice(0, 3)]
    assert width_of({}) == 0


def test_a_name_is_on_one_side_only() -> None:
    with pytest.raises(ValueError, match="both sides: age, user"):
        side_by_side({"user": 3, "age": 1}, {"user": 3, "age": 2, "item": 1})
