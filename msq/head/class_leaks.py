"""Class splits that leak: a seen and an unseen class have the same clips.

THUMOS14's CliffDiving lies within Diving: what such a split calls unseen was shown in training,
under another name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msq.head.class_splits import ClassSplit
from msq.head.features import Features
from msq.head.token_batches import with_next

LEAK_SHARE = 0.95
LEAK_CLIPS = 10  # fewer shared clips than that may well be chance


class Leak(NamedTuple):
    """A seen and an unseen class with the same clips.

    Attributes:
        seen: name of the trained class.
        unseen: name of the other.
        share: of the smaller one's clips that both have.
        clips: that both have.
    """

    seen: str
    unseen: str
    share: float
    clips: int


def coinciding_classes(
    labels: Tensor, classes: Sequence[str], share: float = LEAK_SHARE, clips: int = LEAK_CLIPS
) -> list[Leak]:
    """Pairs of classes of which the smaller one's clips are also the other's.

    Args:
        labels: [N, K], positive where not zero; a row for each clip, whatever its split.
        classes: K names.
        share: of the smaller class's clips, at least.
        clips: that both have, at least.

    Returns:
        One `Leak` for each pair, `seen` being the class with the lower index.
    """
    positive = (labels != 0).double()
    together = positive.T @ positive
    count = together.diagonal()
    smaller = torch.minimum(count[:, None], count[None])
    held = ((together >= share * smaller) & (together >= clips)).triu(1)
    return [
        Leak(classes[a], classes[b], float(together[a, b] / smaller[a, b]), int(together[a, b]))
        for a, b in held.nonzero().tolist()
    ]


def clip_labels(features: Features) -> Tensor:
    """Labels [M, K] of the M different clips.

    In a single-label set a clip of two classes is two rows (THUMOS14's official view). They are
    taken for one where their ids differ in the class at their end only (`ID/CliffDiving`), or where
    their tokens are the same.
    """
    labels = features.labels.cpu()
    if features.task == "multilabel":
        return labels
    names = [features.classes[k] for k in labels.argmax(1).tolist()]
    first: dict[str, int] = {}
    clips: dict[bytes, int] = {}
    place, hashes = [], _token_hashes(features)
    for row, (clip, name) in enumerate(zip(features.ids, names, strict=True)):
        shown = hashes[first.setdefault(clip.removesuffix(f"/{name}"), row)]
        place.append(clips.setdefault(shown, len(clips)))
    merged = torch.zeros(len(clips), labels.shape[1], dtype=torch.int64)
    return merged.index_add_(0, torch.tensor(place, dtype=torch.long), labels.long())


def _token_hashes(features: Features) -> list[bytes]:
    """A hash of each clip's tokens."""
    rows = torch.arange(len(features.ids), device=features.tokens.device)
    return [
        hashlib.blake2b(row.tobytes()).digest()
        for _, part in with_next(features.tokens, torch.split(rows, 256))
        for row in part.detach().cpu().contiguous().view(torch.uint8).flatten(1).numpy()
    ]


def leaks(split: ClassSplit, coinciding: Sequence[Leak]) -> list[Leak]:
    """The coinciding pairs that a split puts on opposite sides, seen one first."""
    seen, unseen = set(split.seen), set(split.unseen)
    turned = (pair._replace(seen=pair.unseen, unseen=pair.seen) for pair in coinciding)
    return [pair for pair in (*coinciding, *turned) if pair.seen in seen and pair.unseen in unseen]
