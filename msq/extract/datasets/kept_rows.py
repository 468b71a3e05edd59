"""What the policy `keep` makes of lines that `skip` leaves out, and what it says of each.

Lines of one id, file, cut and split are one clip with the labels of all of them (the form of many
lists: one line per label). Other files or cuts of an id that is taken get `id~2`, `id~3`, … in the
order of the lines. Labels that are no classes are left off where the clip keeps another one. What
cannot be kept honestly stays skipped: a clip none of whose labels is a class (zeros would say that
it shows none of them), the same clip in two splits, and a second label where a clip has one.

Where all labels are classes, every clip that `skip` gives is there, with at least its labels.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from msq.extract.datasets.annotation_text import Skipped
from msq.extract.datasets.dataset import Task
from msq.extract.datasets.manifest_row import Row
from msq.extract.datasets.options import nearest

_Key = tuple[str, str, float, float | None]


@dataclass
class KeptRows:
    """The lines of a list as the policy `keep` takes them.

    Attributes:
        rows: one for each clip, where its first line stood.
        changes: (line, what was done), in order of the lines.
        skipped: (line, reason) of what could not be kept, likewise.
    """

    rows: list[Row] = field(default_factory=list)
    changes: Skipped = field(default_factory=list)
    skipped: Skipped = field(default_factory=list)


def keep_rows(
    rows: Sequence[Row],
    classes: Collection[str] | None,
    source: str,
    task: Task,
    remedy: str = "",
) -> KeptRows:
    """Join, rename and mend lines; each change is listed.

    Args:
        rows: lines that can be used one by one, in order.
        classes: names of the classes; None takes every label for one.
        source: where the classes are from, for messages.
        task: in `singlelabel` no label is left off and no second one is joined.
        remedy: what makes it another task, for messages.
    """
    order = {row.where: place for place, row in enumerate(rows)}
    named = {x for row in rows for x in (*row.labels, *row.unknown)}
    strange: set[str] = set() if classes is None else named - {*classes}
    fit: list[Row] = []
    unfit: list[Row] = []
    for row in rows:
        (unfit if row.labels and strange.issuperset(row.labels) else fit).append(row)
    ids = _Ids(row.id for row in fit)
    found = KeptRows()
    clips: dict[_Key, _Clip] = {}
    for row in fit:
        clip = clips.get(_key(row))
        if clip is None:
            clip = clips[_key(row)] = _Clip(row, *ids.take(row))
        elif reason := clip.refusal(row, task, remedy):
            found.skipped.append((row.where, reason))
            continue
        clip.take(row, strange)
    for row in unfit:
        clip = clips.get(_key(row))
        if clip is None or not clip.labels or clip.refusal(row, task, remedy):
            reason = f"unknown label {row.labels[0]!r}: not in {source}"
            found.skipped.append((row.where, reason))
        else:
            clip.take(row, strange)
    off = {name for clip in clips.values() for _, _, name in clip.left_off}
    hints = {name: nearest(name, classes or ()) for name in off}
    for clip in clips.values():
        found.rows.append(clip.row())
        found.changes += clip.told(source, hints)
    found.changes.sort(key=lambda item: order[item[0]])
    found.skipped.sort(key=lambda item: order[item[0]])
    return found


def _key(row: Row) -> _Key:
    """What makes two lines speak of the same clip; its split does not."""
    return row.id, os.path.normpath(row.path), row.start or 0.0, row.end


class _Clip:
    """A clip as its lines make it, one after another.

    Attributes:
        first: its first line.
        id: which it has.
        labels: each label and the first line that has it.
        unknown: likewise.
        left_off: (line, label or unknown, name) of what is no class.
        changes: (line, what was done).
    """

    def __init__(self, row: Row, identity: str, change: str) -> None:
        self.first, self.id = row, identity
        self.labels: dict[str, str] = {}
        self.unknown: dict[str, str] = {}
        self.left_off: list[tuple[str, str, str]] = []
        self.changes: Skipped = [(row.where, change)] if change else []

    def refusal(self, row: Row, task: Task, remedy: str) -> str:
        """Why another line of it cannot be joined; nothing where it can."""
        begun = f"duplicate id {row.id!r}, first used on {self.first.where}"
        if row.split != self.first.split:
            return (
                f"{begun}: the same clip, there in split {self.first.split} and here in "
                f"{row.split}; it can be in one of them"
            )
        if task == "singlelabel" and len({*self.labels, *row.labels}) > 1:
            (label, line), *_ = self.labels.items()
            return (
                f"{begun}: expected one label (single-label task), found {label!r} on {line} and "
                f"{row.labels[0]!r} here{remedy}"
            )
        return ""

    def take(self, row: Row, strange: Collection[str]) -> None:
        """Take a line's labels. What one line knows and another does not is known."""
        self.left_off += [(row.where, "label", x) for x in row.labels if x in strange]
        self.left_off += [(row.where, "unknown", x) for x in row.unknown if x in strange]
        labels = [x for x in row.labels if x not in strange]
        unknown = [x for x in row.unknown if x not in strange]
        more = [x for x in labels if x not in self.labels]
        settled = [x for x in labels if x in self.unknown]
        certain = [x for x in unknown if x in self.labels]
        doubted = [x for x in unknown if x not in self.labels and x not in self.unknown]
        self.labels |= dict.fromkeys(more, row.where)
        self.unknown |= dict.fromkeys(doubted, row.where)
        for label in settled:
            del self.unknown[label]
        if row is self.first:
            return
        added = [f"adds {_quoted(more)}"] if more else []
        added += [f"adds unknown {_quoted(doubted)}"] if doubted else []
        added += [f"{_quoted(settled)} is unknown no more"] if settled else []
        added += [f"{_quoted(certain)} stays a label"] if certain else []
        what = ", ".join(added) or "adds nothing"
        change = f"joined with {self.first.where}, clip {self.id!r}: {what}"
        self.changes.append((row.where, change))

    def row(self) -> Row:
        """All its lines as one."""
        return self.first._replace(id=self.id, labels=(*self.labels,), unknown=(*self.unknown,))

    def told(self, source: str, hints: dict[str, str]) -> Skipped:
        """What was done, and to which line."""
        kept = f"clip {self.id!r} keeps {_quoted(self.labels) or 'no label'}"
        return self.changes + [
            (line, f"{kind} {name!r} left off: not in {source}{hints[name]}; {kept}")
            for line, kind, name in self.left_off
        ]


class _Ids:
    """Gives out ids; those that lines ask for go before those that are made here."""

    def __init__(self, wanted: Iterable[str]) -> None:
        self._wanted = set(wanted)
        self._first: dict[str, Row] = {}  # who has an id
        self._next: dict[str, int] = {}

    def take(self, row: Row) -> tuple[str, str]:
        """The id of a new clip, and what is to be said of it."""
        name = row.id
        if name in self._first and row.longer_id and row.path != self._first[name].path:
            name = row.longer_id  # `a.avi` beside `a.mp4`, under every policy
        change = ""
        if name in self._first:
            first, number = self._first[name], self._next.get(name, 2)
            while f"{name}~{number}" in self._wanted or f"{name}~{number}" in self._first:
                number += 1
            self._next[name] = number + 1
            other = "cut of it" if row.path == first.path else "file"
            change = f"duplicate id {name!r}, first used on {first.where} for another {other}: "
            name = f"{name}~{number}"
            change += f"its id is {name!r}"
        self._first[name] = row
        return name, change


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
