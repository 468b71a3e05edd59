"""The rows of a split, from an open store."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from msq.errors import StoreError
from msq.extract.store import FeatureStore, open_store

_stores = runpy.run_path(str(Path(__file__).with_name("test_store.py")))
SPLITS = ("test", "train", "train", "val", "test", "train")


def filled(path: Path, splits: tuple[str, ...], status: dict[int, int]) -> FeatureStore:
    """A store with a row for each split."""
    data = _stores["dataset"](len(splits))
    clips = tuple(replace(clip, split=one) for clip, one in zip(data.clips, splits, strict=True))
    _stores["fill"](path, replace(data, clips=clips), [_stores["fakes"].SPEC], status)
    return open_store(path)


def test_the_rows_of_splits_are_those_that_a_store_takes(tmp_path: Path) -> None:
    store = filled(tmp_path / "a.zarr", SPLITS, {})
    assert store.rows("train").tolist() == [1, 2, 5]
    assert store.rows("train").dtype == torch.int64
    assert store.rows("test", "val").tolist() == [0, 3, 4]  # in the order of the store
    assert store.rows("val", "val").tolist() == [3]
    assert torch.equal(store.tokens(store.rows("test")), store.tokens()[[0, 4]])
    assert torch.equal(store.labels(store.rows("val")), store.labels()[[3]])


def test_rows_that_failed_are_rows_of_their_split(tmp_path: Path) -> None:
    store = filled(tmp_path / "a.zarr", SPLITS, {2: 2})
    assert store.rows("train").tolist() == [1, 2, 5]
    assert store.ok_rows().tolist() == [0, 1, 3, 4, 5]


def test_a_split_without_a_clip_is_refused_and_those_there_are_named(tmp_path: Path) -> None:
    store = filled(tmp_path / "a.zarr", ("train", "test"), {})
    for asked in (("val",), ("train", "val"), ("Train",)):
        with pytest.raises(StoreError, match=r"no split '\w+'; there are: train, test") as caught:
            store.rows(*asked)
        assert "a.zarr" in str(caught.value)
    with pytest.raises(StoreError, match="there are: train, test"):
        store.rows()
