"""Attention maps are the true ones, and rollout is what its formulas say."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TimesformerConfig, TimesformerModel, VideoMAEConfig, VideoMAEModel

from msq.config import HeadConfig
from msq.errors import UsageError
from msq.extract.encode_watched import WatchedTokens, image_heat
from msq.extract.encoders import VideoEncoder, load_clip, load_video_encoder
from msq.extract.encoders.attention_maps import is_readable, probabilities, projections, watching
from msq.extract.encoders.pooling import TokenOrder, pool
from msq.extract.encoders.rollout import divided_back, joint_back, per_frame_back
from msq.extract.encoders.timesformer_config import TimeSformerConfig
from msq.extract.encoders.timesformer_names import from_msq
from msq.extract.encoders.token_places import laid_out, unpool
from msq.extract.encoders.videomae_weights import from_msq as videomae_from_msq
from msq.extract.shard_builder import encode
from msq.extract.transforms import resize_crop, seen_box
from msq.head.model import MSQNet
from msq.head.rollout import query_rollout

_fixtures = runpy.run_path(str(Path(__file__).with_name("encoder_fixtures.py")))
TINY_TIMESFORMER, TINY_CLIP = _fixtures["TINY_TIMESFORMER"], _fixtures["TINY_CLIP"]
NOISE = 0.1  # large enough that maps are far from even


def stochastic(*shape: int, seed: int = 0) -> Tensor:
    """Random attention: the last dimension sums to one."""
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def clip_of(encoder: Any, seed: int = 0) -> np.ndarray:
    size = encoder.spec.size
    return np.random.default_rng(seed).integers(
        0, 256, (encoder.spec.frames, 3, size, size), np.uint8
    )


@pytest.fixture
def timesformer(tmp_path: Path) -> VideoEncoder:
    model = _fixtures["random_timesformer"](TINY_TIMESFORMER, std=NOISE)
    _fixtures["write_timesformer_folder"](tmp_path / "t", model)
    return load_video_encoder("auto", str(tmp_path / "t"))


@pytest.fixture
def videomae(tmp_path: Path) -> VideoEncoder:
    _fixtures["write_videomae_folder"](tmp_path / "v", _fixtures["TINY_VIDEOMAE"], std=NOISE)
    return load_video_encoder("auto", str(tmp_path / "v"))


# --- the maps -------------------------------------------------------------------------------------


def layers_of_every_kind() -> dict[str, tuple[nn.Module, Tensor, nn.Module]]:
    """A layer, its input, and what it makes of the mixed values."""
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1))
    timesformer = _fixtures["random_timesformer"](TINY_TIMESFORMER).blocks[0].spatial_attention
    videomae = _fixtures["VideoMAE"](_fixtures["TINY_VIDEOMAE"]).blocks[0].attention
    torchs = nn.MultiheadAttention(32, 4, batch_first=True)
    steps_first = nn.MultiheadAttention(32, 4, batch_first=False)
    timms = timm.layers.Attention(32, 4, qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm)
    # timm 1.0.15 has the same layer in another module.
    place = {"__module__": "timm.models.vision_transformer"}
    olds = type("Attention", (timm.layers.Attention,), place)(32, 4, qkv_bias=True)
    clips = open_clip.modified_resnet.AttentionPool2d(3, 32, 4, 16)
    wide, narrow = torch.randn(3, 7, 64), torch.randn(3, 7, 48)
    found: dict[str, tuple[nn.Module, Tensor, nn.Module]] = {
        "timesformer": (timesformer, wide, timesformer.out),
        "videomae": (videomae, narrow, videomae.out),
        "torch": (torchs, x, torchs.out_proj),
        "torch, steps first": (steps_first, x.transpose(0, 1), steps_first.out_proj),
        "timm": (timms, x, timms.proj),
        "timm, older": (olds, x, olds.proj),
        "clip pool": (clips, torch.randn(3, 32, 3, 3), clips.c_proj),
    }
    for layer, _, _ in found.values():
        _fixtures["randomise"](layer, 3, 0.3)
        layer.eval()
    return found


@pytest.mark.parametrize("kind", list(layers_of_every_kind()))
@torch.no_grad()
def test_probabilities_applied_to_the_values_are_the_layers_output(kind: str) -> None:
    layer, x, out = layers_of_every_kind()[kind]
    assert is_readable(layer)
    made = layer(x, x, x)[0] if kind.startswith("torch") else layer(x)
    expected = made.transpose(0, 1) if kind == "torch, steps first" else made
    q, k, v = projections(layer, x)
    heads = [probabilities(q[:, h : h + 1], k[:, h : h + 1]) for h in range(q.shape[1])]
    mixed = torch.stack([a @ v[:, h] for h, a in enumerate(heads)], dim=2).flatten(2)
    found = out(mixed)[:, 0] if kind == "clip pool" else out(mixed)
    assert expected.std() > 0.05
    assert (found - expected).abs().max() <= 1e-5
    whole = probabilities(q, k)
    assert (whole - torch.stack(heads).mean(0)).abs().max() <= 1e-6
    assert (whole.sum(-1) - 1).abs().max() <= 1e-5
    assert whole.std() > 0.02  # far from even


def test_a_subclass_is_not_taken_for_what_it_comes_from() -> None:
    class Other(nn.MultiheadAttention):
        pass

    assert not is_readable(Other(8, 2))


@torch.no_grad()
def test_maps_of_timesformer_are_hugging_faces(timesformer: VideoEncoder) -> None:
    model: Any = timesformer.model
    config = TimesformerConfig(**_fixtures["huggingface_config"](TINY_TIMESFORMER))
    twin = TimesformerModel(config).eval()
    state = from_msq(model.state_dict(), "huggingface")
    twin.load_state_dict({k.removeprefix("timesformer."): v for k, v in state.items()})
    over_time: list[Tensor] = []
    for layer in twin.encoder.layer:  # it gives those of space only; its own modules have the rest
        layer.temporal_attention.attention.register_forward_pre_hook(
            lambda module, given: over_time.append(module.forward(given[0], True)[1])
        )
    x = torch.randn(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    space = twin(x, output_attentions=True).attentions
    layers = [a for b in model.blocks for a in (b.temporal_attention, b.spatial_attention)]
    with watching(layers) as maps:
        timesformer(x)
    expected = [a for pair in zip(over_time, space, strict=True) for a in pair]
    assert len(expected) == len(maps) == 4
    for ours, theirs in zip(maps, expected, strict=True):
        assert ours.shape == (theirs.shape[0], *theirs.shape[2:])
        assert theirs.std() > 0.01
        assert (ours - theirs.mean(1)).abs().max() <= 1e-5


@torch.no_grad()
def test_maps_of_videomae_are_hugging_faces(videomae: VideoEncoder) -> None:
    model: Any = videomae.model
    config = VideoMAEConfig(**_fixtures["videomae_json"](_fixtures["TINY_VIDEOMAE"]))
    config._attn_implementation = "eager"
    twin = VideoMAEModel(config).eval()
    newer = {"q_bias": "query.bias", "v_bias": "value.bias"}
    for name, value in videomae_from_msq(model.state_dict()).items():
        head, _, leaf = name.removeprefix("videomae.").rpartition(".")
        twin.get_parameter(f"{head}.{newer.get(leaf, leaf)}").copy_(value)
    x = torch.randn(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    expected = twin(x, output_attentions=True).attentions
    with watching([block.attention for block in model.blocks]) as maps:
        videomae(x)
    assert len(expected) == len(maps) == 2
    for ours, theirs in zip(maps, expected, strict=True):
        assert theirs.std() > 1e-3
        assert (ours - theirs.mean(1)).abs().max() <= 1e-5


def test_half_precision_maps_are_softmaxes_in_float32(tmp_path: Path) -> None:
    model = _fixtures["random_timesformer"](TINY_TIMESFORMER, std=NOISE)
    _fixtures["write_timesformer_folder"](tmp_path / "t", model)
    encoder = load_video_encoder("auto", str(tmp_path / "t"), precision="bf16")
    layer: Any = encoder.model.blocks[0].spatial_attention  # type: ignore[union-attr,index]
    with watching([layer]) as maps:
        encode(encoder, [clip_of(encoder)])
    assert maps[0].dtype == torch.float32
    assert (maps[0].sum(-1) - 1).abs().max() <= 1e-5  # 2e-3 after a rounding to bf16


# --- rollout --------------------------------------------------------------------------------------


def test_joint_rollout_of_a_case_worked_out_by_hand() -> None:
    first = torch.tensor([[1.0, 0.0], [0.5, 0.5]])  # A'_1 = [1 0; 1/4 3/4]
    second = torch.tensor([[0.5, 0.5], [0.0, 1.0]])  # A'_2 = [3/4 1/4; 0 1]
    expected = torch.tensor([[0.8125, 0.1875], [0.25, 0.75]])  # A'_2 A'_1
    assert torch.equal(joint_back(torch.eye(2), [first, second]), expected)


def test_divided_rollout_of_a_case_worked_out_by_hand() -> None:
    """One patch in two frames: tokens are the global one, patch in frame 0, patch in frame 1."""
    time = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])  # A'_time = [1 0 0; 0 3/4 1/4; 0 0 1]
    space = torch.tensor([[[0.6, 0.4], [0.2, 0.8]], [[0.2, 0.8], [0.4, 0.6]]])
    # A_space = [.4 .2 .4; .2 .8 0; .4 0 .6], A'_space = [.7 .1 .2; .1 .9 0; .2 0 .8]
    expected = torch.tensor([[0.7, 0.075, 0.225], [0.1, 0.675, 0.225], [0.2, 0.0, 0.8]])
    found = divided_back(torch.eye(3), [time], [space])
    assert (found - expected).abs().max() <= 1e-7


def dense_divided(time: Sequence[Tensor], space: Sequence[Tensor]) -> Tensor:
    """The whole product, each factor written out as a matrix over all tokens."""
    n, t = time[0].shape[:2]
    whole = torch.eye(1 + n * t)
    for over_time, over_space in zip(time, space, strict=True):
        a = torch.eye(1 + n * t)
        for p in range(n):
            for i in range(t):
                a[1 + p * t + i] = 0
                for j in range(t):
                    a[1 + p * t + i, 1 + p * t + j] = over_time[p, i, j]
        whole = (0.5 * a + 0.5 * torch.eye(1 + n * t)) @ whole
        b = torch.zeros(1 + n * t, 1 + n * t)
        for i in range(t):
            for p in range(1 + n):
                row = 0 if p == 0 else 1 + (p - 1) * t + i
                for q in range(1 + n):
                    column = 0 if q == 0 else 1 + (q - 1) * t + i
                    b[row, column] += over_space[i, p, q] / (t if p == 0 else 1)
        whole = (0.5 * b + 0.5 * torch.eye(1 + n * t)) @ whole
    return whole


def test_divided_rollout_is_the_product_of_dense_matrices() -> None:
    n, t = 3, 2
    time = [stochastic(n, t, t, seed=i) for i in range(3)]
    space = [stochastic(t, 1 + n, 1 + n, seed=10 + i) for i in range(3)]
    rows = stochastic(4, 1 + n * t, seed=20)
    expected = rows @ dense_divided(time, space)
    found = divided_back(rows, time, space)
    assert (found - expected).abs().max() <= 1e-6
    assert (found.sum(-1) - 1).abs().max() <= 1e-6


def test_per_frame_rollout_keeps_frames_apart() -> None:
    maps = [stochastic(2, 4, 4, seed=i) for i in range(2)]  # two frames, class token, three patches
    rows = torch.zeros(2, 1 + 3 * 2)
    rows[0, 1 + 2 * 2 + 1] = 1  # patch 2 of frame 1
    rows[1, 0] = 1  # the mean of both class tokens
    found = per_frame_back(rows, maps, prefix=1, has_class=True)
    frames = [joint_back(torch.eye(4), [m[i] for m in maps]) for i in range(2)]
    assert torch.allclose(found[0, 2::2], frames[1][3, 1:], atol=1e-7)
    assert torch.equal(found[0, 1::2], torch.zeros(3))
    assert torch.allclose(found[1, 1::2], frames[0][0, 1:] / 2, atol=1e-7)
    assert torch.allclose(found[1, 0], (frames[0][0, 0] + frames[1][0, 0]) / 2, atol=1e-7)


def test_per_frame_rollout_without_a_class_token_begins_at_all_patches() -> None:
    maps = [stochastic(2, 3, 3, seed=i) for i in range(2)]
    row = torch.eye(1, 1 + 3 * 2)
    found = per_frame_back(row, maps, prefix=0, has_class=False)
    for i in range(2):
        each = joint_back(torch.eye(3), [m[i] for m in maps]).mean(0) / 2
        assert torch.allclose(found[0, 1 + i :: 2], each, atol=1e-7)


def test_rollout_of_queries_worked_out_by_hand() -> None:
    found = {
        "self_attention": torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]]),
        "cross_attention": torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [1.0, 0.0]]]),
    }
    found = {name: maps[:, None, None] for name, maps in found.items()}  # [L, B, H, K, ·]
    # Layer 1: ½ C_1 = [½ 0; 0 ½]. Layer 2: the queries mix to [¼ ¼; ¼ ¼], then
    # [⅜ ⅜; ⅝ ⅛], of which 1 - 2^-2 = ¾ is divided out.
    expected = torch.tensor([[0.5, 0.5], [5 / 6, 1 / 6]])
    assert (query_rollout(found)[0] - expected).abs().max() <= 1e-6
    # With one encoder layer E = [0 1; 0 1] over the tokens, M = [½ ½; 0 1].
    found["encoder_attention"] = torch.tensor([[0.0, 1.0], [0.0, 1.0]])[None, None, None]
    memory = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    assert (query_rollout(found)[0] - expected @ memory).abs().max() <= 1e-6


@torch.no_grad()
def test_rollout_through_a_head_with_encoder_layers() -> None:
    """The maps of the `official` kind of head: all of it written out, layer by layer."""
    config = HeadConfig(queries="vanilla", width=16, layers=2, encoder_layers=2, heads=2, ffn=16)
    model = MSQNet(config, classes=3, token_width=8).eval()
    _fixtures["randomise"](model, 1, 0.5)
    tokens = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    found = model(tokens, intermediates=True)
    own, cross, inner = (
        found[name].mean(2) for name in ("self_attention", "cross_attention", "encoder_attention")
    )
    for b in range(2):
        memory = (inner[1, b] + torch.eye(5)) @ (inner[0, b] + torch.eye(5)) / 4
        taken = cross[0, b] @ memory / 2
        taken = (own[1, b] @ taken + taken) / 2
        taken = (cross[1, b] @ memory + taken) / 2
        assert (query_rollout(found)[b] - taken / 0.75).abs().max() <= 1e-6
    assert float(query_rollout(found).std()) > 0.02


# --- from tokens to pictures ----------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["frame", "band", "patch"])
@pytest.mark.parametrize("order", [TokenOrder(4), TokenOrder(2, True, False)])
def test_unpooled_weights_give_what_pooled_tokens_give(
    timesformer: VideoEncoder, pooling: Any, order: TokenOrder
) -> None:
    """Weights over pooled tokens, and over all tokens, mix to the same."""
    length = order.global_token + 9 * order.steps
    tokens = torch.randn(1, length, 5, generator=torch.Generator().manual_seed(0))
    pooled = pool(tokens, 4, pooling, order)
    rows = stochastic(3, pooled.shape[1])
    spec = replace(timesformer.spec, pooling=pooling)
    encoder = VideoEncoder(timesformer.model, spec, order)
    found = unpool(rows, length, encoder)
    assert (found @ tokens[0] - rows @ pooled[0]).abs().max() <= 1e-5
    assert (found.sum(-1) - 1).abs().max() <= 1e-5


def test_tokens_lie_where_their_order_says(
    timesformer: VideoEncoder, videomae: VideoEncoder
) -> None:
    row = torch.zeros(2, 1 + 16 * 4)
    row[0, 1 + 6 * 4 + 3] = 1  # patch 6, row 1 and column 2 of 4, in frame 3
    row[1, 0] = 1
    places, elsewhere = laid_out(row, timesformer)
    assert places.shape == (2, 4, 4, 4)
    assert places[0].nonzero().tolist() == [[3, 1, 2]]
    assert elsewhere.tolist() == [0.0, 1.0]
    row = torch.zeros(1, 2 * 16)
    row[0, 16 + 5] = 1  # place 5 of the second tubelet, frames 2 and 3
    places, elsewhere = laid_out(row, videomae)
    assert places[0].nonzero().tolist() == [[2, 1, 1], [3, 1, 1]]
    assert float(places.sum()) == 1.0
    assert elsewhere.tolist() == [0.0]


@pytest.mark.parametrize(
    ("height", "width", "size", "short"),
    [
        (120, 200, 64, 0),
        (200, 120, 64, 0),
        (97, 331, 32, 48),
        (50, 50, 64, 80),
        (240, 320, 224, 256),
    ],
)
def test_the_box_is_the_part_that_the_crop_shows(
    height: int, width: int, size: int, short: int
) -> None:
    """Frames whose grey tells the place: what the crop holds at its edges is where the box ends."""
    for axis, side in ((0, height), (1, width)):
        ramp = np.linspace(0, 255, side)
        frame = np.broadcast_to(ramp[:, None] if axis == 0 else ramp[None, :], (height, width))
        frames = np.repeat(np.rint(frame)[None, ..., None], 3, axis=-1).astype(np.uint8)
        seen = resize_crop(frames, size, short_side=short)[0, 0].float().mean(dim=1 - axis)
        box = seen_box(height, width, size, short_side=short)
        first, length = box[axis], box[2 + axis]
        cell = length / size  # a pixel of the crop, in pixels of the frame
        centres = (first + cell * (np.arange(size) + 0.5) - 0.5).clip(0, side - 1)
        expected = np.interp(centres, np.arange(side), ramp)
        middle = slice(size // 8, -size // 8)  # bicubic reaches over the edges of the frame
        off = np.abs(seen.numpy() - expected)[middle] / (255 / side)  # in pixels of the frame
        assert off.max() <= max(0.6 * cell, 1.0)


def looker() -> VideoEncoder:
    """A TimeSformer whose queries, all alike, ask for bright patches, and for nothing else."""
    from msq.bench.random_encoders import video_encoder

    config = TimeSformerConfig(
        image_size=(32, 32), patch_size=8, frames=4, width=4, depth=2, heads=1
    )
    encoder = video_encoder(config)
    model: Any = encoder.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.stem.proj.weight[0] = 1 / (3 * 64)  # channel 0 is the mean brightness
        model.cls_token[0, 0, 1] = 1.0
        for block in model.blocks:
            block.spatial_norm.weight.fill_(1)
            block.spatial_attention.qkv.bias[0] = 4.0  # every query
            block.spatial_attention.qkv.weight[4, 0] = 1.0  # keys: channel 0 after the norm
    return encoder


def test_a_model_that_looks_for_light_is_seen_to_look_at_it() -> None:
    encoder = looker()
    clip = np.zeros((4, 3, 32, 32), np.uint8)
    clip[2, :, 8:16, 24:32] = 255  # row 1, column 3 of frame 2
    watched = WatchedTokens(encoder, clip)
    heat, elsewhere = watched.global_heat()
    assert divmod(int(heat.argmax()), 16) == (2, 1 * 4 + 3)
    assert float(heat[2, 1, 3]) > 5 * float(heat[2].median())
    assert float(heat.sum() + elsewhere) == pytest.approx(1, abs=1e-5)
    # The token of frame 2, with frame pooling, too; and not that of frame 0.
    rows, _ = watched.heat(torch.eye(5))
    assert divmod(int(rows[3].argmax()), 16) == (2, 7)
    assert float(rows[1][1:].max()) == 0


def test_heat_keeps_time_where_the_tokens_are_and_spreads_space_by_rollout(
    timesformer: VideoEncoder,
) -> None:
    """Against dense matrices: frame t's token, its own frame's columns, at the weight of t."""
    model: Any = timesformer.model
    clip = clip_of(timesformer)
    watched = WatchedTokens(timesformer, clip)
    layers = [a for b in model.blocks for a in (b.temporal_attention, b.spatial_attention)]
    with watching(layers) as maps:
        encode(timesformer, [clip])
    whole = dense_divided(maps[::2], maps[1::2])  # [65, 65]
    weights = torch.tensor([[0.1, 0.4, 0.3, 0.2, 0.0]])  # the global token, then four frames
    expected = 0.1 * whole[0, 1:].view(16, 4).T
    for t in range(4):
        row = whole[1 + t :: 4].mean(0)[1:].view(16, 4)[:, t]  # the mean of the frame's patches
        expected[t] += weights[0, 1 + t] * row / row.sum()
    heat, elsewhere = watched.heat(weights)
    assert (heat[0].flatten(1) - expected).abs().max() <= 1e-6
    assert float(elsewhere) == pytest.approx(0.1 * float(whole[0, 0]), abs=1e-6)
    assert float(heat[0, 0].std() / heat[0, 0].mean()) > 0.01  # no even map


@pytest.mark.parametrize("kind", ["timesformer", "videomae"])
def test_watching_moves_no_bit_of_the_tokens(kind: str, request: pytest.FixtureRequest) -> None:
    encoder = request.getfixturevalue(kind)
    clip = clip_of(encoder)
    watched = WatchedTokens(encoder, clip)
    assert torch.equal(watched.tokens, encode(encoder, [clip])[0])
    heat, elsewhere = watched.heat(stochastic(2, encoder.spec.tokens))
    assert heat.shape == (2, 4, 4, 4)
    assert (heat.sum(dim=(1, 2, 3)) + elsewhere - 1).abs().max() <= 1e-5
    assert float(heat.min()) >= 0
    module: Any = encoder.model.blocks[0]  # type: ignore[union-attr,index]
    assert not any(m._forward_hooks for m in [encoder.model, *module.modules()])


@pytest.mark.parametrize("kind", ["open_clip", "timm"])
def test_image_models_on_every_frame(kind: str, tmp_path: Path) -> None:
    if kind == "open_clip":
        _fixtures["write_clip_folder"](tmp_path / "c", TINY_CLIP)
        encoder = load_video_encoder(f"open_clip/local-dir:{tmp_path / 'c'}", frames=2)
    else:
        from safetensors.torch import save_file

        twin = timm.create_model("test_vit", pretrained=False)
        _fixtures["randomise"](twin, std=NOISE)
        save_file(twin.state_dict(), tmp_path / "w.safetensors")
        encoder = load_video_encoder("timm/test_vit", str(tmp_path / "w.safetensors"), frames=2)
    clip = clip_of(encoder)
    watched = WatchedTokens(encoder, clip)
    assert torch.equal(watched.tokens, encode(encoder, [clip])[0])
    heat, elsewhere = watched.heat(torch.eye(3))
    assert (heat.sum(dim=(1, 2, 3)) + elsewhere - 1).abs().max() <= 1e-5
    assert float(heat[1, 1].abs().max()) == 0  # frame 0's token saw nothing of frame 1
    assert float(heat[1, 0].std()) > 0


def test_clips_image_tower(tmp_path: Path) -> None:
    """A ViT: rollout of each frame's class token; the maps are those of the library's layers."""
    _fixtures["write_clip_folder"](tmp_path / "c", TINY_CLIP)
    image, _ = load_clip(f"local-dir:{tmp_path / 'c'}", frames=3)
    clip = clip_of(image)
    feature, heat, elsewhere = image_heat(image, clip)
    assert torch.equal(feature, encode(image, [clip])[0])
    assert heat.shape == (3, 4, 4)
    assert float(heat.sum() + elsewhere) == pytest.approx(1, abs=1e-5)
    seen: list[Tensor] = []
    visual: Any = image.model.visual
    for block in visual.transformer.resblocks:
        block.ln_1.register_forward_hook(lambda _, given, out: seen.append(out))
    encode(image, [clip])
    rows = torch.eye(17)[None].expand(3, -1, -1)
    for block, x in zip(visual.transformer.resblocks, seen, strict=True):
        theirs = block.attn(x, x, x, need_weights=True, average_attn_weights=True)[1]
        rows = (0.5 * theirs + 0.5 * torch.eye(17)) @ rows
    assert (heat.flatten(1) - rows[:, 0, 1:] / 3).abs().max() <= 1e-6


def test_a_resnet_of_clip_has_its_attention_pool() -> None:
    image, _ = load_clip("embedded")
    clip = clip_of(image)
    feature, heat, elsewhere = image_heat(image, clip)
    assert torch.equal(feature, encode(image, [clip])[0])
    assert heat.shape == (8, 3, 3)
    assert float(heat.sum()) == pytest.approx(1, abs=1e-5)
    assert float(elsewhere) == 0
    visual: Any = image.model.visual
    pooled: list[Tensor] = []
    visual.attnpool.register_forward_hook(lambda _, given, out: pooled.append(given[0]))
    encode(image, [clip])
    weights = _library_pool(visual.attnpool, pooled[0])
    expected = weights[:, 0, 1:] + weights[:, 0, :1] / 9
    assert (heat.flatten(1) - expected / 8).abs().max() <= 1e-6


def _library_pool(pool: Any, x: Tensor) -> Tensor:
    """The pool's own call of torch's attention, asked for its weights."""
    x = x.flatten(2).permute(2, 0, 1)
    x = torch.cat([x.mean(dim=0, keepdim=True), x]) + pool.positional_embedding[:, None]
    bias = torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias])
    _, weights = F.multi_head_attention_forward(
        x, x, x, x.shape[-1], pool.num_heads, None, bias, None, None, False, 0.0,
        pool.c_proj.weight, pool.c_proj.bias, training=False, need_weights=True,
        use_separate_proj_weight=True, q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight,
    )  # fmt: skip
    assert weights is not None
    return weights


def test_a_3d_network_says_what_is_possible(tmp_path: Path) -> None:
    from torchvision.models import get_model

    torch.save(get_model("mc3_18", weights=None).state_dict(), tmp_path / "w.pth")
    encoder = load_video_encoder(
        f"torchvision/mc3_18/{tmp_path / 'w.pth'}", frames=4, size=48, pooling="frame"
    )
    clip = clip_of(encoder)
    with pytest.raises(UsageError, match=r"mc3.*--head-only"):
        WatchedTokens(encoder, clip)
    watched = WatchedTokens(encoder, clip, through_encoder=False)
    steps = encoder.spec.tokens - 1
    rows = torch.zeros(1, encoder.spec.tokens)
    rows[0, 1] = 1  # all of the look on the first step in time
    heat, elsewhere = watched.heat(rows)
    assert heat.shape[1] == 4
    assert float(heat[0, : 4 // steps].sum()) == pytest.approx(1, abs=1e-6)
    assert float(elsewhere) == 0
