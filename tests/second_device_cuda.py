"""What stands for `torch.cuda` beside `tests/second_device.py`: streams, events, graphs.

A graph records the operations that run while it is captured, with the tensors and numbers that they
were given, and puts back what they changed; a replay runs them again, into the same memory. So a
number of the processor that should have changed between two steps is the old one here as well, and
a tensor that was replaced is not seen.
"""

from __future__ import annotations

import contextlib
import runpy
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint
from torch.utils._pytree import tree_leaves, tree_map

from msq.head.graph import _side_stream
from msq.head.sending import _of_copies
from msq.kernels.dispatch import resolve

_device = types.SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("second_device.py"))))
CUDA, Calls, Generator, Operations = (
    _device.CUDA, _device.Calls, _device.Generator, _device.Operations
)  # fmt: skip
Refused, SecondDevice, is_on = _device.Refused, _device.SecondDevice, _device.is_on
plainly, storage, where = _device.plainly, _device.storage, _device.where


class Copy:
    """A copy between device and pinned memory that nothing has waited for yet."""

    def __init__(self, source: Tensor, target: Tensor) -> None:
        self._source, self._target, self.done, self._where = source, target, False, where()
        self._values = source.clone()
        self._to_host = not is_on(target)
        if not self._to_host:
            target.copy_(source)
        elif target.dtype.is_floating_point:
            target.fill_(float("nan"))
        else:
            target.fill_(1)

    def finish(self) -> None:
        """The processor has waited for it."""
        if self.done:
            return
        self.done = True
        with plainly(), torch.no_grad(), torch._C.DisableTorchFunction():
            if self._to_host:
                self._target.copy_(self._values)
                return
            same = self._source.view(torch.uint8).equal(self._values.view(torch.uint8))
        if not same:
            raise Refused(f"pinned memory written before its copy was done: {self._where}")


def fake_cuda(device: Any, capability: tuple[int, int], bf16: bool) -> dict[str, Any]:
    """Names of `torch.cuda` and what stands for them."""

    class Stream:
        """A stream; the copies in its order that may not be done."""

        device = CUDA

        def __init__(self, device: Any = None, priority: int = 0) -> None:
            self.work: list[Copy] = []
            self.recorded: list[Any] = []

        def is_capturing(self) -> bool:
            return device.graph is not None

        def wait_stream(self, other: Stream) -> None:
            self.work += other.work

        def wait_event(self, event: Event) -> None:
            self.work += event.work

        def record_event(self, event: Event | None = None) -> Event:
            event = event or Event()
            event.record(self)
            return event

        def synchronize(self) -> None:
            device.wait("event", "Stream.synchronize")
            self.finish()

        def finish(self) -> None:
            for copy in self.work:
                copy.finish()
            self.work.clear()

        def begin(self, source: Tensor, target: Tensor) -> None:
            copy = Copy(source, target)
            self.work.append(copy)
            if is_on(target):
                storage(target).arriving = copy

        def require(self, what: Any, name: str) -> None:
            copy = getattr(what, "arriving", None)
            if copy is not None and not copy.done and all(copy is not x for x in self.work):
                raise Refused(f"{name}: of what another stream is still copying, at {where()}")

    class Event:
        """An event: the copies that were before it."""

        def __init__(self, enable_timing: bool = False, **_: Any) -> None:
            self.work: list[Copy] = []
            self._timing, self._recorded = enable_timing, False

        def record(self, stream: Stream | None = None) -> None:
            self.work, self._recorded = list((stream or now()).work), True

        def synchronize(self) -> None:
            device.wait("event", "Event.synchronize")
            for copy in self.work:
                copy.finish()

        def wait(self, stream: Stream | None = None) -> None:
            (stream or now()).wait_event(self)

        def query(self) -> bool:
            return all(copy.done for copy in self.work)

        def elapsed_time(self, other: Event) -> float:
            if not (self._timing and other._timing and self._recorded and other._recorded):
                raise Refused("both events must be recorded, and made with enable_timing")
            return 1.0

    default, own = Stream(), threading.local()

    def now(device: Any = None) -> Stream:
        found: Stream = getattr(own, "stream", default)
        return found

    @contextlib.contextmanager
    def on(stream: Stream | None) -> Iterator[None]:
        before = now()
        own.stream = stream or before
        try:
            yield
        finally:
            own.stream = before

    @contextlib.contextmanager
    def graph(graph: Any, pool: Any = None, stream: Any = None, **_: Any) -> Iterator[None]:
        device.wait("device", "graph")
        with on(stream or Stream()):
            device.graph = graph
            try:
                yield
            finally:
                device.graph = None
                graph.capture_end()

    def synchronize(_: Any = None) -> None:
        device.wait("device", "synchronize")
        default.finish()
        now().finish()

    def set_rng_state(state: Tensor, _: Any = "cuda") -> None:
        if is_on(state):
            raise TypeError("expected a torch.ByteTensor of the CPU")

    device.stream = now
    about = types.SimpleNamespace(
        name="a second device", total_memory=64 * 2**30, major=capability[0], minor=capability[1],
        multi_processor_count=108, warp_size=32,
    )  # fmt: skip
    nothing = contextlib.nullcontext
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "device": lambda _=None: nothing(),
        "device_of": lambda _: nothing(),
        "get_device_properties": lambda _=None: about,
        "get_device_name": lambda _=None: about.name,
        "get_device_capability": lambda _=None: capability,
        "is_bf16_supported": lambda including_emulation=True: bf16,
        "mem_get_info": lambda _=None: (32 * 2**30, 64 * 2**30),
        "memory_reserved": lambda _=None: 0,
        "memory_allocated": lambda _=None: 0,
        "max_memory_allocated": lambda _=None: 0,
        "reset_peak_memory_stats": lambda _=None: None,
        "empty_cache": lambda: None,
        "synchronize": synchronize,
        "is_current_stream_capturing": lambda: device.graph is not None,
        "get_rng_state": lambda _="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": set_rng_state,
        "Stream": Stream,
        "Event": Event,
        "current_stream": now,
        "default_stream": lambda _=None: default,
        "stream": on,
        "graph": graph,
        "CUDAGraph": CUDAGraph,
    }


