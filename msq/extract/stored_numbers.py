"""Features as the numbers that stand on disk."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

# By the name that stands in the attributes of an array.
STORED = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


def to_disk(features: torch.Tensor, store_dtype: str) -> NDArray[np.generic]:
    """Float32 features in the dtype of the array on disk; bfloat16 as its bits, uint16."""
    return as_array(features.to(STORED[store_dtype]).cpu().contiguous())


def as_array(values: torch.Tensor) -> NDArray[np.generic]:
    """The same memory for numpy, which has no bfloat16: its bits, uint16."""
    bits = values.view(torch.uint16) if values.dtype == torch.bfloat16 else values
    return bits.numpy()
