"""What augmentation draws for end-to-end training, and what it does to the frames of a clip."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from msq.extract.augment import COLOUR, GREY, augment, draw, draw_official
from msq.extract.decode_pool import DecodeTask, Picture, decode
from msq.extract.views import CLEAN, View, augmented_views, parse_view, seed_of_draw


def test_seeds_of_draws_meet_neither_each_other_nor_stored_views() -> None:
    runs, numbers = (0, 1, 2, 17, 2**31, -1), (0, 1, 2**20, 2**32 - 1)
    seeds = [seed_of_draw(seed, number) for seed, number in itertools.product(runs, numbers)]
    assert len(set(seeds)) == len(seeds)
    assert min(seeds) >= 2**32
    views = [View("official", seed) for seed in (1, *seeds)]
    views += [CLEAN, *augmented_views(3), View("augmented", seeds[0])]
    assert len({str(view) for view in views}) == len(views)
    assert [parse_view(str(view)) for view in views] == views
    assert str(View("augmented", 7)) == "augmented 7"
    for number in (-1, 2**32):
        with pytest.raises(ValueError, match="number of a draw"):
            seed_of_draw(0, number)


def noise(frames: int = 6) -> np.ndarray:
    """The same picture again and again, uint8 [T, 40, 60, 3]."""
    rng = np.random.default_rng(0)
    return np.repeat(rng.integers(0, 256, (1, 40, 60, 3)).astype(np.uint8), frames, axis=0)


def test_all_frames_share_crop_and_colours_in_a_consistent_view() -> None:
    for clip in "abcdefgh":
        out = augment(noise(), draw(seed_of_draw(0, 0), clip), 24).numpy()
        assert (out == out[:1]).all()


def test_official_frames_share_the_crop_and_have_colours_of_their_own() -> None:
    operations = {
        "brightness": tv.adjust_brightness,
        "contrast": tv.adjust_contrast,
        "saturation": tv.adjust_saturation,
        "hue": tv.adjust_hue,
    }
    differing = 0
    for clip in "abcdefgh":
        drawn = draw_official(5, clip, 6)
        assert draw_official(5, clip, 3).colours_of == drawn.colours_of[:3]
        found = augment(noise(), drawn, 24, "pil").numpy()
        for frame, colours, out in zip(noise(), drawn.colours_of, found, strict=True):
            top, left, height, width = drawn.box(40, 60)
            image = tv.resized_crop(
                Image.fromarray(frame), top, left, height, width, [24, 24],
                InterpolationMode.BILINEAR,
            )  # fmt: skip
            for name, amount in colours:
                image = operations[name](image, amount)
            if drawn.grey:
                image = tv.to_grayscale(image, 3)
            np.testing.assert_array_equal(out.transpose(1, 2, 0), np.asarray(image))
        small = augment(noise(), drawn, 24).numpy().astype(int)
        assert np.abs(small - found).mean() < 8  # torch's way of the same
        uncoloured = augment(noise(), replace(drawn, colours_of=()), 24).numpy()
        assert (uncoloured == uncoloured[:1]).all()
        differing += not drawn.grey and bool((found != found[:1]).any())
    assert differing >= 4


def test_official_draws_are_as_often_as_the_authors_make_them() -> None:
    drawn = [draw_official(1, f"clip {i}", 4) for i in range(2000)]
    assert not any(one.flip for one in drawn)
    assert abs(np.mean([one.grey for one in drawn]) - GREY) < 0.06
    coloured = np.array([[bool(c) for c in one.colours_of] for one in drawn])
    assert abs(coloured.mean() - COLOUR) < 0.04
    # Drawn per frame: all four of a clip are coloured in 0.8 ** 4 of the clips, not in 0.8.
    assert abs(coloured.all(axis=1).mean() - COLOUR**4) < 0.07
    crops = {(one.shape, one.place) for one in drawn}
    assert len(crops) == 10 * 13
    other = [draw(1, f"clip {i}") for i in range(2000)]  # stage one's: drawn apart
    equal = [(a.shape, a.place) == (b.shape, b.place) for a, b in zip(drawn, other, strict=True)]
    assert sum(equal) < 60


def test_official_frames_are_the_centres_of_their_segments(media: Any) -> None:
    times = {}
    for view in (CLEAN, View("official", 9), View("augmented", 9)):
        picture = Picture(4, "official", 16, "torch", view=view)
        task = DecodeTask(0, media("cfr.mp4"), None, None, (picture,), id="a")
        times[view.kind] = decode(task).times[0].tolist()
    assert times["official"] == times["clean"] != times["augmented"]
