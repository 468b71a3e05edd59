"""The plain way in: a manifest (CSV with a header, or JSONL) to a Dataset.

Columns: `path` (relative to the manifest), `labels` (names joined by `;`, may be empty; a JSON
list in JSONL), `split`, and optionally `id`, `start`, `end` (seconds) and `unknown` (names, written
as `labels` are, of which nobody knows whether the clip has them). A line that cannot be used is
left out and listed in `Dataset.skipped` with its line number and reason; a manifest that cannot be
read at all is a `DatasetError`.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from msq.errors import DatasetError
from msq.extract.datasets.dataset import SPLITS, Clip, Dataset, Task

REQUIRED = ("path", "labels", "split")
OPTIONAL = ("id", "start", "end", "unknown")
Policy = Literal["skip", "error"]


class _Row(NamedTuple):
    """One usable line before its label names are turned into indices."""

    where: str
    id: str
    longer_id: str | None
    path: Path
    start: float | None
    end: float | None
    labels: tuple[str, ...]
    split: str
    unknown: tuple[str, ...] = ()


class _BadLine(ValueError):
    """A line that cannot be used; the message is the reason given to the user."""


def read_manifest(
    path: Path,
    *,
    classes: Path | None = None,
    task: Task = "multilabel",
    name: str | None = None,
    policy: Policy = "skip",
) -> Dataset:
    """Read a manifest.

    Args:
        path: the `.csv`, `.tsv` or `.jsonl` file.
        classes: file that fixes the class order (see `read_classes`); sorted names if None.
        task: `multilabel`, or `singlelabel` where every clip has exactly one label.
        name: the dataset's name; by default the file's stem, or its folder's name when the stem
            is just `manifest`.
        policy: `skip` lists unusable lines in `skipped`; `error` raises at the first.

    Raises:
        DatasetError: the file is missing, empty, has no usable header or no usable line, or
            `policy` is `error` and a line cannot be used.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetError(f"manifest {path}: expected a CSV or JSONL file, found nothing there")
    text = _decode(path)
    lines = _jsonl(text) if path.suffix.lower() in (".jsonl", ".ndjson") else _csv(path, text)
    rows: list[_Row] = []
    skipped: list[tuple[str, str]] = []
    known = read_classes(classes) if classes is not None else None
    seen: dict[str, _Row] = {}
    for where, record in lines:
        try:
            row = _row(path, where, record, task)
            if row.id in seen and row.longer_id and row.path != seen[row.id].path:
                row = row._replace(id=row.longer_id)  # `a.avi` beside `a.mp4`: two clips
            if row.id in seen:
                raise _BadLine(f"duplicate id {row.id!r}, first used on {seen[row.id].where}")
            strange = [x for x in _named(row) if known is not None and x not in known]
            if strange:
                raise _BadLine(f"unknown label {strange[0]!r}: not in {classes}")
        except _BadLine as bad:
            if policy == "error":
                raise DatasetError(f"manifest {path}, {where}: {bad}") from None
            skipped.append((where, str(bad)))
            continue
        seen[row.id] = row
        rows.append(row)
    if not rows:
        first = f"; the first, {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise DatasetError(f"manifest {path}: no usable line, {len(skipped)} left out{first}")
    names = known if known is not None else tuple(sorted({x for r in rows for x in _named(r)}))
    if not names:
        raise DatasetError(f"manifest {path}: no line has a label, so there are no classes")
    return Dataset(
        name=name or (path.resolve().parent.name if path.stem == "manifest" else path.stem),
        classes=names,
        task=task,
        clips=_clips(rows, names),
        metric="map" if task == "multilabel" else "top1",
        skipped=tuple(skipped),
    )


def read_classes(path: Path) -> tuple[str, ...]:
    """Class names in index order: one per line, or a CSV with a header that has `name`.

    Raises:
        DatasetError: the file is missing or empty, a name stands twice, or ids are not 0…K-1.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetError(f"classes file {path}: expected a text file, found nothing there")
    lines = [line.strip() for line in _decode(path).splitlines() if line.strip()]
    header = [cell.strip().lower() for cell in lines[0].split(",")] if lines else []
    if "name" in header and len(header) > 1:
        records = list(csv.DictReader(lines, fieldnames=header))[1:]
        if "id" in header:
            ids = [str(r["id"]).strip() for r in records]
            if sorted(ids) != sorted(str(i) for i in range(len(ids))):
                raise DatasetError(
                    f"classes file {path}: expected the ids 0 to {len(ids) - 1}, found {ids[:5]}…"
                )
            records.sort(key=lambda r: int(str(r["id"]).strip()))
        names = [str(r["name"]).strip() for r in records]
    else:
        names = lines
    if not names:
        raise DatasetError(f"classes file {path}: expected one class name per line, found none")
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise DatasetError(f"classes file {path}: the name {twice[0]!r} stands more than once")
    return tuple(names)


def _decode(path: Path) -> str:
    """The file's text. Bytes that are not UTF-8 stay marked, so that only their line is lost."""
    raw = path.read_bytes()
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return raw.decode("utf-16")
        except UnicodeDecodeError as bad:
            raise DatasetError(f"{path}: starts as UTF-16 but is not: {bad.reason}") from None
    return raw.decode("utf-8-sig", errors="surrogateescape")


