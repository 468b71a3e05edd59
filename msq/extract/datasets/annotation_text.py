"""Reading the text files that datasets are published as: encodings, line ends, blanks, options."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from msq.errors import DatasetError, UsageError

Skipped = list[tuple[str, str]]


class Line(NamedTuple):
    """A line that holds something: its number in the file, and its text without outer blanks."""

    number: int
    text: str


def read_text(path: Path) -> str:
    """Text of an annotation file in UTF-8 or UTF-16; bytes that are neither stay marked.

    Raises:
        DatasetError: the file is missing or is no text file.
    """
    if not path.is_file():
        raise DatasetError(
            f"{path}: expected an annotation file, found nothing there: unpack the archive again"
        )
    raw = path.read_bytes()
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return raw.decode("utf-16", errors="replace")
    if b"\0" in raw:
        raise DatasetError(f"{path}: expected text, found binary data: is it still compressed?")
    return raw.decode("utf-8-sig", errors="surrogateescape")


def read_lines(path: Path, skipped: Skipped | None = None) -> list[Line]:
    """Lines that are not empty, whatever their ends; those that are not UTF-8 go to `skipped`.

    Raises:
        DatasetError: the file is missing, is no text, or has no line.
    """
    lines = []
    for number, raw in enumerate(re.split(r"\r\n|\n|\r", read_text(path)), start=1):
        text = raw.strip()
        if any("\udc80" <= char <= "\udcff" for char in text):
            if skipped is not None:
                skipped.append((f"{path.name} line {number}", "not UTF-8: save the file as UTF-8"))
        elif text:
            lines.append(Line(number, text))
    if not lines:
        raise DatasetError(
            f"{path}: expected annotations, found an empty file: unpack the archive again"
        )
    return lines


def refuse_cut_off(path: Path, line: Line, lines: Sequence[Line], expected: str) -> None:
    """Tell a file that was cut off from one with a malformed line, given such a line.

    Raises:
        DatasetError: the line is the file's last and has no end: the rest of the file is gone.
    """
    if line == lines[-1] and not read_text(path).endswith(("\n", "\r")):
        raise DatasetError(
            f"{path}, line {line.number}: expected {expected}, found {line.text[-60:]!r} and the "
            "end of the file: it was cut off; unpack the archive again"
        )


def to_seconds(text: str) -> float:
    """A time in seconds.

    Raises:
        ValueError: not a finite number, or below 0.
    """
    value = float(text)
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"expected seconds, 0 or more, found {text!r}")
    return value


def readable(name: str) -> str:
    """A class name as words: `brush_hair` and `CliffDiving` give `brush hair`, `Cliff Diving`."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name.replace("_", " "))
    return re.sub(r"\s+", " ", words).strip()


def class_names(names: Iterable[str], style: str) -> tuple[str, ...]:
    """Names as published (`official`) or as words (`readable`, for text encoders)."""
    return tuple(readable(name) if style == "readable" else name for name in names)


def positive(dataset: str, options: Mapping[str, str], name: str) -> float | None:
    """The value of an option that is a number above 0; None where it is not given.

    Raises:
        UsageError: not such a number.
    """
    text = options.get(name, "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UsageError(
            f"dataset {dataset}, option {name}: expected a number above 0, found {text!r}"
        )
    return value


def first_folder(root: Path, folders: Iterable[str], pattern: str) -> Path | None:
    """The first of `root/<folder>` that holds a file whose whole name matches `pattern`."""
    for folder in folders:
        place = root / folder
        if place.is_dir() and any(re.fullmatch(pattern, file.name) for file in place.iterdir()):
            return place
    return None
