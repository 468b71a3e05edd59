"""A clip's frame rate reaches the decoder, so that a folder of frames can be cut."""

import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image

from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.pipeline import extract

FAKES = runpy.run_path(str(Path(__file__).with_name("fakes.py")))


@pytest.fixture
def clip(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for k in range(20):
        Image.new("RGB", (40, 40), (12 * k,) * 3).save(folder / f"{k + 1:05d}.png")
    return Clip("a#1-2", folder, 1.0, 2.0, (0,), "train", fps=8.0)


def test_extraction_cuts_a_frame_folder_at_the_clips_rate(clip, tmp_path):
    video = FAKES["FakeEncoder"]()
    data = Dataset("d", ("x",), "multilabel", (clip, replace(clip, id="b", fps=None)), "map")
    result = extract(data, tmp_path / "s.zarr", video=video, image=None, workers=0)
    assert (result.done, result.failed) == (1, 1)
    assert "frame rate" in result.failures[0]["reason"]
    times = np.asarray(zarr.open_group(result.store, mode="r")["time/fake-video"])
    assert times[0, 0].min() >= 1.0
    assert times[0, 0].max() < 2.0


def test_the_rate_is_part_of_what_a_store_is_made_from(clip):
    def hashed(rate):
        rows = (replace(clip, fps=rate),)
        return Dataset("d", ("x",), "multilabel", rows, "map").clip_list_hash()

    assert hashed(8.0) != hashed(25.0)
    assert hashed(None) == hashed(None) != hashed(8.0)
