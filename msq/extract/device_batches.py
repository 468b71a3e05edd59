"""Batches of uint8 frames to an encoder's device, and features back, without waiting for either.

On a GPU both ways go through pinned memory: frames on a stream of their own, beside the encoding
of the batch before; features behind their encoding, to be fetched when the next batch is under
way. On a CPU nothing is copied beyond the stacking of the clips.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SLOTS = 2  # pinned buffers for clips of one size: one is filled while the other is sent


class Sender:
    """Stacks the frames of clips and sends them to a device.

    Args:
        device: of the encoder.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None  # of the copies to a GPU
        self._slots: dict[tuple[int, ...], list[tuple[Tensor, torch.cuda.Event]]] = {}

    def send(self, frames: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Uint8 `[B, T, 3, h, w]` on the device, of clips `[T, 3, h, w]`.

        The frames may be overwritten as soon as this returns.
        """
        if self._device.type != "cuda":
            return torch.from_numpy(np.stack(frames)).to(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        buffer, sent = self._slot((len(frames), *frames[0].shape))
        sent.synchronize()
        np.stack(frames, out=buffer.numpy())
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            pixels = buffer.to(self._device, non_blocking=True)
            sent.record(self._stream)
        current.wait_stream(self._stream)
        pixels.record_stream(current)
        return pixels

    def _slot(self, shape: tuple[int, ...]) -> tuple[Tensor, torch.cuda.Event]:
        """Pinned memory `shape`, that which was used longest ago, and the event of its last use.

        Smaller batches take the first part of what the largest needed: how many clips of a batch
        can be decoded is another number each time, and pinned memory is never given back.
        """
        slots = self._slots.setdefault(shape[1:], [])
        if len(slots) < _SLOTS:
            slots.append((_pinned(shape), torch.cuda.Event()))  # type: ignore[no-untyped-call]
        else:
            slots.append(slots.pop(0))
        buffer, sent = slots[-1]
        if len(buffer) < shape[0]:
            sent.synchronize()  # what was sent from it is no longer needed
            buffer = _pinned(shape)
            slots[-1] = (buffer, sent)
        return buffer[: shape[0]], sent


def _pinned(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8, pin_memory=True)


class Arriving:
    """Features on their way to the host; made right after they were computed.

    Args:
        features: `[B, ...]` float32 on the encoder's device.
        dtype: that of the store.
        began: when the encoding began.
    """

    def __init__(self, features: Tensor, dtype: torch.dtype, began: Moment) -> None:
        self._features = features
        cast = features.to(dtype)
        finite = torch.isfinite(cast).flatten(1).all(dim=1)
        self._began, self._ended = began, Moment(features.device)
        self._values, self._finite = _to_host(cast), _to_host(finite)
        self._arrived = Moment(features.device)

    def fetch(self) -> tuple[Tensor, list[bool], float]:
        """Wait for them: values `[B, ...]` in the store's dtype, which are finite, seconds."""
        self._arrived.wait()
        seconds = self._ended.since(self._began)
        return self._values.contiguous(), self._finite.tolist(), seconds

    def largest(self, place: int) -> float:
        """The largest magnitude of one clip, NaN where there is one."""
        return float(self._features[place].abs().max())


class Moment:
    """A moment in the work of a device: on a GPU that of its stream, else now."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Until the device has come to it."""
        if self._event is not None:
            self._event.synchronize()

    def since(self, other: Moment) -> float:
        """Seconds from another one, when both have come."""
        if self._event is not None and other._event is not None:
            return float(other._event.elapsed_time(self._event)) / 1e3
        return self._time - other._time


def free_memory() -> None:
    """Give back what torch keeps of a GPU's memory for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _to_host(values: Tensor) -> Tensor:
    if values.device.type != "cuda":
        return values.cpu()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
