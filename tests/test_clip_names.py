"""What `msq predict` calls the videos that it is given."""

from __future__ import annotations

import os
from pathlib import Path

from msq.head.predict_videos import clip_names


def test_a_name_that_is_not_utf8_can_be_written_as_utf8() -> None:
    latin = Path(os.fsdecode(b"cam/l\xf6we.mp4"))
    assert clip_names([latin]) == ["l\\udcf6we"]
    (first, second) = clip_names([latin, Path(os.fsdecode(b"old/l\xf6we.mp4"))])
    assert (first, second) == ("cam/l\\udcf6we.mp4", "old/l\\udcf6we.mp4")
    assert "".join([first, second]).encode()


def test_other_names_are_left_alone() -> None:
    assert clip_names([Path("a/löwe, 2.mp4")]) == ["löwe, 2"]
