"""Errors that speak of a device, and of no head that was trained on it.

A GPU that is full, taken by another process or broken fails every trial that is tried on it. So
such an error is no outcome of a trial: it ends the worker, and what it had not done is left to
workers on other devices.
"""

from __future__ import annotations

import torch

from msq.errors import MsqError, is_out_of_memory

# What torch before 2.8 has in place of `AcceleratorError`.
_WORDS = ("CUDA error", "cuDNN error", "CUBLAS_STATUS_NOT_INITIALIZED")
_Accelerator: type[Exception] | None = getattr(torch, "AcceleratorError", None)


class DeviceFailed(MsqError):
    """A worker that cannot go on: its device cannot be used, or it does not see the files."""


def is_of_device(error: BaseException) -> bool:
    """Whether nothing more can be done on the device in this process.

    A GPU without room is none of these: a smaller head may still fit.
    """
    if out_of_memory(error) or isinstance(error, MsqError):
        return isinstance(error, DeviceFailed)
    if _Accelerator is not None and isinstance(error, _Accelerator):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def out_of_memory(error: BaseException) -> bool:
    """Whether there was no room, on a GPU or in this machine."""
    return is_out_of_memory(error)


def device_failed(device: str, error: BaseException) -> DeviceFailed:
    """The error of a worker whose device gave one."""
    first = (str(error) or repr(error)).splitlines()[0]
    return DeviceFailed(
        f"device {device} cannot be used: {type(error).__name__}: {first}; its trials are left to "
        "workers on other devices; without any, the same command with another --device goes on"
    )
