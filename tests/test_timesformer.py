import runpy
from pathlib import Path

import pytest
import torch
from transformers import TimesformerConfig, TimesformerModel

from msq.errors import UsageError
from msq.extract.encoders import timesformer as timesformer_module
from msq.extract.encoders.pooling import pool, pooled_tokens
from msq.extract.encoders.timesformer import TimeSformer
from msq.extract.encoders.timesformer_config import TimeSformerConfig
from msq.extract.encoders.timesformer_names import from_msq
from msq.extract.encoders.timesformer_weights import resize_embeddings

_fixtures = runpy.run_path(str(Path(__file__).with_name("encoder_fixtures.py")))
random_timesformer = _fixtures["random_timesformer"]
huggingface_config = _fixtures["huggingface_config"]
write_timesformer_folder = _fixtures["write_timesformer_folder"]

SMALL = TimeSformerConfig(
    image_size=(32, 32), patch_size=8, frames=3, width=48, depth=2, heads=4, mlp_ratio=2.0
)
LARGER = TimeSformerConfig(
    image_size=(80, 80), patch_size=16, frames=8, width=96, depth=4, heads=3, mlp_ratio=4.0
)
# Large enough that a wrong LayerNorm epsilon or a swapped norm is far outside 1e-5.
WEIGHT_NOISE = 0.1


def huggingface_twin(model: TimeSformer, **changes: object) -> TimesformerModel:
    """Hugging Face's model holding the same weights."""
    twin = TimesformerModel(TimesformerConfig(**{**huggingface_config(model.config), **changes}))
    state = from_msq(model.state_dict(), "huggingface")
    twin.load_state_dict({k.removeprefix("timesformer."): v for k, v in state.items()})
    return twin.eval()


def video(config: TimeSformerConfig, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, config.frames, 3, *config.image_size, generator=generator)


@pytest.mark.parametrize("config", [SMALL, LARGER], ids=["32px-T3", "80px-T8"])
@torch.inference_mode()
def test_tokens_equal_hugging_face_with_random_weights(config):
    model = random_timesformer(config, std=WEIGHT_NOISE)
    x = video(config)
    expected = huggingface_twin(model)(x).last_hidden_state
    assert model(x).shape == (2, 1 + config.patches * config.frames, config.width)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_the_layer_norm_epsilon_of_the_public_models_is_seen_by_the_comparison():
    model = random_timesformer(SMALL, std=WEIGHT_NOISE)
    x = 0.01 * video(SMALL)
    wrong = huggingface_twin(model, layer_norm_eps=1e-3)(x).last_hidden_state
    assert (model(x) - wrong).abs().max() > 1e-4


