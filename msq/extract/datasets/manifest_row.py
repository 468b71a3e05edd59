"""One line of a manifest, checked: what it says of a clip, or why it cannot be used."""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from msq.extract.datasets.dataset import SPLITS, Task
from msq.extract.datasets.manifest_lines import COLUMNS, REQUIRED, unfit_text


class Row(NamedTuple):
    """One usable line before its label names are turned into indices.

    Attributes:
        where: the line.
        id: of its clip.
        longer_id: which it has where another file has taken `id`; None where the line says its id.
        path: video file or folder of frames.
        start: of the cut in seconds, None for the beginning.
        end: likewise, None for the end.
        labels: names of classes, each once.
        split: `train`, `val` or `test`.
        unknown: names of classes of which nobody knows; none of `labels`.
        bare: its id is the file's name alone, since its path is absolute and outside the
            manifest's folder.
    """

    where: str
    id: str
    longer_id: str | None
    path: Path
    start: float | None
    end: float | None
    labels: tuple[str, ...]
    split: str
    unknown: tuple[str, ...] = ()
    bare: bool = False


class BadLine(ValueError):
    """A line that cannot be used; the message is the reason given to the user."""


def read_row(path: Path, where: str, record: dict[str, Any] | str, task: Task) -> Row:
    """Check one record; raises BadLine with the reason when it cannot be used."""
    if isinstance(record, str):
        raise BadLine(record)
    for key in COLUMNS:
        value = record.get(key)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, str) and (unfit := unfit_text(part)):
                raise BadLine(f"{key} {unfit}")
    missing = [column for column in REQUIRED if column not in record]
    if missing:
        raise BadLine(f"malformed line: no {', '.join(missing)}")
    relative = record["path"]
    if not isinstance(relative, str) or not relative.strip():
        raise BadLine(f"malformed line: expected a path, found {relative!r}")
    split = str(record["split"]).strip().lower()
    if split not in SPLITS:
        raise BadLine(f"bad split {record['split']!r}: expected train, val or test")
    start, end = _seconds(record, "start"), _seconds(record, "end")
    if start is not None and end is not None and start >= end:
        raise BadLine(f"empty cut: start {start:g} is not before end {end:g}")
    labels, unknown = _labels(record["labels"]), _labels(record.get("unknown"))
    if both := [x for x in unknown if x in labels]:
        raise BadLine(f"{both[0]!r} stands under labels and under unknown: it can be one of them")
    if task == "singlelabel" and len(labels) > 1:
        raise BadLine(f"expected one label (single-label task), found {len(labels)}")
    relative = relative.strip()
    identity = "" if record.get("id") is None else str(record["id"]).strip()
    longer, bare = None, False
    if not identity:
        bare = _is_outside(path.parent, relative)
        identity = _default_id(path.parent, relative, start, end)
        longer = _default_id(path.parent, relative, start, end, suffix=True)
    return Row(
        where, identity, longer, path.parent / relative, start, end, labels, split, unknown, bare
    )


def _labels(value: Any) -> tuple[str, ...]:
    """Distinct label names in the order written."""
    if value is None:
        return ()
    if isinstance(value, str):
        names = value.split(";")
    elif isinstance(value, list) and all(isinstance(x, str) for x in value):
        names = value
    else:
        raise BadLine(f"malformed line: expected label names, found {value!r}")
    return tuple(dict.fromkeys(x.strip() for x in names if x.strip()))


def named(row: Row) -> tuple[str, ...]:
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
        raise BadLine(f"bad {key} {value!r}: expected seconds") from None
    if not math.isfinite(seconds) or seconds < 0:
        raise BadLine(f"bad {key} {value!r}: expected seconds, 0 or more")
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
    if _is_outside(folder, relative):
        pure = PurePosixPath(pure.name)
    elif pure.is_absolute():
        pure = PurePosixPath(Path(relative).relative_to(folder.resolve()))
    stem = (pure if suffix or not pure.name else pure.with_suffix("")).as_posix()
    if start is None and end is None:
        return stem
    return f"{stem}#{'' if start is None else f'{start:g}'}-{'' if end is None else f'{end:g}'}"


def _is_outside(folder: Path, relative: str) -> bool:
    """Whether a path is absolute and not in the manifest's folder."""
    absolute = PurePosixPath(relative).is_absolute()
    return absolute and not Path(relative).is_relative_to(folder.resolve())
