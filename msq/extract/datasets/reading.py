"""What an adapter makes of a folder, from which both the Dataset and the Survey come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from msq.errors import DatasetError
from msq.extract.datasets.adapter import Adapter, SplitCount, Survey
from msq.extract.datasets.dataset import Dataset
from msq.extract.datasets.locate import require_root
from msq.extract.datasets.options import check_options, choice
from msq.extract.datasets.survey import EXAMPLES, kept_items, skipped_items


@dataclass(frozen=True, slots=True)
class Reading:
    """A dataset as found below a root.

    Attributes:
        dataset: what stage one gets.
        splits: counts under the dataset's own split names, also of splits not in `dataset`.
        missing: videos that are not there, relative to the root.
        oddities: how often each known trap occurs.
        published: numbers that the field reports, under the same names.
        notes: what else a user must know.
        regular: items of `dataset.skipped` that are left out by the dataset's own rules (unused in
            a split, ambiguous), and not because they cannot be used; `Dataset.regular` of what
            the adapter's `read` gives.
    """

    dataset: Dataset
    splits: Mapping[str, SplitCount]
    missing: tuple[str, ...]
    oddities: Mapping[str, int] = field(default_factory=dict)
    published: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    regular: frozenset[tuple[str, str]] = frozenset()

    def survey(self) -> Survey:
        """The same as `msq datasets check` shows it."""
        counted = {key: count for key, count in self.oddities.items() if count}
        if self.dataset.skipped:
            counted["skipped"] = len(self.dataset.skipped)
        return Survey(
            dataset=self.dataset.name,
            classes=len(self.dataset.classes),
            splits=dict(self.splits),
            missing=len(self.missing),
            oddities=counted,
            published=dict(self.published),
            notes=self.notes,
            missing_examples=self.missing[:EXAMPLES],
            kept_items=kept_items(self.dataset),
            skipped_items=skipped_items(replace(self.dataset, regular=self.regular)),
        )


POLICY = {"policy": "skip rows that cannot be used (each is listed), or error at the first; skip"}
KEEP_POLICY = {
    "policy": "skip rows that cannot be used (each is listed), error at the first, or keep what "
    "can be joined, renamed or mended (each is listed); skip"
}
Load = Callable[[Path, Mapping[str, str]], Reading]


def make_adapter(
    name: str,
    title: str,
    needs: str,
    access: str,
    options: Mapping[str, str],
    load: Load,
    *,
    keeps: bool = False,
) -> Adapter:
    """An Adapter around `load`, which is called with a folder that exists and known options.

    With `keeps`, `load` knows the policy `keep`; the others are seen to here.
    """
    options = {**options, **(KEEP_POLICY if keeps else POLICY)}
    policies = ("skip", "error", "keep") if keeps else ("skip", "error")

    def checked(root: Path, given: Mapping[str, str]) -> Reading:
        check_options(name, given, options)
        choice(name, given, "policy", policies, "skip")
        return load(require_root(root, needs), given)

    def read(root: Path, given: Mapping[str, str]) -> Dataset:
        reading = checked(root, given)
        if given.get("policy") == "error":
            unusable = [x for x in reading.dataset.skipped if x not in reading.regular]
            if unusable:
                item, reason = unusable[0]
                raise DatasetError(
                    f"{root}: {item}: {reason} ({len(unusable)} such items in all; "
                    "--option policy=skip leaves them out)"
                )
        return replace(reading.dataset, regular=reading.regular)

    return Adapter(
        name=name,
        title=title,
        needs=needs,
        access=access,
        options=options,
        read=read,
        survey=lambda root, given: checked(root, given).survey(),
    )
