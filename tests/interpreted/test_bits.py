from __future__ import annotations

import numpy as np
import pytest
import torch

from msq.kernels.bits import mask_bits, philox, reference

KEY = torch.tensor([7, 3])


@pytest.mark.parametrize("rate", [1, 205, 410, 2048, 3000, 4095])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 31), (7, 157), (40, 512)])
def test_the_kernel_makes_the_bits_of_the_reference(rate: int, rows: int, columns: int) -> None:
    ours = mask_bits(KEY, 4, rows, columns, rate, triton=True)
    assert torch.equal(ours, mask_bits(KEY, 4, rows, columns, rate))


def test_negative_and_large_keys_are_the_same_to_both() -> None:
    for key in (torch.tensor([-1, 2**40 + 5]), torch.tensor([2**63 - 1, -(2**63)])):
        assert torch.equal(
            mask_bits(key, 9, 3, 70, 410, triton=True), mask_bits(key, 9, 3, 70, 410)
        )


def test_the_generator_is_philox() -> None:
    """Ten rounds of the same function give the published vectors of Random123 (4x32-10)."""
    import msq.kernels.bits as bits

    rounds, bits.ROUNDS = bits.ROUNDS, 10
    try:
        zero = [torch.zeros(1, dtype=torch.int64)] * 4
        found = philox(zero, torch.tensor(0), torch.tensor(0))
        full = [torch.tensor([0xFFFFFFFF])] * 4
        other = philox(full, torch.tensor(0xFFFFFFFF), torch.tensor(0xFFFFFFFF))
    finally:
        bits.ROUNDS = rounds
    assert [hex(int(x)) for x in found] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    assert [hex(int(x)) for x in other] == ["0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd"]


def unpacked(words: torch.Tensor) -> np.ndarray:
    return np.unpackbits(words.numpy().view(np.uint8), bitorder="little")


@pytest.mark.parametrize("rate", [26, 410, 2048, 4000])
def test_bits_are_unbiased_and_independent(rate: int) -> None:
    words = 20_000
    bits = unpacked(reference(KEY, 1, words, rate)).astype(float)
    p, n = rate / 4096, 32 * words
    assert abs(bits.mean() - p) < 4 * (p * (1 - p) / n) ** 0.5
    per_place = bits.reshape(words, 32).mean(0)  # every place of a word has the same probability
    assert np.abs(per_place - p).max() < 4.5 * (p * (1 - p) / words) ** 0.5
    others = {
        "next bit": np.roll(bits, 1),
        "next word": np.roll(bits, 32),
        "next step": unpacked(reference(KEY + torch.tensor([0, 1]), 1, words, rate)),
        "other seed": unpacked(reference(KEY + torch.tensor([1, 0]), 1, words, rate)),
        "other site": unpacked(reference(KEY, 2, words, rate)),
    }
    for name, other in others.items():
        correlation = np.corrcoef(bits, other)[0, 1]
        assert abs(correlation) < 4.5 / n**0.5, name


def test_a_rate_of_none_or_all_is_refused() -> None:
    for rate in (0, 4096):
        with pytest.raises(ValueError, match="rate"):
            mask_bits(KEY, 0, 1, 1, rate)


def test_the_op_is_sound_for_compilers() -> None:
    for triton in (False, True):
        torch.library.opcheck(torch.ops.msq.mask_bits, (KEY, 1, 64, 410, triton))
