"""A training step as one CUDA graph: recorded once, then started by a single call.

On a GPU a step of some hundred small operations is limited by the processor that starts them. All
of it (forward pass, backward pass, clipping, optimiser, average) becomes one graph. A graph reads
and writes fixed addresses, so the batch is copied into buffers of its own first, and what differs
between steps otherwise lies in tensors (`msq.head.step`).

The first steps run as they are, on a stream of their own: kernels are compiled then, and libraries
take their workspaces. They are real steps, so nothing has to be undone. A batch of another size,
such as the short last one of an epoch that is counted in clips, runs as it is too.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch

from msq.head.feeding import Batch

Run = Callable[[Batch], None]
Replay = Callable[[], object]
Record = Callable[[Callable[[], None]], Replay]
WARM_UP = 3  # steps before the recording


class StepGraph:
    """A step that is recorded once and then replayed.

    Args:
        run: the step; what it reads beside the batch, and all that it writes, has fixed addresses.
        size: clips of the batches that are replayed; of each head, where there are several.
        record: makes a graph of a call, without running it.
        warm: runs a step before the recording.

    Attributes:
        refused: why there is no graph although the steps before the recording are over.
    """

    def __init__(
        self,
        run: Run,
        size: int,
        record: Record | None = None,
        warm: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self._run, self._size = run, size
        self._record, self._warm = record or recorded, warm or on_a_side_stream
        self.refused = ""
        self.forget()

    def forget(self) -> None:
        """Record anew: to be called when tensors that the step uses were replaced."""
        self._warmed = 0
        self._replay: Replay | None = None
        self._inputs: Batch | None = None

    def __call__(self, batch: Batch) -> None:
        """Take one step, on the device of the batch: streams and graphs are the current one's."""
        with torch.cuda.device_of(batch.rows):  # type: ignore[no-untyped-call]
            self._take(batch)

    def _take(self, batch: Batch) -> None:
        if batch.rows.shape[-1] != self._size or self.refused:
            self._run(batch)
            return
        if self._warmed < WARM_UP:
            self._warm(lambda: self._run(batch))
            self._warmed += 1
            return
        if self._replay is None:
            self._inputs = own = Batch(*(None if x is None else x.clone() for x in batch))  # type: ignore[arg-type]
            try:
                self._replay = self._record(lambda: self._run(own))
            except RuntimeError as error:  # a library that cannot be captured: the step can run
                text = str(error).strip() or repr(error)
                self.refused = text.splitlines()[0][:200]
                self._run(batch)
                return
        assert self._inputs is not None
        for mine, given in zip(self._inputs, batch, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        self._replay()


def on_a_side_stream(run: Callable[[], None]) -> None:
    """Run on a stream of its own, as a recording does, after and before all else."""
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*capturable=True.*")  # it is about to be
        run()
    torch.cuda.current_stream().wait_stream(stream)


@functools.lru_cache(maxsize=16)
def _side_stream(device: int) -> torch.cuda.Stream:
    """One of a device: what a step allocates is kept for its stream, and the next one finds it."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def recorded(run: Callable[[], None]) -> Replay:
    """A CUDA graph of one call; other threads may use the GPU meanwhile.

    Up to torch 2.11 a recording that fails leaves its own stream the current one: it is put back.

    Raises:
        RuntimeError: something in it cannot be captured.
    """
    torch.cuda.synchronize()
    # Torch's own stream for recordings is of the device that recorded first in this process.
    stream = _side_stream(torch.cuda.current_device())
    graph = torch.cuda.CUDAGraph()
    try:
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
        ):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        raise
    return graph.replay
