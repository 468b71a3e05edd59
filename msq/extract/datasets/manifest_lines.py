"""The lines of a manifest, CSV or JSONL: records, or the reason why a line is none."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msq.errors import DatasetError

REQUIRED = ("path", "labels", "split")
OPTIONAL = ("id", "start", "end", "unknown")
COLUMNS = (*REQUIRED, *OPTIONAL)

Line = tuple[str, dict[str, Any] | str]  # where, and the record or the reason


def decode_text(path: Path) -> str:
    """The file's text. Bytes that are not UTF-8 stay marked, so that only their line is lost."""
    raw = path.read_bytes()
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return raw.decode("utf-16")
        except UnicodeDecodeError as bad:
            raise DatasetError(f"{path}: starts as UTF-16 but is not: {bad.reason}") from None
    return raw.decode("utf-8-sig", errors="surrogateescape")


def csv_lines(path: Path, text: str) -> Iterator[Line]:
    """(where, record or reason) for every data line of a CSV or TSV file."""
    first = text.split("\n", 1)[0]
    delimiter = "\t" if "\t" in first and "," not in first else ","
    # Strict: else a quote that nobody closes makes one field of all lines up to the next quote.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [printable(cell.strip().lower()) for cell in next(reader, [])]
    except csv.Error as bad:
        raise DatasetError(f"manifest {path}: the header cannot be read as CSV: {bad}") from None
    missing = [column for column in REQUIRED if column not in header]
    if missing:
        split = header[0].split(";") if len(header) == 1 else []
        fix = (
            " (the fields stand apart by semicolons; save them with commas or tabs, since labels "
            "are joined by semicolons)"
        )
        raise DatasetError(
            f"manifest {path}: expected a header with the columns {', '.join(REQUIRED)} "
            f"(and optionally {', '.join(OPTIONAL)}), found {', '.join(header) or 'nothing'}"
            f"{fix if len(split) > 1 else ''}"
        )
    if len(set(header)) != len(header):
        raise DatasetError(f"manifest {path}: a column stands twice in {', '.join(header)}")
    while True:
        before = reader.line_num
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as bad:
            hint = " (a quote that is not closed?)" if reader.line_num > before + 1 else ""
            yield _lines(before, reader.line_num), f"malformed line: {bad}{hint}"
            continue
        where = _lines(before, reader.line_num)
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            yield (
                where,
                f"malformed line: expected {len(header)} fields, found {len(cells)} (a field "
                "that holds a comma needs double quotes)",
            )
            continue
        yield where, dict(zip(header, cells, strict=True))


def jsonl_lines(text: str) -> Iterator[Line]:
    """(where, record or reason) for every line of a JSONL file."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as bad:
            yield f"line {number}", f"malformed line: not JSON ({bad})"
            continue
        if not isinstance(record, dict):
            found = printable(line.strip()[:40])
            yield f"line {number}", f"malformed line: expected an object, found {found}"
            continue
        yield f"line {number}", record


def unfit_text(text: str) -> str | None:
    """What keeps a text from being a name, a path or a time; None for a fit one."""
    if any("\udc80" <= char <= "\udcff" for char in text):
        try:
            shown = text.encode("utf-8", "surrogateescape").decode("latin-1")
            return f"is not UTF-8 (as Latin-1 it reads {shown!r}); save as UTF-8"
        except UnicodeEncodeError:
            pass
    if any("\ud800" <= char <= "\udfff" for char in text):
        return f"holds half of a character (an unpaired surrogate): {text[:40]!r}"
    if any(char in text.strip() for char in "\n\r\0"):
        return f"holds a line break or a NUL (a quote that is not closed?): {text[:40]!r}"
    return None


def printable(text: str) -> str:
    """A text in which everything that has no UTF-8 form is escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _lines(before: int, last: int) -> str:
    """Where a record stands: the lines after `before` up to `last`."""
    return f"line {last}" if last <= before + 1 else f"lines {before + 1} to {last}"
