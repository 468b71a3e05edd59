"""Dropout decisions as packed bits, many at a time: bit-sliced Bernoulli(rate / 4096).

32 decisions are one word. For a rate with n binary digits (without trailing zeros), n random words
are combined from the lowest digit upwards, by OR where the digit is 1 and by AND where it is 0:
before a digit the bits are 1 with probability p, after it with (1 + p) / 2 or p / 2. Each random
word is one of the four outputs of a Philox 4x32 call with seven rounds, a function of key and
counter (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):

    key      (seed, step)
    counter  (word index low 32 bits, word index high 32 bits, call, site)

so a decision depends on what it is about, and not on tiles, devices or the order of work. The
reference and the kernel give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

DIGITS = 12
ROUNDS = 7
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def digits_needed(rate: int) -> int:
    """Binary digits of rate / 4096 without its trailing zeros.

    Raises:
        ValueError: a rate that is not 1 to 4095.
    """
    if not 0 < rate < 2**DIGITS:
        raise ValueError(f"rate: expected 1 to {2**DIGITS - 1}, found {rate}")
    return DIGITS - ((rate & -rate).bit_length() - 1)


def mask_bits(
    key: Tensor, site: int, rows: int, columns: int, rate: int, *, triton: bool = False
) -> Tensor:
    """Decisions for [rows, columns], a row padded to whole words.

    Args:
        key: int64 [2], seed and step (their low 32 bits count), on the device of the result. They
            are a tensor so that a captured graph can go on counting.
        site: which dropout of the head, a number of its own for each.
        rows: all but the last dimension of what is dropped.
        columns: the last dimension.
        rate: probability of dropping in units of 1/4096.
        triton: run the kernel rather than the reference.

    Returns:
        int32 [rows, ceil(columns / 32)], lowest bit first; 1 is dropped.
    """
    width = -(-columns // 32)
    result: Tensor = torch.ops.msq.mask_bits(key, site, rows * width, rate, triton)
    return result.view(rows, width)


@torch.library.custom_op("msq::mask_bits", mutates_args=())
def _mask_bits(key: Tensor, site: int, words: int, rate: int, triton: bool) -> Tensor:
    if triton:
        from msq.kernels.gpu.bits import launch

        return launch(key, site, words, rate)
    return reference(key, site, words, rate)


@_mask_bits.register_fake
def _(key: Tensor, site: int, words: int, rate: int, triton: bool) -> Tensor:
    return torch.empty(words, dtype=torch.int32, device=key.device)


def reference(key: Tensor, site: int, words: int, rate: int) -> Tensor:
    """int32 [words] by integer arithmetic in PyTorch."""
    needed = digits_needed(rate)
    index = torch.arange(words, dtype=torch.int64, device=key.device)
    random: list[Tensor] = []
    for call in range(-(-needed // 4)):
        counter = [index & _MASK, index >> 32, torch.full_like(index, call),
                   torch.full_like(index, site)]  # fmt: skip
        random += philox(counter, key[0] & _MASK, key[1] & _MASK)
    result = random[0]
    for place in range(1, needed):
        one = rate >> (DIGITS - needed + place) & 1
        result = result | random[place] if one else result & random[place]
    # The 32 bits as a signed number.
    return torch.where(result >= 2**31, result - 2**32, result).int()


def philox(counter: list[Tensor], low: Tensor, high: Tensor) -> list[Tensor]:
    """Philox 4x32-7: four int64 tensors of 32-bit words from four, under a key of two words."""
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        # The wrapped int64 product has the right 64 bits; its upper half is taken without sign.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> 32 & _MASK) ^ c1 ^ low,
            second & _MASK,
            (first >> 32 & _MASK) ^ c3 ^ high,
            first & _MASK,
        )
        low, high = low + _WEYL[0] & _MASK, high + _WEYL[1] & _MASK
    return [c0, c1, c2, c3]