class CUDAGraph:
    """Operations that are run again."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._operations: list[tuple[Any, Any, Any, Any]] = []
        self._before: list[tuple[Any, Any]] = []
        self._born: list[Any] = []  # kept: an address is not given to another one
        self._known: set[int] = set()

    def before(self, func: Any, args: Any, kwargs: Any) -> None:
        """An operation is about to run: keep what it will change."""
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            for x in tree_leaves(given):
                if isinstance(x, Tensor) and storage(x)._cdata not in self._known:
                    self._known.add(storage(x)._cdata)
                    with plainly(), torch._C.DisableTorchFunction():
                        self._before.append((storage(x), storage(x).clone()))

    def after(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """An operation ran: note it with what it was given, numbers of the CPU as they are."""
        given = {storage(x)._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and storage(x)._cdata not in given:
                self._known.add(storage(x)._cdata)
                self._born.append(storage(x))

        def frozen(x: Any) -> Any:
            if not isinstance(x, Tensor) or is_on(x):
                return x
            with plainly(), torch._C.DisableTorchFunction():
                return x.detach().clone()

        self._operations.append((func, *tree_map(frozen, (args, kwargs)), out))

    def capture_end(self) -> None:
        """Put back what the operations changed: a capture runs nothing."""
        with plainly(), torch._C.DisableTorchFunction(), torch.no_grad():
            for own, kept in self._before:
                own.copy_(kept)
        self._before.clear()

    def replay(self) -> None:
        """Run all of them."""
        with plainly(), torch._C.DisableTorchFunction(), torch.no_grad():
            for func, args, kwargs, out in self._operations:
                made = func(*args, **kwargs)
                mine = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
                new = [x for x in tree_leaves(made) if isinstance(x, Tensor)]
                for x, y in zip(mine, new, strict=True):
                    if storage(x)._cdata != storage(y)._cdata:
                        x.detach().copy_(y)

    def reset(self) -> None:
        """Forget them."""
        self._operations.clear()


@contextlib.contextmanager
def second_device(
    patch: Any, capability: tuple[int, int] = (7, 5), bf16: bool | None = None
) -> Iterator[Any]:
    """`cuda:0` on a machine without one.

    Args:
        patch: pytest's monkeypatch.
        capability: of the GPU; from 8.0 on kernels and graphs are chosen.
        bf16: whether it multiplies bf16 matrices; None by the capability.
    """
    device = SecondDevice()
    low = capability >= (8, 0) if bf16 is None else bf16
    for name, value in fake_cuda(device, capability, low).items():
        patch.setattr(torch.cuda, name, value, raising=False)
    patch.setattr(torch, "Generator", Generator)
    patch.setattr(torch.accelerator, "current_stream", torch.cuda.current_stream)
    grouped, run = torch._C._group_tensors_by_device_and_dtype, threading.Thread.run

    def group(lists: Any, with_indices: bool = False) -> Any:
        found = grouped(lists, with_indices)
        first = next(x for x in tree_leaves(lists) if isinstance(x, Tensor))
        side = CUDA if is_on(first) else torch.device("cpu")
        return {(side, dtype): value for (_, dtype), value in found.items()}

    def watched_run(thread: threading.Thread) -> None:
        with Calls(device), Operations(device):
            run(thread)

    engine = torch.autograd._engine_run_backward

    def backward(*arguments: Any, **options: Any) -> Any:
        """Backward passes in Python are watched too: torch answers for `backward` without modes."""
        modes = torch.overrides._get_current_function_mode_stack()
        with (
            contextlib.nullcontext() if any(isinstance(m, Calls) for m in modes) else Calls(device)
        ):
            return engine(*arguments, **options)

    parse = torch._C._nn._parse_to

    def parsed(*arguments: Any, **options: Any) -> Any:
        """`Module.to(tensor)` asks below Python where the tensor is."""
        where, *rest = parse(*arguments, **options)
        given = [x for x in (*arguments, *options.values()) if isinstance(x, Tensor)]
        return (CUDA if given and is_on(given[0]) else where, *rest)

    class Autocast(torch.autocast):
        def __init__(self, kind: str, *arguments: Any, **options: Any) -> None:
            super().__init__("cpu" if kind == "cuda" else kind, *arguments, **options)

    patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", group)
    patch.setattr(threading.Thread, "run", watched_run)
    patch.setattr(torch, "autocast", Autocast)
    patch.setattr(torch._C._nn, "_parse_to", parsed)
    # Tensors are saved for it inside a call, where they look like the CPU's.
    patch.setitem(checkpoint._allowed_determinism_checks_to_fns, "default",
                  lambda x: {"shape": x.shape, "dtype": x.dtype})  # fmt: skip
    patch.setattr(torch.Tensor, "record_stream", lambda x, stream: stream.recorded.append(x))
    patch.setattr(torch.autograd, "_engine_run_backward", backward)
    for made in (resolve, _side_stream, _of_copies):  # what they keep is of another device
        made.cache_clear()
    try:
        with Calls(device), Operations(device):
            yield device
            device.stream().finish()
    finally:
        for made in (resolve, _side_stream, _of_copies):
            made.cache_clear()
