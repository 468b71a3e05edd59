"""`msq extract --dry-run` says what the run will do, to the byte, and writes nothing."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msq.cli import main
from msq.errors import SpecMismatch, StoreError, UsageError
from msq.extract.decode_pool import cores
from msq.extract.plan_run import dry_run
from msq.extract.request import ExtractRequest
from msq.report import stage_one
from msq.report.stage_one import size

fakes = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fakes.py"))))
SPLITS = ("train", "train", "test", "val", "train", "test", "train")


def patch_encoders(
    monkeypatch: pytest.MonkeyPatch, pooling: str = "frame", text: Any = None
) -> None:
    """Every request gets encoders that take no time."""
    video = fakes.FakeEncoder(replace(fakes.SPEC, pooling=pooling))
    image = fakes.FakeEncoder(fakes.image_spec(frames=2, size=8))
    monkeypatch.setattr(
        ExtractRequest, "load_encoders", lambda _: (video, image, text or fakes.FakeText())
    )


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExtractRequest:
    patch_encoders(monkeypatch)
    lines = ["path,labels,split"]
    for row, split in enumerate(SPLITS):
        fakes.write_video(tmp_path / "v" / f"{row}.mp4", row)
        lines.append(f"{row}.mp4,{'run' if row % 2 else 'jump;feed a zorilla'},{split}")
    (tmp_path / "v" / "clips.csv").write_text("\n".join(lines) + "\n")
    return ExtractRequest(
        manifest=tmp_path / "v" / "clips.csv", out=tmp_path / "s.zarr", shard=3, workers=0
    )


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def stored_bytes(store: Path) -> int:
    return sum(count for count, _ in files(store).values())


@pytest.mark.parametrize("pooling", ["frame", "patch"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_the_bytes_are_those_of_the_finished_store(
    pooling: str, dtype: Any, request_: ExtractRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_encoders(monkeypatch, pooling)
    asked = replace(request_, store_dtype=dtype, prompts=("{}", "a video of {}"))
    before = dry_run(asked)
    assert asked.out is not None
    assert not asked.out.exists()
    assert not list(asked.out.parent.glob("*.claims"))
    assert before["bytes"]["total"] == before["bytes"]["pending"]
    assert before["shards"] == {"total": 3, "done": 0, "pending": 3}
    assert asked.run().done == 7
    assert stored_bytes(asked.out) == before["bytes"]["total"]
    found = files(asked.out)
    after = dry_run(asked)
    assert files(asked.out) == found
    assert after["bytes"] == {**before["bytes"], "pending": 0}
    assert after["shards"] == {"total": 3, "done": 3, "pending": 0}
    assert after["exists"]
    assert not before["exists"]


def test_features_take_rows_times_their_size(request_: ExtractRequest) -> None:
    plan = dry_run(request_)
    index = 3 * (3 * 16 + 4)
    assert plan["bytes"]["features"] == 7 * (5 * 6 * 2 + 4) + 7 * (6 * 2 + 4) + 2 * index
    assert plan["bytes"]["times"] == 7 * (4 * 4 + 4) + 7 * (2 * 4 + 4) + 2 * index
    assert plan["bytes"]["status"] == 2 * 3 * (3 + 4)
    sizes = [encoder["bytes"] for encoder in plan["encoders"].values()]
    assert sum(sizes) == plan["bytes"]["total"] - plan["bytes"]["other"]


def test_the_plan_names_what_the_run_will_use(request_: ExtractRequest) -> None:
    assert request_.manifest is not None
    with request_.manifest.open("a") as manifest:
        manifest.write("absent.mp4,run,test\nbad.mp4,run,nowhere\n")
    plan = dry_run(request_)
    assert (plan["clips"], plan["missing"], plan["skipped"], plan["classes"]) == (8, 1, 1, 3)
    assert plan["splits"] == {"train": 4, "test": 3, "val": 1}
    assert "nowhere" in plan["skipped_items"][0]["reason"]
    assert plan["encoders"]["fake-video"]["spec"] == fakes.SPEC.line(plan["dataset"])
    assert plan["encoders"]["fake-image"]["kind"] == "image"
    text = plan["text"]["fake-text"]
    assert text["prompts"] == {"plain": "{}"}
    assert text["unknown_words"] == {"feed a zorilla": ["zorilla"]}
    assert plan["free_bytes"] > 0
    assert plan["enough"] is True


def test_the_time_is_measured_on_a_few_clips(request_: ExtractRequest) -> None:
    found = dry_run(request_)["expected"]
    assert (found["clips"], found["sampled"], found["workers"]) == (7, 4, 0)
    each = found["encode_seconds"]
    assert {*each} == {"fake-video", "fake-image"}
    assert min(found["decode_seconds"], *each.values()) > 0
    # Without decode processes decoding and encoding take turns.
    assert found["seconds"] == pytest.approx(7 * (found["decode_seconds"] + sum(each.values())))
    found = dry_run(replace(request_, workers=2, views=2))["expected"]
    each, decoding = found["encode_seconds"], found["decode_seconds"]
    assert found["seconds"] == pytest.approx(
        7 * (decoding / min(2, cores()) + 3 * sum(each.values()))
    )
    assert request_.out is not None
    request_.run()
    done = dry_run(request_)["expected"]
    assert (done["seconds"], done["clips"], done["sampled"]) == (0.0, 0, 0)
    (request_.out / "status/fake-image/c/2/0").unlink()  # a shard of one clip, one encoder
    left = dry_run(request_)["expected"]
    assert (left["clips"], left["sampled"]) == (1, 1)
    assert left["encode_seconds"]["fake-video"] is None


def test_clips_that_cannot_be_timed_are_no_error(request_: ExtractRequest) -> None:
    assert request_.manifest is not None
    for row in range(7):
        (request_.manifest.parent / f"{row}.mp4").write_bytes(b"no video")
    found = dry_run(request_)["expected"]
    assert found["seconds"] is None
    assert "can be decoded" in found["reason"]


def test_a_store_that_cannot_fit_is_not_begun(
    request_: ExtractRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert request_.manifest is not None
    assert request_.out is not None
    (request_.manifest.parent / "6.mp4").unlink()  # takes no room
    row = (5 * 6 * 2 + 4) + (6 * 2 + 4)
    usage = SimpleNamespace(free=3 * 6 * row - 1)
    monkeypatch.setattr("msq.extract.plan_run.shutil.disk_usage", lambda _: usage)
    asked = replace(request_, views=2)
    with pytest.raises(StoreError, match=r"expected room for .* found .* free.*--limit"):
        asked.run()
    assert not request_.out.exists()
    usage.free += 1
    assert asked.run().done == 6
    usage.free = 0
    assert asked.run().done == 6  # what is there is there


def test_a_store_half_done_shows_what_is_left(request_: ExtractRequest) -> None:
    assert request_.out is not None
    assert request_.manifest is not None
    (request_.manifest.parent / "4.mp4").write_bytes(b"no video")
    result = request_.run()
    assert result.failed == 1
    (request_.out / "tokens/fake-video/c/1/0/0/0").unlink()
    (request_.out / "status/fake-image/c/2/0").unlink()
    (request_.out / "split/c/0").unlink()
    (request_.out / "label/c/0" / ".0.99.tmp").write_bytes(b"left by a killed writer")
    found = files(request_.out)
    plan = dry_run(request_)
    assert files(request_.out) == found
    assert plan["shards"] == {"total": 3, "done": 1, "pending": 2}
    shards = {name: encoder["shards"] for name, encoder in plan["encoders"].items()}
    assert shards["fake-video"] == {"total": 3, "done": 2, "pending": 1}
    assert shards["fake-image"] == {"total": 3, "done": 2, "pending": 1}
    assert plan["failed"] == 1
    index = 3 * 16 + 4
    video = 3 * (5 * 6 * 2 + 4) + 3 * (4 * 4 + 4) + 2 * index + 7
    image = 1 * (6 * 2 + 4) + 1 * (2 * 4 + 4) + 2 * index + 7
    split = plan["bytes"]["pending"] - video - image
    request_.run()
    assert split == (request_.out / "split/c/0").stat().st_size


def test_what_the_run_would_refuse_is_refused(
    request_: ExtractRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert request_.out is not None
    request_.run()
    found = files(request_.out)
    with pytest.raises(SpecMismatch, match="store_dtype"):
        dry_run(replace(request_, store_dtype="float32"))
    with pytest.raises(SpecMismatch, match="clips: expected 5, found 7"):
        dry_run(replace(request_, limit=5))
    with monkeypatch.context() as patched:
        patch_encoders(patched, text=fakes.FakeText(fakes.text_spec(sha256="1" * 64)))
        with pytest.raises(SpecMismatch, match="sha256"):
            dry_run(request_)
    same = fakes.FakeEncoder(), fakes.FakeEncoder(fakes.image_spec(slug="fake-video")), None
    monkeypatch.setattr(ExtractRequest, "load_encoders", lambda _: same)
    with pytest.raises(UsageError, match="both named 'fake-video'"):
        dry_run(request_)
    assert files(request_.out) == found


def test_a_place_that_cannot_hold_a_store_is_refused(
    request_: ExtractRequest, tmp_path: Path
) -> None:
    with pytest.raises(StoreError, match=r"found (clips\.csv|\d\.mp4); choose another place"):
        dry_run(replace(request_, out=tmp_path / "v"))
    with pytest.raises(UsageError, match="found a file"):
        dry_run(replace(request_, out=tmp_path / "v" / "clips.csv"))
    (tmp_path / "empty").mkdir()
    assert dry_run(replace(request_, out=tmp_path / "empty"))["shards"]["done"] == 0
    deep = tmp_path / "not" / "there" / "yet.zarr"
    assert dry_run(replace(request_, out=deep))["free_bytes"] > 0
    assert not (tmp_path / "not").exists()


def run_command(*arguments: object) -> int | None:
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    code = left.value.code
    assert code is None or isinstance(code, int)
    return code


def test_the_command_prints_one_document_or_a_table(
    request_: ExtractRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("extract", "--manifest", request_.manifest, "--out", request_.out, "--dry-run")
    before = files(tmp_path)
    assert run_command(*command, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["clips"] == 7
    assert run_command(*command) == 0
    shown = capsys.readouterr()
    assert "7 clips (4 train, 2 test, 1 val), 3 classes" in " ".join(shown.out.split())
    assert fakes.SPEC.line(plan["dataset"]) in shown.out
    assert f"store: {size(plan['bytes']['total'])} when finished" in shown.out
    assert "time: about" in shown.out
    assert "does not know zorilla" in shown.err
    assert files(tmp_path) == before


def test_what_is_left_out_by_rule_is_counted_on_stdout(
    request_: ExtractRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = {**dry_run(request_), "left_out": 2}
    monkeypatch.setattr("msq.extract.plan_run.dry_run", lambda _: plan)
    stage_one.show_dry_run(request_)
    said = capsys.readouterr()
    assert "2 left out by the dataset's own rules" in said.out
    assert "left out" not in said.err
    assert "skipped" not in said.out


def test_too_little_disk_is_said(
    request_: ExtractRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = SimpleNamespace(free=100)
    monkeypatch.setattr("msq.extract.plan_run.shutil.disk_usage", lambda _: usage)
    assert dry_run(request_)["enough"] is False
    run_command("extract", "--manifest", request_.manifest, "--out", request_.out, "--dry-run")
    assert "less free space" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (12_345_678, "12.3 MB"),
        (2 * 10**15, "2000.0 TB"),
    ],
)
def test_bytes_are_shown_in_a_readable_unit(count: int, text: str) -> None:
    assert size(count) == text
