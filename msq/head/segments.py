"""Macro mAP of groups of classes: Animal Kingdom's head, middle and tail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from msq.errors import UsageError
from msq.head.metrics import MeanAP, mean_average_precision


def segment_map(
    scores: Tensor,
    labels: Tensor,
    segments: Mapping[str, Sequence[int]],
    known: Tensor | None = None,
) -> dict[str, MeanAP]:
    """Macro mAP over the whole set and over each segment's classes.

    All clips are ranked for every class, whatever segment their labels belong to; classes without
    positives are left out of a segment's mean and counted, clips without any label are left out.

    Args:
        scores: [N, K], higher is surer.
        labels: [N, K], positive where not zero.
        segments: name -> class indices, for instance of
            `msq.extract.datasets.animal_kingdom.read_animal_kingdom_segments`.
        known: [N, K], zero where nobody knows; None where all is known.

    Returns:
        `overall` and one value for each segment; NaN for a segment without positives.

    Raises:
        UsageError: shapes that do not fit, a class that is not among the K, one that stands twice
            in a segment, or a segment called `overall`.
    """
    return _by_segment(mean_average_precision(scores, labels, known), segments)


def _by_segment(overall: MeanAP, segments: Mapping[str, Sequence[int]]) -> dict[str, MeanAP]:
    result, classes = {"overall": overall}, len(overall.per_class)
    for name, members in segments.items():
        if name in result:
            raise UsageError(f"segment_map: expected a segment other than {name!r}")
        wrong = [k for k in members if not 0 <= k < classes]
        if wrong or len(set(members)) != len(members):
            raise UsageError(
                f"segment_map, {name}: expected distinct classes 0 to {classes - 1}, found "
                f"{wrong or sorted(members)}"
            )
        per_class = overall.per_class[list(members)]
        result[name] = MeanAP(per_class, overall.rows_scored, overall.rows_left_out)
    return result


def segment_metrics(
    scores: Tensor,
    labels: Tensor,
    segments: Mapping[str, Sequence[int]],
    known: Tensor | None = None,
) -> dict[str, float | int]:
    """`map_NAME` and `classes_scored_NAME` of each segment; nothing where there are none."""
    if not segments:
        return {}
    return _named(segment_map(scores, labels, segments, known), segments)


def class_segments(
    per_class: Tensor, segments: Mapping[str, Sequence[int]]
) -> dict[str, float | int]:
    """`segment_metrics` from the AP of each class [K]."""
    return _named(_by_segment(MeanAP(per_class, 0, 0), segments), segments) if segments else {}


def _named(
    found: Mapping[str, MeanAP], segments: Mapping[str, Sequence[int]]
) -> dict[str, float | int]:
    return {
        key: value
        for name in segments
        for key, value in (
            (f"map_{name}", float(found[name])),
            (f"classes_scored_{name}", found[name].classes_scored),
        )
    }
