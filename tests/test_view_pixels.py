"""What the views of a clip show: pieces in time, squares in space, augmentations."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from msq.errors import UsageError
from msq.extract.augment import PLACES, SHAPES, Augmentation, augment, draw, draw_places
from msq.extract.decode_pool import DecodeTask, Picture, decode
from msq.extract.sampling import FrameChoice, sample_indices
from msq.extract.transforms import resize_box, resize_crop
from msq.extract.video import decode_all
from msq.extract.views import CLEAN, View, augmented_views, clips_by_crops

SIZES = [(64, 96), (96, 64), (50, 50), (37, 91)]


def noise(height: int, width: int, frames: int = 2, seed: int = 0) -> np.ndarray:
    """Blocks of colour with noise on them, uint8 [T, H, W, 3]."""
    rng = np.random.default_rng(seed)
    shape = (frames, -(-height // 8), -(-width // 8), 3)
    blocks = np.kron(rng.integers(0, 256, shape), np.ones((1, 8, 8, 1)))[:, :height, :width]
    return np.clip(blocks + rng.normal(0, 8, blocks.shape), 0, 255).astype(np.uint8)


def shown(path: Path, picture: Picture, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and times of one picture of a clip."""
    result = decode(DecodeTask(0, path, None, None, (picture,), **options))
    assert result.reason is None, result.reason
    return result.frames[0], result.times[0]


@pytest.mark.parametrize("sampling", ["uniform", "official"])
@pytest.mark.parametrize(("length", "pieces"), [(48, 3), (50, 4), (7, 3), (3, 5), (1, 2)])
def test_a_piece_is_sampled_as_if_it_were_the_clip(length: int, pieces: int, sampling: str) -> None:
    covered = []
    for i in range(pieces):
        first = int(np.floor(i * length / pieces))
        last = max(int(np.floor((i + 1) * length / pieces)), first + 1)
        covered += list(range(first, last))
        expected = np.arange(length)[first:last][sample_indices(last - first, 4, sampling)]
        found = FrameChoice(4, sampling, i, pieces).indices(length)
        np.testing.assert_array_equal(found, expected)
    assert set(covered) == set(range(length))
    if length >= pieces:
        assert len(covered) == length  # no frame twice
    with pytest.raises(ValueError, match="piece below 2"):
        FrameChoice(4, sampling, 2, 2).indices(8)


@pytest.mark.parametrize("size", [32, 50])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_three_crops_lie_along_the_long_side(height: int, width: int, size: int) -> None:
    frames = noise(height, width)
    short, long = min(height, width), max(height, width)
    scaled_long = int(size * long / short)
    target = (scaled_long, size) if width <= height else (size, scaled_long)
    images = [Image.fromarray(f).resize(target[::-1], Image.Resampling.BICUBIC) for f in frames]
    scaled = np.stack([np.asarray(i) for i in images]).transpose(0, 3, 1, 2)
    for j, start in enumerate((0, round((scaled_long - size) / 2), scaled_long - size)):
        top, left = (start, 0) if width <= height else (0, start)
        expected = scaled[:, :, top : top + size, left : left + size]
        found = resize_crop(frames, size, "pil", crop=j, crops=3, short_side=size + 9)
        np.testing.assert_array_equal(found.numpy(), expected)
    centre = resize_crop(frames, size, "pil")
    assert torch.equal(centre, resize_crop(frames, size, "pil", crop=1, crops=3))
    with pytest.raises(ValueError, match="found 3 of 3"):
        resize_crop(frames, size, crop=3, crops=3)


def test_the_test_views_of_a_file_are_its_pieces_and_crops(media: Any) -> None:
    path = media("gop12 b2.mp4")
    everything, times = decode_all(path)
    n, t = len(everything), 4
    for view in clips_by_crops(3, 3):
        picture = Picture(t, "uniform", 32, "torch", view=view)
        pixels, seconds = shown(path, picture)
        first, last = view.clip * n // 3, (view.clip + 1) * n // 3
        chosen = first + sample_indices(last - first, t)
        np.testing.assert_array_equal(seconds, times[chosen].astype(np.float32))
        expected = resize_crop(everything[chosen], 32, crop=view.crop, crops=3)
        np.testing.assert_array_equal(pixels, expected.numpy())
    clean, _ = shown(path, Picture(t, "uniform", 32, "torch"))
    whole, _ = shown(path, Picture(t, "uniform", 32, "torch", view=clips_by_crops(1, 1)[0]))
    np.testing.assert_array_equal(clean, whole)


