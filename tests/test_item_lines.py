"""What stage one says of a clip, in a line."""

from __future__ import annotations

from msq.report.stage_one import item_line


def test_the_decoders_words_are_said_once():
    said = {"clip": "a", "reason": "expected a video, found: no moov atom"}
    line = "a: expected a video, found: no moov atom"
    assert item_line(said) == line
    assert item_line({**said, "message": "no moov atom"}) == line
    assert item_line({**said, "message": "code 1", "views": [0]}) == (
        "a, view 0: expected a video, found: no moov atom (code 1)"
    )
