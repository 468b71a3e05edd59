"""Dropout masks: addressed by place, unbiased, independent, and the plain head's own dropout."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from msq.config import HeadConfig
from msq.head.masks import LayerMasks, Masks, Part, Site, drop_rate, step_masks
from msq.head.model import MSQNet


def kept(masks: Masks, shape: tuple[int, ...], part: Part = Part.decoder, layer: int = 0,
         site: Site = Site.hidden) -> Tensor:  # fmt: skip
    return masks.at(part, layer).kept(site, shape, torch.float64)


def by_hand(masks: Masks, place: int, rows: int, columns: int) -> np.ndarray:
    """One decision at a time, from the definition: the digits of p against random digits.

    Decision i is bit i % 64 of its group; digit words lie in blocks of 128 groups. It is dropped
    where the number with these random binary digits is below p.
    """
    digits = 12 - (len(bin(masks.rate)) - len(bin(masks.rate).rstrip("0")))
    padded = 32 * math.ceil(columns / 32)
    blocks = math.ceil(rows * padded / 8192)
    key = np.array([masks.seed, masks.step], np.uint64)
    counter = np.array([0, 0, 0, place], np.uint64)
    words = np.random.Philox(counter=counter, key=key).random_raw(blocks * digits * 128)
    found = np.ones((rows, columns))
    for row, column in itertools.product(range(rows), range(columns)):
        block, rest = divmod(row * padded + column, 8192)
        group, bit = divmod(rest, 64)
        value = 0
        for digit in range(digits):  # the last word holds the highest digit
            word = int(words[(block * digits + digit) * 128 + group])
            value |= (word >> bit & 1) << digit
        # OR and AND from the lowest digit upwards compare the complement of the random number.
        found[row, column] = not (2**digits - 1 - value) < masks.rate >> (12 - digits)
    return found


FROZEN = [17, 0, 16, 1, 8, 16, 1, 0, 0, 64, 0, 0, 4, 0, 0, 1]


@pytest.mark.parametrize("dropout", [0.1, 0.3, 0.5, 0.0625, 0.9])
def test_every_decision_is_the_one_that_the_definition_gives(dropout: float) -> None:
    masks = Masks(7, 3, dropout)
    for rows, columns in ((5, 157), (3, 17), (300, 33)):
        found = masks.at(Part.decoder, 2).kept(Site.hidden, (rows, columns), torch.float64)
        place = (int(Part.decoder) << 48) | (2 << 8) | int(Site.hidden)
        np.testing.assert_array_equal(found.numpy(), by_hand(masks, place, rows, columns))


def test_the_probability_is_the_nearest_multiple_of_one_4096th() -> None:
    assert drop_rate(0.1) == 410
    assert Masks(0, 0, 0.1).scale == pytest.approx(4096 / 3686)
    assert drop_rate(0.5) == 2048
    assert drop_rate(0.99999) == 4095
    assert step_masks(0, 0, 0.0001) is None
    assert step_masks(0, 0, 0.0) is None


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.03])
def test_as_many_are_dropped_as_asked_everywhere(dropout: float) -> None:
    n = 4_000_000
    share = 1 - kept(Masks(1, 0, dropout), (n // 2048, 2048))
    p = drop_rate(dropout) / 4096
    assert float(share.mean()) == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / n))
    # Position by position (the bit in its word, the row and the column): chi-square, 4.5 sigma.
    for dimension in (0, 1):
        counts = share.sum(dimension)
        trials = share.shape[dimension]
        chi = float(((counts - trials * p) ** 2 / (trials * p * (1 - p))).sum())
        assert abs(chi - len(counts)) < 4.5 * math.sqrt(2 * len(counts))


def test_decisions_of_other_steps_sites_layers_parts_and_seeds_are_independent() -> None:
    shape, p = (512, 2048), 410 / 4096
    masks, later, other = Masks(1, 0, 0.1), Masks(1, 1, 0.1), Masks(2, 0, 0.1)
    several = [
        kept(masks, shape), kept(later, shape), kept(other, shape), kept(masks, shape, layer=1),
        kept(masks, shape, site=Site.ffn_residual), kept(masks, shape, part=Part.encoder),
        kept(masks, shape).roll(1, 1), kept(masks, shape).roll(64, 1),
        kept(masks, shape).roll(1, 0), kept(masks, shape).roll(4, 0),
    ]  # fmt: skip
    n, sigma = several[0].numel(), 1 / math.sqrt(several[0].numel())
    for a, b in itertools.combinations(several, 2):
        together = float(((1 - a) * (1 - b)).sum()) / n
        assert abs((together - p * p) / (p * (1 - p))) < 4.5 * sigma


def test_a_mask_can_be_made_again_alone_and_does_not_depend_on_the_number_of_clips() -> None:
    shape = (4, 8, 20, 157)
    first = Masks(3, 9, 0.1)
    for site in Site:  # in any order, whatever was made before
        first.at(Part.decoder, 5).kept(site, (64, 64), torch.float32)
    found = first.at(Part.decoder, 5).kept(Site.self_probability, shape, torch.float32)
    alone = Masks(3, 9, 0.1).at(Part.decoder, 5)
    assert torch.equal(found, alone.kept(Site.self_probability, shape, torch.float32))
    fewer = Masks(3, 9, 0.1).at(Part.decoder, 5)
    assert torch.equal(found[:2], fewer.kept(Site.self_probability, (2, *shape[1:]), torch.float32))


def test_threads_do_not_change_the_bits() -> None:
    shape, before = (3000, 2048), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(Masks(1, 2, 0.1).bits(Part.decoder, 0, Site.hidden, *shape))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_bits_are_those_of_the_first_release() -> None:
    """Frozen: with other bits a run could not be resumed across versions of msq."""
    bits = Masks(0, 1, 0.1).bits(Part.decoder, 2, Site.self_residual, 2, 64)
    assert bits.flatten().tolist() == FROZEN


def test_dropout_by_masks_keeps_the_mean() -> None:
    x = torch.ones(2000, 512, dtype=torch.float64)
    found = Masks(4, 0, 0.3).at(Part.encoder).drop(Site.self_residual, x)
    sigma = math.sqrt(0.3 / 0.7 / x.numel())
    assert float(found.mean()) == pytest.approx(1, abs=4.5 * sigma)
    assert set(found.unique().tolist()) == {0.0, 4096 / (4096 - drop_rate(0.3))}


class Recorder(Masks):
    """Notes what is asked for."""

    def __init__(self) -> None:
        super().__init__(0, 0, 0.2)
        self.asked: list[tuple[Part, int, Site, tuple[int, ...]]] = []

    def at(self, part: Part, layer: int = 0) -> LayerMasks:
        recorder = self

        class Layer(LayerMasks):
            def kept(self, site: Site, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
                recorder.asked.append((part, layer, site, shape))
                return super().kept(site, shape, dtype)

        return Layer(self, part, layer)


def official_head(dropout: float = 0.2) -> tuple[MSQNet, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    config = HeadConfig(width=8, heads=2, layers=2, ffn=12, dropout=dropout, encoder_layers=2,
                        memory_position="sincos-input", start="torch")  # fmt: skip
    model = MSQNet(config, classes=5, token_width=6, image_width=4,
                   text=torch.randn(5, 8, generator=g)).double()  # fmt: skip
    tokens = torch.randn(3, 4, 6, generator=g).double()
    return model, tokens, torch.randn(3, 4, generator=g).double()


def test_each_site_of_each_layer_is_asked_once_with_its_logical_shape() -> None:
    model, tokens, image = official_head()
    masks = Recorder()
    model.train()(tokens, image, masks=masks)
    b, k, s, h, d, f = 3, 5, 4, 2, 8, 12
    expected = [(Part.input, 0, Site.self_residual, (b, s, d))]
    for i in range(2):
        expected += [
            (Part.encoder, i, Site.self_probability, (b, h, s, s)),
            (Part.encoder, i, Site.self_residual, (b, s, d)),
            (Part.encoder, i, Site.hidden, (b, s, f)),
            (Part.encoder, i, Site.ffn_residual, (b, s, d)),
            (Part.decoder, i, Site.self_probability, (b, h, k, k)),
            (Part.decoder, i, Site.self_residual, (b, k, d)),
            (Part.decoder, i, Site.cross_probability, (b, h, k, s)),
            (Part.decoder, i, Site.cross_residual, (b, k, d)),
            (Part.decoder, i, Site.hidden, (b, k, f)),
            (Part.decoder, i, Site.ffn_residual, (b, k, d)),
        ]
    assert sorted(masks.asked) == sorted(expected)


def test_given_masks_the_head_reads_no_generator_and_both_modes_agree() -> None:
    model, tokens, image = official_head()
    state = torch.get_rng_state()
    found = model.train()(tokens, image, masks=Masks(0, 4, 0.2))["logits"]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(found, model.eval()(tokens, image, masks=Masks(0, 4, 0.2))["logits"])
    assert not torch.equal(found, model(tokens, image, masks=Masks(0, 5, 0.2))["logits"])
    maps = model(tokens, image, masks=Masks(0, 4, 0.2), intermediates=True)
    assert torch.equal(found, maps["logits"])
    assert float((maps["self_attention"].detach().sum(-1) - 1).abs().max()) < 1e-12


def test_masks_act_as_torchs_dropout_does_when_it_drops_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch's own dropout modules and attention, made to use our masks one after the other."""
    model, tokens, image = official_head()
    recorder = Recorder()
    expected = model.train()(tokens, image, masks=recorder)["logits"]
    order = iter(recorder.asked)

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        assert training
        assert p == 0.2
        part, layer, site, shape = next(order)
        assert tuple(x.shape) == shape
        return x * Masks(0, 0, 0.2).at(part, layer).kept(site, shape, x.dtype) * (4096 / 3277)

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    # Maps are asked for, so that attention goes the way on which dropout is a call of its own.
    found = model(tokens, image, intermediates=True)["logits"]
    assert next(order, None) is None
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)
