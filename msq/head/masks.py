"""Dropout masks as data: every version of the head can be given the same ones.

A decision is addressed by what it decides about, not by when it is drawn: (seed, step), the part of
the head, the layer, the site in the layer, and its row and column there. So the masks of any step
can be made again, a resumed run needs no state of a generator, and the plain head and the packed
one drop the same numbers.

The probability of dropping is a multiple of 1/4096, the nearest one: 410/4096 = 0.1001 for 0.1.
What is kept is divided by the exact probability of keeping, so nothing is biased. 64 decisions at a
time are made of up to twelve random words, one for each binary digit of the probability
("bit slicing"); they stay packed, one bit each, and become numbers where they are used.

On the CPU the words come from numpy's Philox4x64-10, a function of key and counter (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011), the same on every machine. On a GPU they
come from torch's Philox there: other masks, which depend on the model of the GPU too. A step that
is recorded in a CUDA graph has its masks from `msq.kernels.bits` (`CountedMasks`).
"""

from __future__ import annotations

import functools
import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from msq.kernels.bits import mask_bits

DIGITS = 12  # of the probability, in binary
_GROUPS = 128  # words of a block that hold the same digit
_BLOCK = 64 * _GROUPS  # decisions of a block


class Part(IntEnum):
    """Parts of the head that have dropout."""

    input = 0
    encoder = 1
    decoder = 2


class Site(IntEnum):
    """Places of dropout in a layer, with the rows and columns of their masks.

    Rows count all but the last dimension: probabilities are [B, H, K, keys], the hidden layer is
    [B, K, F], residual branches and the input are [B, K, D], with the S tokens for the K queries in
    the encoder and for the input.
    """

    self_probability = 0
    self_residual = 1
    cross_probability = 2
    cross_residual = 3
    hidden = 4
    ffn_residual = 5


def drop_rate(dropout: float) -> int:
    """The probability of dropping in units of 1/4096, rounded; never all of them."""
    return min(round(dropout * 4096), 4095)


