"""A store of made-up features, a small head, and what two sweeps are compared by.

Load it by its path, e.g. `runpy.run_path(str(Path(__file__).with_name("sweep_stores.py")))`: tests
are no package.
"""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from msq.cli import main
from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.store import open_store
from msq.extract.store_writer import StoreWriter
from msq.extract.views import CLEAN

views = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("view_stores.py"))))
HEAD = ("head.layers=1", "head.heads=2", "head.ffn=32", "train.batch=16", "optim.lr=2e-3")


def make_store(path: Path, **changes: Any) -> Path:
    """120 clips of 8 classes that leave a mark on tokens and image; clean features only."""
    return Path(views.make_store(path, [CLEAN], **{"clips": 120, "classes": 8, **changes}))


def add_text_encoder(path: Path) -> str:
    """Another text encoder beside the one that the store has; its name."""
    other = replace(views.TEXT, slug="another-text", sha256="c" * 64)
    add_prompt(path, "plain", "{}", other)
    return str(other.slug)


def add_prompt(path: Path, name: str, template: str, encoder: Any = views.TEXT) -> None:
    """Other class texts, of the same encoder or another, beside those that the store has."""
    opened = open_store(path)
    rows = tuple(
        Clip(clip, Path("x"), None, None, tuple(labels.nonzero().flatten().tolist()), split)
        for clip, split, labels in zip(opened.clips, opened.splits, opened.labels(), strict=True)
    )
    data = Dataset("toy", tuple(opened.classes), opened.task, rows, "map")
    values = np.random.default_rng(11).normal(size=(len(opened.classes), views.WIDTH))
    writer = StoreWriter(path, data, shard=64)
    writer.add_text(encoder, name, template, {}, values.astype(np.float32))


def msq(*arguments: object) -> int:
    """Exit code of one command."""
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    return int(left.value.code or 0)


def numbers(folder: Path) -> dict[str, Any]:
    """Everything that a sweep found, without how long it took."""
    found = json.loads((folder / "results.json").read_text())
    del found["sweep"]
    return dict(_timeless(found))


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if "seconds" not in k}
    return [_timeless(v) for v in value] if isinstance(value, list) else value
