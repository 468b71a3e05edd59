"""Prompts and sets of prompts: how they are given, averaged, stored and carried by runs."""

from __future__ import annotations

import dataclasses
import json
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import zarr

from msq import config as configuration
from msq.config import RunConfig
from msq.errors import SpecMismatch, UsageError
from msq.extract.datasets import Clip, Dataset
from msq.extract.encoders import load_clip, load_video_encoder
from msq.extract.encoders.prompts import (
    AVERAGE,
    PromptSet,
    averaged,
    described,
    parse_prompts,
)
from msq.extract.pipeline import extract
from msq.extract.plan_run import dry_run
from msq.extract.request import ExtractRequest
from msq.extract.store import open_store
from msq.head.class_splits import class_split
from msq.head.features import load_features
from msq.head.predict import load_head
from msq.head.protocol import require_protocol
from msq.head.train import train_head
from msq.head.zeroshot import seen_features

_fixtures = runpy.run_path(str(Path(__file__).with_name("encoder_fixtures.py")))
_fakes = runpy.run_path(str(Path(__file__).with_name("fakes.py")))
CLASSES = ("dog run", "dog walk", "bird fly")
SET = ("a photo of a {}.", "{} in a video", "the {}, seen twice: {}")


def test_a_template_is_a_set_of_one_under_a_readable_name() -> None:
    assert parse_prompts(["{}", "A video of {}!"]) == {
        "plain": "{}",
        "a-video-of": "A video of {}!",
    }
    assert PromptSet.parse("{}").templates == ("{}",)


def test_the_published_sets_are_those_of_open_clip() -> None:
    ensemble = PromptSet.parse("clip")
    assert (ensemble.name, len(ensemble.templates)) == ("clip-ensemble", 80)
    for template, function in zip(
        ensemble.templates, open_clip.OPENAI_IMAGENET_TEMPLATES, strict=True
    ):
        assert template.replace("{}", "zebra") == function("zebra")
    simple = PromptSet.parse("clip-simple")
    assert (simple.name, len(simple.templates)) == ("clip-simple", 7)
    assert "itap of a {}." in simple.templates


def test_a_file_holds_one_template_a_line(tmp_path: Path) -> None:
    file = tmp_path / "My Prompts.txt"
    file.write_text("\ufeff# of ours\n\n  a {} .\r\n#{} no\nthe {}, {}\n", encoding="utf-8")
    assert parse_prompts([str(file), "{}"]) == {"my-prompts": ("a {} .", "the {}, {}"),
                                                "plain": "{}"}  # fmt: skip
    file.write_text("the {}\n")
    assert parse_prompts([str(file)]) == {"my-prompts": "the {}"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a {}\nthe dog\n", r"p\.txt, line 2: expected a template with \{\} .*found 'the dog'"),
        (b"a {}\n\na {}\n", r"p\.txt, line 3: 'a \{\}' stands in line 1 already"),
        (b"# nothing\n\n", r"p\.txt: expected one template a line, .*found none"),
        (b"\xff\xfea {}", r"p\.txt: expected templates as UTF-8 text"),
    ],
)
def test_other_files_are_refused_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(UsageError, match=message):
        PromptSet.parse(str(tmp_path / "p.txt"))


def test_what_is_no_prompt_is_refused(tmp_path: Path) -> None:
    for given in ("a dog", str(tmp_path), "no-such-file.txt"):
        with pytest.raises(
            UsageError, match=r"expected a template with \{\} for the class name, clip"
        ):
            PromptSet.parse(given)
    with pytest.raises(UsageError, match="two different ones are both named 'a-dog' in a store: a"):
        parse_prompts(["a dog {}", "a dog: {}"])
    assert parse_prompts(["a dog {}", "a dog {}"]) == {"a-dog": "a dog {}"}
    with pytest.raises(UsageError, match="at least one template, found none"):
        PromptSet("x", ())
    assert described("the {}") == "the {}"
    assert described(SET).startswith("3 templates averaged (a photo of a {}. | {} in a video | the")


