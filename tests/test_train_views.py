"""Training on augmented views: what is shown, that it is drawn, and that a run can go on."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msq import config as configuration
from msq.config import RunConfig
from msq.errors import SpecMismatch, StoreError, UsageError
from msq.extract.store import open_store
from msq.extract.views import CLEAN, augmented_views, clips_by_crops
from msq.head.checkpoint import load_model
from msq.head.evaluate import evaluate_run
from msq.head.features import Features, configured_features, load_features
from msq.head.train import Training, train_head
from msq.head.zeroshot import zero_shot

stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("view_stores.py"))))
SMALL = ("head.layers=1", "head.heads=2", "head.ffn=32", "train.epochs=3", "train.batch=16")
VIEWS = (CLEAN, *clips_by_crops(1, 1), *augmented_views(3))  # augmented ones are 2, 3 and 4


def small(*overrides: str) -> RunConfig:
    return configuration.override(RunConfig(), [*SMALL, *overrides])


def features_of(path: Path, which: str, **options: Any) -> Features:
    store = stores.make_store(path, VIEWS, **options)
    return configured_features(open_store(store), small(f"features.train_views={which}").features)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(run / "head.safetensors")[0].state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_views_of_training_clips_are_resident_as_the_store_has_them(tmp_path: Path) -> None:
    found = features_of(tmp_path / "a.zarr", "all")
    store = open_store(tmp_path / "a.zarr")
    views = found.train_views
    assert views is not None
    assert views.names == ("clean", "augmented 1", "augmented 2", "augmented 3")
    rows = [row for row, split in enumerate(store.splits) if split == "train"]
    assert views.tokens.shape == (4, len(rows), stores.TOKENS, stores.WIDTH)
    assert views.image is not None
    for v, number in enumerate((0, 2, 3, 4)):
        assert torch.equal(views.tokens[v], store.tokens(rows, view=number).float())
        assert torch.equal(views.image[v], store.image(rows, view=number).float())
    assert torch.equal(found.tokens, store.tokens().float())  # validation and test clips: clean
    assert (views.place >= 0).tolist() == [split == "train" for split in store.splits]
    assert load_features(store).train_views is None
    assert "train_views" not in load_features(store).identity()
    assert found.identity()["train_views"] == list(views.names)


def test_a_step_shows_each_clip_in_a_view_drawn_from_seed_and_step(tmp_path: Path) -> None:
    found = features_of(tmp_path / "a.zarr", "augmented")
    store, views = open_store(tmp_path / "a.zarr"), found.train_views
    assert views is not None
    rows = found.rows("train")[torch.tensor([3, 0, 7, 3])]
    drawn = []
    for step in range(200):
        tokens, image = views.of(rows, seed=1, step=step)
        chosen = views.draw(4, 1, step)
        drawn.append(chosen)
        if step < 5:
            assert image is not None
            for place, (row, v) in enumerate(zip(rows.tolist(), chosen.tolist(), strict=True)):
                expected = store.tokens([row], view=2 + v)[0].float()
                assert torch.equal(tokens[place], expected)
                assert torch.equal(image[place], store.image([row], view=2 + v)[0].float())
    counts = torch.bincount(torch.cat(drawn), minlength=3).float()
    assert (counts - 800 / 3).abs().max() < 4 * (800 * 2 / 9) ** 0.5  # four standard deviations
    again = torch.stack([views.draw(4, 1, step) for step in range(200)])
    assert torch.equal(again, torch.stack(drawn))
    other = torch.stack([views.draw(4, 2, step) for step in range(200)])
    assert not torch.equal(again, other)
    assert len({tuple(v.tolist()) for v in drawn}) > 40  # of 81


def test_views_equal_to_the_clean_one_train_to_the_same_bits(tmp_path: Path) -> None:
    clean = load_features(open_store(stores.make_store(tmp_path / "a.zarr", VIEWS, noise=0)))
    train_head(clean, small(), tmp_path / "clean")
    for which in ("augmented", "all"):
        config = small(f"features.train_views={which}")
        same = configured_features(open_store(tmp_path / "a.zarr"), config.features)
        train_head(same, config, tmp_path / which)
        assert equal(weights(tmp_path / "clean"), weights(tmp_path / which))


@pytest.mark.parametrize("which", ["augmented", "all"])
def test_a_run_on_views_is_deterministic_and_goes_on_within_an_epoch(
    which: str, tmp_path: Path
) -> None:
    found = features_of(tmp_path / "a.zarr", which)
    config = small(f"features.train_views={which}")
    whole = train_head(found, config, tmp_path / "whole")
    steps = Training(found, config).steps
    assert steps > 5
    stopped = train_head(found, config, tmp_path / "parts", stop_after=1)
    while not stopped.finished:  # after every single step, in the middle of epochs too
        stopped = train_head(found, config, tmp_path / "parts", stop_after=1)
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert stopped.metrics == whole.metrics
    clean = train_head(load_features(open_store(tmp_path / "a.zarr")), small(), tmp_path / "clean")
    assert not equal(weights(tmp_path / "whole"), weights(tmp_path / "clean"))
    # What was shown in training plays no part in scoring.
    stored = json.loads((tmp_path / "whole/result.json").read_text())
    names = [f"augmented {k}" for k in (1, 2, 3)]
    assert stored["views"] == "clean"
    assert stored["train_views"] == (names if which == "augmented" else ["clean", *names])
    assert clean.result["train_views"] == ["clean"]
    scored = evaluate_run(tmp_path / "whole", open_store(tmp_path / "a.zarr"))
    assert scored["metrics"]["map"] == pytest.approx(whole.metrics["map"], abs=1e-9)
    with pytest.raises(SpecMismatch, match="train_views"):
        train_head(load_features(open_store(tmp_path / "a.zarr")), small(), tmp_path / "whole")


def test_clips_without_all_training_views_are_left_out_of_training_alone(tmp_path: Path) -> None:
    lost: dict[Any, int] = {("augmented 2", 0): 2, ("fake-image", "augmented 3", 1): 0}
    lost |= {("augmented 1", 2): 2}  # a test clip, which stays
    found = features_of(tmp_path / "a.zarr", "augmented", status=lost)
    assert found.left_out["without all training views"] == 2
    assert "58 of 60 clips (2 without all training views)" in found.coverage()
    assert found.ids[:2] == ("clip 2 é", "clip 3 é")
    assert found.splits.count("test") == 20
    views = found.train_views
    assert views is not None
    row = found.ids.index("clip 4 é")
    expected = open_store(tmp_path / "a.zarr").tokens([4], view=3)[0].float()
    assert torch.equal(views.tokens[1, views.place[row]], expected)


def test_a_store_without_augmented_views_is_refused_with_the_command(tmp_path: Path) -> None:
    store = open_store(stores.make_store(tmp_path / "a.zarr", (CLEAN, *clips_by_crops(2, 1))))
    with pytest.raises(UsageError, match=r"needs augmented views, .*--views 4"):
        load_features(store, train_views="augmented")
    with pytest.raises(UsageError, match="found 2"):
        small("features.view=2", "features.train_views=all")
    with pytest.raises(UsageError, match="one of clean, augmented, all"):
        small("features.train_views=some")
    half = stores.make_store(tmp_path / "b.zarr", VIEWS, image_views=(CLEAN,))
    with pytest.raises(StoreError, match="fake-image: no view 'augmented 1'"):
        load_features(open_store(half), train_views="augmented")


def test_a_view_has_one_name_and_each_encoder_its_own_number(tmp_path: Path) -> None:
    turned = (CLEAN, *augmented_views(3), *clips_by_crops(1, 1))
    store = open_store(stores.make_store(tmp_path / "a.zarr", VIEWS, image_views=turned))
    found = load_features(store, view=2)
    assert found.view_name == "augmented 1"
    assert torch.equal(found.tokens, store.tokens(view=2).float())
    assert found.image is not None
    assert torch.equal(found.image, store.image(view=1).float())
    with pytest.raises(StoreError, match="no view 5; its views: 0 clean, 1 test"):
        load_features(store, view=5)


def test_class_splits_train_on_the_same_views(tmp_path: Path) -> None:
    found = features_of(tmp_path / "a.zarr", "augmented")
    config = small("features.train_views=augmented", "train.epochs=1")
    (result,) = zero_shot(found, config, seen=[60], splits=1, queries=("text",))
    assert result["views"] == "clean"
    rows = found.rows("train")[::2]
    some = found.select(rows=rows, columns=[0, 2])
    assert some.train_views is not None
    assert found.train_views is not None
    every = torch.arange(len(rows))
    a, _ = some.train_views.of(every, 0, 0)
    b, _ = found.train_views.of(rows, 0, 0)
    assert torch.equal(a, b)
