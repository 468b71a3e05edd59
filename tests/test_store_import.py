"""Features computed elsewhere in a store: what is written, what is refused, what is trained."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import xarray as xr

import msq
from msq.cli import main
from msq.errors import SpecMismatch, StoreError, UsageError
from msq.extract.array_file import FeatureError
from msq.extract.claims import claim_store
from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.feature_import import ImportResult, import_features
from msq.extract.store import open_store

fakes = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fakes.py"))))
D = 6


def run(*arguments: Any) -> Any:
    """Exit code of one command."""
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    return left.value.code


def dataset(*clips: Clip) -> Dataset:
    return Dataset("toy", ("run", "jump"), "multilabel", clips, "map")


def videos(count: int) -> Dataset:
    return dataset(
        *(
            Clip(f"v{i}", Path(f"/data/v{i}.mp4"), None, None, (i % 2,), "train" if i else "test")
            for i in range(count)
        )
    )


def features(folder: Path, lengths: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    made = {f"v{i}": rng.normal(size=(n, D)).astype(np.float32) for i, n in enumerate(lengths)}
    for name, values in made.items():
        np.save(folder / f"{name}.npy", values)
    return made


def tree(path: Path) -> dict[str, bytes]:
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def load(data: Dataset, out: Path, source: Path, **options: Any) -> ImportResult:
    return import_features(data, out, source, name="i3d", store_dtype="float32", **options)


def test_pieces_global_token_and_times_are_written(tmp_path: Path) -> None:
    made = features(tmp_path / "f", [8, 4, 11])
    result = load(
        videos(3), tmp_path / "s.zarr", tmp_path / "f", tokens=4, seconds_per_feature=0.5, shard=2
    )
    assert (result.clips, result.done, result.failed, result.tokens) == (3, 3, 0, 5)
    store = open_store(tmp_path / "s.zarr")
    tokens = store.tokens()
    assert tokens.shape == (3, 5, D)
    for row, values in enumerate(made.values()):
        pooled = torch.nn.functional.adaptive_avg_pool1d(torch.from_numpy(values.T)[None], 4)[0].T
        torch.testing.assert_close(tokens[row, 1:], pooled)
        torch.testing.assert_close(tokens[row, 0], torch.from_numpy(values).mean(0))
    # Pieces of two features each, whose centres are 0.25 s, 0.75 s, …
    assert store.time()[0].tolist() == [0.5, 1.5, 2.5, 3.5]
    spec = store.spec("i3d")
    assert spec.line("toy") == (
        f"toy|i3d@{spec.sha256[:16]}|video imported|T4 every 0.5s from 0.25s|segments-pool|"
        f"global mean|fp32|5x{D}"
    )
    assert spec.weights == "imported:f"
    assert store.verify() == []
    with xr.open_datatree(tmp_path / "s.zarr", engine="zarr", consolidated=False) as opened:
        assert np.array_equal(opened["tokens"]["i3d"].values[:, 0], tokens.numpy())


def test_features_of_one_length_are_kept_as_they_are(tmp_path: Path) -> None:
    made = features(tmp_path / "f", [3, 3])
    load(videos(2), tmp_path / "s.zarr", tmp_path / "f", global_token="none")
    store = open_store(tmp_path / "s.zarr")
    assert np.array_equal(store.tokens().numpy(), np.stack(list(made.values())))
    assert store.spec("i3d").pooling == "none"
    assert torch.isnan(store.time()).all()
    features(tmp_path / "g", [3, 5])
    with pytest.raises(UsageError, match=r"3 \('v0'\) to 5 \('v1'\) features; .* --tokens S"):
        load(videos(2), tmp_path / "t.zarr", tmp_path / "g")
    assert not (tmp_path / "t.zarr").exists()


def test_vectors_become_one_token_or_an_image_feature(tmp_path: Path) -> None:
    vectors = np.random.default_rng(1).normal(size=(3, D)).astype(np.float32)
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["features"] = vectors
        file["ids"] = np.array([b"v2", b"v0", b"v1"])
    load(videos(3), tmp_path / "s.zarr", tmp_path / "f.h5")
    image = import_features(
        videos(3), tmp_path / "s.zarr", tmp_path / "f.h5", name="pooled", kind="image"
    )
    store = open_store(tmp_path / "s.zarr")
    assert np.array_equal(store.tokens()[:, 0].numpy(), vectors[[1, 2, 0]])
    assert store.tokens().shape == (3, 1, D)
    assert np.array_equal(store.image().numpy(), vectors[[1, 2, 0]].astype(np.float16))
    assert image.tokens == 0
    assert store.spec("pooled").pooling == "mean"
    assert store.verify() == []


def test_cuts_get_their_part_of_the_videos_features(tmp_path: Path) -> None:
    made = features(tmp_path / "f", [40])["v0"]
    cut = [(1.0, 3.0), (2.0, 2.01), (9.5, 30.0), (10.5, 12.0)]
    data = dataset(
        *(Clip(f"v0#{a}-{b}", Path("/data/v0.mp4"), a, b, (0,), "train") for a, b in cut)
    )
    with pytest.raises(UsageError, match=r"'v0#1\.0-3\.0' is a part of a video.*--seconds-per-f"):
        load(data, tmp_path / "s.zarr", tmp_path / "f", tokens=2)
    result = load(
        data, tmp_path / "s.zarr", tmp_path / "f", tokens=2, seconds_per_feature=0.25,
        feature_offset=0.2,
    )  # fmt: skip
    centres = [0.2 + 0.25 * i for i in range(40)]
    inside = [i for i, t in enumerate(centres) if 1 <= t < 3]
    store = open_store(tmp_path / "s.zarr")
    np.testing.assert_allclose(
        store.tokens([0])[0, 0].numpy(), made[inside].mean(axis=0), rtol=1e-5, atol=1e-6
    )
    nearest = int(np.argmin(np.abs(np.array(centres) - 2.005)))
    assert np.array_equal(store.tokens([1])[0, 1].numpy(), made[nearest])
    assert store.time([1])[0].tolist() == pytest.approx([centres[nearest]] * 2)
    # The last of them begins after the features end; the one before ends after them.
    assert result.failed == 1
    assert result.failures[0]["reason"] == (
        "the features of its video end at 9.95 s, outside of this part"
    )


def test_an_item_for_each_part_needs_no_rate(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    np.save(folder / "v0#1-2.npy", np.ones((2, D), np.float32))
    np.save(folder / "v0#3-4.npy", np.zeros((2, D), np.float32))
    data = dataset(
        *(Clip(f"v0#{a}-{a + 1}", Path("/data/v0.mp4"), a, a + 1, (0,), "train") for a in (3, 1))
    )
    load(data, tmp_path / "s.zarr", folder)
    assert open_store(tmp_path / "s.zarr").tokens()[:, 0, 0].tolist() == [0.0, 1.0]
    # Seconds of the video, not of the part.
    load(data, tmp_path / "t.zarr", folder, seconds_per_feature=0.5)
    assert open_store(tmp_path / "t.zarr").time().tolist() == [[3.25, 3.75], [1.25, 1.75]]


def test_what_cannot_be_used_is_recorded_and_the_rest_is_kept(tmp_path: Path) -> None:
    features(tmp_path / "f", [4, 4, 4, 4, 4, 4, 4])
    folder = tmp_path / "f"
    (folder / "v1.npy").unlink()
    nan = np.load(folder / "v2.npy")
    nan[2, 1:3] = np.nan
    np.save(folder / "v2.npy", nan)
    (folder / "v3.npy").write_bytes((folder / "v3.npy").read_bytes()[:-5])
    np.save(folder / "v4.npy", np.zeros((0, D), np.float32))
    np.save(folder / "v5.npy", np.full((4, D), 1e6, np.float32))
    np.save(folder / "other.npy", np.zeros((4, D), np.float32))
    result = import_features(videos(7), tmp_path / "s.zarr", folder, name="i3d", shard=3, tokens=2)
    assert (result.clips, result.done, result.failed) == (7, 2, 5)
    reasons = {entry["clip"]: entry["reason"] for entry in result.failures}
    assert reasons == {
        "v1": "no features for this clip in f",
        "v2": "2 of its features' values are NaN or infinite, first in 2",
        "v3": "features cannot be read",
        "v4": f"its features are empty, shape (0, 1, {D})",
        "v5": "features are not finite as float16 (largest magnitude 1e+06); try --store-dtype "
        "float32",
    }
    message = next(entry["message"] for entry in result.failures if entry["clip"] == "v3")
    assert message.startswith("f/v3.npy: damaged")
    assert (result.items, result.unused, result.unused_items) == (7, 1, ["other"])
    assert "1 of the 7 items of" in result.warnings[0]
    store = open_store(tmp_path / "s.zarr")
    assert store.status("i3d").tolist() == [1, 2, 2, 2, 2, 2, 1]
    assert store.verify() == []


def test_a_wrong_width_and_sources_without_a_fitting_item_are_errors(tmp_path: Path) -> None:
    features(tmp_path / "f", [4, 4])
    np.save(tmp_path / "f" / "v1.npy", np.zeros((4, D + 1), np.float32))
    expected = rf"v1\.npy: expected features of width {D} as in 'v0', found {D + 1}"
    with pytest.raises(FeatureError, match=expected):
        load(videos(2), tmp_path / "s.zarr", tmp_path / "f")
    np.save(tmp_path / "f" / "v0.npy", np.full((4, D), np.nan))
    np.save(tmp_path / "f" / "v1.npy", np.zeros((4, D)).T[:, :0])
    with pytest.raises(FeatureError, match=r"can be used \(24 of its .* first in 0; its features"):
        load(videos(2), tmp_path / "s.zarr", tmp_path / "f")
    (tmp_path / "g").mkdir()
    np.save(tmp_path / "g" / "v0_rgb.npy", np.zeros((4, D), np.float32))
    with pytest.raises(FeatureError, match=r"Clips are named 'v0' .* items 'v0_rgb'") as caught:
        load(videos(2), tmp_path / "s.zarr", tmp_path / "g")
    assert caught.value.exit_code == 1
    assert not (tmp_path / "s.zarr").exists()
    found = load(videos(2), tmp_path / "s.zarr", tmp_path / "g", key_template="{stem}_rgb")
    assert (found.done, found.failed) == (1, 1)


def test_the_same_source_is_done_and_another_is_refused(tmp_path: Path) -> None:
    made = features(tmp_path / "f", [4, 4, 4])
    first = load(videos(3), tmp_path / "s.zarr", tmp_path / "f", tokens=2, shard=2)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "s.zarr").rglob("*")}
    with h5py.File(tmp_path / "moved.h5", "w") as file:  # the same bytes by the same keys
        for key, values in made.items():
            file[key] = values
    for source in ("f", "moved.h5"):
        again = load(videos(3), tmp_path / "s.zarr", tmp_path / source, tokens=2, shard=2)
        assert (again.done, again.clips_per_second) == (first.done, 0.0)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "s.zarr").rglob("*")} == before
    with pytest.raises(SpecMismatch, match="frames: expected 3, found 2"):
        load(videos(3), tmp_path / "s.zarr", tmp_path / "f", tokens=3, shard=2)
    with pytest.raises(SpecMismatch, match="clips: expected 2, found 3"):
        load(videos(2), tmp_path / "s.zarr", tmp_path / "f", tokens=2, shard=2)
    np.save(tmp_path / "f" / "v1.npy", made["v1"] + 1)
    with pytest.raises(SpecMismatch, match=r"sha256: expected .*\n.*import them by another --name"):
        load(videos(3), tmp_path / "s.zarr", tmp_path / "f", tokens=2, shard=2)
    with claim_store(tmp_path / "s.zarr"), pytest.raises(StoreError, match="is writing this store"):
        load(videos(3), tmp_path / "s.zarr", tmp_path / "f", tokens=2, shard=2)


def test_features_that_change_between_the_two_looks_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features(tmp_path / "f", [4, 4])

    def event(found: dict[str, Any]) -> None:
        if found["stage"] == "read":
            np.save(tmp_path / "f" / "v0.npy", np.zeros((4, D), np.float32))

    with pytest.raises(FeatureError, match=r"v0\.npy: changed while it was imported"):
        load(videos(2), tmp_path / "s.zarr", tmp_path / "f", progress=event)
    assert open_store(tmp_path / "s.zarr").status("i3d").tolist() == [0, 0]


KILLED = """
import os, signal, sys
from pathlib import Path
from msq.extract import atomic, feature_rows, store_writer
from msq.cli import main
left = int(sys.argv[1])
def write(path, pieces, original=atomic.write_file):
    global left
    left -= 1
    if left < 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f".{path.name}.1.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return original(path, pieces)