def test_the_average_is_the_documented_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(5, 7, 11, generator=generator) * torch.rand(5, 7, 1, generator=generator) * 9
    rows = raw.double().numpy()
    lengths = np.sqrt((rows**2).sum(-1))
    for k in range(7):
        u = np.mean([rows[m, k] / lengths[m, k] for m in range(5)], axis=0)
        expected = lengths[:, k].mean() * u / np.sqrt((u**2).sum())
        np.testing.assert_allclose(averaged(raw)[k].numpy(), expected, rtol=1e-6)
    # It is as long as the raw vectors are on average, and long ones weigh no more than short ones.
    np.testing.assert_allclose(averaged(raw).norm(dim=1).numpy(), lengths.mean(0), rtol=1e-6)
    scaled = averaged([raw[0] * 100, raw[1]])
    torch.testing.assert_close(
        torch.nn.functional.normalize(scaled), torch.nn.functional.normalize(averaged(raw[:2]))
    )


@dataclass
class World:
    """Encoders of random weights, one video, and a store with two prompts, one of them a set."""

    folder: Path
    data: Dataset
    image: Any
    text: Any
    video: Any

    def extract(self, prompts: Any) -> Any:
        extract(self.data, self.folder / "s.zarr", video=self.video, image=self.image,
                text=self.text, prompts=prompts, store_dtype="float32", workers=0)  # fmt: skip
        return open_store(self.folder / "s.zarr")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("prompts")
    tiny = _fixtures["random_timesformer"](_fixtures["TINY_TIMESFORMER"])
    _fixtures["write_timesformer_folder"](folder / "video", tiny)
    _fixtures["write_clip_folder"](folder / "image", _fixtures["TINY_CLIP"])
    clips = []
    for i in range(4):
        path = folder / f"video {i}.mp4"
        _fakes["write_video"](path, seed=i)
        clips.append(Clip(path.stem, path, None, None, (i % 3,), "test" if i > 2 else "train"))
    image, text = load_clip(f"local-dir:{folder / 'image'}", frames=3)
    video = load_video_encoder("timesformer", f"local-dir:{folder / 'video'}")
    data = Dataset("tiny", CLASSES, "multilabel", tuple(clips), "map")
    world = World(folder, data, image, text, video)
    world.extract({"plain": "{}", "ours": SET})
    return world


def test_a_store_holds_the_average_and_says_what_it_is_of(world: World) -> None:
    store = open_store(world.folder / "s.zarr")
    slug = world.text.spec.slug
    single = [world.text(list(CLASSES), template) for template in SET]
    torch.testing.assert_close(store.text(prompt="ours"), averaged(single), atol=0, rtol=0)
    assert torch.equal(store.text(prompt="plain"), world.text(list(CLASSES)))
    assert store.prompts() == {"plain": "{}", "ours": " | ".join(SET)}
    assert store.templates(prompt="ours") == SET
    assert store.templates(prompt="plain") == ("{}",)
    attributes = zarr.open_array(store.path / "text" / slug / "ours", mode="r").attrs["msq"]
    assert attributes["templates"] == list(SET)
    assert attributes["average"] == AVERAGE
    plain = zarr.open_array(store.path / "text" / slug / "plain", mode="r").attrs["msq"]
    assert not {"templates", "average"} & set(plain)
    assert store.verify() == []


def test_another_set_under_the_same_name_is_refused_with_the_difference(world: World) -> None:
    before = _fakes["tree"](world.folder / "s.zarr")
    world.extract({"ours": SET})  # the same: found
    for other, line in [
        (SET[:2], r"templates: expected 2, found 3$"),
        (
            (SET[0], "a {}", SET[2]),
            "templates, first difference at row 1: expected 'a {}', found '",
        ),
        ("a {}", r"templates: expected 1, found 3\n"),
    ]:
        with pytest.raises(
            SpecMismatch, match=rf"(?m)text/clip-image/ours was made [^$]*  .*{line}"
        ):
            world.extract({"ours": other})
    with pytest.raises(SpecMismatch, match="templates: expected 3, found 1"):
        world.extract({"plain": SET})
    with pytest.raises(SpecMismatch, match=r"template: expected 'a \{\}', found '\{\}'"):
        world.extract({"plain": "a {}"})
    assert _fakes["tree"](world.folder / "s.zarr") == before


