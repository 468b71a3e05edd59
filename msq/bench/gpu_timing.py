"""Timing on a GPU: CUDA graphs on all sides, ceilings of the machine, a budget of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from msq.bench.cases import Side
from msq.bench.runner import ceiling, interleaved, quartiles

Run = Callable[[], object]
Record = Callable[[dict[str, Any]], None]
WARM_UP = 3  # runs before a capture
# Why there is no graph, where none was wanted; any other reason makes a side no fair one.
NO_GRAPH_WANTED = ("", "no CUDA", "eager", "not asked for")


@dataclass
class Session:
    """One part of the GPU benchmark under way.

    Attributes:
        device: `cuda`, or `cpu` for a dry run.
        tiny: sizes and rounds of a dry run.
        seconds: that the part may take.
        record: writes one result.
    """

    device: str
    tiny: bool
    seconds: float
    record: Record
    began: float = field(default_factory=time.monotonic)

    @property
    def rounds(self) -> int:
        """Of every comparison: the median of at least 50."""
        return 2 if self.tiny else 50

    def left(self) -> float:
        """Seconds until the part has to end."""
        return self.seconds - (time.monotonic() - self.began)

    def add(self, name: str, **values: Any) -> None:
        """Write one result at once."""
        self.record({"name": name, "tiny": self.tiny, **values})

    def attempt(self, name: str, work: Callable[[], None], needs: float = 30.0) -> None:
        """Do a piece of work; an error or a lack of time is a result like any other.

        Args:
            name: of the piece.
            work: adds its results itself.
            needs: seconds below which it is not begun.
        """
        if self.left() < needs:
            self.add(name, left_out=f"{self.left():.0f} s left, needs {needs:.0f}")
            return
        try:
            work()
        except Exception as error:  # the next piece may work
            text = str(error).strip() or repr(error)
            self.add(name, error=f"{type(error).__name__}: {text.splitlines()[0][:300]}")
        if self.device == "cuda":
            torch.cuda.empty_cache()


def captured(run: Run, device: str, times: int = 1) -> tuple[Run, str]:
    """A CUDA graph of some runs, or the runs themselves and why there is no graph.

    Args:
        run: does the work on the current stream, always the same.
        device: `cuda`; elsewhere there are no graphs.
        times: how often one replay does it.
    """
    loop = _looped(run, times)
    if device != "cuda":
        return loop, "no CUDA"
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        # The outer one puts the stream back: in torch 2.11 a failed recording does not.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
            loop()
    except Exception as error:  # what cannot be captured is timed as it is, and said so
        torch.cuda.synchronize()
        return loop, str(error).strip().splitlines()[0][:200]
    return graph.replay, ""


def compare(
    session: Session,
    runs: Mapping[str, Run],
    times: int = 1,
    capture: bool = True,
    eager: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
    """Milliseconds of each of several runs, interleaved.

    Args:
        session: says where, and how often.
        runs: what to time.
        times: runs in one measurement, for what takes microseconds.
        capture: in CUDA graphs.
        eager: names of runs that are timed as they are all the same.

    Returns:
        For each `median, q25, q75` in ms of one run and `graph`, empty or why there is none; a run
        that failed has `error` alone.
    """
    found: dict[str, dict[str, Any]] = {}
    sides: dict[str, Side] = {}
    times = 1 if session.tiny else times
    for name, run in runs.items():
        try:
            if name in eager or not capture:
                ready, reason = _looped(run, times), "eager" if name in eager else "not asked for"
            else:
                ready, reason = captured(run, session.device, times)
            ready()
        except Exception as error:  # such as an attention backend that refuses these sizes
            found[name] = {"error": str(error).strip().splitlines()[0][:200]}
            continue
        sides[name], found[name] = Side(ready), {"graph": reason}
    for name, taken in interleaved(sides, session.rounds).items():
        found[name] |= quartiles([1e3 * t.wall / times for t in taken])
    return found


class NotCaptured(Exception):
    """A side that was to be a CUDA graph ran launch by launch: it is compared with nothing."""


def median(found: Mapping[str, Mapping[str, Any]], name: str, side: str) -> float | None:
    """Ms of one side of one result; None where it was not measured.

    Raises:
        NotCaptured: it has no graph although its opponents have one.
    """
    one = found.get(name, {}).get("sides", {}).get(side, {})
    if "median" not in one:
        return None
    reason = one.get("graph", "")
    if reason not in NO_GRAPH_WANTED:
        raise NotCaptured(f"{side} is no CUDA graph: {reason}")
    return float(one["median"])


def _looped(run: Run, times: int) -> Run:
    def loop() -> None:
        for _ in range(times):
            run()

    return loop


def ceilings(session: Session) -> None:
    """Speed of a large matrix product in bf16 and fp32, of a copy, and of one inside the cache."""
    size = 128 if session.tiny else 8192
    values = {p: ceiling(session.device, p, size, 20) for p in ("bf16", "fp32")}
    cells = 2**12 if session.tiny else 2**29
    source = torch.empty(cells, dtype=torch.int16, device=session.device)
    target = torch.empty_like(source)
    taken = interleaved({"copy": Side(lambda: target.copy_(source))}, 20)["copy"]
    moved = 2 * source.nbytes / min(t.wall for t in taken)
    # 8 MB each, which stay in the second-level cache; in a graph, since a launch takes as long.
    small = 2**8 if session.tiny else 2**22
    near, to = source[:small], target[:small]
    cached = compare(session, {"copy": lambda: to.copy_(near)}, times=20)["copy"]["median"]
    session.add(
        "ceilings", **{f"{p}_flops": v for p, v in values.items()}, copy_bytes=moved,
        cached_copy_bytes=2 * near.nbytes / (1e-3 * cached),
    )  # fmt: skip
