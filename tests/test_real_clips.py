"""Recorded clips of several makers, where the folder of real clips is at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from msq.extract.sampling import sample_indices
from msq.extract.transforms import resize_crop
from msq.extract.video import decode_all, decode_clip

# Frames that a full decode of each clip shows.
CLIPS = {
    "arm_wrestling.mp4": 280,
    "flipping_a_pancake.mkv": 310,
    "part_0.mp4": 32,
    "skeleton_demo.mp4": 72,
    "test.avi": 164,
    "test.mp4": 300,
    "v_GGSY1Qvo990.mp4": 355,
    "v_ZNVhz7ctTq0.mp4": 420,
    "vid1.mp4": 56,
    "vid2.mp4": 134,
}


def clip_path(shared: Path, name: str) -> Path:
    path = shared / "clips" / name
    if not path.is_file():
        pytest.skip(f"no clip {name} in the folder of real clips")
    return path


@pytest.mark.parametrize("name", CLIPS)
def test_a_real_clip_is_clean_and_equals_a_full_decode(name: str, shared: Path) -> None:
    path = clip_path(shared, name)
    everything, times = decode_all(path)
    assert len(everything) == CLIPS[name]
    assert times[0] == 0
    assert (np.diff(times) > 0).all()
    # A large picture costs seconds in comparing, not in decoding.
    for frames in (1, 8, 16, 32) if everything[0].size < 2**20 else (16,):
        clip = decode_clip(path, frames)
        chosen = sample_indices(len(everything), frames)
        assert clip.degraded is None
        np.testing.assert_array_equal(clip.frames, everything[chosen])
        np.testing.assert_array_equal(clip.times, times[chosen].astype(np.float32))
    inside = np.flatnonzero((times >= 0.7) & (times < 1.9))
    cut = decode_clip(path, 8, start=0.7, end=1.9)
    np.testing.assert_array_equal(cut.frames, everything[inside[sample_indices(len(inside), 8)]])


@pytest.mark.parametrize("name", CLIPS)
def test_resizing_a_real_clip_is_within_the_stated_distance_of_pil(name: str, shared: Path) -> None:
    frames = decode_clip(clip_path(shared, name), 4).frames
    exact = resize_crop(frames, 224, "pil").numpy().astype(int)
    difference = np.abs(resize_crop(frames, 224).numpy() - exact)
    assert difference.max() <= 2
    assert (difference > 0).mean() <= 0.005


@pytest.mark.parametrize("name", ["vid1.mp4", "test.avi", "part_0.mp4"])
def test_more_frames_than_a_real_clip_has_are_repeats(name: str, shared: Path) -> None:
    path = clip_path(shared, name)
    everything, _ = decode_all(path)
    frames = len(everything) + 9
    np.testing.assert_array_equal(
        decode_clip(path, frames).frames, everything[sample_indices(len(everything), frames)]
    )