def train(world: World, prompt: str, *more: str) -> tuple[Path, Any]:
    out = world.folder / f"run-{prompt}"
    values = [f"features.prompt={prompt}", "head.layers=1", "head.heads=2", "head.classifier=text",
              "train.epochs=1", "train.val=0", "train.batch=4", *more]  # fmt: skip
    features = load_features(open_store(world.folder / "s.zarr"), prompt=prompt)
    train_head(features, configuration.override(RunConfig(), values), out)
    return out, features


def test_runs_carry_the_set_and_encode_new_labels_with_it(world: World) -> None:
    run, features = train(world, "ours")
    assert features.prompt == SET
    store = open_store(world.folder / "s.zarr")
    head = load_head(run)
    assert head.meta["prompt"] == list(SET)
    new = ["dog walk", "bird run"]
    text = head._asked(new, None).text
    assert text is not None
    expected = averaged([world.text(new, template) for template in SET])
    torch.testing.assert_close(text, expected, atol=1e-6, rtol=0)

    def scores(**options: Any) -> list[float]:
        items = head.predict([0], new, store=store, **options)[0]["predictions"]
        return [item["score"] for item in sorted(items, key=lambda item: item["label"])]

    assert scores() == scores(prompt=SET) == scores(prompt=list(SET))
    assert scores(prompt=SET[0]) != scores()
    # Another set makes another run of it: the unfinished one is not taken up again.
    identity = features.identity()["prompt"]
    assert identity.startswith("3 templates averaged, ")
    fewer = dataclasses.replace(features, prompt=SET[:2]).identity()["prompt"]
    other = dataclasses.replace(features, prompt=(*SET[:2], "a {}")).identity()["prompt"]
    assert len({identity, fewer, other}) == 3
    assert dataclasses.replace(features, prompt="a {}").identity()["prompt"] == "a {}"
    json.dumps(features.identity())


def test_zero_shot_features_and_the_official_protocol_know_of_sets(world: World) -> None:
    features = load_features(open_store(world.folder / "s.zarr"), prompt="ours")
    part = seen_features(features, class_split(CLASSES, 0.67, 0))
    assert part.prompt == SET
    assert part.text is not None
    assert features.text is not None
    kept = [CLASSES.index(name) for name in part.classes]
    assert torch.equal(part.text, features.text[kept])
    config = configuration.override(RunConfig(), ["train.protocol=official"])
    with pytest.raises(SpecMismatch, match=r"prompt: expected \{\} .*, found a set of templates"):
        require_protocol(features, config)


def test_dry_runs_tell_what_a_prompt_is(world: World, tmp_path: Path) -> None:
    manifest = tmp_path / "clips.csv"
    manifest.write_text(f"path,labels,split\n{world.data.clips[0].path},run,train\n")
    (tmp_path / "two.txt").write_text("a {}\nthe {}\n")
    request = ExtractRequest(
        manifest=manifest,
        out=tmp_path / "o.zarr",
        video_encoder="none",
        image_encoder=f"local-dir:{world.folder / 'image'}",
        prompts=["{}", str(tmp_path / "two.txt"), "clip-simple"],
    )
    found = dry_run(request)["text"]["clip-image"]["prompts"]
    assert found["plain"] == "{}"
    assert found["two"] == "2 templates averaged (a {} | the {})"
    assert found["clip-simple"].startswith("7 templates averaged (itap of a {}. | a bad photo of")
    request.run()
    assert sorted(open_store(tmp_path / "o.zarr").prompts()) == ["clip-simple", "plain", "two"]
