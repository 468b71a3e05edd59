"""The plain way in: a manifest (CSV with a header, or JSONL) to a Dataset.

Columns: `path` (relative to the manifest), `labels` (names joined by `;`, may be empty; a JSON
list in JSONL), `split`, and optionally `id`, `start`, `end` (seconds) and `unknown` (names, written
as `labels` are, of which nobody knows whether the clip has them). A line that cannot be used is
left out and listed in `Dataset.skipped` with its line number and reason; a manifest that cannot be
read at all is a `DatasetError`.
"""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from msq.errors import DatasetError
from msq.extract.datasets.dataset import SPLITS, Clip, Dataset, Task
from msq.extract.datasets.manifest_lines import (
    COLUMNS,
    REQUIRED,
    csv_lines,
    decode_text,
    jsonl_lines,
    unfit_text,
)

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
    text = decode_text(path)
    jsonl = path.suffix.lower() in (".jsonl", ".ndjson")
    lines = jsonl_lines(text) if jsonl else csv_lines(path, text)
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
    lines = [x.strip() for x in re.split(r"\r\n|\r|\n", decode_text(path)) if x.strip()]
    for line in lines:
        if unfit := unfit_text(line):
            raise DatasetError(f"classes file {path}: a line {unfit}")
    header = [cell.strip().lower() for cell in lines[0].split(",")] if lines else []
    if "name" in header and len(header) > 1:
        try:
            records = list(csv.DictReader(lines, fieldnames=header, strict=True))[1:]
        except csv.Error as bad:
            raise DatasetError(f"classes file {path}: cannot be read as CSV: {bad}") from None
        if "id" in header:
            ids = [str(r["id"]).strip() for r in records]
            if sorted(ids) != sorted(str(i) for i in range(len(ids))):
                raise DatasetError(
                    f"classes file {path}: expected the ids 0 to {len(ids) - 1}, found {ids[:5]}…"
                )
            records.sort(key=lambda r: int(str(r["id"]).strip()))
        names = [(r["name"] or "").strip() for r in records]
        if "" in names:
            raise DatasetError(
                f"classes file {path}: expected a name on every line, found none on number "
                f"{names.index('') + 1} of the classes"
            )
    else:
        names = lines
    if not names:
        raise DatasetError(f"classes file {path}: expected one class name per line, found none")
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise DatasetError(f"classes file {path}: the name {twice[0]!r} stands more than once")
    return tuple(names)


def _row(path: Path, where: str, record: dict[str, Any] | str, task: Task) -> _Row:
    """Check one record; raises _BadLine with the reason when it cannot be used."""
    if isinstance(record, str):
        raise _BadLine(record)
    for key in COLUMNS:
        value = record.get(key)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, str) and (unfit := unfit_text(part)):
                raise _BadLine(f"{key} {unfit}")
    missing = [column for column in REQUIRED if column not in record]
    if missing:
        raise _BadLine(f"malformed line: no {', '.join(missing)}")
    relative = record["path"]
    if not isinstance(relative, str) or not relative.strip():
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
    except (TypeError, ValueError, OverflowError):
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
