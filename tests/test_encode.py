"""`msq.encode`: a video's features without a store, to the bit those of the store."""

from __future__ import annotations

import runpy
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import msq
from msq.errors import UsageError, VideoError
from msq.extract import decode_task
from msq.extract.datasets import Clip, Dataset
from msq.extract.encode import encode_clip, encode_cuts
from msq.extract.encoders import load_clip, load_video_encoder
from msq.extract.pipeline import extract
from msq.extract.store import open_store
from msq.extract.timeline import Cut
from msq.extract.video_survey import survey
from msq.extract.views import augmented_views, clips_by_crops

_fixtures = runpy.run_path(str(Path(__file__).with_name("encoder_fixtures.py")))
_media = runpy.run_path(str(Path(__file__).with_name("media.py")))
fakes = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fakes.py"))))


@dataclass
class Made:
    """Encoders and the store that they made of some clips, float32, one clip at a time."""

    video: Any
    image: Any
    clips: tuple[Clip, ...]
    store: Any


@pytest.fixture(scope="module", params=["uniform", "official"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("encode")
    tiny = _fixtures["random_timesformer"](_fixtures["TINY_TIMESFORMER"])
    _fixtures["write_timesformer_folder"](folder / "video", tiny)
    _fixtures["write_clip_folder"](folder / "image", _fixtures["TINY_CLIP"])
    options: dict[str, Any] = {"sampling": request.param}
    if request.param == "official":
        options |= {"short_side": 48, "resize": "pil"}
    video = load_video_encoder("timesformer", f"local-dir:{folder / 'video'}", **options)
    image, _ = load_clip(f"local-dir:{folder / 'image'}", frames=3, **options)
    long, short = folder / "long.mp4", folder / "short.avi"
    _media["encode"](long, 60)
    _media["encode"](short, 3, codec="mpeg4", seed=1)
    clips = (
        Clip("whole", long, None, None, (0,), "train"),
        Clip("part", long, 0.5, 1.3, (0,), "train"),
        Clip("short", short, None, None, (1,), "test"),
    )
    data = Dataset("tiny", ("a", "b"), "multilabel", clips, "map")
    views = (*augmented_views(1), *clips_by_crops(2, 3))
    extract(data, folder / "s.zarr", video=video, image=image, text=None, store_dtype="float32",
            batch=1, workers=0, views=views)  # fmt: skip
    return Made(video, image, clips, open_store(folder / "s.zarr"))


def test_features_have_the_bits_of_the_stored_row(made: Made) -> None:
    for row, clip in enumerate(made.clips):
        tokens = msq.encode(clip.path, made.video, clip.start, clip.end)
        vector = msq.encode(str(clip.path), made.image, start=clip.start, end=clip.end)
        assert tokens.shape == (made.video.spec.tokens, made.video.spec.channels)
        assert vector.shape == (made.image.spec.channels,)
        assert tokens.dtype == vector.dtype == torch.float32
        assert torch.equal(tokens, made.store.tokens([row])[0])
        assert torch.equal(vector, made.store.image([row])[0])
    assert not torch.equal(
        made.store.tokens([0]), made.store.tokens([1])
    )  # the part is told from the whole


def test_every_view_has_the_bits_of_the_stored_one(made: Made) -> None:
    slug = made.video.spec.slug
    views = made.store.views(slug)
    assert [str(view) for view in views[:3]] == ["clean", "augmented 1", "test clip 1/2 crop 1/3"]
    seen = []
    for number, view in enumerate(views):
        for row, clip in enumerate(made.clips):
            given = view if row else str(view)
            tokens = msq.encode(clip.path, made.video, clip.start, clip.end, given, clip=clip.id)
            assert torch.equal(tokens, made.store.tokens([row], view=number)[0]), view
            seen.append(tokens)
    assert not torch.equal(seen[0], seen[3])  # views differ
    with pytest.raises(UsageError, match="'augmented 1': it is drawn from the clip's id"):
        msq.encode(made.clips[0].path, made.video, view="augmented 1")


def test_cuts_of_one_pass_are_the_parts_encoded_alone(made: Made) -> None:
    path = made.clips[0].path
    cuts = [Cut(k / 4, k / 4 + 0.5) for k in range(9)] + [Cut(99.0, 100.0)]
    found = dict(encode_cuts(survey(path), cuts, [made.video, made.image], batch=4))
    assert sorted(found) == list(range(10))
    for place in range(9):
        cut, both = cuts[place], found[place]
        alone = encode_clip(path, [made.video, made.image], cut.start, cut.end)
        for one, other in zip(both.features, alone.features, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
        for one, other in zip(both.times, alone.times, strict=True):
            assert one.tolist() == other.tolist()
    assert isinstance(found[9], VideoError)
    assert "at least one frame in the cut 99 s to 100 s" in str(found[9])


def test_cuts_of_one_pass_have_the_bits_of_the_parts_alone(made: Made) -> None:
    """In batches of one, as `encode_clip` has it: frames, times and features."""
    path = made.clips[0].path
    cuts = [Cut(k / 10, k / 10 + 0.5) for k in range(15)]
    found = dict(encode_cuts(survey(path), cuts, [made.video, made.image], batch=1))
    for place, cut in enumerate(cuts):
        alone = encode_clip(path, [made.video, made.image], cut.start, cut.end)
        for one, other in zip(found[place].features, alone.features, strict=True):
            assert torch.equal(one, other)


def test_cuts_are_decoded_beside_the_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.mp4"
    _media["encode"](path, 100)
    resized: list[int] = []
    pixels = decode_task.Picture.pixels

    def counted(self: Any, *arguments: Any) -> Any:
        resized.append(threading.get_ident())
        return pixels(self, *arguments)

    monkeypatch.setattr(decode_task.Picture, "pixels", counted)
    calls: list[int] = []

    class Slow(fakes.FakeEncoder):
        def __call__(self, video: torch.Tensor) -> torch.Tensor:
            calls.append(threading.get_ident())
            ahead = min(8 * (len(calls) + 1), 64)
            end = time.monotonic() + 600  # while a batch is encoded, the next one is decoded
            while len(resized) < ahead and time.monotonic() < end:
                time.sleep(0.005)
            assert ahead <= len(resized) <= ahead + 16  # and no more than the next two
            return super().__call__(video)

    cuts = [Cut(k / 4, k / 4 + 0.25) for k in range(16)]
    assert len(dict(encode_cuts(survey(path), cuts, [Slow()], batch=2))) == 16
    assert len(calls) == 8
    assert set(resized).isdisjoint(calls)  # in a thread of its own
    assert set(calls) == {threading.get_ident()}


def test_an_error_says_at_which_cut_it_was_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.mp4"
    _media["encode"](path, 50)
    cuts = [Cut(k / 4, k / 4 + 0.25) for k in range(7)]

    class Broken(fakes.FakeEncoder):
        def __call__(self, video: torch.Tensor) -> torch.Tensor:
            if len(self.calls) == 1:
                raise ValueError("no such kernel")
            return super().__call__(video)

    with pytest.raises(ValueError, match="no such kernel") as caught:
        list(encode_cuts(survey(path), cuts, [Broken()], batch=2))
    assert caught.value.__notes__ == [f"{path}: while encoding 0.5 s to 0.75 s, 0.75 s to 1 s"]
    pixels, calls = decode_task.Picture.pixels, []

    def broken(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 12:  # of four frames each
            raise ValueError("no such resizing")
        return pixels(self, *arguments)

    monkeypatch.setattr(decode_task.Picture, "pixels", broken)
    with pytest.raises(ValueError, match="no such resizing") as caught:
        list(encode_cuts(survey(path), cuts, [fakes.FakeEncoder()], batch=2))
    assert caught.value.__notes__ == [f"{path}: 0.5 s to 0.75 s was not done yet"]
    assert not [t for t in threading.enumerate() if t.name.startswith("ahead")]


def test_too_little_memory_for_a_batch_halves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.mp4"
    _media["encode"](path, 50)
    encoder = fakes.FakeEncoder()
    whole = fakes.FakeEncoder.__call__

    def small(self: Any, video: torch.Tensor) -> torch.Tensor:
        if len(video) > 2:
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return whole(self, video)

    cuts = [Cut(k / 4, k / 4 + 0.25) for k in range(7)]
    expected = dict(encode_cuts(survey(path), cuts, [encoder]))
    monkeypatch.setattr(fakes.FakeEncoder, "__call__", small)
    found = dict(encode_cuts(survey(path), cuts, [encoder]))
    assert encoder.calls == [7, 1, 2, 2, 2]
    for place, one in expected.items():
        torch.testing.assert_close(found[place].features[0], one.features[0])


def test_a_damaged_video_is_encoded_with_a_warning_and_others_are_refused(
    media: Any, tmp_path: Path
) -> None:
    encoder = fakes.FakeEncoder()
    with pytest.warns(UserWarning, match=r"flipped\.mp4: frames decoded with corrupt data"):
        assert msq.encode(media.damaged("flipped.mp4"), encoder).shape == (5, 6)
    with pytest.raises(VideoError, match=r"absent\.mp4: expected a video file, found nothing"):
        msq.encode(tmp_path / "absent.mp4", encoder)
    with pytest.raises(VideoError, match="expected at least one frame in the cut 50 s to the end"):
        msq.encode(media("cfr.mp4"), encoder, start=50)
    with pytest.raises(UsageError, match="expected a video or an image encoder, found one of text"):
        msq.encode(media("cfr.mp4"), fakes.FakeText())
    with pytest.raises(UsageError, match="view 'clear': expected clean"):
        msq.encode(media("cfr.mp4"), encoder, view="clear")


def test_a_folder_of_frames_is_cut_by_its_frame_rate(tmp_path: Path) -> None:
    for i, picture in enumerate(_media["pictures"](20, 48, 32)):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    encoder = fakes.FakeEncoder()
    whole = msq.encode(tmp_path, encoder)
    part = msq.encode(tmp_path, encoder, start=1, end=2, fps=5)
    assert part.shape == whole.shape
    assert not torch.equal(part, whole)
    with pytest.raises(UsageError, match=r"fps: expected a positive number .* found -1"):
        msq.encode(tmp_path, encoder, fps=-1)
    with pytest.raises(VideoError, match="give frame folders their frame rate"):
        msq.encode(tmp_path, encoder, start=1, end=2)
