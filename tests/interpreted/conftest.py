"""Kernels in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreted`."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
