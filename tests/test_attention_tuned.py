"""Attention of an encoder that `msq train` tuned: the run brings it along."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np

from msq.head.predict import load_head

_tuned = runpy.run_path(str(Path(__file__).with_name("test_encoder_file.py")))
world, head_run, whole_run = (_tuned[name] for name in ("world", "head_run", "whole_run"))


def test_the_runs_own_weights_are_watched(world: Any, whole_run: Path) -> None:
    video = world.folder / "5.mp4"
    found = load_head(whole_run).attention(video)
    assert found.video.heat is not None
    other = load_head(whole_run)
    other.encoders["video"].model.load_state_dict(world.start.model.state_dict())
    before = other.attention(video)  # as the encoder was before it was tuned
    assert before.video.heat is not None
    assert np.abs(found.video.heat - before.video.heat).max() > 1e-4
    assert np.abs(found.scores - before.scores).max() > 0
    predicted = load_head(whole_run).predict(video)[0]["predictions"]
    assert [p["label"] for p in predicted][: len(found.labels)] == list(found.labels)
