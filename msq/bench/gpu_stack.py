"""Ten heads at once and in turn on a GPU, both ways as CUDA graphs; and in turn without one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from msq.bench.cases import Settings, Side
from msq.bench.gpu_timing import Session, median
from msq.bench.runner import interleaved, quartiles
from msq.bench.stack_cases import agreement, begun, in_turn, sides_of
from msq.head.graph import WARM_UP

NAME, EAGER = "heads at once", "sequential, eager"
CLASSES, CLIPS, HEADS = 20, 64, 10


def heads_at_once(session: Session) -> None:
    """A gate, then one step of all heads all ways, interleaved; adds `heads at once`."""
    tiny = session.tiny
    sizes = (5, 4, 2) if tiny else (CLASSES, CLIPS, HEADS)
    begin = functools.partial(begun, *sizes, Settings(quick=tiny, device=session.device))
    together, alone = (begin(stacked=at_once, exact=True) for at_once in (True, False))
    gate = agreement(together, alone, lambda: sides_of(together, alone).values())
    facts = {"ok": gate.ok, "worst": gate.worst, "what": gate.what}
    if not gate.ok:
        session.add(NAME, gate=facts)
        return
    together, alone = begin(stacked=True), begin(stacked=False)
    eager = begin(stacked=False, graph="off")
    sides = {**sides_of(together, alone), EAGER: Side(functools.partial(in_turn, eager))}
    taken = interleaved(sides, session.rounds, warm_up=WARM_UP + 2)  # a refused graph is an error
    found = {name: quartiles([1e3 * one.wall for one in times]) for name, times in taken.items()}
    session.add(NAME, gate=facts, heads=sizes[2], graph=together[0].choice.graph, sides=found)


def times_faster(found: Mapping[str, Mapping[str, Any]], than: str = "sequential") -> float | None:
    """One after another over at once; None where not measured."""
    at_once, other = (median(found, NAME, side) for side in ("stacked", than))
    return other / at_once if at_once and other else None
