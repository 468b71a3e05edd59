"""Frame folders of more than 8 bits a channel, as thermal cameras write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from msq.errors import VideoError
from msq.extract.video import decode_clip

VALUES = [[0, 255, 256, 32768, 65535]]


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_pictures_of_16_bits_keep_their_greys(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(np.array(VALUES, np.uint16)).save(tmp_path / f"1{suffix}")
    grey = decode_clip(tmp_path, 1).frames[0]
    np.testing.assert_array_equal(grey[0], np.repeat([[0], [0], [1], [128], [255]], 3, axis=1))


@pytest.mark.parametrize(("kind", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_pictures_without_a_known_white_are_refused(tmp_path: Path, kind: Any, mode: str) -> None:
    Image.fromarray(np.array(VALUES, kind)).save(tmp_path / "1.tiff")
    found = rf"found 32 in 1\.tiff \(mode {mode}\); save them with 16"
    with pytest.raises(VideoError, match=found):
        decode_clip(tmp_path, 1)
