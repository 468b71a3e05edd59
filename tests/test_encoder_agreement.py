"""One line per encoder: how far its tokens are from those of an independent twin.

    pytest tests/test_encoder_agreement.py -rP

prints the table of docs/encoders.md for the installed libraries. Random weights, large enough that
a wrong detail is far outside the tolerance; float32 on the CPU.
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import get_model
from transformers import TimesformerConfig, TimesformerModel, VideoMAEConfig, VideoMAEModel

from msq.extract.encoders import load_clip, load_video_encoder
from msq.extract.encoders.timesformer_names import from_msq
from msq.extract.encoders.videomae_weights import from_msq as videomae_from_msq

_fixtures = runpy.run_path(str(Path(__file__).with_name("encoder_fixtures.py")))
PAGE = Path(__file__).parents[1] / "docs" / "encoders.md"
NOISE = 0.1


def _video(frames: int, size: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, frames, 3, size, size, generator=generator)


def _watch(module: nn.Module, store: list[Tensor], *, inputs: bool = False) -> None:
    """Keeps what goes through a module, the first input or the output."""
    module.register_forward_hook(lambda _, given, out: store.append(given[0] if inputs else out))


def timesformer(folder: Path) -> tuple[Tensor, Tensor]:
    config = _fixtures["TINY_TIMESFORMER"]
    model = _fixtures["random_timesformer"](config, std=NOISE)
    _fixtures["write_timesformer_folder"](folder, model)
    twin = TimesformerModel(TimesformerConfig(**_fixtures["huggingface_config"](config))).eval()
    state = from_msq(model.state_dict(), "huggingface")
    twin.load_state_dict({k.removeprefix("timesformer."): v for k, v in state.items()})
    x = _video(config.frames, 32)
    encoder = load_video_encoder("auto", str(folder), pooling="patch")
    return encoder(x), twin(x).last_hidden_state


def videomae(folder: Path) -> tuple[Tensor, Tensor]:
    config = _fixtures["TINY_VIDEOMAE"]
    model = _fixtures["write_videomae_folder"](folder, config, std=NOISE)
    twin = VideoMAEModel(VideoMAEConfig(**_fixtures["videomae_json"](config))).eval()
    newer = {"q_bias": "query.bias", "v_bias": "value.bias"}
    for name, value in videomae_from_msq(model.state_dict()).items():
        head, _, leaf = name.removeprefix("videomae.").rpartition(".")
        twin.get_parameter(f"{head}.{newer.get(leaf, leaf)}").copy_(value)
    x = _video(config.frames, 32)
    encoder = load_video_encoder("auto", str(folder), pooling="patch")
    return encoder(x)[:, 1:], twin(x).last_hidden_state


def per_frame_timm(folder: Path) -> tuple[Tensor, Tensor]:
    twin = timm.create_model("test_vit", pretrained=False).eval()
    _fixtures["randomise"](twin, std=NOISE)
    folder.mkdir()
    save_file(twin.state_dict(), folder / "w.safetensors")
    x = _video(2, 160)
    features = twin.forward_features(x.flatten(0, 1)).unflatten(0, (2, 2))
    encoder = load_video_encoder("timm/test_vit", str(folder / "w.safetensors"), frames=2)
    expected = torch.cat([features[:, :, :1].mean(1), features[:, :, 1:].mean(2)], 1)
    return encoder(x), expected


def _clip_twin(folder: Path) -> open_clip.CLIP:
    _fixtures["write_clip_folder"](folder, _fixtures["TINY_CLIP"])
    twin = open_clip.CLIP(**_fixtures["TINY_CLIP"]).eval()
    twin.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
    return twin


def per_frame_open_clip(folder: Path) -> tuple[Tensor, Tensor]:
    twin = _clip_twin(folder)
    seen: list[Tensor] = []
    _watch(twin.visual.ln_post, seen)
    x = _video(2, 32)
    twin.encode_image(x.flatten(0, 1))
    features = seen[0].unflatten(0, (2, 2))
    expected = torch.cat([features[:, :, :1].mean(1), features[:, :, 1:].mean(2)], 1)
    return load_video_encoder(f"open_clip/local-dir:{folder}", frames=2)(x), expected


def torchvision(folder: Path) -> tuple[Tensor, Tensor]:
    folder.mkdir()
    twin = get_model("mc3_18", weights=None).eval()
    torch.save(twin.state_dict(), folder / "w.pth")
    seen: list[Tensor] = []
    _watch(twin.avgpool, seen, inputs=True)
    x = _video(4, 48)
    twin(x.transpose(1, 2))
    encoder = load_video_encoder(
        f"torchvision/mc3_18/{folder / 'w.pth'}", frames=4, size=48, pooling="patch"
    )
    return encoder(x)[:, 1:], seen[0].flatten(2).transpose(1, 2)


def clip_image(folder: Path) -> tuple[Tensor, Tensor]:
    twin = _clip_twin(folder)
    x = _video(3, 32)
    image, _ = load_clip(f"local-dir:{folder}", frames=3)
    return image(x), twin.encode_image(x.flatten(0, 1)).unflatten(0, (2, 3))


def clip_text(folder: Path) -> tuple[Tensor, Tensor]:
    twin = _clip_twin(folder)
    names = ["a dog running", "opening a door", "x"]
    tokenizer = open_clip.SimpleTokenizer(context_length=12)
    _, text = load_clip(f"local-dir:{folder}", frames=3)
    return text(names), twin.encode_text(tokenizer(names))


ENCODERS: dict[str, tuple[Callable[[Path], tuple[Tensor, Tensor]], str, str, float]] = {
    # encoder: (how, the twin, its package, tolerance)
    "TimeSformer": (timesformer, "TimesformerModel", "transformers", 1e-5),
    "VideoMAE": (videomae, "VideoMAEModel", "transformers", 1e-5),
    "timm, per frame": (per_frame_timm, "forward_features", "timm", 1e-5),
    "open_clip, per frame": (per_frame_open_clip, "visual.ln_post", "open_clip_torch", 1e-5),
    "torchvision 3-D": (torchvision, "input of avgpool", "torchvision", 1e-5),
    "CLIP image tower": (clip_image, "CLIP.encode_image", "open_clip_torch", 1e-5),
    "CLIP text tower": (clip_text, "CLIP.encode_text", "open_clip_torch", 1e-5),
}


@pytest.mark.parametrize("name", ENCODERS)
@torch.inference_mode()
def test_agreement(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    measure, twin, package, tolerance = ENCODERS[name]
    found, expected = measure(tmp_path / "weights")
    assert found.shape == expected.shape
    worst = float((found - expected).abs().max())
    print(f"| {name} | {twin} | {package} {version(package)} | {tolerance:g} | {worst:.1e} |")
    assert expected.std() > 1e-2  # of a size that the tolerance means something for
    assert worst <= tolerance


def test_the_page_lists_every_encoder_with_its_twin_and_tolerance() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name, (_, twin, package, tolerance) in ENCODERS.items():
        start = f"| {name} | {twin} | {package} "
        line = next((line for line in page.splitlines() if line.startswith(start)), "")
        assert f"| {tolerance:g} |" in line