def test_all_views_of_one_task_are_what_each_is_alone(media: Any) -> None:
    views = (CLEAN, *augmented_views(2), *clips_by_crops(2, 3))
    pictures = tuple(
        Picture(frames, "uniform", size, "torch", view=view)
        for view in views
        for frames, size in ((4, 32), (4, 24), (3, 32))
    )
    path = media("gop12 b2.mp4")
    together = decode(DecodeTask(0, path, None, None, pictures, id="a"))
    for picture, pixels, times in zip(pictures, together.frames, together.times, strict=True):
        alone, seconds = shown(path, picture, id="a")
        np.testing.assert_array_equal(pixels, alone)
        np.testing.assert_array_equal(times, seconds)


# --- augmentation ---------------------------------------------------------------------------------


def test_a_draw_depends_on_the_seed_and_the_clip_alone() -> None:
    assert draw(1, "a") == draw(1, "a")
    different = {draw(seed, clip) for seed in (1, 2, 3) for clip in ("a", "b", "1\na")}
    assert len(different) == 9
    assert draw_places(1, "a", 8)[:4] == draw_places(1, "a", 4)  # T plays no part in what is drawn
    assert draw_places(1, "a", 4) != draw_places(2, "a", 4)


def test_draws_are_as_frequent_as_they_should_be() -> None:
    n = 4000
    draws = [draw(1, str(i)) for i in range(n)]
    for share, expected in (
        (sum(d.flip for d in draws) / n, 0.5),
        (sum(d.grey for d in draws) / n, 0.2),
        (sum(bool(d.colours) for d in draws) / n, 0.8),
    ):
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n)
    for counts, kinds in ((Counter(d.shape for d in draws), SHAPES),
                          (Counter(d.place for d in draws), PLACES)):  # fmt: skip
        assert set(counts) == set(kinds)
        even = n / len(kinds)
        chi2 = sum((c - even) ** 2 / even for c in counts.values())
        assert chi2 < len(kinds) + 4 * np.sqrt(2 * len(kinds))
    limits = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2),
              "hue": (-0.1, 0.1)}  # fmt: skip
    amounts = {name: [dict(d.colours)[name] for d in draws if d.colours] for name in limits}
    for name, (low, high) in limits.items():
        assert low <= min(amounts[name]) < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < max(amounts[name]) <= high
    first = Counter(d.colours[0][0] for d in draws if d.colours)
    assert set(first) == set(limits)
    assert max(first.values()) < 1.2 * min(first.values())


