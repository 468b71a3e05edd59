"""Names of classes between commas, as typed."""

from __future__ import annotations

import pytest

from msq.class_list import class_names
from msq.errors import UsageError


@pytest.mark.parametrize(
    ("line", "names"),
    [
        (None, None),
        ("", []),
        ("dog running", ["dog running"]),
        (" bird flying , dog eating,, ", ["bird flying", "dog eating"]),
        ('"dog eating, barking",dog running', ["dog eating, barking", "dog running"]),
        ('dog running, "dog eating, barking"', ["dog running", "dog eating, barking"]),
        ('say ""now"",x', ['say ""now""', "x"]),
        ('"say ""now""",x', ['say "now"', "x"]),
        ("Chien qui aboie, 犬", ["Chien qui aboie", "犬"]),
    ],
)
def test_names_are_read_as_a_row_of_csv(line: str | None, names: list[str] | None) -> None:
    assert class_names(line) == names


@pytest.mark.parametrize("line", ['"dog eating, barking', '"dog" eating,x', "a\nb"])
def test_a_line_that_is_no_row_is_refused(line: str) -> None:
    with pytest.raises(UsageError, match=r"--classes .*: expected names between commas"):
        class_names(line, "--classes")
