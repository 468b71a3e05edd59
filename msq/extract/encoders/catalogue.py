"""The lines of `msq encoders list`: what can be loaded, what it needs, how large it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

_FAIR = "CC BY-NC 4.0"
_MCG = "CC BY-NC 4.0"
_TORCHVISION = "BSD-3-Clause for the code; none stated for the weights"
_BYTES = 4  # published checkpoints are float32


@dataclass(frozen=True)
class EncoderInfo:
    """One line of `msq encoders list`.

    Attributes:
        name: as typed after `--video-encoder` or `--image-encoder`.
        kind: `video`, `image+text` or `text`.
        needs: where its weights come from.
        licence: of those weights.
        parameters_millions: of the encoder without classifier; None where it depends.
        megabytes: to fetch; None where it depends, or is not known.
        frames: T that it was trained with; None where it depends.
        size: height and width in pixels; None where it depends.
        width: channels of its outputs; None where it depends.
    """

    name: str
    kind: str
    needs: str
    licence: str
    parameters_millions: float | None = None
    megabytes: int | None = None
    frames: int | None = None
    size: int | None = None
    width: int | None = None


_EMBEDDED = "nothing: inside the package"
_FETCHED = "fetched, or local-dir:PATH with the repository's files"


def _timesformer(repository: str, classes: int, frames: int, size: int, count: int) -> EncoderInfo:
    megabytes = round((count + 769 * classes) * _BYTES / 1e6)
    return EncoderInfo(f"hf-hub:{repository}", "video", _FETCHED, _FAIR, round(count / 1e6, 1),
                       megabytes, frames, size, 768)  # fmt: skip


# Encoder without classifier: base, HR (more positions) and L (more frames).
_BASE, _HIGH, _LONG, _LONG_SSV2 = 121_258_752, 121_716_480, 121_326_336, 121_301_760
_TIMESFORMERS = (
    EncoderInfo("timesformer-embedded", "video", _EMBEDDED, "Apache-2.0", 1.2, 0, 8, 48, 128),
    EncoderInfo(
        "timesformer",
        "video",
        "local-dir:PATH in Hugging Face's layout, or a FAIR file such as "
        "TimeSformer_divST_96x4_224_K400.pyth",
        f"the checkpoint's own; {_FAIR} for those of FAIR",
    ),
    _timesformer("facebook/timesformer-base-finetuned-k400", 400, 8, 224, _BASE),
    _timesformer("facebook/timesformer-base-finetuned-k600", 600, 8, 224, _BASE),
    _timesformer("facebook/timesformer-base-finetuned-ssv2", 174, 8, 224, _BASE),
    _timesformer("facebook/timesformer-hr-finetuned-k400", 400, 16, 448, _HIGH),
    _timesformer("facebook/timesformer-hr-finetuned-k600", 600, 16, 448, _HIGH),
    _timesformer("facebook/timesformer-hr-finetuned-ssv2", 174, 16, 448, _HIGH),
    _timesformer("fcakyon/timesformer-large-finetuned-k400", 400, 96, 224, _LONG),
    _timesformer("fcakyon/timesformer-large-finetuned-k600", 600, 96, 224, _LONG),
    _timesformer("fcakyon/timesformer-large-finetuned-ssv2", 174, 64, 224, _LONG_SSV2),
)


def _videomae(name: str, classes: int, width: int, count: int) -> EncoderInfo:
    # A fine-tuned checkpoint has a LayerNorm and a classifier besides; a pre-trained one has a
    # decoder, whose size is not counted here.
    extra = 2 * width + (width + 1) * classes
    megabytes = round((count + extra) * _BYTES / 1e6) if classes else None
    return EncoderInfo(f"hf-hub:MCG-NJU/videomae-{name}", "video", _FETCHED, _MCG,
                       round(count / 1e6, 1), megabytes, 16, 224, width)  # fmt: skip


_VIDEOMAES = (
    EncoderInfo(
        "videomae",
        "video",
        "local-dir:PATH in Hugging Face's layout, config.json included",
        f"the checkpoint's own; {_MCG} for those of MCG-NJU",
    ),
    _videomae("small-finetuned-kinetics", 400, 384, 21_879_168),
    _videomae("small-finetuned-ssv2", 174, 384, 21_879_168),
    _videomae("base-finetuned-kinetics", 400, 768, 86_225_664),
    _videomae("base-finetuned-ssv2", 174, 768, 86_225_664),
    _videomae("base", 0, 768, 86_227_200),
    _videomae("large-finetuned-kinetics", 400, 1024, 303_858_688),
    _videomae("large", 0, 1024, 303_860_736),
    _videomae("huge-finetuned-kinetics", 400, 1280, 631_604_480),
)


def _torchvision(
    name: str, total: int, count: int, frames: int, size: int, width: int
) -> EncoderInfo:
    needs = "fetched from download.pytorch.org, or torchvision/NAME/FILE"
    return EncoderInfo(f"torchvision/{name}", "video", needs, _TORCHVISION, round(count / 1e6, 1),
                       round(total * _BYTES / 1e6), frames, size, width)  # fmt: skip


_LIBRARIES = (
    EncoderInfo(
        "timm/TAG, as timm/vit_base_patch16_clip_224.openai",
        "video",
        "every frame by itself; the tag's own weights, or timm/ARCH/FILE",
        "the tag's own: docs/encoders.md",
    ),
    EncoderInfo(
        "open_clip/ViT-B-16/openai",
        "video",
        "every frame by itself; the tag's own weights, or open_clip/ARCH/FILE",
        "MIT; other tags have their own",
        86.2,
        351,
        None,
        224,
        768,
    ),
    _torchvision("r3d_18", 33_371_472, 33_166_272, 16, 112, 512),
    _torchvision("mc3_18", 11_695_440, 11_490_240, 16, 112, 512),
    _torchvision("r2plus1d_18", 31_505_325, 31_300_125, 16, 112, 512),
    _torchvision("s3d", 8_320_048, 7_910_048, 16, 224, 1024),
    _torchvision("swin3d_t", 28_158_070, 27_850_470, 32, 224, 768),
    _torchvision("swin3d_s", 49_816_678, 49_509_078, 32, 224, 768),
    _torchvision("swin3d_b", 88_048_984, 87_638_984, 32, 224, 1024),
    _torchvision("mvit_v1_b", 36_610_672, 36_303_072, 16, 224, 768),
    _torchvision("mvit_v2_s", 34_537_744, 34_230_144, 16, 224, 768),
)
_CLIPS = (
    EncoderInfo("clip-embedded", "image+text", _EMBEDDED, "Apache-2.0", 1.9, 0, 8, 96, 128),
    EncoderInfo(
        "ViT-B-16 and every other open_clip architecture",
        "image+text",
        "weights: an open_clip tag (ViT-B-16/openai), hf-hub:org/name, local-dir:PATH or a file",
        "the checkpoint's own; MIT for openai and laion tags",
    ),
)
_TEXT_NEEDS = f"{_FETCHED}; and pip install 'msq[text]'"
_TEXTS = (  # megabytes are those of model.safetensors, width is D
    EncoderInfo("bert-base-uncased", "text", _TEXT_NEEDS, "Apache-2.0", 109.5, 440, width=768),
    EncoderInfo("all-MiniLM-L6-v2", "text", _TEXT_NEEDS, "Apache-2.0", 22.7, 91, width=384),
    EncoderInfo("all-mpnet-base-v2", "text", _TEXT_NEEDS, "Apache-2.0", 109.5, 438, width=768),
    EncoderInfo(
        "every other text or sentence encoder of Hugging Face",
        "text",
        "hf-hub:ORG/NAME or local-dir:PATH; and pip install 'msq[text]'",
        "the repository's own",
    ),
)


def list_encoders() -> list[dict[str, Any]]:
    """What can be loaded: an `EncoderInfo` as dictionary for each family and checkpoint."""
    return [asdict(x) for x in (*_TIMESFORMERS, *_VIDEOMAES, *_LIBRARIES, *_CLIPS, *_TEXTS)]
