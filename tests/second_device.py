"""A device that is not the CPU on a machine that has none: code sees `cuda:0`, with its rules.

Every tensor lies in this machine's memory, and whether it is on the device stands beside its
storage, so that views, parameters and gradients are where what they look at is. Two modes watch
all that Python calls and all that the dispatcher runs, in the backward pass and in other threads
too:

* an operation on tensors of both sides is refused, as a GPU refuses it (numbers of no dimension
  beside it are passed as numbers, also there), and so is a generator of the other side;
* whatever makes the processor wait for the device is written down with its line in msq: values
  that are read, sizes that depend on values, copies of either way that are not `non_blocking` (a
  blocking copy to a GPU waits for all that stands before it in the stream);
* a copy that is not waited for goes wrong where one on a GPU would: pinned memory must be left
  alone until the copy from it is done, and holds nothing before the copy to it is;
* what was copied on another stream must be waited for by the stream that reads it.

`tests/second_device_cuda.py` has what stands for `torch.cuda`: streams, events, graphs. Triton
kernels are their references. Numbers are those of the CPU to the last bit.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
MSQ = str(Path(__file__).parents[1] / "msq")
READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2",
    "bincount", "unique_dim", "unique_consecutive", "allclose", "nonzero_numpy", "histc",
}  # fmt: skip
NUMBERS_TOO = {"where", "masked_fill", "masked_fill_", "fill_", "lerp", "lerp_", "index_put_"}


class Wait(NamedTuple):
    """Something for which the processor waits.

    Attributes:
        kind: `read`, `copy` (a blocking one to the device), `event` or `device`.
        what: name of the operation.
        where: the innermost lines of msq that asked for it.
    """

    kind: str
    what: str
    where: str


class Refused(RuntimeError):
    """What a GPU would not do, or would do wrongly."""


def storage(x: Tensor) -> Any:
    """The storage of a tensor; one object as long as it lives, so it can carry our attributes."""
    with torch._C.DisableTorchFunction():
        return x.untyped_storage()


def is_on(x: Tensor) -> bool:
    """Whether a tensor is on the device."""
    return getattr(storage(x), "on", False)


def set_on(x: Tensor, on: bool) -> Tensor:
    """Say where a tensor that was just made is."""
    if storage(x).nbytes() or on:
        storage(x).on = on
    return x


class SecondDevice:
    """The device: what happened on it, and what is under way.

    Attributes:
        waits: for the device, in order.
        uploads: copies to the device, each with its lines.
        operations: run on it.
        graph: that is being recorded, else None.
    """

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self.uploads: list[str] = []
        self.operations = 0
        self.graph: Any = None
        self.making = threading.local()  # `on`: a function is making something on the device
        self.stream: Callable[[], Any] = lambda: None  # the current one

    # What is told of it.

    def wait(self, kind: str, what: str) -> None:
        """Write down that the processor waits; no graph can be recorded meanwhile."""
        if self.graph is not None:
            raise Refused(f"{what}: operation not permitted when stream is capturing ({where()})")
        self.waits.append(Wait(kind, what, where()))
        if kind in ("read", "copy"):
            self.stream().finish()

    def kinds(self, *kinds: str) -> list[str]:
        """Lines that waited in one of these ways."""
        return [f"{w.what} at {w.where}" for w in self.waits if w.kind in kinds]

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[Wait]]:
        """The waits from here on alone."""
        found: list[Wait] = []
        first = len(self.waits)
        yield found
        found += self.waits[first:]

    # What runs on it.

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation of the dispatcher."""
        if func.namespace == "msq" and any(a.name == "triton" for a in func._schema.arguments):
            args, kwargs = _by_reference(func, args, kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on = [x for x in given if is_on(x)]
        off = [x for x in given if not is_on(x)]
        making = getattr(self.making, "on", False) and not given
        if not on and not making:
            return func(*args, **kwargs)
        self.operations += 1
        name = func._schema.name.partition("::")[2]
        for x in on:
            self.stream().require(storage(x), str(func))
        if name in ("copy_", "_copy_from") and off:
            return self._copied(func, args, kwargs)
        self._check(func, name, args, kwargs, on, off)
        graph = self.graph
        if graph is not None:
            graph.before(func, args, kwargs)
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and not is_on(x):
                set_on(x, True)
        if graph is not None:
            graph.after(func, args, kwargs, out)
        return out

    def _check(
        self, func: Any, name: str, args: Any, kwargs: Any, on: list[Tensor], off: list[Tensor]
    ) -> None:
        indices = [x for x in args[1] if x is not None] if name in _INDEXED else []
        if any(not is_on(i) for i in indices):
            if not is_on(args[0]):
                raise Refused(f"{func}: indices on {CUDA} into a tensor of the CPU at {where()}")
            self.uploads.append(where())
            self.wait("copy", f"{name} by rows of the CPU")
            off = [x for x in off if all(x is not i for i in indices)]
        numbers = torch.Tag.pointwise in func.tags or name in NUMBERS_TOO
        wrong = [x for x in off if x.dim() or not numbers]
        if wrong:
            shapes = [tuple(x.shape) for x in on], [tuple(x.shape) for x in wrong]
            raise Refused(
                f"{func}: expected all tensors to be on the same device, found {CUDA} {shapes[0]} "
                f"and cpu {shapes[1]} at {where()}"
            )
        by_mask = any(i.dtype in (torch.bool, torch.uint8) for i in indices)
        unsized = name == "repeat_interleave" and func._overloadname == "Tensor"
        if name in READS or by_mask or (unsized and kwargs.get("output_size") is None):
            self.wait("read", name)

    def _copied(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`copy_` between the two sides."""
        target, source, *rest = args
        later = bool(rest[0] if rest else kwargs.get("non_blocking", False))
        self.transfer(source, target, later)
        return target

    def transfer(self, source: Tensor, target: Tensor, later: bool) -> None:
        """Copy values to the other side, into a tensor that is there."""
        host = target if is_on(source) else source
        pinned = getattr(storage(host), "pinned", False)
        if not is_on(source):
            self.uploads.append(where())
        if later and is_on(source) and not pinned:
            raise Refused(f"a copy to pageable memory that nothing waits for, at {where()}")
        if not later:
            self.wait("read" if is_on(source) else "copy", "copy_")
        elif self.graph is not None:
            raise Refused(f"a copy between host and device inside a graph, at {where()}")
        with torch.no_grad(), torch._C.DisableTorchFunction(), plainly():
            if later and pinned:
                self.stream().begin(source, target)
            else:
                target.copy_(source)

    def moved(
        self, x: Tensor, on: bool, dtype: torch.dtype | None, later: bool, copy: bool = False
    ) -> Tensor:
        """`Tensor.to`."""
        if is_on(x) == on:
            return x.to(dtype or x.dtype, copy=copy)
        if x.requires_grad and torch.is_grad_enabled():
            raise Refused("a gradient that goes from one device to the other")
        with torch._C.DisableTorchFunction(), plainly():
            made = torch.empty_like(x, dtype=dtype or x.dtype)
        set_on(made, on)
        if isinstance(x, torch.nn.Parameter):
            x = x.detach()
        self.transfer(x, made, later)
        return made


_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Generator(torch.Generator):
    """`torch.Generator` of either side."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        """A generator of the CPU that says where it is."""
        made: Generator = super().__new__(cls, "cpu")
        made.where = torch.device(device)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        """Nothing is left to do."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where it says that it is."""
        return self.where


def check_generator(device: SecondDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Refuse a generator of the other side, and one that a graph does not know."""
    generator = kwargs.get("generator")
    if generator is None:
        return
    given = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    on = any(map(is_on, given)) or _is_cuda(kwargs.get("device"))
    if generator.device.type != ("cuda" if on else "cpu"):
        raise Refused(f"{func}: a generator of {generator.device} for a tensor of the other side")
    if on and device.graph is not None:
        raise Refused(f"{func}: a generator that the graph does not know, at {where()}")


def plainly() -> Any:
    """A context in which no mode looks at operations."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def where() -> str:
    """The innermost two lines of msq that are being run."""
    lines, frame = [], sys._getframe(1)
    found: Any = frame
    while found is not None and len(lines) < 3:
        if found.f_code.co_filename.startswith(MSQ):
            lines.append(f"{found.f_code.co_filename[len(MSQ) + 1 :]}:{found.f_lineno}")
        found = found.f_back
    return " < ".join(lines) or "no line of msq"


def _by_reference(func: Any, args: Any, kwargs: Any) -> Any:
    """The same call without its Triton kernel."""
    names = [a.name for a in func._schema.arguments]
    place = names.index("triton")
    if place < len(args):
        return (*args[:place], False, *args[place + 1 :]), kwargs
    return args, {**kwargs, "triton": False}


class Operations(TorchDispatchMode):
    """Shows the device all that the dispatcher runs."""

    def __init__(self, device: SecondDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        return self._device.run(func, args, kwargs or {})


class Calls(TorchFunctionMode):
    """Answers for the device what Python asks of tensors."""

    def __init__(self, device: SecondDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One call."""
        kwargs = dict(kwargs or {})
        check_generator(self._device, func, args, kwargs)
        answer = _ANSWERS.get(func)
        if answer is not None:
            return answer(self._device, func, args, kwargs)
        wanted = kwargs.get("device")
        pin = bool(kwargs.pop("pin_memory", False))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if wanted is None and not pin and not given:
            return func(*args, **kwargs)
        # What a function makes on the way is beside what it was given.
        inside = any(map(is_on, given)) if wanted is None else _is_cuda(wanted)
        out = _made(self._device, func, args, kwargs, wanted, inside)
        if pin:
            storage(out).pinned = True
        return out


def _made(
    device: SecondDevice, func: Any, args: Any, kwargs: dict[str, Any], wanted: Any, on: bool
) -> Any:
    """What a function makes on the device that it is told."""
    meta = wanted is not None and torch.device(wanted).type == "meta"
    if wanted is not None and not meta:
        kwargs["device"] = "cpu"
    before, device.making.on = getattr(device.making, "on", False), on
    try:
        out = func(*args, **kwargs)
    finally:
        device.making.on = before
    return out if wanted is None or not isinstance(out, Tensor) else set_on(out, on)


def _literal(device: SecondDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """`torch.tensor` and `Tensor.new_tensor`: made by the processor, then copied."""
    wanted = kwargs.pop("device", None)
    own = bool(args) and isinstance(args[0], Tensor) and func is torch.Tensor.new_tensor
    on = is_on(args[0]) if own and wanted is None else _is_cuda(wanted)
    pin = bool(kwargs.pop("pin_memory", False))
    if own:
        kwargs.setdefault("dtype", args[0].dtype)
        args = args[1:]
    made: Tensor = torch.tensor(*args, **kwargs)
    if on:
        return device.moved(made, True, None, False).requires_grad_(made.requires_grad)
    if pin:
        storage(made).pinned = True
    return made


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _to(device: SecondDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    x, *rest = args
    copy = bool(kwargs.pop("copy", False))
    other = kwargs.pop("other", None)
    if rest and isinstance(rest[0], Tensor):
        other = rest.pop(0)
    if other is not None:
        return device.moved(x, is_on(other), other.dtype, any(rest), copy)
    wanted, dtype, later, _ = torch._C._nn._parse_to(*rest, **kwargs)
    if wanted is not None and wanted.type == "meta":
        return func(*args, **kwargs)
    on = is_on(x) if wanted is None else wanted.type == "cuda"
    return device.moved(x, on, dtype, later, copy)


def _host(device: SecondDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`tolist`: read without an operation."""
    if is_on(args[0]):
        device.wait("read", "tolist")
    return func(*args, **kwargs)


def _numpy(device: SecondDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if is_on(args[0]):
        raise TypeError(f"can't convert {CUDA} device type tensor to numpy")
    return func(*args, **kwargs)


def _pinned(device: SecondDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
    made = args[0].clone()
    storage(made).pinned = True
    return made


def _deep(device: SecondDevice, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    made = func(*args, **kwargs)
    return set_on(made, is_on(args[0])) if isinstance(made, Tensor) else made


T = torch.Tensor
_ANSWERS: dict[Any, Callable[..., Any]] = {
    T.device.__get__: lambda d, f, a, k: CUDA if is_on(a[0]) else f(*a, **k),
    T.is_cuda.__get__: lambda d, f, a, k: is_on(a[0]),
    T.is_cpu.__get__: lambda d, f, a, k: not is_on(a[0]) and f(*a, **k),
    T.get_device: lambda d, f, a, k: 0 if is_on(a[0]) else f(*a, **k),
    T.cpu: lambda d, f, a, k: d.moved(a[0], False, None, bool(k.get("non_blocking"))),
    T.cuda: lambda d, f, a, k: d.moved(a[0], True, None, bool(k.get("non_blocking"))),
    T.to: _to,
    T.tolist: _host,
    T.numpy: _numpy,
    T.__array__: _numpy,
    T.pin_memory: _pinned,
    T.is_pinned: lambda d, f, a, k: getattr(storage(a[0]), "pinned", False),
    T.__deepcopy__: _deep,
    T.new_tensor: _literal,
    torch.tensor: _literal,
}
