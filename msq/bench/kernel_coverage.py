"""Which ops `msq.kernels` registers, and which of them the cases exercise."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import torch

import msq.kernels
from msq.bench.kernel_cases import kernel_cases
from msq.bench.temporal_cases import temporal_case


def known_ops() -> set[str]:
    """Names of all ops that importing `msq.kernels` registers, `msq::` left off."""
    for module in pkgutil.iter_modules(msq.kernels.__path__, "msq.kernels."):
        if not module.ispkg:
            importlib.import_module(module.name)
    registered: Any = torch._C._dispatch_get_all_op_names()
    names = {str(name).split(".")[0] for name in registered}
    return {name.removeprefix("msq::") for name in names if name.startswith("msq::")}


def covered_ops() -> set[str]:
    """Those that the cases and the check of the mask bits exercise."""
    tiny = (
        *kernel_cases(1, 2, 2, 32, 2, torch.float32, "cpu"),
        temporal_case(2, 2, 2, 16, torch.float32, "cpu"),
    )
    return {"mask_bits", *(op for case in tiny for op in case.ops)}
