"""Scoring a file of anyone's predictions: what is true comes from a store or an annotation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq.errors import UsageError
from msq.report import terminal
from msq.report.scores import counts, metric_rows, scope

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Truth:
    """Labels of all clips, whether they have features or not.

    Attributes:
        name: of the dataset.
        variant: which reading of it; "" where there is one only.
        partition: which official split `splits` is; None where there is one only.
        ids: N clip ids.
        splits: N of `train`, `val`, `test`, or "" where the partition leaves the clip out.
        labels: [N, K].
        known: [N, K], zero where nobody knows; None where all is known.
        groups: name -> class indices.
    """

    name: str
    variant: str
    partition: str | None
    ids: tuple[str, ...]
    splits: tuple[str, ...]
    labels: Tensor
    known: Tensor | None
    groups: Mapping[str, tuple[int, ...]]


def evaluate_submission(
    file: Path,
    store: Path | None,
    dataset: str | None,
    root: Path | None,
    options: Mapping[str, str],
    split: str,
    partition: str | None = None,
) -> dict[str, Any]:
    """Score a file of anyone's predictions against a store's labels, or a dataset's own.

    Raises:
        UsageError: both or neither of store and dataset, no such partition, no clip in that split,
            or a line of the file that is none.
    """
    from msq.head.export import CHARADES_TEST_VIDEOS, score_submission

    if (store is None) == (dataset is None):
        raise UsageError("--submission FILE: expected a STORE, or --dataset NAME with --root DIR")
    if store is not None:
        data = store_truth(store, partition)
    else:
        data = dataset_truth(str(dataset), root, options, partition)
    rows = [row for row, part in enumerate(data.splits) if part == split]
    if not rows:
        raise UsageError(f"--split {split}: no clip in it; found {sorted(set(data.splits) - {''})}")
    official = data.name == "charades" and split == "test"
    found = score_submission(
        file,
        [data.ids[row] for row in rows],
        data.labels[rows],
        known=None if data.known is None else data.known[rows],
        groups=data.groups,
        expected=CHARADES_TEST_VIDEOS if official else None,
    )
    return {
        "submission": str(file),
        "dataset": data.name,
        "variant": data.variant,
        "partition": data.partition,
        "split": split,
        **found,
    }


def store_truth(path: Path, wanted: str | None = None) -> Truth:
    """That of a feature store."""
    from msq.extract.store import open_store
    from msq.head.features import choose_partition

    store = open_store(path)
    partition, splits = choose_partition(store, wanted)
    known = store.label_known()
    return Truth(
        store.name,
        store.variant,
        partition,
        store.clips,
        splits,
        store.labels(),
        known,
        store.groups,
    )


def dataset_truth(
    name: str, root: Path | None, options: Mapping[str, str], wanted: str | None = None
) -> Truth:
    """That of a dataset's annotation files; the videos need not be there.

    Raises:
        UsageError: an unknown dataset, option or partition.
        DatasetError: annotations that cannot be read.
    """
    import torch

    from msq.extract.datasets.registry import read_dataset
    from msq.extract.store_schema import known_matrix, label_matrix

    data = read_dataset(name, root, options)
    known = known_matrix(data)
    if wanted is not None and wanted not in data.partitions:
        raise UsageError(
            f"dataset {name}: no partition {wanted!r}; it has "
            f"{', '.join(data.partitions) or 'none (--option split=all, where there are some)'}"
        )
    partition = wanted or next(iter(data.partitions), None)
    own = tuple(clip.split for clip in data.clips)
    return Truth(
        data.name,
        data.variant,
        partition,
        tuple(clip.id for clip in data.clips),
        own if partition is None else data.partitions[partition],
        torch.from_numpy(label_matrix(data)),
        None if known is None else torch.from_numpy(known),
        data.groups,
    )


def show_submission(result: Mapping[str, Any], *, json: bool = False) -> None:
    """Metrics of a submission, and what was odd about it."""
    for warning in result["warnings"]:
        terminal.say(f"warning: {warning}")
    if json:
        terminal.print_json(result)
        return
    header, rows = metric_rows(result)
    terminal.table(f"{result['submission']}: {scope(result)}", header, rows)
    terminal.say(f"{counts(result['metrics'])}; {result['clips']} clips")
