"""Gradients of an end-to-end step against Hugging Face's TimeSformer and torch's own Transformer.

The composition is written down from public modules alone, holds the same weights, and sees the same
normalised pixels; ours goes through the step that `msq train` takes. float64, dropout off. Of each
tensor the largest difference is held to 1e-10 of its largest number.

No tensor is without a gradient. Exactly zero in theory, rounding in practice, are the biases of the
keys of every attention: they add one number to all scores of a row, and softmax takes it out again
(in the encoder the middle third of each `qkv.bias`). They are compared as a part of the packed
tensor that torch and Hugging Face have them in.
"""

from __future__ import annotations

import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TimesformerConfig, TimesformerModel

from msq.config import HeadConfig, OptimConfig, RunConfig, TrainConfig
from msq.extract.encoders.encoder import VideoEncoder
from msq.extract.encoders.pooling import pooled_tokens
from msq.extract.encoders.spec import EncoderSpec
from msq.extract.encoders.timesformer import TimeSformer
from msq.extract.encoders.timesformer_config import TimeSformerConfig
from msq.extract.encoders.timesformer_names import from_msq
from msq.extract.transforms import normalise
from msq.head.backbone import Backbone
from msq.head.end_to_end_config import BackboneConfig, EndToEndConfig
from msq.head.end_to_end_step import EndToEndStep, Part
from msq.head.model import MSQNet
from msq.head.official import to_official
from msq.head.packed_choice import StepChoice

beside = Path(__file__)
weights = SimpleNamespace(**runpy.run_path(str(beside.with_name("encoder_fixtures.py"))))
official = SimpleNamespace(**runpy.run_path(str(beside.with_name("test_official.py"))))

TOLERANCE = 1e-10
CLIPS, CLASSES, LABEL, IMAGE = 5, 6, 10, 14
ENCODER = TimeSformerConfig(
    image_size=(32, 32), patch_size=8, frames=4, width=48, depth=3, heads=4, mlp_ratio=2.0
)
WIDTH, HEADS, LAYERS, FFN = 24, 4, 2, 40
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PROTOCOLS = ("paper", "official")
POOLING = {"paper": "frame", "official": "band"}


def encoder(protocol: str, noise: float) -> VideoEncoder:
    """A TimeSformer in float64, every tensor so far away from its start."""
    model = weights.random_timesformer(ENCODER, std=noise).double()
    pooling: Any = POOLING[protocol]
    spec = EncoderSpec(
        slug="t", kind="video", architecture="TimeSformer", weights="random", sha256="0" * 64,
        frames=ENCODER.frames, size=32, mean=MEAN, std=STD, pooling=pooling, precision="fp32",
        sampling="uniform", resize="torch", output="", channels=ENCODER.width,
        tokens=pooled_tokens(pooling, ENCODER.frames, ENCODER.patches),
    )  # fmt: skip
    return VideoEncoder(model, spec)


def head(protocol: str) -> MSQNet:
    """A head of the protocol's form in float64, every parameter away from its start."""
    generator = torch.Generator().manual_seed(5)
    text = torch.randn(CLASSES, LABEL, generator=generator)
    form: dict[str, Any] = {}
    if protocol == "official":
        form = {"encoder_layers": LAYERS, "memory_position": "sincos-input",
                "label_projection": "fused", "start": "torch"}  # fmt: skip
    config = HeadConfig(width=WIDTH, layers=LAYERS, heads=HEADS, ffn=FFN, dropout=0.0, **form)
    made = MSQNet(
        config, classes=CLASSES, token_width=ENCODER.width, image_width=IMAGE, text=text, seed=3
    ).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).double(), alpha=0.1)
    return made


