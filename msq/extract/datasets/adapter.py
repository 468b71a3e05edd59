"""What a dataset's adapter offers: reading it, and saying what is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from msq.extract.datasets.dataset import Dataset


@dataclass(frozen=True, slots=True)
class SplitCount:
    """Clips of one split of the dataset.

    Attributes:
        clips: all of them, unlabelled ones included.
        unlabelled: those without any label.
    """

    clips: int
    unlabelled: int = 0


@dataclass(frozen=True, slots=True)
class Survey:
    """What `msq datasets check` finds. With annotations alone, all videos count as missing.

    Attributes:
        dataset: name of the adapter.
        classes: K.
        splits: by the names of the dataset: `train`, `test`; `split1/train` where it has several.
        missing: clips (or videos, where clips are cuts) whose file is not there.
        oddities: how often each known trap occurs: `end_past_length`, `reversed`, …
        published: the numbers that the field reports, under the same names, for comparison.
        notes: what else a user must know, one line each.
        missing_examples: the first few missing files, relative to the root.
        kept_items: `item, change` of what the policy `keep` joined, renamed or mended.
        skipped_items: `item, reason` of what cannot be used (what is left out by the dataset's own
            rules is counted among the oddities alone).
    """

    dataset: str
    classes: int
    splits: Mapping[str, SplitCount]
    missing: int
    oddities: Mapping[str, int] = field(default_factory=dict)
    published: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    missing_examples: tuple[str, ...] = ()
    kept_items: tuple[Mapping[str, str], ...] = ()
    skipped_items: tuple[Mapping[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Adapter:
    """One dataset or annotation format.

    Attributes:
        name: what `--dataset` takes.
        title: full name and reference in a line.
        needs: files and folders expected below `--root`.
        access: how one gets the data, and its licence, as far as known.
        options: option name -> what it means and its default (`--option split=1`).
        read: (root, options) -> Dataset. Raises DatasetError where annotations are missing,
            half-extracted or of another format, UsageError for an unknown option.
        survey: (root, options) -> Survey.
    """

    name: str
    title: str
    needs: str
    access: str
    options: Mapping[str, str]
    read: Callable[[Path, Mapping[str, str]], Dataset]
    survey: Callable[[Path, Mapping[str, str]], Survey]
