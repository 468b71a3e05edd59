"""Features that stay float16 in memory: half the size, and the bits of features widened at once."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from msq import config as configuration
from msq.config import FeatureConfig, RunConfig
from msq.extract.store import FeatureStore, open_store
from msq.extract.views import CLEAN, augmented_views, clips_by_crops
from msq.head import evaluate, finite
from msq.head import features as reading
from msq.head.baselines import clip_similarity, linear_probe
from msq.head.checkpoint import load_model
from msq.head.class_leaks import clip_labels
from msq.head.evaluate import evaluate_run
from msq.head.features import Features, configured_features, load_features
from msq.head.memory import moving_bytes
from msq.head.stream import StreamedTokens
from msq.head.train import train_head
from msq.head.trials import ENGINES, Job

stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("view_stores.py"))))


def small(*overrides: str) -> RunConfig:
    return configuration.override(
        RunConfig(), ["head.layers=1", "head.heads=2", "head.ffn=32", "train.epochs=3",
                      "train.batch=16", *overrides])  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    path = tmp_path_factory.mktemp("store") / "a.zarr"
    views = (CLEAN, *augmented_views(2), *clips_by_crops(2, 1))
    return open_store(stores.make_store(path, views))


def widened(store: FeatureStore, chosen: FeatureConfig, partition: str | None = None) -> Features:
    """The same features, all of them made float32 when they are read."""
    return load_features(
        store, chosen.video, chosen.image, chosen.text, chosen.prompt, chosen.view,
        partition=partition, train_views=chosen.train_views, feed=chosen.feed,
    )  # fmt: skip


def both(store: FeatureStore, chosen: FeatureConfig) -> tuple[Features, Features]:
    narrow, wide = configured_features(store, chosen), widened(store, chosen)
    assert isinstance(narrow.tokens, Tensor)
    assert (narrow.tokens.dtype, wide.tokens.dtype) == (torch.float16, torch.float32)
    return narrow, wide


def arrays(features: Features) -> list[Tensor]:
    views = features.train_views
    found = [
        features.tokens,
        features.image,
        *(() if views is None else (views.tokens, views.image)),
    ]
    assert all(isinstance(x, Tensor) for x in found)
    return found  # type: ignore[return-value]


def test_in_memory_they_take_half_and_that_is_what_must_fit(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow, wide = both(store, small("features.train_views=all").features)
    for mine, theirs in zip(arrays(narrow), arrays(wide), strict=True):
        assert 2 * mine.nbytes == theirs.nbytes
        assert torch.equal(mine.float(), theirs)
    assert narrow.text is not None
    assert narrow.text.dtype == torch.float32
    own = [narrow.labels.nbytes + sum(x.nbytes for x in arrays(narrow))]
    assert moving_bytes(narrow, "meta") == own[0]
    asked: list[int] = []
    monkeypatch.setattr(reading, "fits", lambda size, device: bool(asked.append(size)) or True)
    configured_features(store, small().features)
    assert isinstance(narrow.tokens, Tensor)
    assert asked == [narrow.tokens.nbytes]
    monkeypatch.setattr(reading, "fits", lambda size, device: False)
    left = configured_features(store, small().features)
    assert isinstance(left.tokens, StreamedTokens)  # widened by the threads that read
    assert left.tokens.dtype == torch.float32


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("train.path=plain", "head.queries=vanilla", "head.classifier=shared"),
        ("features.train_views=augmented", "head.classifier=text"),
        ("train.precision=bf16",),
    ],
)
def test_losses_weights_and_metrics_have_the_bits_of_the_widened_path(
    changes: tuple[str, ...], store: FeatureStore, tmp_path: Path
) -> None:
    config = small(*changes)
    names, found = ("narrow", "wide"), {}
    for name, features in zip(names, both(store, config.features), strict=True):
        done = train_head(features, config, tmp_path / name)
        lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        history = [{**json.loads(line), "seconds": 0} for line in lines]
        model = load_model(tmp_path / name / "head.safetensors")[0].state_dict()
        found[name] = (history, done.metrics, done.result["per_class"], model)
    *mine, weights = found["narrow"]
    *theirs, expected = found["wide"]
    assert mine == theirs
    assert len(mine[0]) == 3
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    # Scoring a store reads it the same way.
    again = evaluate_run(tmp_path / "narrow", store)
    assert again["metrics"] == mine[1]


def test_a_stack_and_the_baselines_have_the_same_bits(store: FeatureStore) -> None:
    narrow, wide = both(store, small().features)
    jobs = [[Job(f, small(f"train.seed={n}"), None) for n in range(2)] for f in (narrow, wide)]
    ours, theirs = (ENGINES["stacked"](several, "cpu", None) for several in jobs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.metrics == other.metrics  # type: ignore[union-attr]
    rows = narrow.rows("test")
    assert torch.equal(linear_probe(narrow, rows)[0], linear_probe(wide, rows)[0])
    assert torch.equal(clip_similarity(narrow, rows), clip_similarity(wide, rows))
    assert torch.equal(clip_labels(narrow), clip_labels(wide))


def test_an_ensemble_over_views_has_the_same_bits(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_head(configured_features(store, small().features), small(), tmp_path / "run")
    found: list[dict[str, Any]] = []
    for way in (configured_features, widened):
        monkeypatch.setattr(evaluate, "configured_features", way)
        found.append(evaluate_run(tmp_path / "run", store, ensemble="mean"))
    for key in ("metrics", "per_class", "clips", "views"):
        assert found[0][key] == found[1][key]
    assert found[0]["views"] == "2 clips x 1 crops, mean"


def test_a_look_for_infinite_values_widens_a_part_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(finite, "_PART", 7)
    widest: list[int] = []
    whole = Tensor.sum

    def watched(self: Tensor, *given: Any, **named: Any) -> Tensor:
        widest.append(self.numel())
        return whole(self, *given, **named)

    monkeypatch.setattr(Tensor, "sum", watched)
    x = torch.full((4, 5), 6e4, dtype=torch.float16)  # their sum is more than float16 holds
    assert bool(finite._all_finite(x))
    assert max(widest) == 7
    for row in range(4):
        bad = x.clone()
        bad[row, 4] = float("inf") if row % 2 else float("nan")
        assert not bool(finite._all_finite(bad))
    assert bool(finite._all_finite(x[:0]))
