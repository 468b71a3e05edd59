"""The plain way in: a manifest (CSV with a header, or JSONL) to a Dataset.

Columns: `path` (relative to the manifest), `labels` (names joined by `;`, may be empty; a JSON
list in JSONL), `split`, and optionally `id`, `start`, `end` (seconds) and `unknown` (names, written
as `labels` are, of which nobody knows whether the clip has them). A line that cannot be used is
left out and listed in `Dataset.skipped` with its line number and reason; under the policy `keep`,
duplicates and unknown labels are mended instead and listed in `Dataset.kept`. A manifest that
cannot be read at all is a `DatasetError`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal, get_args

from msq.errors import DatasetError, UsageError
from msq.extract.datasets.annotation_text import Skipped
from msq.extract.datasets.dataset import Clip, Dataset, Task
from msq.extract.datasets.kept_rows import keep_rows
from msq.extract.datasets.manifest_lines import csv_lines, decode_text, jsonl_lines, unfit_text
from msq.extract.datasets.manifest_row import BadLine, Row, named, read_row

Policy = Literal["skip", "error", "keep"]


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
        policy: `skip` lists unusable lines in `skipped`; `error` raises at the first; `keep` joins,
            renames and mends those that it can (see `keep_rows`) and lists each in `kept`.

    Raises:
        DatasetError: the file is missing, empty, has no usable header or no usable line, or
            `policy` is `error` and a line cannot be used.
        UsageError: another policy.
    """
    if policy not in get_args(Policy):
        raise UsageError(f"policy {policy!r}: expected one of {', '.join(get_args(Policy))}")
    path = Path(path)
    if not path.is_file():
        raise DatasetError(f"manifest {path}: expected a CSV or JSONL file, found nothing there")
    text = decode_text(path)
    jsonl = path.suffix.lower() in (".jsonl", ".ndjson")
    lines = jsonl_lines(text) if jsonl else csv_lines(path, text)
    rows: list[Row] = []
    skipped: Skipped = []
    known = read_classes(classes) if classes is not None else None
    seen: dict[str, Row] = {}
    order: dict[str, int] = {}  # of the lines
    for where, record in lines:
        order[where] = len(order)
        try:
            row = read_row(path, where, record, task)
            if policy != "keep":
                row = _with_own_id(row, seen)
                _require_classes(row, known, classes)
        except BadLine as bad:
            if policy == "error":
                raise DatasetError(f"manifest {path}, {where}: {bad}") from None
            skipped.append((where, str(bad)))
            continue
        seen[row.id] = row
        rows.append(row)
    kept: Skipped = []
    if policy == "keep":
        found = keep_rows(rows, None if known is None else {*known}, str(classes), task)
        rows = found.rows
        skipped = sorted([*skipped, *found.skipped], key=lambda item: order[item[0]])
        kept = found.changes
    if not rows:
        first = f"; the first, {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise DatasetError(f"manifest {path}: no usable line, {len(skipped)} left out{first}")
    names = known if known is not None else tuple(sorted({x for r in rows for x in named(r)}))
    if not names:
        raise DatasetError(f"manifest {path}: no line has a label, so there are no classes")
    return Dataset(
        name=name or (path.resolve().parent.name if path.stem == "manifest" else path.stem),
        classes=names,
        task=task,
        clips=_clips(rows, names),
        metric="map" if task == "multilabel" else "top1",
        skipped=tuple(skipped),
        kept=tuple((f"{path.name} {where}", change) for where, change in kept),
    )


def _with_own_id(row: Row, seen: Mapping[str, Row]) -> Row:
    """The line with an id that no line before it has; BadLine where it has none."""
    if row.id in seen and row.longer_id and row.path != seen[row.id].path:
        row = row._replace(id=row.longer_id)  # `a.avi` beside `a.mp4`: two clips
    if row.id in seen:
        first = seen[row.id]
        why = ""
        if row.bare and row.path != first.path:
            why = (": without an id, a clip whose path is absolute and outside the manifest's "
                   "folder has the file's name alone; give the lines an id column, or --policy "
                   "keep, which renames the second")  # fmt: skip
        raise BadLine(f"duplicate id {row.id!r}, first used on {first.where}{why}")
    return row


def _require_classes(row: Row, known: Collection[str] | None, file: Path | None) -> None:
    strange = [x for x in named(row) if known is not None and x not in known]
    if strange:
        raise BadLine(f"unknown label {strange[0]!r}: not in {file}")


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


def _clips(rows: list[Row], classes: tuple[str, ...]) -> tuple[Clip, ...]:
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
