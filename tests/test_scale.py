"""docs/scale.md: its tables are those that the arithmetic gives, and the arithmetic is right."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from msq.bench import scale
from msq.extract.encoders.timesformer import TimeSformer
from msq.extract.encoders.timesformer_config import TimeSformerConfig
from msq.extract.pipeline import extract

DOCUMENT = Path(__file__).parents[1] / "docs" / "scale.md"
fakes = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fakes.py"))))


def test_the_document_holds_the_tables_of_the_arithmetic() -> None:
    begin, end = "<!-- tables: msq.bench.scale -->\n", "<!-- end of tables -->"
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text.count(begin) == text.count(end) == 1
    assert text.partition(begin)[2].partition(end)[0].strip() == scale.tables()


def test_the_operations_are_those_that_torch_counts() -> None:
    with torch.device("meta"):
        model = TimeSformer(TimeSformerConfig(frames=scale.FRAMES)).eval()
        video = torch.empty(1, scale.FRAMES, 3, 224, 224)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(video)
    assert scale.timesformer_flops() == counter.get_total_flops()


@pytest.mark.parametrize("mode", scale.MODES)
def test_bytes_and_files_are_those_of_a_store(
    mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = replace(fakes.SPEC, pooling=mode)
    image = fakes.image_spec(frames=2, size=8)
    monkeypatch.setattr(scale, "_specs", lambda _: (video, image))
    extract(
        fakes.make_dataset(tmp_path / "v", 7), tmp_path / "s.zarr",
        video=fakes.FakeEncoder(video), image=fakes.FakeEncoder(image), workers=0, shard=3,
    )  # fmt: skip
    chunks = [
        file.stat().st_size
        for part in ("tokens", "image", "time", "status")
        for file in (tmp_path / "s.zarr" / part).rglob("*")
        if file.is_file() and file.name != "zarr.json"
    ]
    assert sum(chunks) == scale.feature_bytes(mode, 7, shard=3)
    assert len(chunks) == scale.files(mode, 7, shard=3)


def test_hours_follow_from_the_costs() -> None:
    costs = replace(scale.MEASURED, decode=dict.fromkeys(scale.MEASURED.decode, 3.6))
    line = next(x for x in scale.tables(costs).splitlines() if x.startswith("| 100 million"))
    assert line.split(" | ")[3] == "100,000"
    a100 = 1e8 * scale.clip_flops() / (312e12 * scale.MFU) / 3600
    assert line.split(" | ")[5] == f"{a100:.3g}"
