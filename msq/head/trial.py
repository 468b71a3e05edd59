"""A trial: one head, trained once, scored once. What a sweep is made of.

A trial's identity is the hash of what decides its numbers: the features, the whole configuration,
the class split and the division of actors. Where it stands in a table is no part of it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from msq import config as configuration
from msq.config import RunConfig
from msq.head.actors import ActorSplit
from msq.head.class_splits import ClassSplit


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One head to be trained.

    Attributes:
        source: key of the features among the sources of the plan; a hash of their identity.
        config: of the run.
        split: which classes are trained; None for all.
        actors: whose clips are trained on and whose are scored; None for all.
        row: axis -> value, where it stands in the table.
        repeat: axis -> value of what the table averages over: split, seed, partition.
        choice: axis -> value of what validation clips decide: one of these stands in the table.
    """

    source: str
    config: RunConfig
    split: ClassSplit | None = None
    actors: ActorSplit | None = None
    row: Mapping[str, Any] = field(default_factory=dict)
    repeat: Mapping[str, Any] = field(default_factory=dict)
    choice: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def id(self) -> str:
        """16 hexadecimal digits over all that decides the numbers."""
        decides = [
            self.source,
            configuration.identity(self.config),
            None if self.split is None else self.split.hash,
            None if self.actors is None else self.actors.hash,
        ]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def kind(self) -> str:
        """`zero-shot`, `actors` or `train`."""
        return "actors" if self.actors else "zero-shot" if self.split else "train"

    def name(self) -> str:
        """Where it stands, in words."""
        places = {**self.row, **self.repeat, **self.choice}
        return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in places.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the plan."""
        return {
            "id": self.id,
            "source": self.source,
            "row": dict(self.row),
            "repeat": dict(self.repeat),
            "choice": dict(self.choice),
            "config": configuration.to_dict(self.config),
            "split": None if self.split is None else split_to_dict(self.split),
            "actors": None if self.actors is None else self.actors.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> Trial:
        """The trial that `to_dict` gave."""
        split, actors = values["split"], values["actors"]
        return cls(
            source=values["source"],
            config=configuration.from_dict(values["config"], where),
            split=None if split is None else split_from_dict(split),
            actors=None if actors is None else ActorSplit.from_dict(actors),
            row=values["row"],
            repeat=values["repeat"],
            choice=values["choice"],
        )


def split_to_dict(split: ClassSplit) -> dict[str, Any]:
    """Plain values, the hash among them for people to compare."""
    return {"source": split.source, "seed": split.seed, "hash": split.hash,
            "seen": list(split.seen), "unseen": list(split.unseen)}  # fmt: skip


def split_from_dict(values: Mapping[str, Any]) -> ClassSplit:
    """The split that `split_to_dict` gave."""
    seen, unseen = tuple(values["seen"]), tuple(values["unseen"])
    return ClassSplit(seen, unseen, values["seed"], values["source"])
