"""Class names on the command line: between commas, one with a comma of its own in quotes."""

from __future__ import annotations

import csv

from msq.errors import UsageError


def class_names(line: str | None, option: str = "--labels") -> list[str] | None:
    """The names of a line such as `run,"eat, bark"`, read as a row of CSV; None for None.

    Args:
        line: as typed.
        option: its name, for messages.

    Raises:
        UsageError: quotes that are not closed, or text beside them.
    """
    if line is None:
        return None
    try:
        cells = next(csv.reader([line], skipinitialspace=True, strict=True), [])
    except csv.Error as error:
        raise UsageError(
            f"{option} {line!r}: expected names between commas, one with a comma in quotes, such "
            f'as run,"eat, bark" (a quote within them is doubled); {error}'
        ) from None
    return [name for cell in cells if (name := cell.strip())]