class PaperHead(nn.Module):
    """Equations 3 to 7: the layers are torch's; positions go to the keys of the cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.label = nn.Parameter(torch.zeros(CLASSES, LABEL))
        self.project = nn.Linear(ENCODER.width, WIDTH, bias=False)
        self.fuse = nn.Linear(LABEL + IMAGE, WIDTH, bias=False)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(WIDTH, HEADS, FFN, dropout=0.0, batch_first=True)
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.W = nn.Parameter(torch.zeros(CLASSES, WIDTH))
        self.b = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        """Logits [B, K] of tokens [B, S, D'] and image [B, D'']."""
        memory = self.project(tokens)
        place = torch.arange(memory.shape[1], dtype=memory.dtype)[:, None]
        rate = 10000.0 ** (-torch.arange(0, WIDTH, 2, dtype=memory.dtype) / WIDTH)
        code = torch.stack([torch.sin(place * rate), torch.cos(place * rate)], dim=2).flatten(1)
        label = self.label.expand(len(tokens), -1, -1)
        x = self.fuse(torch.cat([label, image[:, None].expand(-1, CLASSES, -1)], dim=2))
        layer: Any
        for layer in self.layers:
            x = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False)[0])
            read = layer.multihead_attn(x, memory + code, memory, need_weights=False)[0]
            x = layer.norm2(x + read)
            x = layer.norm3(x + layer.linear2(torch.relu(layer.linear1(x))))
        return (self.norm(x) * self.W).sum(-1) + self.b


