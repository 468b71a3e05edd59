"""What a zero-shot sweep can be asked for, and its defaults: those of the command and of Python.

It imports nothing heavy: the command line takes its defaults from here.
"""

from __future__ import annotations

import dataclasses
import math
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msq.config import Classifier, Queries
from msq.config_values import toml_value
from msq.errors import UsageError

SEEN, ALL = "50,75", "all"
MODES: tuple[Queries, ...] = typing.get_args(Queries)


@dataclass(frozen=True, kw_only=True)
class ZeroShotOptions:
    """Which class splits, and which heads on them. See `msq zero-shot --help` for each field.

    Attributes:
        seen: percent of classes seen.
        splits: random class splits of each share.
        queries: the modes to compare.
        classifier: None chooses by the queries, see `msq.head.zeroshot`.
        split_dir: a folder of class lists, in place of drawn splits.
        class_order: the first classes are seen.
        seen_classes: a list of the classes to train.
        actors: a table `clip,actor`: actors are held out, not classes.
        train_actors: only these are trained on.
        test_actors: only these are scored.
        prompts: of the store, to compare; `("all",)` for all.
        text_encoders: likewise.
        choose: key -> values, of which validation clips choose.
    """

    seen: tuple[float, ...] = tuple(float(share) for share in SEEN.split(","))
    splits: int = 10
    queries: tuple[Queries, ...] = MODES
    classifier: Classifier | None = None
    split_dir: Path | None = None
    class_order: bool = False
    seen_classes: Path | None = None
    actors: Path | None = None
    train_actors: tuple[str, ...] | None = None
    test_actors: tuple[str, ...] | None = None
    prompts: tuple[str, ...] | None = None
    text_encoders: tuple[str, ...] | None = None
    choose: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what no sweep can be, and what does not go together."""
        if type(self.splits) is not int or self.splits < 1:
            raise UsageError(f"--splits: expected a whole number from 1 on, found {self.splits!r}")
        if self.classifier not in (None, *typing.get_args(Classifier)):
            words = ", ".join(typing.get_args(Classifier))
            raise UsageError(f"--classifier: expected one of {words}, found {self.classifier!r}")
        kinds = {"--split-dir": self.split_dir, "--class-order": self.class_order or None,
                 "--seen-classes": self.seen_classes, "--actors": self.actors}  # fmt: skip
        given = [name for name, value in kinds.items() if value is not None]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)}: expected one of them, found both")
        if self.actors is None and (self.train_actors or self.test_actors):
            raise UsageError(
                "--train-actors and --test-actors go with --actors FILE, a table clip,actor"
            )


def zero_shot_options(given: Mapping[str, Any]) -> ZeroShotOptions:
    """The options of a sweep, from what was typed or what a Python caller has.

    Args:
        given: fields of `ZeroShotOptions`, None where nothing was asked for. Several values are a
            sequence or, as they are typed, one text: `"50,75"`, `"10..90"`, `"text,vanilla"`,
            `"all"`; `choose` is a mapping, or texts such as `optim.lr=1e-3,2e-3`.

    Raises:
        UsageError: shares that are no percentages, unknown queries, two kinds of splits at once.
    """
    found = {key: value for key, value in given.items() if value is not None}
    made: dict[str, Any] = dict(found)
    if "seen" in found:
        made["seen"] = shares(found["seen"])
    if "queries" in found:
        made["queries"] = query_modes(found["queries"])
    for key in ("train_actors", "test_actors", "prompts", "text_encoders"):
        if key in found:
            made[key] = names(found[key]) or None
    for key in ("split_dir", "seen_classes", "actors"):
        if isinstance(found.get(key), str | os.PathLike):
            made[key] = Path(found[key])
    if "choose" in found and not isinstance(found["choose"], Mapping):
        made["choose"] = choices(found["choose"])
    known = {one.name for one in dataclasses.fields(ZeroShotOptions)}
    return ZeroShotOptions(**{key: value for key, value in made.items() if key in known})


def shares(asked: str | float | Sequence[float]) -> tuple[float, ...]:
    """`50,75`, `10..90` (in tens), a number or several -> percentages.

    Raises:
        UsageError: anything else.
    """
    try:
        if isinstance(asked, str):
            low, dots, high = asked.partition("..")
            texts = range(int(low), int(high) + 1, 10) if dots else asked.split(",")
            found = tuple(float(x) for x in texts)
        else:
            found = tuple(float(x) for x in (asked if isinstance(asked, Sequence) else (asked,)))
    except (TypeError, ValueError):
        found = ()
    if not found or not all(math.isfinite(x) for x in found):
        raise UsageError(f"--seen {asked!r}: expected percentages such as 50,75 or 10..90")
    return found


def query_modes(asked: str | Sequence[str]) -> tuple[Queries, ...]:
    """`all`, or names, joined by commas or not.

    Raises:
        UsageError: a name that is none.
    """
    found = names(asked)
    if found == (ALL,):
        return MODES
    unknown = [x for x in found if x not in MODES] or ([] if found else [""])
    if unknown:
        raise UsageError(f"--queries {unknown[0]!r}: expected {', '.join(MODES)} or all")
    return typing.cast("tuple[Queries, ...]", found)


def names(asked: str | Sequence[str]) -> tuple[str, ...]:
    """`a, b` or several names -> each of them."""
    if isinstance(asked, str):
        return tuple(x.strip() for x in asked.split(",") if x.strip())
    return tuple(asked)


def choices(given: Sequence[str]) -> dict[str, list[Any]]:
    """`optim.lr=1e-3,2e-3` -> key and values.

    Raises:
        UsageError: not of this form.
    """
    found = {}
    for text in given:
        key, equals, values = text.partition("=")
        parts = [toml_value(x.strip()) for x in values.split(",") if x.strip()]
        if not equals or not parts:
            raise UsageError(f"--choose {text!r}: expected KEY=VALUE,VALUE,… such as "
                             "optim.lr=1e-3,2e-3")  # fmt: skip
        found[key.strip()] = parts
    return found
