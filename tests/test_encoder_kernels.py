"""Which arithmetic an encoder uses, and that a store never holds two kinds of it unseen."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from msq import load_video_encoder
from msq.errors import SpecMismatch, UsageError
from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.encoders.spec import EncoderSpec, difference
from msq.extract.encoders.timesformer import TimeSformer
from msq.extract.encoders.timesformer_config import TimeSformerConfig
from msq.extract.store_writer import StoreWriter
from msq.kernels.dispatch import Choice, resolve

fakes = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fakes.py"))))
FUSED = replace(fakes.SPEC, kernels="triton")
TINY = TimeSformerConfig(
    image_size=(16, 16), patch_size=8, frames=4, width=32, depth=2, heads=2, mlp_ratio=2.0
)


def test_a_spec_without_kernels_is_what_it_was_before_there_were_any() -> None:
    assert "kernels" not in fakes.SPEC.to_dict()
    assert EncoderSpec.from_dict(fakes.SPEC.to_dict()) == fakes.SPEC
    assert "triton" not in fakes.SPEC.line("toy")


def test_a_spec_with_kernels_is_another_one() -> None:
    assert EncoderSpec.from_dict(json.loads(json.dumps(FUSED.to_dict()))) == FUSED
    assert FUSED.line("toy") == fakes.SPEC.line("toy").replace("|fp32|", "|fp32 triton|")
    assert FUSED.fingerprint("toy") != fakes.SPEC.fingerprint("toy")
    without, with_kernels = fakes.SPEC.to_dict(), FUSED.to_dict()
    assert difference(without, with_kernels) == ["kernels: expected nothing, found triton"]
    assert difference(with_kernels, without) == ["kernels: expected triton, found nothing"]


@pytest.mark.parametrize(("first", "second"), [(fakes.SPEC, FUSED), (FUSED, fakes.SPEC)])
def test_a_store_does_not_take_rows_of_the_other_kind(
    tmp_path: Path, first: EncoderSpec, second: EncoderSpec
) -> None:
    clips = (Clip("one", Path("one.mp4"), None, None, (0,), "train"),)
    data = Dataset("toy", ("a", "b"), "multilabel", clips, "map")
    StoreWriter(tmp_path / "a.zarr", data).add_encoder(first)
    StoreWriter(tmp_path / "a.zarr", data).add_encoder(first)
    with pytest.raises(SpecMismatch, match="kernels: expected"):
        StoreWriter(tmp_path / "a.zarr", data).add_encoder(second)


def test_on_the_cpu_every_choice_that_runs_gives_the_same_bits() -> None:
    video = torch.randn(1, 8, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    auto, plain = (load_video_encoder(kernels=kernels) for kernels in ("auto", "reference"))
    assert auto.spec == plain.spec == load_video_encoder().spec
    assert auto.spec.kernels == ""
    assert torch.equal(auto(video), plain(video))


def test_what_cannot_run_is_refused_before_anything_is_encoded(monkeypatch) -> None:
    with pytest.raises(UsageError, match=r"temporal_attention.*no CUDA device \(cpu\)"):
        load_video_encoder(kernels="triton")
    with pytest.raises(UsageError, match="kernels is one of"):
        load_video_encoder(kernels="cuda")  # type: ignore[arg-type]
    resolve.cache_clear()
    with monkeypatch.context() as patched:
        patched.setenv("MSQ_KERNELS", "triton")
        with pytest.raises(UsageError, match="no CUDA device"):
            load_video_encoder()
        assert load_video_encoder(kernels="reference").spec.kernels == ""
    resolve.cache_clear()


def test_an_encoder_without_such_an_operation_refuses_the_kernel(tmp_path: Path) -> None:
    from msq.extract.encoders.registry import _chosen_kernels

    class Other:
        model, architecture = torch.nn.Identity(), "videomae p16"

    with pytest.raises(UsageError, match=r"only a TimeSformer .* found videomae p16"):
        _chosen_kernels(Other, "triton", torch.device("cpu"), "fp32")  # type: ignore[arg-type]
    for kernels in ("auto", "reference"):
        assert _chosen_kernels(Other, kernels, torch.device("cpu"), "fp32") == ""  # type: ignore[arg-type]


def test_only_attention_over_time_changes_and_the_kernel_never_runs_off_its_device(
    monkeypatch,
) -> None:
    seen = []

    def chosen(op, device, dtype, keys, kernels, obstacle):
        seen.append((op, dtype, keys, kernels, obstacle))
        return Choice(op, "triton", "for this test")

    monkeypatch.setattr("msq.extract.encoders.timesformer.resolve", chosen)
    model = TimeSformer(TINY)
    model.choose_kernels("auto", torch.device("cuda"), torch.bfloat16)
    assert seen == [("temporal_attention", torch.bfloat16, 4, "auto", "")]
    for block in model.blocks:
        assert block.temporal_attention.fused
        assert not block.spatial_attention.fused
    with pytest.raises(UsageError, match="needs a CUDA device, found cpu"):
        model(torch.zeros(1, 4, 3, 16, 16))
    wide = TimeSformer(replace(TINY, width=48))  # heads of 24
    wide.choose_kernels("auto", torch.device("cuda"), torch.bfloat16)
    assert "width 24" in seen[-1][4]


def test_the_state_of_a_model_knows_nothing_of_kernels() -> None:
    assert not [name for name in TimeSformer(TINY).state_dict() if "fused" in name]