class Masks:
    """The dropout masks of one step.

    Args:
        seed: of the run.
        step: of the optimiser, 0 for the first.
        dropout: probability of dropping, in [0, 1); rounded to a multiple of 1/4096.
        device: where the masks are needed.

    Attributes:
        scale: 1 / (probability of keeping), for the rounded probability.
    """

    def __init__(
        self, seed: int, step: int, dropout: float, device: str | torch.device = "cpu"
    ) -> None:
        self.seed, self.step, self.device = seed, step, torch.device(device)
        self.rate = drop_rate(dropout)
        self.scale = 4096 / (4096 - self.rate)
        self._bits: dict[tuple[Part, int, Site, int, int], Tensor] = {}
        self._pool: ThreadPoolExecutor | None = None

    def at(self, part: Part, layer: int = 0) -> LayerMasks:
        """The masks of one layer."""
        return LayerMasks(self, part, layer)

    def bits(self, part: Part, layer: int, site: Site, rows: int, columns: int) -> Tensor:
        """Packed decisions uint8 [rows, 4 ceil(columns / 32)], lowest bit first; 1 is dropped.

        Rows are padded to 32 bits, as a kernel reads them. They are kept until the step is over,
        for the backward pass.
        """
        key = (part, layer, site, rows, columns)
        if key not in self._bits:
            width = 4 * math.ceil(columns / 32)
            words = math.ceil(rows * width / 8)
            made = _dropped(self._words(part, layer, site, words), self.rate)
            self._bits[key] = made.view(torch.uint8)[: rows * width].view(rows, width)
        return self._bits[key]

    def _words(self, part: Part, layer: int, site: Site, words: int) -> Tensor:
        """Random int64 [blocks, digits needed, _GROUPS]: enough for so many words of decisions."""
        shape = (math.ceil(words / _GROUPS), _digits_needed(self.rate), _GROUPS)
        if self.device.type == "cpu":
            return self._philox((int(part) << 48) | (layer << 8) | int(site), shape)
        name = f"{self.seed} {self.step} {int(part)} {layer} {int(site)}"
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        generator = torch.Generator(self.device).manual_seed(int.from_bytes(digest) >> 1)
        empty = torch.empty(shape, dtype=torch.int64, device=self.device)
        return empty.random_(-(2**63), None, generator=generator)

    def _philox(self, place: int, shape: tuple[int, int, int]) -> Tensor:
        """Words of numpy's Philox: key (seed, step), counter (from 0 on, 0, 0, place)."""
        key = np.array([self.seed % 2**64, self.step], np.uint64)
        made = np.empty(shape, np.uint64)

        def fill(part: np.ndarray[tuple[int, ...], np.dtype[np.uint64]], first: int) -> None:
            counter = np.array([first * shape[1] * _GROUPS // 4, 0, 0, place], np.uint64)
            words = np.random.Philox(counter=counter, key=key).random_raw(part.size)
            part[...] = words.reshape(part.shape)

        threads = torch.get_num_threads()
        if threads == 1 or made.size < 100_000:
            fill(made, 0)
        else:  # numpy lets go of the interpreter meanwhile
            self._pool = self._pool or ThreadPoolExecutor(threads)
            size = math.ceil(len(made) / threads)
            starts = range(0, len(made), size)
            list(self._pool.map(fill, [made[i : i + size] for i in starts], starts))
        return torch.from_numpy(made.view(np.int64))


class CountedMasks(Masks):
    """The dropout masks of the step that a tensor says, as a captured graph goes on counting.

    They come from `msq.kernels.bits`, by its kernel on a GPU: other masks than those of `Masks`.

    Args:
        key: int64 [2], seed and step, on the device where the masks are needed.
        dropout: probability of dropping, in (0, 1); rounded to a multiple of 1/4096.
    """

    def __init__(self, key: Tensor, dropout: float) -> None:
        super().__init__(0, 0, dropout, key.device)
        self.key = key

    def bits(self, part: Part, layer: int, site: Site, rows: int, columns: int) -> Tensor:
        """As `Masks.bits`."""
        at = (part, layer, site, rows, columns)
        if at not in self._bits:
            place = int(part) << 24 | layer << 8 | int(site)
            triton = self.device.type == "cuda"
            words = mask_bits(self.key, place, rows, columns, self.rate, triton=triton)
            self._bits[at] = words.view(torch.uint8)
        return self._bits[at]


class LayerMasks:
    """The masks of one layer, as the layers of the head take them.

    Attributes:
        scale: 1 / (probability of keeping).
    """

    def __init__(self, masks: Masks, part: Part, layer: int) -> None:
        self.masks, self.part, self.layer, self.scale = masks, part, layer, masks.scale

    def words(self, site: Site, rows: int, columns: int) -> Tensor:
        """Packed decisions int32 [rows, ceil(columns / 32)], as kernels take them; 1 is dropped."""
        bits = self.masks.bits(self.part, self.layer, site, rows, columns)
        return bits.view(torch.int32)

    def kept(self, site: Site, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """1 where a number is kept and 0 where it is dropped, of this shape.

        The last dimension is a slice of padded rows unless it is a multiple of 32.
        """
        rows, columns = math.prod(shape[:-1]), shape[-1]
        bits = self.masks.bits(self.part, self.layer, site, rows, columns)
        table = _kept_table(dtype, bits.device)
        found: Tensor = torch.nn.functional.embedding(bits.int(), table)  # [rows, bytes, 8]
        return found.view(*shape[:-1], -1)[..., :columns]

    def drop(self, site: Site, x: Tensor) -> Tensor:
        """`x` with what is dropped set to zero and the rest scaled up: dropout by this mask."""
        return x * self.kept(site, tuple(x.shape), x.dtype) * self.scale


def step_masks(
    seed: int, step: int, dropout: float, device: str | torch.device = "cpu"
) -> Masks | None:
    """The masks of one step, None where nothing is ever dropped."""
    return Masks(seed, step, dropout, device) if drop_rate(dropout) else None


def _digits_needed(rate: int) -> int:
    """Binary digits of rate / 4096 without its trailing zeros; one where the rate is 0."""
    return DIGITS - ((rate & -rate).bit_length() - 1) if rate else 1


def _dropped(words: Tensor, rate: int) -> Tensor:
    """One bit per decision, 1 with probability rate / 4096: int64 [blocks x _GROUPS].

    From the lowest digit upwards: before digit d the bits are 1 with probability p; a random word
    makes that (1 + p) / 2 by OR where the digit is 1 and p / 2 by AND where it is 0.
    """
    needed = words.shape[1]
    result = words[:, 0].clone() if rate else torch.zeros_like(words[:, 0])
    for place in range(1, needed):
        if rate >> (DIGITS - needed + place) & 1:
            result |= words[:, place]
        else:
            result &= words[:, place]
    return result.flatten()


@functools.lru_cache(maxsize=16)
def _kept_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 8]: the numbers that a byte of decisions stands for."""
    with torch.inference_mode(False):
        byte, bit = torch.arange(256)[:, None], torch.arange(8)
        return (1 - (byte >> bit & 1)).to(device, dtype)
