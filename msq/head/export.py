"""Predictions in the form of the official Charades scorer: `id s_0 … s_156`, one line a video.

Any dataset's can be written so; K scores a line then.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msq.errors import MsqError, UsageError
from msq.head.json_file import write_atomic
from msq.head.metrics import ranking_metrics
from msq.head.segments import segment_metrics

CHARADES_TEST_VIDEOS = 1863


def write_charades_submission(file: Path, ids: Sequence[str], scores: Tensor) -> None:
    """Write one line a video: its id and the scores of its classes, between blanks.

    Nine digits keep every float32 apart, and seventeen every float64, so the order, which alone is
    scored, survives.

    Args:
        file: to write; whole or not at all.
        ids: [N] distinct, without blanks.
        scores: [N, K], higher is surer; logits or probabilities.

    Raises:
        UsageError: shapes that do not fit, or ids that are not distinct or hold blanks.
        MsqError: NaN among the scores.
    """
    if scores.ndim != 2 or len(scores) != len(ids):
        raise UsageError(
            f"{file}: expected scores [N, K] of {len(ids)} ids, found {list(scores.shape)}"
        )
    bad = [name for name in ids if len(name.split()) != 1 or name != name.strip()]
    if bad or len(set(ids)) != len(ids):
        raise UsageError(
            f"{file}: expected distinct ids without blanks, found {bad[:3] or 'some twice'}"
        )
    if bool(scores.isnan().any()):
        raise MsqError(f"{file}: NaN among the scores")
    digits = 17 if scores.dtype == torch.float64 else 9
    values = scores.detach().double().cpu().tolist()
    lines = (
        " ".join((name, *(f"{x:.{digits}g}" for x in row)))
        for name, row in zip(ids, values, strict=True)
    )
    write_atomic(file, "".join(f"{line}\n" for line in lines).encode())


def export_charades_run(run: Path, file: Path) -> int:
    """Write the predictions of a run's test split as a submission; returns how many videos.

    Raises:
        UsageError: the run has no `predictions.npz`.
    """
    source = Path(run) / "predictions.npz"
    if not source.is_file():
        raise UsageError(f"{source}: expected the predictions of a finished run, found nothing")
    with np.load(source, allow_pickle=False) as found:
        ids = [str(name) for name in found["ids"]]
        write_charades_submission(file, ids, torch.from_numpy(found["logits"]))
    return len(ids)


def read_charades_submission(
    file: Path,
    ids: Sequence[str],
    classes: int = 157,
    expected: int | None = CHARADES_TEST_VIDEOS,
) -> Tensor:
    """Scores [N, K] float64 of a submission in the order of `ids`, blanks or tabs between them.

    A video without a line gets -inf, as in the official scorer; `metrics.charades_map` ranks
    unlabelled videos last on its own. Both a missing video and a line of an unknown one are
    warned of, as is a list of ids that is not the 1,863 official test videos (`expected`; None
    for any number).

    Raises:
        UsageError: the file is missing, or a line has not an id and `classes` numbers, or an id
            stands twice.
    """
    file = Path(file)
    if not file.is_file():
        raise UsageError(f"{file}: expected a submission, found nothing there")
    found: dict[str, list[float]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        cells = line.split()
        if not cells:
            continue
        try:
            values = [float(x) for x in cells[1:]]
        except ValueError as bad:
            raise UsageError(f"{file}, line {number}: {bad}") from None
        if len(values) != classes:
            raise UsageError(
                f"{file}, line {number}: expected an id and {classes} scores, found {len(values)}"
            )
        if cells[0] in found:
            raise UsageError(f"{file}, line {number}: the id {cells[0]!r} stands twice")
        found[cells[0]] = values
    lost = [name for name in ids if name not in found]
    unknown = sorted(found.keys() - set(ids))
    for names, what in ((lost, "without a line, ranked last"), (unknown, "not asked for")):
        if names:
            warnings.warn(f"{file}: {len(names)} videos {what}: {names[:3]}", stacklevel=2)
    if expected is not None and len(ids) != expected:
        warnings.warn(
            f"{file}: {len(ids)} videos, the official test set has {expected}", stacklevel=2
        )
    empty = [-float("inf")] * classes
    return torch.tensor([found.get(name, empty) for name in ids], dtype=torch.float64)


def score_submission(
    file: Path,
    ids: Sequence[str],
    labels: Tensor,
    *,
    known: Tensor | None = None,
    groups: Mapping[str, Sequence[int]] | None = None,
    expected: int | None = None,
) -> dict[str, Any]:
    """Score a submission of anyone's, by rank alone: its numbers may be of any scale.

    Args:
        file: the submission.
        ids: [N] of the clips that should be in it, in the order of the annotation (stable ties).
        labels: [N, K].
        known: [N, K], zero where nobody knows; None where all is known.
        groups: name -> class indices.
        expected: how many clips the official list has.

    Returns:
        `metrics` (those that need no threshold), `clips`, `without_line` (ids), `warnings`.

    Raises:
        UsageError: as `read_charades_submission`.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = read_charades_submission(file, ids, labels.shape[1], expected)
    metrics = ranking_metrics(scores, labels, known)
    metrics |= segment_metrics(scores, labels, groups or {}, known)
    lost = (scores == -torch.inf).all(1).tolist()
    return {
        "metrics": metrics,
        "clips": len(ids),
        "without_line": [name for name, gone in zip(ids, lost, strict=True) if gone],
        "warnings": [str(w.message) for w in caught],
    }
