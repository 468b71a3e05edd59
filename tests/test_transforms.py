from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from msq.errors import UsageError
from msq.extract.transforms import normalise, resize_crop, resized_shape

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def noise(frames: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height * 1000 + width)
    return rng.integers(0, 256, (frames, height, width, 3)).astype(np.uint8)


def scenery(frames: int, height: int, width: int) -> np.ndarray:
    """What video frames hold: shading, hard saturated edges, fine stripes, sensor noise."""
    rng = np.random.default_rng(height * 1000 + width)
    y, x = np.mgrid[:height, :width].astype(float)
    video = np.empty((frames, height, width, 3))
    for i in range(frames):
        phase = rng.uniform(0, 6, 3)
        shade = 128 + 90 * np.sin(x[..., None] / width * 4 + phase) * np.cos(y[..., None] / 31 + i)
        shade[height // 4 : height // 2, width // 5 : width // 2] = rng.integers(0, 2, 3) * 255
        shade[-height // 4 :, :, i % 3] += 60 * np.sign(np.sin(x[-height // 4 :] * 1.1))
        video[i] = shade + rng.normal(0, 3, shade.shape)
    return np.clip(video, 0, 255).astype(np.uint8)


def pil_reference(video: np.ndarray, size: int) -> np.ndarray:
    """CLIP's own preprocessing, one picture at a time, written out from its definition."""
    out = []
    for frame in video:
        image = Image.fromarray(frame)
        w, h = image.size
        w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
        image = image.resize((w, h), Image.Resampling.BICUBIC)
        left, top = round((w - size) / 2.0), round((h - size) / 2.0)
        out.append(np.asarray(image.crop((left, top, left + size, top + size))))
    return np.stack(out).transpose(0, 3, 1, 2)


# (height, width, size): 480p, HMDB and UCF shapes, portrait, odd, square, enlarged, no change.
SHAPES = [
    (480, 640, 224),
    (240, 320, 224),
    (256, 340, 224),
    (320, 240, 112),
    (97, 131, 48),
    (131, 97, 47),
    (64, 64, 48),
    (36, 60, 48),
    (48, 96, 48),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_resize_is_within_two_grey_levels_of_pil_and_half_a_percent_of_values(
    shape: tuple[int, int, int],
) -> None:
    video = scenery(6, *shape[:2])
    difference = np.abs(
        resize_crop(video, shape[2]).numpy().astype(int) - pil_reference(video, shape[2])
    )
    assert difference.max() <= 2
    assert (difference > 0).mean() <= 0.005


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_resize_of_white_noise_is_within_two_grey_levels_of_pil(
    shape: tuple[int, int, int],
) -> None:
    video = noise(4, *shape[:2])
    difference = resize_crop(video, shape[2]).numpy().astype(int) - pil_reference(video, shape[2])
    assert np.abs(difference).max() <= 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pil_resize_is_exact(shape: tuple[int, int, int]) -> None:
    video = noise(2, *shape[:2])
    np.testing.assert_array_equal(
        resize_crop(video, shape[2], "pil").numpy(), pil_reference(video, shape[2])
    )


def test_a_frame_of_the_wanted_size_is_left_as_it_is() -> None:
    video = noise(2, 32, 32)
    for resize in ("torch", "pil"):
        np.testing.assert_array_equal(
            resize_crop(video, 32, resize).numpy(), video.transpose(0, 3, 1, 2)
        )


@pytest.mark.parametrize("resize", ["torch", "pil"])
def test_output_is_contiguous_uint8_and_the_input_is_untouched(resize: str) -> None:
    video = noise(3, 40, 60)
    before = video.copy()
    out = resize_crop(torch.from_numpy(video), 24, resize)
    assert out.dtype == torch.uint8
    assert out.shape == (3, 3, 24, 24)
    assert out.is_contiguous()
    np.testing.assert_array_equal(video, before)


def test_a_read_only_array_is_taken_without_a_warning() -> None:
    video = noise(2, 40, 60)
    expected = resize_crop(video, 24)
    video.flags.writeable = False
    assert torch.equal(resize_crop(video, 24), expected)


def test_the_long_side_is_rounded_down() -> None:
    assert resized_shape(480, 854, 224) == (224, 398)
    assert resized_shape(854, 480, 224) == (398, 224)
    assert resized_shape(100, 100, 224) == (224, 224)


def test_normalise_is_the_textbook_formula_within_rounding() -> None:
    frames = torch.arange(256, dtype=torch.uint8).expand(2, 3, 1, 256)
    exact = (frames.double() / 255 - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(
        STD
    ).double().view(3, 1, 1)
    out = normalise(frames, MEAN, STD)
    assert out.dtype == torch.float32
    assert (out.double() - exact).abs().max() < 1e-6


def test_normalise_takes_any_leading_shape_and_leaves_its_input_alone() -> None:
    frames = torch.randint(0, 256, (2, 4, 3, 5, 7), dtype=torch.uint8)
    before = frames.clone()
    out = normalise(frames, MEAN, STD)
    assert out.shape == frames.shape
    assert torch.equal(frames, before)
    assert torch.equal(out[1, 2], normalise(frames[1, 2], MEAN, STD))
    floats = frames.float()
    assert torch.equal(normalise(floats, MEAN, STD), out)
    assert torch.equal(floats, frames.float())


@pytest.mark.gpu
def test_normalise_on_the_device_is_within_one_rounding_of_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    frames = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8)
    out = normalise(frames.cuda(), MEAN, STD)
    assert out.is_cuda
    assert (out.cpu() - normalise(frames, MEAN, STD)).abs().max() < 5e-7


def test_bad_arguments_are_refused() -> None:
    video = noise(1, 8, 8)
    with pytest.raises(UsageError, match="expected one of torch, pil; found 'cv2'"):
        resize_crop(video, 4, "cv2")
    with pytest.raises(UsageError, match="at least 1 pixel"):
        resize_crop(video, 0)
    with pytest.raises(ValueError, match=r"uint8 frames \[T, H, W, 3\]"):
        resize_crop(video.astype(np.float32), 4)
    with pytest.raises(ValueError, match=r"uint8 frames \[T, H, W, 3\]"):
        resize_crop(video.transpose(0, 3, 1, 2), 4)
    with pytest.raises(ValueError, match=r"frames \[\.\.\., 3, h, w\]"):
        normalise(torch.zeros(8, 8, 3, dtype=torch.uint8), MEAN, STD)
    with pytest.raises(ValueError, match="positive stds"):
        normalise(torch.zeros(3, 8, 8, dtype=torch.uint8), MEAN, (0.0, 1.0, 1.0))
