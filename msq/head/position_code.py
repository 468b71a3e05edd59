"""The position code of the tokens: fixed sines and cosines, no weights."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

MOST_CODED_TOKENS = 2000  # the authors' position code is this long


def sincos(tokens: int, width: int) -> Tensor:
    """The fixed position code [S, D]: sines in the even channels, cosines in the odd ones.

    The wavelengths run from 2 pi to 10000 * 2 pi, as in the first Transformer.
    """
    place = torch.arange(tokens, dtype=torch.float64)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10000.0) / width))
    code = torch.zeros(tokens, width, dtype=torch.float64)
    code[:, 0::2] = torch.sin(place * rate)
    code[:, 1::2] = torch.cos(place * rate)[:, : width // 2]
    return code


@functools.lru_cache(maxsize=32)
def position_code(tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`sincos` where it is needed, made once; an ordinary tensor whatever mode asks first."""
    with torch.inference_mode(False):
        return sincos(tokens, width).to(device, dtype)
