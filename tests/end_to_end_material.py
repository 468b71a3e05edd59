"""Small material for end-to-end training: real videos, a real store, a TimeSformer of two layers.

Load it by its path, as `fakes.py`.
"""

from __future__ import annotations

import copy
import dataclasses
import runpy
from pathlib import Path
from typing import Any

import torch

from msq.bench.random_encoders import video_encoder
from msq.extract.datasets.dataset import Dataset
from msq.extract.encoders.encoder import VideoEncoder
from msq.extract.encoders.timesformer_config import TimeSformerConfig
from msq.extract.pipeline import extract
from msq.extract.store import open_store
from msq.head.end_to_end_config import EndToEndConfig, end_to_end_settings
from msq.head.features import Features, load_features
from msq.head.material import Material

_FAKES = runpy.run_path(str(Path(__file__).with_name("fakes.py")))
SHAPE = TimeSformerConfig(image_size=(16, 16), patch_size=8, frames=4, width=16, depth=2, heads=2)
SMALL = ("head.width=16", "head.layers=1", "head.heads=2", "head.ffn=32", "train.batch=4",
         "train.epochs=3", "train.val=0", "train.precision=fp32", "optim.warmup=0.5",
         "clips.augment=none", "backbone.lr=1e-3")  # fmt: skip


def settings(*assignments: str) -> EndToEndConfig:
    return end_to_end_settings(None, [*SMALL, *assignments])


def encoder(seed: int = 0, config: TimeSformerConfig = SHAPE) -> VideoEncoder:
    """Random weights, attention over time among them."""
    made = video_encoder(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return made


def dataset(folder: Path, count: int = 18, broken: tuple[int, ...] = ()) -> Dataset:
    """Two thirds to train on; the rest validates and tests in turn."""
    made: Dataset = _FAKES["make_dataset"](folder, count, broken)
    splits = ("train", "train", "val", "train", "train", "test")
    clips = [dataclasses.replace(c, split=splits[i % 6]) for i, c in enumerate(made.clips)]
    return dataclasses.replace(made, clips=tuple(clips))


def features_of(
    data: Dataset, store: Path, video: VideoEncoder, dtype: Any = "float32", batch: int = 4
) -> Features:
    """Features of all encoders, made by stage one."""
    image = _FAKES["FakeEncoder"](_FAKES["image_spec"]())
    extract(data, store, video=video, image=image, text=_FAKES["FakeText"](), store_dtype=dtype,
            workers=0, batch=batch)  # fmt: skip
    return load_features(open_store(store))


def material(
    data: Dataset, features: Features, video: VideoEncoder, *, image: bool = False
) -> Material:
    """The same clips for end-to-end training; the encoder is a copy."""
    own = copy.deepcopy(video)
    places = {clip.id: clip for clip in data.clips}
    empty = torch.empty(len(features.ids), own.spec.tokens, own.spec.channels, device="meta")
    bare = dataclasses.replace(features, tokens=empty)
    tower = _FAKES["FakeEncoder"](_FAKES["image_spec"]()) if image else None
    return Material(bare, tuple(places[clip] for clip in features.ids), own, tower)
