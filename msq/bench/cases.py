"""What can be compared: one registry of cases, and the words they are written in.

A case has sides that do the same work in different ways. Its gate compares their results, and no
time is taken where they differ.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

from msq.errors import UsageError

Kind = Literal["head", "stack", "store", "decode", "extract"]
Unit = Literal["ms", "MB/s"]
KINDS: dict[str, str] = {
    "head": "msq.bench.head_cases",
    "stack": "msq.bench.stack_cases",
    "store": "msq.bench.store_cases",
    "decode": "msq.bench.decode_cases",
    "extract": "msq.bench.extract_cases",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How cases are run.

    Attributes:
        quick: tiny sizes, to see that everything runs; the numbers mean nothing.
        rounds: how often each side runs; None leaves it to the case.
        device: `cpu`, `cuda` (the current one), or `cuda:N` for stage one.
        compile: also time what torch.compile makes (head cases); takes minutes on a CPU.
        only: names of cases must contain this.
        emulated: bf16 too where the processor has no bf16 products and torch emulates them.
    """

    quick: bool = False
    rounds: int | None = None
    device: str = "cpu"
    compile: bool = False
    only: str = ""
    emulated: bool = False


@dataclass(frozen=True, slots=True)
class Gate:
    """Whether the sides agree.

    Attributes:
        worst: how far apart they are.
        tolerance: how far they may be.
        what: what was compared, and how the distance is counted.
    """

    worst: float
    tolerance: float
    what: str

    @property
    def ok(self) -> bool:
        """Within the tolerance; a distance that is no number is not."""
        return self.worst <= self.tolerance


@dataclass(frozen=True, slots=True)
class Side:
    """One way of doing the work.

    Attributes:
        run: does it once.
        before: makes it ready for a run; not timed.
    """

    run: Callable[[], object]
    before: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """What follows from the times of a case, and what is wanted of it.

    Attributes:
        value: the number.
        goal: at least this, or at most where `most`; None where it is there to be known.
        most: smaller is better.
    """

    value: float
    goal: float | None = None
    most: bool = False

    def to_dict(self) -> dict[str, float | bool | None]:
        """With `met`, None where there is no goal."""
        good = self.goal is not None and (
            self.value <= self.goal if self.most else self.value >= self.goal
        )
        met = None if self.goal is None else good
        return {"value": self.value, "goal": self.goal, "most": self.most, "met": met}


@dataclass(slots=True)
class Prepared:
    """A case with its data made.

    Attributes:
        gate: compares the sides; called before `sides`.
        sides: makes them, by name.
        megabytes: that one run handles, where the unit is MB/s.
        flops: of one run as the plain form counts them, for the share of the ceiling.
        precision: of the matrix products, `fp32` or `bf16`, with `flops`.
        left_out: sides that could not be made, and why; filled by `sides`.
        figures: what follows from the (wall, CPU) seconds of each side, by what it is.
    """

    gate: Callable[[], Gate]
    sides: Callable[[], Mapping[str, Side]]
    megabytes: float | None = None
    flops: float | None = None
    precision: str = "fp32"
    left_out: dict[str, str] = field(default_factory=dict)
    figures: Callable[[Mapping[str, Sequence[tuple[float, float]]]], Mapping[str, Figure]] = field(
        default=lambda taken: {}
    )


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison.

    Attributes:
        name: unique in the registry.
        compares: in words, what is compared with what.
        base: the side that ratios are taken to.
        unit: of what is reported for each side.
        rounds: unless the settings say otherwise.
        prepare: makes the data; closing it removes what was made.
        not_here: why it says nothing on this machine, and is not run; "" where it does.
    """

    name: str
    compares: str
    base: str
    unit: Unit
    rounds: int
    prepare: Callable[[Settings], AbstractContextManager[Prepared]]
    not_here: str = ""


def registry(kind: str, settings: Settings) -> tuple[Case, ...]:
    """The cases of a kind, in order.

    Args:
        kind: `head`, `stack`, `store`, `decode` or `extract`.
        settings: `only` chooses among them.

    Raises:
        UsageError: no such kind, or no case whose name contains `only`.
    """
    if kind not in KINDS:
        raise UsageError(f"bench: expected {', '.join(KINDS)}, found {kind!r}")
    module = importlib.import_module(KINDS[kind])
    found: Iterable[Case] = module.cases(settings)
    everything = tuple(found)
    chosen = tuple(case for case in everything if settings.only in case.name)
    if not chosen:
        names = "; ".join(case.name for case in everything)
        raise UsageError(f"bench {kind}: no case contains {settings.only!r}; there are: {names}")
    return chosen


def worst_of(gates: Iterable[Gate]) -> Gate:
    """Of several gates the one that is nearest to failing, or has failed furthest."""

    def used(gate: Gate) -> float:
        share = gate.worst / gate.tolerance if gate.tolerance else gate.worst * float("inf")
        if gate.worst == 0:
            return 0.0
        return float("inf") if share != share else share

    return max(gates, key=used)
