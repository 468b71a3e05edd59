"""What `msq store verify` finds, and how `msq store repair` knows where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal[
    "metadata",  # a zarr.json that is missing, unreadable or not what was written
    "dataset",  # clip ids, splits, partitions or labels
    "status",  # a commit record that is damaged, or holds an unknown code
    "data",  # features or times that are recorded as done and cannot be read
    "values",  # NaN or infinite features in a row that is recorded as done
    "contradiction",  # rows that are there although their status says that they are not
    "uncommitted",  # files of a shard that has no commit record
    "failures",  # the list of what went wrong is damaged, or not that of the status
    "text",  # class embeddings
    "stray",  # a file that belongs to no array of the store
    "sample",  # a row that comes out otherwise when it is extracted again
]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: see `Kind`.
        file: below the store, `tokens/ENC/c/3/0/0/0`.
        message: what is wrong in words; it names the file, and the clips where there are any.
        clips: ids of the clips that it holds for; empty where it holds for no row in particular.
        encoder: whose rows; "" where none's.
        view: number of the view.
        shard: number of the shard; -1 where there is none.
    """

    kind: Kind
    file: str
    message: str
    clips: tuple[str, ...] = ()
    encoder: str = ""
    view: int = 0
    shard: int = -1

    def __str__(self) -> str:
        """The message."""
        return self.message

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-able values."""
        return {**asdict(self), "clips": list(self.clips)}


@dataclass
class Verification:
    """What was looked at, and what was found.

    Attributes:
        checked: rows that were read, over all encoders and views.
        files: files that were looked at.
        problems: what is wrong.
        notes: what is worth knowing and not wrong: shards not extracted yet, rows of zeros,
            metadata without a digest, files that killed writers left.
        sampled: rows that were extracted again.
        equal: how many of these came out bit by bit as they are stored.
    """

    checked: int = 0
    files: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sampled: int = 0
    equal: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self, store: str) -> dict[str, Any]:
        """As `msq store verify --json` prints it."""
        return {
            "store": store,
            "ok": self.ok,
            "checked": self.checked,
            "files": self.files,
            "problems": [str(problem) for problem in self.problems],
            "details": [problem.to_dict() for problem in self.problems],
            "notes": self.notes,
            "sampled": self.sampled,
            "equal": self.equal,
        }


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few names in quotes, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more
