"""An end-to-end step on a GPU: TimeSformer-B and a head, forward, backward and both optimisers.

All sides go through the step of `msq train`, with the same frames, head, weights and dropout; they
differ in the encoder alone. `msq` is its TimeSformer in bf16; `kernel` has the Triton kernel for
attention over time, `checkpointing` computes activations again. `HF` is Hugging Face's
`TimesformerModel`, which multiplies its attention out; `HF SDPA` the same with torch's fused
attention in its place. `compiled` goes through torch.compile. Weights are random. Sides that need
transformers are left out where it is not installed.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from msq.bench.cases import Side
from msq.bench.gpu_timing import Session
from msq.bench.hugging_face_side import HuggingFace, named
from msq.bench.random_encoders import video_encoder
from msq.bench.runner import interleaved, quartiles
from msq.config import HeadConfig, OptimConfig, RunConfig, TrainConfig
from msq.extract.encoders.encoder import VideoEncoder
from msq.extract.encoders.timesformer import TimeSformer
from msq.extract.encoders.timesformer_config import TimeSformerConfig
from msq.head.backbone import Backbone
from msq.head.backbone_cost import BackboneShape
from msq.head.backbone_memory import EndToEndShape, step_flops, step_memory
from msq.head.end_to_end_config import BackboneConfig, EndToEndConfig
from msq.head.end_to_end_step import EndToEndStep, Part
from msq.head.memory import StepShape
from msq.head.model import MSQNet
from msq.head.packed_choice import StepChoice

CLASSES, TINY_CLASSES, LABEL, IMAGE = 157, 7, 512, 512
BATCH = {8: 32, 16: 16}  # clips of a step, by frames: as many rows in both
TINY = TimeSformerConfig(image_size=(32, 32), patch_size=8, frames=2, width=32, depth=2, heads=2)
FLOAT64_TOLERANCE = 1e-10
ERROR_RATIO = 2.0  # of a side's gradients in bf16, over that of the eager one
COMPILE_SECONDS = 110.0
# Those without a compiler come first: a part that runs out of time has them.
SIDES = (
    "msq", "msq checkpointing", "msq kernel", "HF", "HF SDPA",
    "msq compiled", "HF SDPA compiled", "msq kernel compiled", "HF compiled",
)  # fmt: skip


def end_to_end_step(session: Session, frames: int) -> None:
    """Parts 5 (T = 8) and 6 (T = 16)."""
    needs = 0.0 if session.tiny else 60.0
    session.attempt(f"encoders agree T={frames}", functools.partial(agree, session, frames), needs)
    session.attempt(result_name(frames), functools.partial(steps, session, frames), 2 * needs)


def agree(session: Session, frames: int) -> None:
    """Tokens and all gradients of ours and of both others, one clip, two layers, in float64."""
    config = _architecture(session, frames, depth=2)
    model = video_encoder(config).model.to(session.device, torch.float64)
    g = torch.Generator().manual_seed(0)
    video = torch.randn(1, config.frames, 3, *config.image_size, generator=g, dtype=torch.float64)
    video = video.to(session.device)
    weight = torch.randn(config.tokens, config.width, generator=g, dtype=torch.float64)
    weight = weight.to(session.device)
    expected = _gradients_of(model, video, weight)
    worst = 0.0
    for fused in (False, True):
        theirs = HuggingFace(model, fused=fused).to(session.device, torch.float64)
        for name, found in _gradients_of(theirs, video, weight).items():
            far = (found - expected[name]).abs().max() / expected[name].abs().max()
            worst = max(worst, float(far))
    gate = {"ok": worst <= FLOAT64_TOLERANCE, "worst": worst, "tolerance": FLOAT64_TOLERANCE,
            "what": "tokens and gradients in float64"}  # fmt: skip
    session.add(f"encoders agree T={frames}", gate=gate)


def steps(session: Session, frames: int) -> None:
    """The gradients of every side in bf16 against float32; then its memory and its time."""
    config = _architecture(session, frames)
    clips = 2 if session.tiny else BATCH[frames]
    exact = Learner(session, config, clips, "fp32", checkpointing=True)
    exact.run()
    right = exact.gradients()
    del exact
    sides: dict[str, Side] = {}
    found: dict[str, dict[str, Any]] = {}
    limit: float | None = None
    for name in SIDES:
        needs = COMPILE_SECONDS if name.endswith("compiled") else 20.0
        if session.left() < needs and not session.tiny:
            found[name] = {"left_out": f"{session.left():.0f} s left, needs {needs:.0f}"}
            continue
        try:
            learner = side(session, config, clips, name)
            found[name] = _checked(learner, right, limit)
        except Exception as error:  # of a compiler, of memory, or transformers is not there
            text = (str(error).strip() or repr(error)).splitlines()[0]
            found[name] = {"error": f"{type(error).__name__}: {text[:300]}"}
            continue
        limit = limit or ERROR_RATIO * found[name]["gradient_error"]
        if found[name]["gate"]:
            found[name] |= _memory(session, learner)
            sides[name] = Side(learner.run)
    for name, taken in interleaved(sides, session.rounds).items():
        found[name] |= quartiles([1e3 * t.wall for t in taken])
    shape = Learner.shape(config, clips, "bf16", False)
    ok = all(one.get("gate", True) for one in found.values())
    session.add(
        result_name(frames), clips=clips, frames=config.frames, flops=step_flops(shape),
        sides=found,
        gate={"ok": ok, "worst": max(one.get("gradient_error", 0.0) for one in found.values()),
              "tolerance": limit, "what": "gradients in bf16, mean error over the tensors"},
    )  # fmt: skip


def side(session: Session, config: TimeSformerConfig, clips: int, name: str) -> Learner:
    """The step of one of `SIDES`."""
    words = set(name.split())
    learner = Learner(
        session, config, clips, "bf16", checkpointing="checkpointing" in words,
        theirs="HF" in words, fused="SDPA" in words,
    )  # fmt: skip
    model = learner.model
    if "kernel" in words and isinstance(model, TimeSformer):
        wanted = "triton" if session.device == "cuda" else "reference"
        model.choose_kernels(wanted, torch.device(session.device), torch.bfloat16)  # type: ignore[arg-type]
    if "compiled" in words:
        backend = "inductor" if session.device == "cuda" else "eager"
        learner.backbone.module = torch.compile(model, backend=backend)
    return learner


class Learner:
    """A step of `msq train` on one batch of frames that stays on the device.

    Args:
        session: says where.
        config: of the encoder.
        clips: of the step.
        precision: `bf16` or `fp32`.
        checkpointing: of our encoder.
        theirs: Hugging Face's encoder, with the weights of ours.
        fused: its attention is torch's fused one.
    """

    def __init__(
        self, session: Session, config: TimeSformerConfig, clips: int, precision: str, *,
        checkpointing: bool = False, theirs: bool = False, fused: bool = False,
    ) -> None:  # fmt: skip
        device = session.device
        encoder = video_encoder(config)
        spread(encoder.model)
        if theirs:
            encoder = VideoEncoder(HuggingFace(encoder.model, fused=fused), encoder.spec)
        encoder.to(device)
        self.model, self.config = encoder.model, config
        switch: Any = "on" if checkpointing else "off"
        settings = EndToEndConfig(
            run=RunConfig(optim=OptimConfig(clip_grad=1.0), train=TrainConfig(ema=0.0)),
            backbone=BackboneConfig(checkpointing=switch),
        )
        self.backbone = Backbone(encoder, settings.backbone, precision)
        g = torch.Generator().manual_seed(1)
        classes = TINY_CLASSES if session.tiny else CLASSES
        text = torch.randn(classes, LABEL, generator=g)
        head = MSQNet(_head(session.tiny), classes=classes, token_width=config.width,
                      image_width=IMAGE, text=text).to(device)  # fmt: skip
        choice = StepChoice("packed", precision)
        self.step = EndToEndStep(head, choice, settings, "bce", 1000, 100, self.backbone)
        size = (clips, config.frames, 3, *config.image_size)
        self.part = Part(
            number=0, rows=torch.arange(clips),
            frames=torch.randint(0, 256, size, generator=g, dtype=torch.uint8).to(device),
            image=torch.randn(clips, IMAGE, generator=g).to(device),
            labels=(torch.rand(clips, classes, generator=g) < 0.05).to(torch.uint8).to(device),
            known=None, weight=1.0,
        )  # fmt: skip
        self.step.plan(0)

    def run(self) -> None:
        """Take the step."""
        self.step.run([self.part])

    def gradients(self) -> dict[str, Tensor]:
        """Of the encoder, under Hugging Face's names, as the last step left them."""
        return named(self.model, {n: p.grad for n, p in self.model.named_parameters()})

    @staticmethod
    def shape(
        config: TimeSformerConfig, clips: int, precision: str, checkpointing: bool
    ) -> EndToEndShape:
        """For the estimates of memory and operations."""
        head = _head(config.width == TINY.width)
        width = head.width or 0
        return EndToEndShape(
            backbone=BackboneShape(encoder=config, clips=clips, precision=precision,
                                   checkpointing=checkpointing),
            head=StepShape(batch=clips, classes=CLASSES, tokens=1 + config.frames,
                           token_width=config.width, width=width, ffn=4 * width,
                           layers=head.layers, heads=head.heads, precision=precision),
            batch=clips, average=False, best=False,
        )  # fmt: skip


