"""What an end-to-end step needs, against what it allocates; what is said where that is too much."""

from __future__ import annotations

import math
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from msq.bench.hugging_face_side import HuggingFace
from msq.bench.random_encoders import timesformer_flops, video_encoder
from msq.config import HeadConfig, OptimConfig, RunConfig, TrainConfig
from msq.errors import MsqError, UsageError, is_out_of_memory
from msq.extract.encoders.timesformer import TimeSformer
from msq.extract.encoders.timesformer_config import TimeSformerConfig
from msq.extract.encoders.timesformer_names import rename
from msq.head import backbone_cost, memory
from msq.head.backbone import Backbone, learning_names
from msq.head.backbone_cost import BackboneShape, forward_flops, learning, parameters
from msq.head.backbone_memory import EndToEndShape, step_memory
from msq.head.backbone_room import memory_error, report_lines, require_room
from msq.head.end_to_end_config import BackboneConfig, EndToEndConfig
from msq.head.end_to_end_step import EndToEndStep, Part
from msq.head.memory import StepShape
from msq.head.model import MSQNet
from msq.head.packed_choice import StepChoice

beside = Path(__file__)
errors = SimpleNamespace(**runpy.run_path(str(beside.with_name("test_training_errors.py"))))

# Image, patch, T, D', layers, heads, MLP, stem: many places, many frames, a wide MLP, convolutions.
MANY_PLACES = TimeSformerConfig(
    image_size=(96, 96), patch_size=8, frames=2, width=64, depth=4, heads=4
)
MANY_FRAMES = TimeSformerConfig(
    image_size=(32, 32), patch_size=8, frames=16, width=96, depth=3, heads=3
)
WIDE = TimeSformerConfig(
    image_size=(64, 64), patch_size=16, frames=4, width=128, depth=4, heads=2, mlp_ratio=6.0
)
CONVOLUTIONS = TimeSformerConfig(
    image_size=(64, 64), patch_size=8, frames=4, width=64, depth=3, heads=4, stem="conv"
)
ARCHITECTURES = [MANY_PLACES, MANY_FRAMES, WIDE, CONVOLUTIONS]
UNFREEZE = ("none", "norms", "temporal", "last:1", "last:2", "all")


def taken(
    encoder: TimeSformerConfig,
    clips: int,
    precision: str,
    parts: int,
    pooling: str,
    **backbone: Any,
) -> tuple[EndToEndStep, EndToEndShape, list[Part]]:
    """A step of random clips, its shape, and its parts."""
    switches = BackboneConfig(accumulate=parts, **backbone)
    run = RunConfig(
        head=HeadConfig(width=32, layers=2, heads=4), optim=OptimConfig(),
        train=TrainConfig(batch=clips, ema=0.0, val=0.0),
    )  # fmt: skip
    config = EndToEndConfig(run=run, backbone=switches)
    video = video_encoder(encoder)
    video.spec = replace(video.spec, pooling=pooling)
    tokens = encoder.frames + (pooling == "frame")
    features = errors.features_of(clips, 6, tokens, 32)
    features = replace(features, tokens=torch.empty(clips, tokens, encoder.width))
    choice = StepChoice("packed", precision)
    shape = EndToEndShape.of(video, features, config, choice)
    assert shape is not None
    head = MSQNet(
        run.head, classes=6, token_width=encoder.width, image_width=32, text=features.text
    )
    step = EndToEndStep(head, choice, config, "bce", 9, 9, Backbone(video, switches, precision))
    made = []
    for number, rows in enumerate(torch.arange(clips).tensor_split(parts)):
        size = (len(rows), encoder.frames, 3, *encoder.image_size)
        frames = torch.randint(0, 256, size, dtype=torch.uint8)
        assert features.image is not None
        made.append(Part(
            number, rows, frames, features.image[rows], features.labels[rows], None,
            len(rows) / clips,
        ))  # fmt: skip
    return step, shape, made


def ratio(step: EndToEndStep, shape: EndToEndShape, parts: list[Part], file: Path) -> float:
    """What is estimated of a step over what it allocates; its optimisers' state is there before."""
    step.plan(0)
    step.run(parts)
    step.plan(1)
    for parameter in step.backbone.learning.values():
        parameter.grad = None
    found = errors.peak_bytes(lambda: step.run(parts), file)
    need = step_memory(shape)
    return float((need.encoder + need.moment + need.gradients) / found)


