"""The benchmark of stage one: its gate, what it counts, and what its figures say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from msq.bench import extract_cases
from msq.bench.cases import Figure, Settings, registry
from msq.bench.process_memory import PeakMemory, descendants, resident
from msq.bench.random_encoders import (
    PlainViT,
    image_encoder,
    timesformer_flops,
    video_encoder,
    vit_flops,
)
from msq.bench.runner import run_cases
from msq.extract.encoders.timesformer_config import TimeSformerConfig

SMALL = TimeSformerConfig(image_size=(48, 48), patch_size=16, frames=3, width=24, depth=2, heads=2)


def counted(model: torch.nn.Module, *shape: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(shape))
    return counter.get_total_flops()


def test_operations_are_counted_as_torch_counts_them() -> None:
    model = video_encoder(SMALL).model
    assert timesformer_flops(2, SMALL) == counted(model, 2, 3, 3, 48, 48)
    vit = PlainViT(48, 16, 24, 2, 2)
    assert vit_flops(5, 48, 16, 24, 2) == counted(vit, 5, 3, 48, 48)


def test_random_encoders_give_what_their_specs_say() -> None:
    video, image = video_encoder(SMALL), image_encoder(SMALL)
    pixels = torch.randn(2, 3, 3, 48, 48)
    assert video(pixels).shape == (2, video.spec.tokens, video.spec.channels) == (2, 4, 24)
    assert image(pixels).shape == (2, 3, 24)
    assert not torch.equal(image(pixels)[0, 0], image(pixels)[0, 1])


def test_figures_know_their_goals() -> None:
    assert Figure(0.95, 0.9).to_dict()["met"] is True
    assert Figure(0.85, 0.9).to_dict()["met"] is False
    assert Figure(0.03, 0.02, most=True).to_dict()["met"] is False
    assert Figure(0.01, 0.02, most=True).to_dict()["met"] is True
    assert Figure(float("nan"), 0.9).to_dict()["met"] is False
    assert Figure(3.0).to_dict()["met"] is None


def test_quick_runs_give_every_figure() -> None:
    settings = Settings(quick=True, rounds=1)
    names = ("pipeline, cost is both", "decode processes", "long run", "workers", "on a GPU, T=8")
    cases = [case for case in registry("extract", settings) if case.name in names]
    found = {case["name"]: case for case in run_cases(cases, settings)["cases"]}
    assert all(case["gate"]["ok"] for case in found.values())
    both = found["pipeline, cost is both"]["figures"]
    assert both["throughput over cores / core-seconds"]["goal"] == 0.9
    assert both["throughput over that of a process per core"]["value"] > 0
    # A process more costs something, and decoding takes place in it: nothing is left out.
    assert both["processor time over that of the parts"]["value"] > 0.5
    assert 0 < both["share of writing"]["value"] < 1
    assert found["decode processes"]["figures"]["two processes over one"]["goal"] == 1.6
    assert found["workers"]["figures"]["the fastest other over the default"]["value"] > 0
    on_gpu = found["on a GPU, T=8"]["figures"]
    assert on_gpu["extract over the slower of decoding and encoding"]["goal"] == 0.9
    clips = on_gpu["clips/s end to end"]["value"]
    hours = on_gpu["hours for 9848 such videos"]["value"]
    assert clips * hours * 3600 == pytest.approx(9848)
    long = found["long run"]["figures"]
    assert long["peak memory of few, MB"]["value"] > 100  # torch alone is more
    assert long["processor time per clip, ms"]["value"] > 0


def test_the_gate_is_red_where_features_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = extract_cases.alone
    monkeypatch.setattr(
        extract_cases, "alone", lambda *a: [[f + 0.01 for f in one] for one in plain(*a)]
    )
    settings = Settings(quick=True, rounds=1, only="cost is both")
    (case,) = run_cases(registry("extract", settings), settings)["cases"]
    assert not case["gate"]["ok"]
    assert case["figures"] == {}


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="Linux alone has it")
def test_memory_of_all_processes_is_seen() -> None:
    before = resident(os.getpid())
    assert os.getpid() in descendants(os.getppid())
    with PeakMemory() as peak:
        held = torch.ones(2**24)
        while peak.bytes < before + 2**25:  # the watch looks every quarter of a second
            held += 1
    assert peak.bytes > before + 2**25
