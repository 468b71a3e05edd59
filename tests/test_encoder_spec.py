import hashlib
import json
from dataclasses import replace

import pytest

from msq.errors import SpecMismatch, UsageError
from msq.extract.encoders.spec import EncoderSpec, difference, slugify

VIDEO = EncoderSpec(
    slug="timesformer-base",
    kind="video",
    architecture="timesformer p16 d12 w768 h12 m3072",
    weights="hf-hub:org/timesformer-base",
    sha256="0123456789abcdef" * 4,
    frames=16,
    size=224,
    mean=(0.45, 0.45, 0.45),
    std=(0.225, 0.225, 0.225),
    pooling="frame",
    precision="fp16",
    sampling="uniform",
    resize="torch",
    output="",
    tokens=17,
    channels=768,
)


def test_the_line_is_readable_and_its_hash_is_the_fingerprint():
    line = VIDEO.line("charades")
    assert line == (
        "charades|timesformer-base@0123456789abcdef|video timesformer p16 d12 w768 h12 m3072|"
        "T16 uniform|224 torch|mean 0.45,0.45,0.45 std 0.225,0.225,0.225|frame-pool|fp16|17x768"
    )
    assert VIDEO.fingerprint("charades") == hashlib.sha256(line.encode()).hexdigest()
    assert VIDEO.fingerprint("thumos14") != VIDEO.fingerprint("charades")


@pytest.mark.parametrize(
    "change",
    [
        {"slug": "other"},
        {"kind": "image"},
        {"architecture": "timesformer p16 d24"},
        {"sha256": "f" * 64},
        {"frames": 8},
        {"size": 448},
        {"mean": (0.5, 0.45, 0.45)},
        {"std": (0.225, 0.225, 0.2250001)},
        {"pooling": "band"},
        {"precision": "fp32"},
        {"sampling": "official"},
        {"resize": "pil"},
        {"output": "pooler"},
        {"tokens": 16},
        {"channels": 512},
        {"resized": "time 8->16 nearest"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_that_changes_the_outputs_changes_the_line(change):
    other = replace(VIDEO, **change)
    assert other.line("d") != VIDEO.line("d")
    assert difference(VIDEO.to_dict(), other.to_dict())


def test_weights_reached_by_another_name_are_the_same_weights():
    moved = replace(VIDEO, weights="local-dir:elsewhere")
    assert moved.fingerprint("d") == VIDEO.fingerprint("d")
    assert difference(VIDEO.to_dict(), moved.to_dict()) == []
    other = replace(moved, sha256="f" * 64)
    assert len(difference(VIDEO.to_dict(), other.to_dict())) == 2


def test_differences_say_what_was_expected_and_found():
    found = replace(VIDEO, frames=8, mean=(0.5, 0.5, 0.5), resized="time 8->16 nearest")
    assert difference(VIDEO.to_dict(), found.to_dict()) == [
        "frames: expected 16, found 8",
        "mean: expected 0.45, 0.45, 0.45, found 0.5, 0.5, 0.5",
        "resized: expected nothing, found time 8->16 nearest",
    ]
    assert difference({"a": 1}, {"b": (2,)}) == [
        "a: expected 1, found nothing",
        "b: expected nothing, found 2",
    ]


def test_a_spec_survives_json_exactly():
    spec = replace(VIDEO, mean=(0.48145466, 0.4578275, 0.40821073))
    assert EncoderSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_spec_of_another_version_is_refused_with_the_names():
    values = VIDEO.to_dict()
    del values["resize"]
    with pytest.raises(SpecMismatch, match="missing resize, unknown colour"):
        EncoderSpec.from_dict({**values, "colour": "red"})


def test_text_encoders_have_nothing_of_frames_in_their_line():
    text = replace(VIDEO, kind="text", frames=0, size=0, mean=(), std=(), tokens=0, channels=512)
    assert text.line("d") == (
        "d|timesformer-base@0123456789abcdef|text timesformer p16 d12 w768 h12 m3072|fp16|512"
    )


def test_names_are_slugs():
    assert slugify("TimeSformer_divST_8x32_224_K400") == "timesformer-divst-8x32-224-k400"
    assert slugify("ViT-B-16") == "vit-b-16"
    assert slugify("été!") == "t"
    assert slugify("!") == "unnamed"
    with pytest.raises(UsageError, match="a-z"):
        replace(VIDEO, slug="ViT/B")


def test_a_dataset_name_cannot_break_the_line_into_more_parts():
    assert VIDEO.line("a|b").count("|") == VIDEO.line("ab").count("|")
