"""The workbooks of Animal Kingdom: AR_metadata.xlsx and df_action.xlsx.

Read through openpyxl, which `pip install 'msq[xlsx]'` brings; nothing else of msq needs it.
"""

from __future__ import annotations

import ast
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from msq.errors import DatasetError

SEGMENTS = ("head", "middle", "tail")


class MetadataRow(NamedTuple):
    """One row of sheet `AR`.

    Attributes:
        where: sheet and row.
        id: video id.
        kind: `train` or `test`.
        labels: as written, `2,40`.
        pairs: as written, a list of (animal, action).
    """

    where: str
    id: str
    kind: str
    labels: str
    pairs: str


class ClassNames(NamedTuple):
    """The classes of sheet `Action`.

    Attributes:
        names: in the order of the label numbers.
        error_cells: labels that are an error cell (the official file has one, Yawning's), filled
            by the one number that no other row has.
    """

    names: tuple[str, ...]
    error_cells: int


def read_classes_sheet(file: Path) -> ClassNames:
    """Class names from `AR_metadata.xlsx`.

    Raises:
        DatasetError: openpyxl or the sheet is missing, or the labels are not 0 … K-1.
    """
    by_label: dict[int, str] = {}
    errors: list[str] = []
    for where, (label, action) in sheet(file, "Action", ("Label", "Action")):
        name = str(action or "").strip()
        if not name:
            raise DatasetError(f"{file}, {where}: expected an action's name, found none")
        if isinstance(label, int | float) and int(label) == label:
            if int(label) in by_label:
                raise DatasetError(f"{file}, {where}: label {int(label)} stands twice")
            by_label[int(label)] = name
        else:
            errors.append(name)
    total = len(by_label) + len(errors)
    free = sorted(set(range(total)) - by_label.keys())
    if len(free) != len(errors) or len(errors) > 1:
        raise DatasetError(
            f"{file}, sheet Action: expected the labels 0 to {total - 1} (one may be an error "
            f"cell), found none for {', '.join(errors) or free}; download the file again"
        )
    by_label.update(zip(free, errors, strict=True))
    return ClassNames(tuple(by_label[k] for k in range(total)), len(errors))


def read_metadata_sheet(file: Path) -> list[MetadataRow]:
    """The clips of sheet `AR`, in its order.

    Raises:
        DatasetError: openpyxl, the sheet or its columns are missing.
    """
    columns = ("video_id", "type", "labels", "list_animal_action")
    return [
        MetadataRow(where, *(str("" if cell is None else cell).strip() for cell in cells))
        for where, cells in sheet(file, "AR", columns)
    ]


def read_segments_sheet(
    file: Path, classes: Sequence[str]
) -> tuple[dict[str, tuple[int, ...]], int]:
    """Head, middle and tail classes of `df_action.xlsx`, joined by name.

    The numbers in its column `index` differ from the labels' for some classes, so they are not
    used. Names are compared without regard to case.

    Returns:
        (segment -> ascending label numbers, how many rows have another index than their label).

    Raises:
        DatasetError: openpyxl or a column is missing, a name is not a class, a segment is none of
            head, middle, tail, or a class has none.
    """
    number = {name.casefold(): k for k, name in enumerate(classes)}
    found: dict[str, list[int]] = {segment: [] for segment in SEGMENTS}
    disagree = 0
    for where, (action, index, segment) in sheet(file, None, ("action", "index", "segment")):
        label = number.get(str(action or "").strip().casefold())
        kind = str(segment or "").strip().lower()
        if label is None:
            raise DatasetError(
                f"{file}, {where}: the action {action!r} is not among the {len(classes)} classes; "
                "is it of another version than AR_metadata.xlsx?"
            )
        if kind not in found:
            raise DatasetError(
                f"{file}, {where}: expected segment head, middle or tail, found {segment!r}"
            )
        found[kind].append(label)
        disagree += index != label
    listed = sorted(k for labels in found.values() for k in labels)
    if listed != list(range(len(classes))):
        lost = [classes[k] for k in range(len(classes)) if listed.count(k) != 1]
        raise DatasetError(
            f"{file}: expected each of the {len(classes)} classes once, not so for "
            f"{', '.join(lost[:5])}"
        )
    return {segment: tuple(sorted(labels)) for segment, labels in found.items()}, disagree


def judge_pairs(row: MetadataRow, labels: Sequence[int], number: Mapping[str, int]) -> str:
    """`agree`, `disagree` or `unreadable`: the (animal, action) pairs of a row against its labels.

    Args:
        row: of sheet `AR`.
        labels: its labels.
        number: class name in lower case -> label.
    """
    try:
        pairs = ast.literal_eval(row.pairs)
        actions = {number[str(pair[1]).strip().casefold()] for pair in pairs}
    except (ValueError, SyntaxError, KeyError, IndexError, TypeError):
        return "unreadable"
    return "agree" if actions == set(labels) else "disagree"


def sheet(file: Path, name: str | None, columns: Sequence[str]) -> list[tuple[str, list[Any]]]:
    """(row, cells of the columns asked for) of every row that has any; columns by header name.

    Args:
        file: the workbook.
        name: of the sheet; the first if None.
        columns: header names, compared without regard to case.

    Raises:
        DatasetError: openpyxl is not installed, the file is no workbook, or a sheet or column is
            missing.
    """
    rows = _rows(file, name)
    header = [str(cell or "").strip().lower() for cell in (rows[0] if rows else ())]
    lost = [column for column in columns if column.lower() not in header]
    if lost:
        raise DatasetError(
            f"{file}, sheet {name or 'number 1'}: expected the columns {', '.join(columns)}, found "
            f"{', '.join(header) or 'none'}"
        )
    places = [header.index(column.lower()) for column in columns]
    found = []
    for number, cells in enumerate(rows[1:], start=2):
        taken = [cells[k] if k < len(cells) else None for k in places]
        if any(cell is not None for cell in taken):
            found.append((f"sheet {name or 'number 1'}, row {number}", taken))
    return found


def _rows(file: Path, name: str | None) -> list[tuple[Any, ...]]:
    try:
        import openpyxl
    except ImportError:
        raise DatasetError(
            f"{file}: reading an Excel workbook needs openpyxl: pip install 'msq[xlsx]'"
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of styles and extensions that hold no data
        try:
            book = openpyxl.load_workbook(file, read_only=True, data_only=True)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as bad:
            raise DatasetError(
                f"{file}: not an Excel workbook ({bad}); if it was cut off, download it again"
            ) from None
        try:
            if name is not None and name not in book.sheetnames:
                raise DatasetError(
                    f"{file}: expected a sheet {name}, found {', '.join(book.sheetnames)}; is it "
                    "the workbook of another dataset?"
                )
            table = book[name] if name is not None else book.worksheets[0]
            return list(table.iter_rows(values_only=True))
        finally:
            book.close()
