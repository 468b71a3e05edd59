"""A dataset by its name, with what was typed for it beside its options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from msq.errors import DatasetError, UsageError
from msq.extract.datasets.dataset import Dataset
from msq.extract.datasets.options import find_class_file, with_class_file
from msq.extract.datasets.registry import find_adapter, read_dataset


def read_named(
    name: str,
    root: Path | None,
    options: Mapping[str, str],
    *,
    classes: Path | None = None,
    task: str | None = None,
    policy: str | None = None,
) -> Dataset:
    """Read a dataset; nothing that was asked for is passed over.

    Args:
        name: as in `msq datasets list`.
        root: where it lies.
        options: of the dataset; a file `classes` is looked for as `classes` below is.
        classes: file that fixes the class order (`--classes`); relative to the working folder
            where it is there, else to the root.
        task: `multilabel` or `singlelabel` (`--task`); None is the dataset's own.
        policy: `skip`, `error` or `keep` (`--policy`), for what cannot be used; None is the
            dataset's own.

    Raises:
        UsageError: an unknown name or option, no root, `classes` or `task` of a dataset that
            brings its own, or an option that says otherwise.
        DatasetError: annotations that cannot be read, or an unusable item under the policy
            `error`.
    """
    adapter = find_adapter(name)
    if classes is not None and "classes" not in adapter.options:
        raise UsageError(f"--classes: dataset {adapter.name} has its own class order; leave it out")
    taken = with_class_file(options, root)
    if classes is not None:
        classes = find_class_file(classes, root)
    for key, value in _asked(classes, task, policy).items():
        if key in adapter.options and taken.setdefault(key, value) != value:
            raise UsageError(f"--{key} {value} and --option {key}={taken[key]}: expected one of "
                             "them")  # fmt: skip
    data = read_dataset(adapter.name, root, taken)
    if task not in (None, data.task):
        raise UsageError(f"--task {task}: dataset {adapter.name} is {data.task}; leave it out")
    if policy == "error" and data.unusable:
        item, reason = data.unusable[0]
        raise DatasetError(
            f"dataset {adapter.name}, {item}: {reason} (--policy error; {len(data.unusable)} "
            "such items)"
        )
    return data


def _asked(classes: Path | None, task: str | None, policy: str | None) -> dict[str, str]:
    """What was asked for, as options."""
    given = {"classes": classes, "task": task, "policy": policy}
    return {key: str(value) for key, value in given.items() if value is not None}