def paper_names(of: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by a head's names under those of `PaperHead`."""
    made = {
        "label": of["offset"], "project.weight": of["memory.weight"],
        "fuse.weight": torch.cat([of["fuse_label.weight"], of["fuse_image.weight"]], dim=1),
        "W": of["classifier.weight"], "b": of["classifier.bias"],
    }  # fmt: skip
    linear = {"expand": "linear1", "contract": "linear2"}
    norms = {"norm_self": "norm1", "norm_cross": "norm2", "norm_ffn": "norm3"}
    for kind in ("weight", "bias"):
        made[f"norm.{kind}"] = of[f"norm.{kind}"]
        for i in range(LAYERS):
            for own, other in (linear | norms).items():
                made[f"layers.{i}.{other}.{kind}"] = of[f"layers.{i}.{own}.{kind}"]
            for own, other in (("self_attention", "self_attn"),
                               ("cross_attention", "multihead_attn")):  # fmt: skip
                theirs, mine = f"layers.{i}.{other}", f"layers.{i}.{own}"
                parts = [of[f"{mine}.{x}.{kind}"] for x in "qkv"]
                made[f"{theirs}.in_proj_{kind}"] = torch.cat(parts)
                made[f"{theirs}.out_proj.{kind}"] = of[f"{mine}.out.{kind}"]
    return made


def as_theirs(made: MSQNet, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by a head's names under those of the composition's head."""
    return to_official(made, values) if made.config.encoder_layers else paper_names(values)


class Composition(nn.Module):
    """Hugging Face's encoder, pooling by its definition, and torch's Transformer behind it."""

    def __init__(self, video: TimeSformer, made: MSQNet) -> None:
        super().__init__()
        self.official = bool(made.config.encoder_layers)
        self.video = TimesformerModel(TimesformerConfig(**weights.huggingface_config(ENCODER)))
        state = from_msq(video.state_dict(), "huggingface")
        named = {k.removeprefix("timesformer."): v for k, v in state.items()}
        self.video.double().load_state_dict(named)
        if self.official:
            self.head = official.Composed(
                CLASSES, ENCODER.width, IMAGE, LABEL, WIDTH, HEADS, LAYERS, FFN, 0.0
            )
            own = to_official(made)
        else:
            self.head = PaperHead()
            own = paper_names({n: p.detach() for n, p in made.named_parameters()})
            assert made.text is not None
            own["label"] = own["label"] + made.text
        self.head.double().load_state_dict(own)

    def forward(self, video: Tensor, image: Tensor) -> Tensor:
        """Logits [B, K] of normalised frames [B, T, 3, h, w]."""
        tokens = self.video(video).last_hidden_state
        clips, frames = video.shape[:2]
        if self.official:  # bins that share a token where their borders fall together
            n = ENCODER.patches
            pooled = [tokens[:, n * i : n * i + n + 1].mean(1) for i in range(frames)]
            return self.head(torch.stack(pooled, dim=1), image)
        each = tokens[:, 1:].view(clips, ENCODER.patches, frames, -1).mean(1)
        return self.head(torch.cat([tokens[:, :1], each], dim=1), image)


def shown(known: bool) -> dict[str, Any]:
    """A step's batch."""
    g = torch.Generator().manual_seed(7)
    labels = (torch.rand(CLIPS, CLASSES, generator=g) < 0.4).to(torch.uint8)
    labels[:, 0] = 1  # cross-entropy needs a class for each clip
    seen = (torch.rand(CLIPS, CLASSES, generator=g) < 0.8).to(torch.uint8)
    seen[:, 0] = 1
    size = (CLIPS, ENCODER.frames, 3, *ENCODER.image_size)
    return {
        "frames": torch.randint(0, 256, size, generator=g, dtype=torch.uint8),
        "image": torch.randn(CLIPS, IMAGE, generator=g, dtype=torch.float64),
        "labels": labels, "known": seen if known else None,
    }  # fmt: skip


def parts_of(batch: Mapping[str, Any], cuts: Sequence[int]) -> list[Part]:
    """The batch in parts of so many clips, each weighted by its share of what the loss averages."""
    made, begin = [], 0
    for number, size in enumerate(cuts):
        rows = torch.arange(begin, begin + size)
        known = batch["known"]
        share = size / CLIPS if known is None else float(known[rows].sum()) / float(known.sum())
        made.append(Part(
            number=number, rows=rows, frames=batch["frames"][rows], image=batch["image"][rows],
            labels=batch["labels"][rows], known=None if known is None else known[rows],
            weight=share,
        ))  # fmt: skip
        begin += size
    assert begin == CLIPS
    return made


class Outcome:
    """Loss, logits and gradients of one step of ours.

    Args:
        protocol: `paper` or `official`.
        loss: `bce` or `ce`.
        cuts: clips of the step's parts.
        known: whether some labels are unknown.
        path: of the head, `packed` or `plain`.
        noise: on the weights of the encoder.
        backbone: settings of `BackboneConfig`.
    """

    def __init__(
        self, protocol: str, loss: str = "bce", cuts: Sequence[int] = (CLIPS,), known: bool = False,
        path: str = "packed", noise: float = 0.1, **backbone: Any,
    ) -> None:  # fmt: skip
        self.video, self.made = encoder(protocol, noise), head(protocol)
        model: Any = self.video.model
        self.theirs = Composition(model, self.made)
        run = RunConfig(
            head=HeadConfig(dropout=0.0), optim=OptimConfig(clip_grad=0.0),
            train=TrainConfig(ema=0.0),
        )  # fmt: skip
        settings = BackboneConfig(accumulate=len(cuts), **backbone)
        config = EndToEndConfig(run=run, backbone=settings)
        learner = Backbone(self.video, settings, "fp32")
        step = EndToEndStep(self.made, StepChoice(path, "fp32"), config, loss, 4, 4, learner)
        self.batch, losses, logits = shown(known), [], []
        part_loss, score = step.part_loss, step.logits

        def watched(part: Part) -> Tensor:
            losses.append(part_loss(part))
            return losses[-1]

        def scored(tokens: Tensor, image: Tensor | None) -> Tensor:
            logits.append(score(tokens, image))
            return logits[-1]

        step.part_loss, step.logits = watched, scored  # type: ignore[method-assign]
        step.plan(0)
        step.run(parts_of(self.batch, cuts))
        assert len(losses) == len(cuts)
        self.loss = sum(value.detach() for value in losses)
        self.logits = torch.cat([value.detach() for value in logits])
        self.learning = set(learner.learning)
        self.encoder = {n: p.grad for n, p in model.named_parameters()}
        first = step.flat.data.storage_offset()
        self.head = {
            n: step.flat.grad[p.storage_offset() - first :][: p.numel()].view(p.shape).clone()
            for n, p in self.made.named_parameters()
        }

    def composed(self, loss: str = "bce") -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss, logits and gradients of the composition, by its names."""
        video = normalise(self.batch["frames"], MEAN, STD).double()
        logits = self.theirs(video, self.batch["image"])
        labels, known = self.batch["labels"].double(), self.batch["known"]
        if loss == "ce":
            value = F.cross_entropy(logits, labels / labels.sum(1, keepdim=True))
        elif known is None:
            value = F.binary_cross_entropy_with_logits(logits, labels)
        else:
            at = known.bool()
            value = F.binary_cross_entropy_with_logits(logits[at], labels[at])
        torch.autograd.backward(value)
        found = {n: p.grad for n, p in self.theirs.named_parameters()}
        return value.detach(), logits.detach(), found

    def named(self) -> dict[str, Tensor]:
        """Our gradients by the composition's names."""
        video = from_msq({n: g for n, g in self.encoder.items() if g is not None}, "huggingface")
        found = {f"video.{n.removeprefix('timesformer.')}": g for n, g in video.items()}
        return found | {f"head.{n}": g for n, g in as_theirs(self.made, self.head).items()}


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def require_equal(ours: Outcome, loss: str = "bce") -> None:
    """Loss, logits and the gradient of every tensor are those of the composition."""
    value, logits, expected = ours.composed(loss)
    assert ours.logits.dtype == torch.float64
    assert abs(float(ours.loss) - float(value)) <= TOLERANCE * abs(float(value))
    assert distance(ours.logits, logits) <= TOLERANCE
    found = ours.named()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
        assert distance(found[name], gradient) <= TOLERANCE, name


@pytest.mark.parametrize("loss", ["bce", "ce"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_step_has_the_gradients_of_the_public_modules(protocol: str, loss: str) -> None:
    require_equal(Outcome(protocol, loss), loss)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_plain_head_has_them_too(protocol: str) -> None:
    require_equal(Outcome(protocol, path="plain"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_activations_computed_again_change_no_gradient(protocol: str) -> None:
    require_equal(Outcome(protocol, checkpointing="on"))


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_parts_of_a_batch_have_the_gradients_of_the_whole(protocol: str, known: bool) -> None:
    require_equal(Outcome(protocol, cuts=(2, 2, 1), known=known))


@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize("unfreeze", ["none", "norms", "temporal", "last:1", "last:2", "all"])
def test_what_learns_has_the_gradients_of_the_full_run_and_the_rest_has_none(
    unfreeze: str, checkpointing: str
) -> None:
    full = Outcome("paper")
    ours = Outcome("paper", cuts=(3, 2), unfreeze=unfreeze, checkpointing=checkpointing)
    for name, gradient in ours.encoder.items():
        expected = full.encoder[name]
        assert expected is not None
        assert (gradient is not None) == (name in ours.learning), name
        if gradient is not None:
            assert distance(gradient, expected) <= TOLERANCE, name
    values = ours.named(), full.named()
    names = [name for name in values[1] if name.startswith("head.")]
    assert names
    for name in names:
        assert distance(values[0][name], values[1][name]) <= TOLERANCE, name
    learning = {
        "none": 0, "norms": 2 + 3 * 3 * 2, "temporal": 1 + 3 * 8, "last:1": 2 + 20,
        "last:2": 2 + 2 * 20, "all": 7 + 3 * 20,
    }  # fmt: skip
    assert len(ours.learning) == learning[unfreeze]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_biases_of_the_keys_have_no_gradient_but_rounding(protocol: str) -> None:
    ours = Outcome(protocol)
    rounding, checked = 1e-14, 0
    for name, gradient in ours.encoder.items():
        if name.endswith("qkv.bias"):
            assert gradient is not None
            _, key, value = gradient.chunk(3)
            assert key.abs().max() <= rounding * max(1.0, float(value.abs().max())), name
            checked += 1
    for name, gradient in ours.head.items():
        if name.endswith(".k.bias"):
            value = ours.head[name.replace(".k.bias", ".v.bias")]
            assert gradient.abs().max() <= rounding * max(1.0, float(value.abs().max())), name
            checked += 1
    assert checked == 2 * ENCODER.depth + (3 if protocol == "official" else 2) * LAYERS


def test_a_fresh_encoder_learns_attention_over_time_from_its_output_on() -> None:
    # Every `temporal_out.weight` starts at zero: what is before it has a gradient of exactly zero
    # at the first step, in Hugging Face's model as in ours.
    ours = Outcome("paper", noise=0.0)
    _, _, theirs = ours.composed()
    found = ours.named()
    still = ("temporal_layernorm.", "temporal_attention.")
    silent = [name for name in theirs if any(part in name for part in still)]
    assert len(silent) == 6 * ENCODER.depth
    for name, gradient in theirs.items():
        if name in silent:
            assert not gradient.any(), name
            assert not found[name].any(), name
        else:
            assert gradient.any(), name
            assert distance(found[name], gradient) <= TOLERANCE, name
