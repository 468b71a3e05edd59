"""Scores of a head over several looks at each clip: pieces in time x crops in space.

Probabilities are averaged, or the largest is taken (what SlowFast does for multi-label data). All
of it is kept in float64 and in the log domain: a mean of sigmoids that are all 1 to the last bit
still tells its clips apart, and what comes out are logits, on which every metric is defined.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from msq.errors import UsageError
from msq.head.features import Features
from msq.head.train_views import readable_in_all

if TYPE_CHECKING:
    from msq.head.model import MSQNet

Ensemble = Literal["none", "mean", "max"]
REASON = "without all test views"  # in `Features.left_out`


@dataclass(frozen=True, eq=False)
class EnsembleScores:
    """What an ensemble says of some clips.

    Attributes:
        features: those given, without the clips of `rows` that some view could not be read of.
        rows: [n] the clips scored, in them.
        logits: [n, K] float64. `multilabel`: the logits of the combined probabilities.
            `singlelabel`: the logarithms of the combined probabilities.
        views: in words, such as `10 clips x 3 crops, mean`.
    """

    features: Features
    rows: Tensor
    logits: Tensor
    views: str


def combined(logits: Iterable[Tensor], task: str, how: str) -> Tensor:
    """Probabilities of several views as one, given and returned as logits.

    With p_v = sigmoid(x_v) and q_v = 1 - p_v, the mean is log(sum p_v) - log(sum q_v), the logit of
    mean(p_v); the largest is max(x_v). For `singlelabel` p_v is a softmax, and the result is
    log(mean(p_v)) or log(max(p_v)); the latter no longer sums to one.

    Args:
        logits: [n, K] of each view.
        task: `multilabel` or `singlelabel`.
        how: `mean` or `max`.

    Returns:
        [n, K] float64.

    Raises:
        UsageError: no view, or another word than `mean` and `max`.
    """
    if how not in ("mean", "max"):
        raise UsageError(f"ensemble: expected mean or max, found {how!r}")
    multilabel, count = task == "multilabel", 0
    yes = no = torch.empty(0)
    for x in (part.double() for part in logits):
        p = F.logsigmoid(x) if multilabel else x.log_softmax(-1)
        q = F.logsigmoid(-x) if multilabel else p
        if how == "max":
            p = x if multilabel else p
            yes = p if not count else torch.maximum(yes, p)
        else:
            yes = p if not count else torch.logaddexp(yes, p)
            no = q if not count else torch.logaddexp(no, q)
        count += 1
    if not count:
        raise UsageError("ensemble: expected at least one view, found none")
    if how == "max":
        return yes
    return yes - no if multilabel else yes - math.log(count)


def chosen_test_views(store: Any, video: str, wanted: str | None = None) -> tuple[Any, ...]:
    """The test views of a store's video encoder: one set of clips x crops.

    Args:
        store: an open feature store.
        video: name of the encoder.
        wanted: `10x3`, where the store has several sets.

    Raises:
        UsageError: none are there, or several and none is named; the message says how to add them.
    """
    views: Sequence[Any] = store.views(video) if hasattr(store, "views") else ()
    sets: dict[str, list[Any]] = {}
    for view in views:
        if view.kind == "test":
            sets.setdefault(f"{view.clips}x{view.crops}", []).append(view)
    name = next(iter(sets)) if wanted is None and len(sets) == 1 else (wanted or "").strip().lower()
    if name in sets:
        return tuple(sets[name])
    if sets and wanted is None:
        raise UsageError(
            f"store of {store.name}: several sets of test views, {', '.join(sets)}; choose one "
            f"with --test-views {next(iter(sets))}"
        )
    what = f"no test views {wanted}" if wanted else "no test views"
    there = f" (there are {', '.join(sets)})" if sets else ""
    raise UsageError(
        f"store of {store.name}: {what} of {video}{there}; `msq extract ... --test-views "
        f"{wanted or '10x3'}` with the options that made the store adds them to it and touches "
        "nothing that is there"
    )


@torch.no_grad()
def ensemble_scores(
    model: MSQNet,
    store: Any,
    features: Features,
    split: str,
    how: str,
    wanted: str | None = None,
    *,
    batch: int = 64,
) -> EnsembleScores:
    """Score the clips of one split in all test views of a store.

    Args:
        model: the head.
        store: the open feature store that the features are from.
        features: its clean view, on the head's device; their labels and text are used.
        split: `train`, `val` or `test`.
        how: `mean` or `max`.
        wanted: which set of test views; see `chosen_test_views`.
        batch: clips at a time.

    Raises:
        UsageError: see `chosen_test_views`; or no clip of the split is there in all views.
        StoreError: the image encoder does not have these views.
    """
    from msq.head.evaluate import score

    video = str(features.specs["video"]["slug"])
    image = None if features.image is None else str(features.specs["image"]["slug"])
    views = chosen_test_views(store, video, wanted)
    encoders = [name for name in (video, image) if name is not None]
    readable = readable_in_all(store, encoders, views)
    place = {clip: row for row, clip in enumerate(store.clips)}
    here = torch.tensor([bool(readable[place[clip]]) for clip in features.ids])
    lost = torch.tensor([part == split for part in features.splits]) & ~here
    device = features.tokens.device
    left_out = {**features.left_out, REASON: int(lost.sum())}
    if lost.any():
        features = features.select(rows=(~lost).nonzero().flatten().to(device))
    features = dataclasses.replace(features, left_out=left_out)
    rows = features.rows(split)
    if not rows.numel():
        raise UsageError(
            f"store of {store.name}: no clip of split {split!r} can be read in all "
            f"{len(views)} test views; run the same `msq extract` again to complete them"
        )
    some = features.select(rows=rows)
    stored = torch.tensor([place[clip] for clip in some.ids])

    def scored(view: Any) -> Tensor:
        parts = []
        for chosen in torch.split(torch.arange(len(stored)), batch):
            seen = some.select(rows=chosen.to(device))
            tokens = store.tokens(stored[chosen], video, view)
            pictures = None if image is None else store.image(stored[chosen], image, view)
            shown = dataclasses.replace(
                seen,
                tokens=tokens.to(device),  # as stored; `score` widens them
                image=None if pictures is None else pictures.to(device),
            )
            parts.append(score(model, shown, batch=batch))
        return torch.cat(parts)

    words = f"{views[0].clips} clips x {views[0].crops} crops, {how}"
    logits = combined((scored(view) for view in views), features.task, how)
    return EnsembleScores(features, rows, logits, words)
