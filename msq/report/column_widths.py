"""How wide the columns of a table in the terminal are, so that words stay whole."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len

LONGEST = 24  # characters that are kept together; a path or a hash may be broken
FRAME = 3  # a column's line and the blank on either side of its text


def column_widths(lines: Sequence[Sequence[str]], room: int) -> list[int | None]:
    """Widths at which a table breaks between words, or else inside its longest words alone.

    Args:
        lines: header and rows, with as many cells each.
        room: characters of a line of the terminal.

    Returns:
        Characters of each column's text; None for all where nothing has to be broken, or where
        there is no room for a character of each.
    """
    columns = list(zip(*lines, strict=True))
    widths = [max(map(cell_len, column)) for column in columns]
    least = [
        max((min(cell_len(word), LONGEST) for cell in column for word in cell.split()), default=0)
        for column in columns
    ]
    over = sum(widths) + FRAME * len(columns) + 1 - room
    if over <= 0 or (FRAME + 1) * len(columns) + 1 > room:
        return [None] * len(columns)
    for _ in range(over):
        free = [k for k, width in enumerate(widths) if width > least[k]]
        widths[max(free or range(len(widths)), key=lambda k: widths[k])] -= 1
    return [*widths]
