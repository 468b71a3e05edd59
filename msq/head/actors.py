"""Cross-actor transfer: train on the clips of some actors, score on those of the others.

A store records no actors, so they come from a table `clip,actor` (CSV with a header); a clip with
several actors has several lines, or names joined by `;`. Training clips that show none but training
actors are trained on, test clips that show none but test actors are scored; clips of both kinds
are left out of both, and clips without a line count as left out too.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq.errors import UsageError

if TYPE_CHECKING:  # tables of results name actors, and load no torch
    from msq.head.features import Features


@dataclass(frozen=True)
class ActorSplit:
    """Whose clips are trained on and whose are scored.

    Attributes:
        train: names of the training actors.
        test: names of the others.
        train_clips: ids of the training and validation clips that show training actors only.
        test_clips: ids of the test clips that show test actors only.
        same_clips: ids of the test clips that show training actors only, for comparison.
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    train_clips: tuple[str, ...] = field(repr=False)
    test_clips: tuple[str, ...] = field(repr=False)
    same_clips: tuple[str, ...] = field(repr=False)

    @property
    def hash(self) -> str:
        """SHA-256 over the lists of clips."""
        lists = [self.train_clips, self.test_clips, self.same_clips]
        return hashlib.sha256(json.dumps(lists).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {key: list(value) for key, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ActorSplit:
        """The division that `to_dict` gave."""
        return cls(**{key: tuple(value) for key, value in values.items()})


def read_actors(path: Path) -> dict[str, frozenset[str]]:
    """Clip id -> its actors, from a CSV with columns `clip` and `actor`.

    Raises:
        UsageError: missing, not UTF-8, without these columns, or without a line.
    """
    actors: dict[str, frozenset[str]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file)
            columns = lines.fieldnames or ()
            if not {"clip", "actor"} <= set(columns):
                raise UsageError(f"{path}: expected columns clip and actor, found {list(columns)}")
            for line in lines:
                names = frozenset(x.strip() for x in (line["actor"] or "").split(";") if x.strip())
                actors[line["clip"]] = actors.get(line["clip"], frozenset()) | names
    except OSError as error:
        raise UsageError(f"{path}: no table of actors can be read there; {error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: expected UTF-8; {error}") from None
    if not actors:
        raise UsageError(f"{path}: expected a line for each clip, found none")
    return actors


def actor_split(
    features: Features,
    actors: Mapping[str, frozenset[str]],
    train: Sequence[str],
    test: Sequence[str] | None = None,
) -> ActorSplit:
    """Divide the clips by their actors.

    Args:
        features: whose clips.
        actors: of each clip, by id.
        train: names of the training actors.
        test: names of the others; None for all that are not in `train`.

    Raises:
        UsageError: an actor that no clip has (names the nearest), one on both sides, or a side
            without clips.
    """
    known = shown_actors(features, actors)
    if not known:
        raise UsageError(f"table of actors: none of its clips is in the store of {features.name}, "
                         f"whose ids look like {features.ids[0]!r}")  # fmt: skip
    others = tuple(test) if test is not None else tuple(x for x in known if x not in set(train))
    for name in (*train, *others):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            words = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
            raise UsageError(f"actor {name!r}: no clip of the store has it; {words}")
    both = sorted(set(train) & set(others))
    if both:
        raise UsageError(f"actors {both}: expected each to be trained on or scored, found both")
    made = _divided(features, actors, train, others)
    if not made.train_clips or not made.test_clips:
        raise UsageError(
            f"actors {', '.join(train)} against {', '.join(others)}: expected training clips of "
            f"the first and test clips of the second, found {len(made.train_clips)} and "
            f"{len(made.test_clips)}"
        )
    return made


def _divided(
    features: Features,
    actors: Mapping[str, frozenset[str]],
    train: Sequence[str],
    test: Sequence[str],
) -> ActorSplit:
    """The clips of either side, none of which may have any."""

    def clips(wanted: frozenset[str], *splits: str) -> tuple[str, ...]:
        return tuple(
            clip
            for clip, split in zip(features.ids, features.splits, strict=True)
            if split in splits and actors.get(clip) and actors[clip] <= wanted
        )

    first, second = frozenset(train), frozenset(test)
    return ActorSplit(tuple(train), tuple(test), clips(first, "train", "val"),
                      clips(second, "test"), clips(first, "test"))  # fmt: skip


def shown_actors(features: Features, actors: Mapping[str, frozenset[str]]) -> list[str]:
    """The actors that the clips show, by name."""
    return sorted(set().union(*(actors.get(clip, frozenset()) for clip in features.ids)))


def leave_one_out(features: Features, actors: Mapping[str, frozenset[str]]) -> list[ActorSplit]:
    """A division for each actor that can be held out: trained on all others, scored on this one.

    Left out are actors without a test clip of their own, as all training subjects are of a set
    whose training and test subjects differ, and those without whom nothing is trained on.

    Raises:
        UsageError: fewer than two actors, or none that can be held out.
    """
    known = shown_actors(features, actors)
    if len(known) < 2:
        raise UsageError(f"table of actors: expected two actors or more among the clips of "
                         f"{features.name}, found {known}")  # fmt: skip
    made = [_divided(features, actors, [x for x in known if x != held], [held]) for held in known]
    found = [one for one in made if one.train_clips and one.test_clips]
    if not found:
        scored = sum(bool(one.test_clips) for one in made)
        raise UsageError(
            f"table of actors: expected an actor with test clips of {features.name} that show "
            f"nobody else, and training clips of the others; of {len(known)} actors {scored} have "
            "such test clips, none has both; name the sides with --train-actors and --test-actors"
        )
    return found