def spread(model: nn.Module) -> None:
    """Every matrix away from zero: a fresh TimeSformer has no gradient inside its time part."""
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g), alpha=0.02)


def _checked(learner: Learner, right: dict[str, Tensor], limit: float | None) -> dict[str, Any]:
    """One step, and how far its gradients are; the first side sets the limit of the others."""
    learner.run()
    found = learner.gradients()
    far = [float((found[n].float() - g).norm() / g.norm()) for n, g in right.items()]
    error = sum(far) / len(far)
    return {"gradient_error": error, "gate": limit is None or error <= limit}


def _memory(session: Session, learner: Learner) -> dict[str, Any]:
    """MiB of a step beyond weights, gradients and moments, and what was estimated."""
    if session.device != "cuda":
        return {}
    for parameter in learner.model.parameters():
        parameter.grad = None
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    learner.run()
    torch.cuda.synchronize()
    found: dict[str, Any] = {"peak_mb": (torch.cuda.max_memory_allocated() - held) / 2**20}
    if isinstance(learner.model, TimeSformer):
        shape = Learner.shape(learner.config, len(learner.part.rows), "bf16",
                              learner.model.checkpointing)  # fmt: skip
        need = step_memory(shape)
        found["estimated_mb"] = (need.encoder + need.moment + need.gradients) / 2**20
    return found


def _gradients_of(model: nn.Module, video: Tensor, weight: Tensor) -> dict[str, Tensor]:
    model.requires_grad_()
    tokens = model(video)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad((tokens * weight).sum(), parameters)
    return {"tokens": tokens.detach(), **named(model, zip(names, grads, strict=True))}


def _architecture(session: Session, frames: int, depth: int = 12) -> TimeSformerConfig:
    return TINY if session.tiny else TimeSformerConfig(frames=frames, depth=depth)


def _head(tiny: bool) -> HeadConfig:
    return HeadConfig(width=32 if tiny else 512, layers=2 if tiny else 6, heads=2 if tiny else 8)


def result_name(frames: int) -> str:
    """Of the result of a number of frames."""
    return f"train TimeSformer-B T={frames}"
