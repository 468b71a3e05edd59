"""How lists of classes differ, said in one line."""

from __future__ import annotations

import pytest

from msq.head.class_difference import class_difference

MANY = [f"c{k:03}" for k in range(157)]


@pytest.mark.parametrize(
    ("expected", "found", "said"),
    [
        (MANY, MANY, None),
        (["a", "b"], ("a", "b"), None),
        (["a", "b"], ["b", "a"], "expected 2, found 2; the same in another order, "
                                 "class 0 is 'a' and 'b'"),
        (["a"], ["a", "b, c"], "expected 1, found 2; missing none, unknown 'b, c'"),
        (MANY, MANY[:150], "expected 157, found 150; missing 'c150', 'c151', 'c152', 'c153', "
                           "'c154' and 2 more, unknown none"),
        ([], ["a"], "expected 0, found 1; missing none, unknown 'a'"),
    ],
)  # fmt: skip
def test_the_line(expected: list[str], found: list[str], said: str | None) -> None:
    assert class_difference(expected, found) == (said and f"classes: {said}")