# Architecture, what learns, checkpointing, precision, parts, pooling.
CASES = [
    (MANY_PLACES, "all", "off", "fp32", 1, "frame"),
    (MANY_PLACES, "last:1", "on", "bf16", 2, "frame"),
    (MANY_PLACES, "norms", "off", "fp32", 1, "band"),
    (MANY_FRAMES, "all", "on", "bf16", 2, "frame"),
    (MANY_FRAMES, "temporal", "off", "fp32", 1, "frame"),
    (MANY_FRAMES, "none", "off", "fp32", 1, "frame"),
    (WIDE, "last:1", "off", "fp32", 1, "frame"),
    (WIDE, "all", "on", "bf16", 2, "frame"),
    (WIDE, "last:2", "on", "fp32", 1, "band"),
    (CONVOLUTIONS, "all", "off", "bf16", 2, "frame"),
    (CONVOLUTIONS, "norms", "on", "fp32", 1, "frame"),
    (CONVOLUTIONS, "last:2", "off", "bf16", 1, "frame"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c[1:])))
def test_the_estimate_of_a_step_is_what_it_allocates(
    case: tuple[TimeSformerConfig, str, str, str, int, str], tmp_path: Path
) -> None:
    encoder, unfreeze, switch, precision, parts, pooling = case
    given = taken(encoder, 4, precision, parts, pooling, unfreeze=unfreeze, checkpointing=switch)
    assert 0.8 < ratio(*given, tmp_path / "trace.json") < 1.3


@pytest.mark.parametrize("encoder", ARCHITECTURES, ids=["places", "frames", "wide", "conv"])
def test_parameters_are_counted_exactly_whatever_learns(encoder: TimeSformerConfig) -> None:
    named = dict(TimeSformer(encoder).named_parameters())
    model = TimeSformer(encoder)
    assert parameters(encoder) == sum(p.numel() for p in named.values())
    for unfreeze in UNFREEZE:
        names = learning_names(model, unfreeze)
        assert learning(encoder, unfreeze) == sum(named[name].numel() for name in names), unfreeze


@pytest.mark.parametrize("unfreeze", ["norms", "temporal", "last:1", "last:3", "all"])
def test_operations_are_those_that_torch_counts(unfreeze: str) -> None:
    encoder = replace(MANY_PLACES, image_size=(32, 32))
    ours = TimeSformer(encoder)
    model = HuggingFace(ours, fused=False)  # its attention is plain products
    learn = learning_names(ours, unfreeze)
    by_name = dict(model.model.named_parameters())
    for name, _ in ours.named_parameters():
        theirs = rename(name, "msq", "huggingface")
        assert theirs is not None
        by_name[theirs].requires_grad_(name in learn)
    video = torch.randn(2, encoder.frames, 3, 32, 32)
    with FlopCounterMode(display=False) as forward:
        tokens = model(video)
    with FlopCounterMode(display=False) as backward:
        tokens.square().sum().backward()
    assert forward.get_total_flops() == forward_flops(encoder, 2) == timesformer_flops(2, encoder)
    shape = BackboneShape(encoder=encoder, clips=2, unfreeze=unfreeze)
    both = forward.get_total_flops() + backward.get_total_flops()
    assert backbone_cost.step_flops(shape) == both
    again = backbone_cost.step_flops(replace(shape, checkpointing=True)) - both
    less = replace(encoder, depth=encoder.depth - 1)
    assert again == shape.layers * (forward_flops(encoder, 2) - forward_flops(less, 2))


BASE = EndToEndShape(
    backbone=BackboneShape(encoder=TimeSformerConfig(frames=8), clips=32, precision="bf16"),
    head=StepShape(batch=32, classes=157, tokens=9, token_width=768, width=512, ffn=2048,
                   layers=6, precision="bf16"),
    batch=32,
)  # fmt: skip