@torch.inference_mode()
def test_more_frames_equal_hugging_face_with_the_time_embedding_resized_the_same_way():
    model = random_timesformer(SMALL, std=WEIGHT_NOISE)
    target = TimeSformerConfig(**{**SMALL.to_dict(), "frames": 8})
    state, note = resize_embeddings(model.state_dict(), SMALL, target)
    ours = TimeSformer(target).eval()
    ours.load_state_dict(state)
    # Nearest neighbour by its definition: new frame i shows old frame floor(i · 3 / 8).
    rows = [i * SMALL.frames // 8 for i in range(8)]
    resized = dict(model.state_dict())
    resized["time_embed"] = model.time_embed[:, rows]
    by_hand = TimeSformer(target).eval()
    by_hand.load_state_dict(resized)
    x = video(target)
    torch.testing.assert_close(
        ours(x), huggingface_twin(by_hand)(x).last_hidden_state, rtol=0, atol=1e-5
    )
    assert note == "time 3->8 nearest"


@pytest.mark.parametrize("size", [(64, 64), (48, 32), (32, 48), (24, 40)])
@torch.inference_mode()
def test_other_sizes_equal_hugging_face_which_resizes_the_position_embedding_itself(size):
    model = random_timesformer(SMALL, std=WEIGHT_NOISE)
    target = TimeSformerConfig(**{**SMALL.to_dict(), "image_size": size})
    state, note = resize_embeddings(model.state_dict(), SMALL, target)
    ours = TimeSformer(target).eval()
    ours.load_state_dict(state)
    x = video(target)
    twin = huggingface_twin(model)
    if target.grid[1] != SMALL.grid[1]:
        # Its layers take the number of columns from the configuration, its embedding from the
        # image; they only agree that rows times columns is the number of patches.
        twin.config.image_size = target.image_size[1]
    torch.testing.assert_close(ours(x), twin(x).last_hidden_state, rtol=0, atol=1e-5)
    assert note == f"space 4x4->{target.grid[0]}x{target.grid[1]} nearest"


@torch.inference_mode()
def test_base_size_at_another_t_and_size_equals_hugging_face():
    base = TimeSformerConfig(depth=2)
    model = random_timesformer(base)
    target = TimeSformerConfig(image_size=(96, 64), frames=2, depth=2)
    state, note = resize_embeddings(model.state_dict(), base, target)
    ours = TimeSformer(target).eval()
    ours.load_state_dict(state)
    twin = huggingface_twin(model, num_frames=8)
    twin.embeddings.time_embeddings.data = model.time_embed[:, [0, 4]]
    twin.config.num_frames, twin.config.image_size = 2, 64
    x = video(target, batch=1)
    torch.testing.assert_close(ours(x), twin(x).last_hidden_state, rtol=0, atol=1e-5)
    assert note == "time 8->2 nearest, space 14x14->6x4 nearest"


def test_linear_time_and_bicubic_space_interpolation_are_offered():
    config = TimeSformerConfig(**{**SMALL.to_dict(), "frames": 2})
    target = TimeSformerConfig(**{**config.to_dict(), "frames": 4, "image_size": (64, 64)})
    model = random_timesformer(config)
    state, note = resize_embeddings(
        model.state_dict(), config, target, time="linear", space="bicubic"
    )
    a, b = model.time_embed[0]
    expected = torch.stack([a, 0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b, b])[None]
    torch.testing.assert_close(state["time_embed"], expected)
    assert state["position_embed"].shape == (1, 65, 48)
    torch.testing.assert_close(state["position_embed"][:, 0], model.position_embed[:, 0])
    assert note == "time 2->4 linear, space 4x4->8x8 bicubic"


def test_tokens_are_patch_major_and_time_minor():
    config = TimeSformerConfig(**{**SMALL.to_dict(), "depth": 1})
    model = TimeSformer(config).eval()  # fresh: nothing passes between frames but the global token
    x = video(config, batch=1)
    changed = x.clone()
    changed[:, 1] += 1.0
    difference = (model(changed) - model(x)).abs().amax(-1)[0]
    per_token = difference[1:].view(config.patches, config.frames)
    assert (per_token[:, 1] > 1e-4).all()
    assert (per_token[:, [0, 2]] == 0).all()
    assert difference[0] > 1e-6  # the global token sees every frame


@torch.inference_mode()
def test_a_fresh_model_ignores_the_order_of_frames_and_a_trained_one_does_not():
    order = [2, 0, 1]
    fresh = TimeSformer(SMALL).eval()
    x = video(SMALL)
    tokens, shuffled = fresh(x), fresh(x[:, order])
    torch.testing.assert_close(shuffled[:, 0], tokens[:, 0])
    per_frame = tokens[:, 1:].view(2, SMALL.patches, SMALL.frames, -1)
    torch.testing.assert_close(shuffled[:, 1:].view_as(per_frame), per_frame[:, :, order])
    trained = random_timesformer(SMALL, std=WEIGHT_NOISE)
    assert (trained(x)[:, 0] - trained(x[:, order])[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_gradients_reach_every_parameter(stem):
    config = TimeSformerConfig(**{**SMALL.to_dict(), "stem": stem})
    model = random_timesformer(config).train()
    weights = torch.linspace(-1, 1, config.width)  # a plain sum of layer-normed tokens is constant
    (model(video(config)) * weights).sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_the_convolutional_stem_has_three_layers_for_stride_eight_and_no_batch_statistics():
    config = TimeSformerConfig(**{**SMALL.to_dict(), "stem": "conv"})
    model = random_timesformer(config).train()
    convolutions = [m for m in model.stem.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [c.stride for c in convolutions] == [(2, 2)] * 3
    x = video(config, batch=3)
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=0, atol=1e-5)
    assert not [n for n, _ in model.named_buffers()]


def test_a_model_started_from_single_frames_keeps_its_tokens_per_frame():
    single = TimeSformerConfig(**{**SMALL.to_dict(), "frames": 1, "stem": "conv"})
    image_model = TimeSformer(single).eval()
    target = TimeSformerConfig(**{**single.to_dict(), "frames": 3})
    state, _ = resize_embeddings(image_model.state_dict(), single, target)
    clip_model = TimeSformer(target).eval()
    clip_model.load_state_dict(state)
    still = video(single).expand(-1, 3, -1, -1, -1)
    first = clip_model(still)[:, 1::3]
    torch.testing.assert_close(first, image_model(still[:, :1])[:, 1:], rtol=0, atol=1e-5)


def test_temporal_parameters_are_those_that_act_over_time():
    model = TimeSformer(SMALL)
    names = {name for name, _ in model.temporal_parameters()}
    assert "time_embed" in names
    assert "blocks.1.temporal_out.weight" in names
    assert len(names) == 1 + SMALL.depth * 8
    assert not any("spatial" in n or "mlp" in n for n in names)


def test_attention_over_more_sequences_than_one_launch_takes_is_split_without_a_trace(monkeypatch):
    model = random_timesformer(SMALL, std=WEIGHT_NOISE)
    whole = model(video(SMALL))
    monkeypatch.setattr(timesformer_module, "_MAX_ATTENTION_BATCH", 5)
    torch.testing.assert_close(model(video(SMALL)), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "shape", [(2, 8, 3, 32, 32), (2, 3, 3, 32, 40), (2, 3, 32, 32), (2, 3, 1, 32, 32)]
)
def test_a_video_of_another_shape_is_refused_with_both_shapes(shape):
    with pytest.raises(UsageError, match=r"expected video \[B, 3, 3, 32, 32\].*found \["):
        TimeSformer(SMALL)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 30}, "not a multiple of the patch size 8"),
        ({"heads": 5}, "not divisible by 5 heads"),
        ({"frames": 0}, "frames"),
        ({"stem": "resnet"}, "stem is"),
        ({"stem": "conv", "patch_size": 12, "image_size": 24}, "power of two"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        TimeSformerConfig(**{**SMALL.to_dict(), **change})


def test_a_configuration_survives_its_dictionary():
    config = TimeSformerConfig(**{**SMALL.to_dict(), "stem": "conv", "image_size": [48, 32]})
    assert TimeSformerConfig.from_dict(config.to_dict()) == config
    assert TimeSformerConfig.from_dict({"image_size": 64}).image_size == (64, 64)
    with pytest.raises(UsageError, match="unknown settings colour"):
        TimeSformerConfig.from_dict({"colour": 1})


def test_band_pooling_is_the_authors_overlapping_bins():
    tokens = torch.randn(2, 1 + 196 * 16, 5, dtype=torch.float64)
    bands = pool(tokens, 16, "band")
    expected = torch.stack([tokens[:, 196 * i : 196 * i + 197].mean(1) for i in range(16)], dim=1)
    torch.testing.assert_close(bands, expected, rtol=0, atol=1e-12)


def test_frame_pooling_is_the_global_token_and_the_mean_of_each_frames_patches():
    patches, frames = 6, 4
    tokens = torch.randn(2, 1 + patches * frames, 5)
    pooled = pool(tokens, frames, "frame")
    assert pooled.shape == (2, 5, 5)
    assert torch.equal(pooled[:, 0], tokens[:, 0])
    for t in range(frames):
        own = torch.stack([tokens[:, 1 + n * frames + t] for n in range(patches)])
        torch.testing.assert_close(pooled[:, 1 + t], own.mean(0))


@pytest.mark.parametrize(("pooling", "count"), [("frame", 5), ("band", 4), ("patch", 25)])
def test_poolings_give_the_announced_number_of_tokens(pooling, count):
    tokens = torch.randn(1, 25, 3)
    assert pool(tokens, 4, pooling).shape[1] == count == pooled_tokens(pooling, 4, 6)


def test_pooling_refuses_what_it_cannot_mean():
    with pytest.raises(UsageError, match="frame, band, patch"):
        pool(torch.zeros(1, 25, 3), 4, "max")
    with pytest.raises(UsageError, match="26 tokens"):
        pool(torch.zeros(1, 26, 3), 4, "frame")
