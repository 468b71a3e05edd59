"""`top` and `threshold`: how many of the scored labels a caller gets."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from msq.errors import UsageError
from msq.head.predict import Head, load_head

_predict = runpy.run_path(str(Path(__file__).with_name("test_predict.py")))
world = _predict["world"]
Predictions = list[dict[str, Any]]


@pytest.fixture(scope="module")
def head(world: Any) -> Head:
    return load_head(world.run("text"), weights=world.weights)


def middle(parts: list[Predictions]) -> float:
    """A score that some of the predictions have, and others are below."""
    found = sorted(one["score"] for part in parts for one in part)
    return float(found[len(found) // 2])


def kept(predictions: Predictions, top: int | None, threshold: float) -> Predictions:
    return [one for one in predictions[:top] if one["score"] >= threshold]


@pytest.mark.parametrize("top", [None, 1, 2])
def test_clips_and_their_windows_have_the_best_labels_alone(
    world: Any, head: Head, top: int | None
) -> None:
    video = world.videos[0]
    (whole,) = head.predict(video, every=0.2)
    parts = [whole, *whole["segments"]]
    threshold = middle([part["predictions"] for part in parts])
    (found,) = head.predict(video, every=0.2, top=top, threshold=threshold)
    expected = [kept(part["predictions"], top, threshold) for part in parts]
    assert [part["predictions"] for part in (found, *found["segments"])] == expected
    assert 0 < sum(map(len, expected)) < sum(len(part["predictions"]) for part in parts)
    windows = list(head.segments(video, every=0.2, top=top, threshold=threshold))
    assert [part["predictions"] for part in windows] == expected[1:]


def test_rows_of_a_store_too(world: Any, head: Head) -> None:
    every = head.predict([0, 4], store=world.store)
    found = head.predict([0, 4], store=world.store, top=2)
    assert [item["predictions"] for item in found] == [item["predictions"][:2] for item in every]
    (none,) = head.predict([0], store=world.store, threshold=1)
    assert none["predictions"] == []


@pytest.mark.parametrize(
    ("how", "message"),
    [({"top": 0}, "top: expected a number of labels, 1 or more, found 0"),
     ({"threshold": 1.5}, "threshold: expected a probability, 0 to 1, found 1.5"),
     ({"threshold": float("nan")}, "found nan")],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    world: Any, head: Head, how: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        head.predict([0], store=world.store, **how)
    with pytest.raises(UsageError, match=message):
        next(head.segments(world.videos[0], every=1, **how))
