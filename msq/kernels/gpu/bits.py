"""The Triton kernel of `msq.kernels.bits`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from msq.kernels.bits import DIGITS, ROUNDS, digits_needed
from msq.kernels.gpu.launch import capability, on_its_device
from msq.kernels.tiles import find_tile


@triton.jit(do_not_specialize=["site"])  # or every place of the head would be compiled anew
def make_bits(
    key,
    out,
    words,
    site,
    rate: tl.constexpr,
    first_digit: tl.constexpr,
    needed: tl.constexpr,
    rounds: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program makes BLOCK words; calls of the generator are unrolled, four words each."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seed = (tl.load(key) & 0xFFFFFFFF) | (tl.load(key + 1) << 32)
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    result = tl.zeros((BLOCK,), dtype=tl.uint32)
    zero = tl.zeros((BLOCK,), dtype=tl.uint32)
    for call in tl.static_range((needed + 3) // 4):
        r0, r1, r2, r3 = tl.philox(seed, low, high, zero + call, zero + site, rounds)
        for lane in tl.static_range(4):
            # Triton 3.6 takes what has a name of its own for a tensor, so these have none.
            word = r0 if lane == 0 else (r1 if lane == 1 else (r2 if lane == 2 else r3))
            if call * 4 + lane == 0:
                result = word
            elif call * 4 + lane < needed:
                if (rate >> (first_digit + call * 4 + lane)) & 1:
                    result = result | word
                else:
                    result = result & word
    tl.store(out + index, result.to(tl.int32, bitcast=True), mask=index < words)


@on_its_device
def launch(key: Tensor, site: int, words: int, rate: int) -> Tensor:
    """int32 [words] on the key's device."""
    needed = digits_needed(rate)
    out = torch.empty(words, dtype=torch.int32, device=key.device)
    tile = find_tile("mask_bits", capability(key), words)
    grid = (triton.cdiv(words, tile.sizes["BLOCK"]),)
    make_bits[grid](
        key, out, words, site, rate, DIGITS - needed, needed, ROUNDS, **tile.launch()
    )  # fmt: skip
    return out