def said(shape: EndToEndShape, free: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(memory, "available_bytes", lambda device: free)
    with pytest.raises(UsageError) as error:
        require_room(shape, "cuda")
    assert error.value.exit_code == 2
    return str(error.value)


def test_a_step_that_cannot_fit_is_refused_with_each_setting_that_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need = step_memory(BASE).total
    free = need * 6 // 10
    text = said(BASE, free, monkeypatch)
    assert "a training step of 32 clips, 8 frames each, unfreeze = all, in bf16 needs" in text
    assert f"about {need / 1e9:.2f} GB on cuda" in text
    assert f"{free / 1e9:.2f} GB free" in text

    def fits(shape: EndToEndShape) -> bool:
        return step_memory(shape).total <= free

    def backbone(**changes: Any) -> EndToEndShape:
        return replace(BASE, backbone=replace(BASE.backbone, **changes))

    parts = int(text.split("backbone.accumulate=")[1].split()[0])
    assert fits(BASE.cut(accumulate=parts))
    assert not fits(BASE.cut(accumulate=parts - 1))
    assert "or backbone.checkpointing=on or" in text
    assert fits(backbone(checkpointing=True))
    last = int(text.split("last:")[1].split()[0])
    assert fits(backbone(unfreeze=f"last:{last}"))
    assert not fits(backbone(unfreeze=f"last:{last + 1}"))
    frames = int(text.split("--frames ")[1].split()[0])
    assert fits(backbone(encoder=TimeSformerConfig(frames=frames)))
    assert not fits(backbone(encoder=TimeSformerConfig(frames=frames + 1)))
    batch = int(text.split("train.batch=")[1])
    assert fits(BASE.cut(batch=batch))
    assert not fits(BASE.cut(batch=batch + 1))
    monkeypatch.setattr(memory, "available_bytes", lambda device: need)
    require_room(BASE, "cuda")
    with pytest.raises(UsageError, match="What would fit: backbone"):
        require_room(BASE, "cuda", moving=1)


def test_where_one_setting_is_not_enough_two_are_named_and_where_nothing_is_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = step_memory(BASE.cut(accumulate=32)).total
    again = replace(BASE, backbone=replace(BASE.backbone, checkpointing=True))
    least = step_memory(again.cut(accumulate=32)).total
    assert least < one
    text = said(BASE, (one + least) // 2, monkeypatch)
    assert "(parts of" not in text
    parts = int(text.split("backbone.checkpointing=on with backbone.accumulate=")[1].split()[0])
    assert step_memory(again.cut(accumulate=parts)).total <= (one + least) // 2
    text = said(BASE, 10**6, monkeypatch)
    assert text.endswith("no setting of these; a smaller encoder or head (head.width), or more "
                         "memory")  # fmt: skip


def test_more_processes_and_parts_make_the_part_smaller_and_sharding_the_state() -> None:
    spread = BASE.cut(accumulate=3)
    assert (spread.backbone.clips, spread.head.batch) == (11, 11)
    over = replace(BASE, ranks=4).cut(accumulate=1)
    assert over.backbone.clips == 8
    whole, divided = step_memory(over), step_memory(replace(over, sharded=True))
    assert divided.encoder == whole.encoder
    numbers = learning(BASE.backbone.encoder, "all")
    assert whole.optimiser - divided.optimiser == 8 * (numbers - math.ceil(numbers / 4))


def test_the_report_says_what_a_step_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 80 * 10**9)
    shape = replace(BASE, backbone=replace(BASE.backbone, unfreeze="last:4")).cut(accumulate=4)
    lines = report_lines(shape, "cuda")
    count = sum(p.numel() for p in TimeSformer(TimeSformerConfig(frames=8)).parameters())
    assert f"{count / 1e6:.1f} M parameters" in lines[0]
    assert "activations are kept in 4 layers" in lines[0]
    assert "32 clips, 4 x 8 clips at a time, bf16, checkpointing off" in lines[1]
    assert f"forward through the encoder {timesformer_flops(1, shape.backbone.encoder) / 1e9:.4g}" \
        in lines[1]  # fmt: skip
    assert f"{step_memory(shape).total / 1e9:.2f} GB beside the weights" in lines[2]
    assert "80.00 GB are free" in lines[2]


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't "
                 "allocate memory: you tried to allocate 70368744177664 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]  # fmt: skip


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=range(5))
def test_an_error_of_memory_names_the_settings_that_need_less(error: BaseException) -> None:
    found = memory_error(error, BASE, "cuda", free=50 * 10**9)
    assert isinstance(found, MsqError)
    assert found.exit_code == 1
    text = str(found)
    assert "out of memory on cuda in a training step of 32 clips, 8 frames each" in text
    assert "with 50.00 GB free before the first step" in text
    parts = int(text.split("backbone.accumulate=")[1].split()[0])
    bound = 0.8 * min(50e9, step_memory(BASE).total)
    assert step_memory(BASE.cut(accumulate=parts)).total <= bound
    assert step_memory(BASE.cut(accumulate=parts - 1)).total > bound
    unknown = memory_error(error, None, "cpu")
    assert unknown is not None
    assert "backbone.accumulate" in str(unknown)


def test_other_errors_are_none_of_memory_and_a_real_one_is() -> None:
    assert memory_error(RuntimeError("shapes cannot be multiplied"), BASE, "cpu") is None
    assert memory_error(ValueError("out of memory"), BASE, "cpu") is None
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**50)
    assert is_out_of_memory(real.value)


def test_an_encoder_of_another_family_has_no_estimate() -> None:
    config, features = EndToEndConfig(), errors.features_of(4, 3, 5, 8)
    video = video_encoder(MANY_FRAMES)
    video.model = torch.nn.Linear(2, 2)
    assert EndToEndShape.of(video, features, config, StepChoice("packed", "fp32")) is None