store_writer.write_file = write
main(sys.argv[2:])
"""


def test_a_killed_import_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    features(tmp_path / "f", [5, 3, 4, 9, 6])
    (tmp_path / "f" / "v3.npy").unlink()
    manifest = tmp_path / "clips.csv"
    rows = [f"v{i}.mp4,run,train" for i in range(5)]
    manifest.write_text("\n".join(["path,labels,split", *rows]) + "\n")
    order = ["store", "import", tmp_path / "a.zarr", tmp_path / "f", "--name", "i3d",
             "--manifest", manifest, "--tokens", 2, "--shard", 2, "-q"]  # fmt: skip
    assert run(*order) == 3
    writes = len(tree(tmp_path / "a.zarr"))
    # In the middle of the encoder's metadata, and of the last shard's record.
    for place, left in enumerate((writes - 12, writes - 1)):
        order[2] = tmp_path / f"b{place}.zarr"
        words = [str(word) for word in order]
        killed = subprocess.run([sys.executable, "-c", KILLED, str(left), *words], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert tree(order[2]) != tree(tmp_path / "a.zarr")
        assert run(*order) == 3
        assert tree(order[2]) == tree(tmp_path / "a.zarr")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight videos, a manifest, and features of theirs."""
    folder = tmp_path_factory.mktemp("world")
    lines = ["path,labels,split"]
    for row, label in enumerate(["dog run", "bird fly"] * 4):
        fakes.write_video(folder / f"v{row}.mp4", seed=row)
        lines.append(f"v{row}.mp4,{label},{'test' if row > 5 else 'train'}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    features(folder / "f", [3 + row for row in range(8)])
    return folder


def import_i3d(world: Path, store: Path, *more: Any) -> int:
    return int(
        run("store", "import", store, world / "f", "--name", "i3d", "--manifest",
            world / "clips.csv", "--tokens", 4, "--feature-fps", 2, "-q", *more)
    )  # fmt: skip


def extract_clip(world: Path, store: Path) -> int:
    return int(
        run("extract", "--manifest", world / "clips.csv", "--out", store, "-q", "--workers", 0,
            "--video-encoder", "none", "--frames", 4)
    )  # fmt: skip


def test_imported_tokens_and_msqs_own_clip_in_either_order_train_a_head(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one.zarr", tmp_path / "two.zarr"
    assert import_i3d(world, one, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    keys = {"store", "clips", "done", "failed", "skipped", "seconds", "clips_per_second",
            "failures", "skipped_items", "warnings", "encoder", "tokens", "channels"}  # fmt: skip
    assert keys <= set(said)
    assert (said["clips"], said["done"], said["encoder"], said["tokens"]) == (8, 8, "i3d", 5)
    assert extract_clip(world, one) == 0
    assert extract_clip(world, two) == 0
    assert import_i3d(world, two) == 0
    assert tree(one) == tree(two)
    assert run("store", "verify", one) in (0, None)
    capsys.readouterr()
    assert run("store", "inspect", one, "--json") in (0, None)
    held = json.loads(capsys.readouterr().out)["encoders"]
    assert held["i3d"]["spec"].startswith("clips|i3d@")
    assert held["i3d"]["ok"] == held["clip-embedded"]["ok"] == 8
    done = run("train-head", one, "--out", tmp_path / "run", "--epochs", 2, "-q", "--queries",
               "multimodal", "features.video=i3d", "head.layers=1", "head.heads=4", "head.ffn=16",
               "train.val=0")  # fmt: skip
    assert done in (0, None)
    assert run("eval", tmp_path / "run", one, "--json") in (0, None)
    rows = msq.load_head(tmp_path / "run").predict([6, 7], store=open_store(one))
    assert [item["clip"] for item in rows] == ["v6", "v7"]
    capsys.readouterr()
    assert run("predict", world / "v0.mp4", "--run", tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert "features 'i3d' were imported from 'f'" in message
    assert "expected rows of the store" in message


def test_options_that_contradict_each_other_are_usage_errors(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "s.zarr"
    for more, words in (
        (("--seconds-per-feature", 1), "expected --seconds-per-feature or --feature-fps"),
        (("--kind", "image"), "expected 1 or more pieces of time"),
        (("--layout", "TND"), "a layout without N"),
        (("--layout", "TT"), "--layout 'TT'"),
        (("--feature-offset", -1), "expected 0 or more seconds"),
        (("--name", "I 3D"), "may hold only a-z"),
    ):
        assert import_i3d(world, store, *more) == 2
        assert words in capsys.readouterr().err
    assert not os.listdir(tmp_path)