def _csv(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(where, record or reason) for every data line of a CSV or TSV file."""
    first = text.split("\n", 1)[0]
    delimiter = "\t" if "\t" in first and "," not in first else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        header = [cell.strip().lower() for cell in next(reader, [])]
    except csv.Error as bad:
        raise DatasetError(f"manifest {path}: the header cannot be read as CSV: {bad}") from None
    missing = [column for column in REQUIRED if column not in header]
    if missing:
        raise DatasetError(
            f"manifest {path}: expected a header with the columns {', '.join(REQUIRED)} "
            f"(and optionally {', '.join(OPTIONAL)}), found {', '.join(header) or 'nothing'}"
        )
    if len(set(header)) != len(header):
        raise DatasetError(f"manifest {path}: a column stands twice in {', '.join(header)}")
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as bad:
            yield f"line {reader.line_num}", f"malformed line: {bad}"
            continue
        where = f"line {reader.line_num}"
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


def _jsonl(text: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(where, record or reason) for every line of a JSONL file."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as bad:
            yield f"line {number}", f"malformed line: not JSON ({bad})"
            continue
        if not isinstance(record, dict):
            yield f"line {number}", f"malformed line: expected an object, found {line.strip()[:40]}"
            continue
        yield f"line {number}", record


def _row(path: Path, where: str, record: dict[str, Any] | str, task: Task) -> _Row:
    """Check one record; raises _BadLine with the reason when it cannot be used."""
    if isinstance(record, str):
        raise _BadLine(record)
    for key, value in record.items():
        if isinstance(value, str) and any("\udc80" <= char <= "\udcff" for char in value):
            shown = value.encode("utf-8", "surrogateescape").decode("latin-1")
            raise _BadLine(f"{key} is not UTF-8 (as Latin-1 it reads {shown!r}); save as UTF-8")
    missing = [column for column in REQUIRED if column not in record]
    if missing:
        raise _BadLine(f"malformed line: no {', '.join(missing)}")
    relative = record["path"]
    if not isinstance(relative, str) or not relative.strip() or "\0" in relative:
        raise _BadLine(f"malformed line: expected a path, found {relative!r}")
    split = str(record["split"]).strip().lower()
    if split not in SPLITS:
        raise _BadLine(f"bad split {record['split']!r}: expected train, val or test")
    start, end = _seconds(record, "start"), _seconds(record, "end")
    if start is not None and end is not None and start >= end:
        raise _BadLine(f"empty cut: start {start:g} is not before end {end:g}")
    labels, unknown = _labels(record["labels"]), _labels(record.get("unknown"))
    if both := [x for x in unknown if x in labels]:
        raise _BadLine(f"{both[0]!r} stands under labels and under unknown: it can be one of them")
    if task == "singlelabel" and len(labels) > 1:
        raise _BadLine(f"expected one label (single-label task), found {len(labels)}")
    relative = relative.strip()
    identity = "" if record.get("id") is None else str(record["id"]).strip()
    longer = None
    if not identity:
        identity = _default_id(path.parent, relative, start, end)
        longer = _default_id(path.parent, relative, start, end, suffix=True)
    return _Row(where, identity, longer, path.parent / relative, start, end, labels, split, unknown)


def _labels(value: Any) -> tuple[str, ...]:
    """Distinct label names in the order written."""
    if value is None:
        return ()
    if isinstance(value, str):
        names = value.split(";")
    elif isinstance(value, list) and all(isinstance(x, str) for x in value):
        names = value
    else:
        raise _BadLine(f"malformed line: expected label names, found {value!r}")
    return tuple(dict.fromkeys(x.strip() for x in names if x.strip()))


def _named(row: _Row) -> tuple[str, ...]:
    """Every class that a line speaks of."""
    return (*row.labels, *row.unknown)


def _seconds(record: dict[str, Any], key: str) -> float | None:
    """A time in seconds; absent, null and the empty string mean no cut."""
    value = record.get(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise _BadLine(f"bad {key} {value!r}: expected seconds") from None
    if not math.isfinite(seconds) or seconds < 0:
        raise _BadLine(f"bad {key} {value!r}: expected seconds, 0 or more")
    return seconds


def _default_id(
    folder: Path, relative: str, start: float | None, end: float | None, *, suffix: bool = False
) -> str:
    """POSIX path relative to the manifest without suffix, with `#start-end` when cut.

    With `suffix` it keeps its suffix: the name of the second of two files that differ in it alone.

    An absolute path outside the manifest's folder gives its bare name: ids go into stores, which
    hold no machine's paths.
    """
    pure = PurePosixPath(relative)
    if pure.is_absolute():
        inside = Path(relative).is_relative_to(folder.resolve())
        pure = PurePosixPath(Path(relative).relative_to(folder.resolve()) if inside else pure.name)
    stem = (pure if suffix or not pure.name else pure.with_suffix("")).as_posix()
    if start is None and end is None:
        return stem
    return f"{stem}#{'' if start is None else f'{start:g}'}-{'' if end is None else f'{end:g}'}"


def _clips(rows: list[_Row], classes: tuple[str, ...]) -> tuple[Clip, ...]:
    index = {name: k for k, name in enumerate(classes)}
    return tuple(
        Clip(
            id=row.id,
            path=row.path,
            start=row.start,
            end=row.end,
            labels=tuple(sorted(index[label] for label in row.labels)),
            split=row.split,  # type: ignore[arg-type]  # checked against SPLITS in _row
            unknown=tuple(sorted(index[label] for label in row.unknown)),
        )
        for row in rows
    )