def test_the_thirteen_places_of_a_crop() -> None:
    # Corners, centre, middles of the sides and the quadrants' centres of a 640 x 480 frame.
    assert len(set(PLACES)) == 13
    boxes = {Augmentation((0.75, 0.875), p, False, (), False).box(480, 640) for p in PLACES}
    down, right = (480 - 360) // 4, (640 - 420) // 4
    places = {(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (0, 2), (2, 0), (4, 2), (2, 4)}
    places |= {(1, 1), (1, 3), (3, 1), (3, 3)}
    assert boxes == {(i * down, j * right, 360, 420) for i, j in places}
    assert len(SHAPES) == 10
    assert {abs([1, 0.875, 0.75, 0.66].index(h) - [1, 0.875, 0.75, 0.66].index(w))
            for h, w in SHAPES} == {0, 1}  # fmt: skip
    for height, width in SIZES:
        for shape in SHAPES:
            for place in PLACES:
                top, left, high, wide = Augmentation(shape, place, False, (), False).box(
                    height, width
                )
                assert 0 <= top <= top + high <= height
                assert 0 <= left <= left + wide <= width


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_box_is_cut_and_resized_as_torchvision_does(height: int, width: int) -> None:
    frames = noise(height, width)
    box = Augmentation((0.66, 0.75), (1, 3), False, (), False).box(height, width)
    expected = [
        np.asarray(
            tv.resized_crop(Image.fromarray(f), *box, [40, 40], InterpolationMode.BICUBIC)
        ).transpose(2, 0, 1)
        for f in frames
    ]
    np.testing.assert_array_equal(resize_box(frames, box, 40, "pil").numpy(), np.stack(expected))
    fast = resize_box(frames, box, 40).numpy().astype(int)
    assert np.abs(fast - np.stack(expected)).max() <= 2
    with pytest.raises(ValueError, match="inside"):
        resize_box(frames, (0, 1, height, width), 40)


OPERATIONS = {
    "brightness": tv.adjust_brightness,
    "contrast": tv.adjust_contrast,
    "saturation": tv.adjust_saturation,
    "hue": tv.adjust_hue,
}


@pytest.mark.parametrize("grey", [False, True], ids=["colour", "grey"])
@pytest.mark.parametrize("flip", [False, True], ids=["as is", "flipped"])
@pytest.mark.parametrize("seed", range(6))
def test_colours_are_those_of_torchvision(seed: int, flip: bool, grey: bool) -> None:
    frames = noise(48, 64, seed=seed)
    colours = next(d.colours for i in range(99) if (d := draw(seed, str(i))).colours)
    drawn = Augmentation((1.0, 1.0), (2, 2), flip, colours, grey)
    found = augment(frames, drawn, 48, "pil").numpy()
    expected = []
    for frame in frames:
        image = Image.fromarray(frame[:, 8:56])
        image = tv.hflip(image) if flip else image
        for name, amount in colours:
            image = OPERATIONS[name](image, amount)
        image = tv.rgb_to_grayscale(image, 3) if grey else image
        expected.append(np.asarray(image).transpose(2, 0, 1))
    np.testing.assert_array_equal(found, np.stack(expected))
    assert found.dtype == np.uint8
    # And as a formula on real numbers, one operation at a time, away from PIL's rounding.
    values = frames[0, :, 8:56].astype(np.float64)
    luma = values @ [0.299, 0.587, 0.114]
    for name, base in (("brightness", 0.0), ("saturation", luma[..., None]),
                       ("contrast", np.round(luma).mean())):  # fmt: skip
        amount = dict(colours)[name]
        wanted = np.clip(base + amount * (values - base), 0, 255)
        single = augment(frames[:1], Augmentation((1.0, 1.0), (2, 2), False, ((name, amount),),
                         False), 48, "pil").numpy()[0].transpose(1, 2, 0)  # fmt: skip
        assert np.abs(single - wanted).max() <= 2


def test_a_view_is_the_same_crop_and_colours_for_every_frame_and_encoder(media: Any) -> None:
    path = media("gop12 b2.mp4")
    everything, _ = decode_all(path)
    view = View("augmented", 3)
    drawn = draw(3, "clip")
    for frames, size, sampling in ((4, 32, "uniform"), (6, 20, "official")):
        pixels, _ = shown(path, Picture(frames, sampling, size, "torch", view=view), id="clip")
        chosen = FrameChoice(frames, sampling, jitter=draw_places(3, "clip", frames))
        whole = everything[chosen.indices(len(everything))]
        for frame, found in zip(whole, pixels, strict=True):
            np.testing.assert_array_equal(augment(frame[None], drawn, size).numpy()[0], found)
    other, _ = shown(path, Picture(4, "uniform", 32, "torch", view=view), id="another")
    first, _ = shown(path, Picture(4, "uniform", 32, "torch", view=view), id="clip")
    assert not np.array_equal(other, first)


@pytest.mark.parametrize("length", [48, 17, 5])
def test_jitter_takes_one_frame_of_each_segment(length: int) -> None:
    t = 5
    for sampling in ("uniform", "official"):
        taken: list[set[int]] = [set() for _ in range(t)]
        for seed in range(200):
            choice = FrameChoice(t, sampling, jitter=draw_places(seed, "a", t))
            for k, index in enumerate(choice.indices(length)):
                taken[k].add(int(index))
        for k in range(t):
            if sampling == "official":
                low, high = k * length // t, (k + 1) * length // t
                assert taken[k] == set(range(low, high))
            else:  # a segment may begin inside a frame
                low, high = k * length / t, (k + 1) * length / t
                assert taken[k] == set(range(int(low), int(np.ceil(high))))
    middle = FrameChoice(t, "uniform", jitter=(0.5,) * t).indices(length)
    np.testing.assert_array_equal(middle, sample_indices(length, t))
    with pytest.raises(ValueError, match="expected 5 places"):
        FrameChoice(t, "uniform", jitter=(0.5,)).indices(length)


def test_a_short_side_below_the_crop_is_refused() -> None:
    with pytest.raises(UsageError, match="at least the 32 pixels"):
        resize_crop(noise(40, 60), 32, short_side=31)
