"""What `msq doctor` says of torch, GPUs, the processor and Triton."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from msq.report.finding import Finding, importable, reason_of, version_of
from msq.report.stage_one import size


def look_at_torch() -> Iterator[Finding]:
    """Its version, what it was built for, and whether that is what this machine has."""
    try:
        import torch
    except Exception as error:  # a missing library of the system, too
        yield Finding("torch", "failed", f"cannot be imported: {reason_of(error)}",
                      "install it again: https://pytorch.org/get-started")  # fmt: skip
        return
    built, rocm = torch.version.cuda, getattr(torch.version, "hip", None)
    target = f"CUDA {built}" if built else f"ROCm {rocm}" if rocm else "the CPU"
    words = f"{torch.__version__}, built for {target}"
    driver = has_driver()
    if driver and target == "the CPU":
        yield Finding("torch", "warning", f"{words}, on a machine with an NVIDIA driver",
                      "the GPU is not used; install a build for CUDA: "
                      "https://pytorch.org/get-started")  # fmt: skip
    elif built and driver and not torch.cuda.is_available():
        yield Finding("torch", "warning", f"{words}, but it finds no GPU",
                      f"update the NVIDIA driver to one for CUDA {built} or later, and see that "
                      "CUDA_VISIBLE_DEVICES hides nothing (nvidia-smi lists them)")  # fmt: skip
    else:
        yield Finding("torch", "ok", words)


def has_driver() -> bool:
    """Whether the machine has an NVIDIA driver, whatever torch makes of it."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    try:
        ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")
    except OSError:
        return False
    return True


def look_at_gpus() -> Iterator[Finding]:
    """Each with its memory."""
    if not importable("torch"):
        return
    import torch

    if not torch.cuda.is_available():
        yield Finding("GPU", "ok", "none that torch can use: --device auto is the processor")
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        words = (
            f"{about.name}, compute capability {about.major}.{about.minor}, {size(free)} free of "
            f"{size(total)}"
        )
        if about.major < 8:
            yield Finding(f"cuda:{index}", "warning", f"{words}, without bf16 products",
                          "use --precision fp32 or fp16 for large encoders")  # fmt: skip
        elif free < total / 2:
            advice = "another program holds the rest; a smaller --batch may be needed"
            yield Finding(f"cuda:{index}", "warning", words, advice)
        else:
            yield Finding(f"cuda:{index}", "ok", f"{words}, with bf16 products")


def look_at_processor() -> Iterator[Finding]:
    """Its bf16 products, cores and threads."""
    if not importable("torch"):
        return
    import torch

    from msq.head.packed_choice import bf16_is_native

    native = bf16_is_native("cpu")
    yield Finding("processor", "ok", "with bf16 products (AVX512-BF16 or AMX)" if native else
                  "without bf16 products: --precision fp32 is the fast one on it")  # fmt: skip
    asked = getattr(os, "sched_getaffinity", None)
    cores = os.cpu_count() or 1 if asked is None else len(asked(0))
    threads = torch.get_num_threads()
    words = f"{cores} cores for this process, {threads} threads of torch"
    if threads > cores:
        advice = f"set OMP_NUM_THREADS={cores}: more threads than cores are slower"
        yield Finding("threads", "warning", words, advice)
    else:
        yield Finding("threads", "ok", words)


def look_at_triton() -> Iterator[Finding]:
    """Whether kernels can be compiled."""
    found = version_of("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield Finding("triton", "warning", f"{found}, with TRITON_INTERPRET=1: kernels are run in "
                      "its interpreter", "unset it, unless kernels are being tested")  # fmt: skip
    elif found is None and has_driver():
        yield Finding("triton", "warning", "not there: torch's own operations run on the GPU",
                      "pip install triton")  # fmt: skip
    else:
        yield Finding("triton", "ok", found or "not there; kernels are for GPUs")
