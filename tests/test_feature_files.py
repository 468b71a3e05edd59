"""Reading features that others computed: formats, keys, layouts, cuts, pieces."""

from __future__ import annotations

import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from msq.errors import MsqError, UsageError
from msq.extract.array_file import DamagedFile, FeatureError, PickledFile
from msq.extract.datasets.dataset import Clip
from msq.extract.feature_files import open_features
from msq.extract.feature_layout import (
    Rate,
    cut_into,
    orient,
    parse_layout,
    rows_inside,
    to_tokens,
)
from msq.extract.feature_matching import match_clips

rng = np.random.default_rng(3)
A, B = (rng.normal(size=(t, 4)).astype(np.float32) for t in (5, 7))


def read_all(path: Path, array: str | None = None) -> dict[str, np.ndarray]:
    source = open_features(path, array)
    try:
        return {key: np.asarray(source.read(key)) for key in sorted(set(source.keys.values()))}
    finally:
        source.close()


def check(found: dict[str, np.ndarray]) -> None:
    assert list(found) == ["a", "b"]
    assert np.array_equal(found["a"], A)
    assert np.array_equal(found["b"], B)


def test_a_folder_of_each_format(tmp_path: Path) -> None:
    np.save(tmp_path / "npy.npy", A)
    np.savez(tmp_path / "npz.npz", fps=np.float32(25), feats=A)
    torch.save(torch.from_numpy(A), tmp_path / "pt.pt")
    torch.save({"features": torch.from_numpy(A)}, tmp_path / "dict.pth")
    save_file({"x": A}, tmp_path / "sf.safetensors")
    with h5py.File(tmp_path / "h.h5", "w") as file:
        file["feat"] = A
    (tmp_path / "sub").mkdir()
    np.save(tmp_path / "sub" / "clip.mp4.npy", A)
    (tmp_path / "README.txt").write_text("no features")
    (tmp_path / "._npy.npy").write_bytes(b"what a Mac leaves behind")
    found = read_all(tmp_path)
    assert list(found) == ["dict", "h", "npy", "npz", "pt", "sf", "sub/clip.mp4"]
    assert all(np.array_equal(values, A) for values in found.values())


def test_one_file_with_an_array_per_id(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", a=A, b=B)
    save_file({"a": A, "b": B}, tmp_path / "all.safetensors")
    torch.save({"a": torch.from_numpy(A), "b": torch.from_numpy(B)}, tmp_path / "all.pt")
    with h5py.File(tmp_path / "flat.h5", "w") as file:
        file["a"], file["b"] = A, B
    with h5py.File(tmp_path / "groups.hdf5", "w") as file:  # as the C3D features of ActivityNet
        file["a/c3d_features"], file["b/c3d_features"] = A, B
    with h5py.File(tmp_path / "more.h5", "w") as file:
        for key, values in (("a", A), ("b", B)):
            file[f"{key}/features"], file[f"{key}/timestamps"] = values, np.arange(9.0)
            file[f"{key}/title"] = "text"
    for name in ("all.npz", "all.safetensors", "all.pt", "flat.h5", "groups.hdf5"):
        check(read_all(tmp_path / name))
    found = read_all(tmp_path / "more.h5")
    check({key: found[key] for key in ("a", "b")})
    assert list(found) == ["a", "a/timestamps", "b", "b/timestamps"]


def test_one_large_array_with_a_list_of_ids(tmp_path: Path) -> None:
    both = np.stack([A, A[::-1]])
    np.savez(tmp_path / "t.npz", features=both, ids=np.array(["a", "ü b"]), labels=np.arange(2))
    with h5py.File(tmp_path / "t.h5", "w") as file:
        file["feats"], file["labels"] = both, np.arange(2)
        file["video_ids"] = np.array(["a", "ü b"], dtype=object)
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["rgb"], file["flow"] = both, -both
        file["names"] = np.array([b"a", "ü b".encode()])
    for name, array in (("t.npz", None), ("t.h5", None), ("s.h5", "rgb")):
        found = read_all(tmp_path / name, array)
        assert list(found) == ["a", "ü b"]
        assert np.array_equal(found["ü b"], A[::-1])
    with pytest.raises(FeatureError, match="--array NAME chooses"):
        read_all(tmp_path / "s.h5")
    with h5py.File(tmp_path / "twice.h5", "w") as file:
        file["x"], file["ids"] = both, np.array([b"a", b"a"])
    with pytest.raises(FeatureError, match="'ids' repeats 'a'"):
        read_all(tmp_path / "twice.h5")


def test_bfloat16_and_numbers_in_the_other_order_of_bytes(tmp_path: Path) -> None:
    torch.save(torch.from_numpy(A).bfloat16(), tmp_path / "a.pt")
    np.save(tmp_path / "b.npy", B.astype(">f4"))
    found = read_all(tmp_path)
    assert np.array_equal(found["a"], torch.from_numpy(A).bfloat16().float().numpy())
    assert np.array_equal(orient(found["b"], "auto", "b")[:, 0], B)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


def test_pickled_objects_are_refused_in_every_format(tmp_path: Path) -> None:
    objects = np.array([Evil(tmp_path / "mark"), None], dtype=object)
    np.save(tmp_path / "o.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "o.npz", a=objects)
    torch.save({"a": Evil(tmp_path / "mark")}, tmp_path / "o.pt")
    (tmp_path / "p.npy").write_bytes(pickle.dumps([1, 2]))
    for name in ("o.npy", "o.npz", "o.pt", "p.npy"):
        with pytest.raises(PickledFile, match="pickled Python objects"):
            read_all(tmp_path / name)
    assert not (tmp_path / "mark").exists()


def test_damaged_and_unsuitable_files_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "short.npy", A)
    whole = (tmp_path / "short.npy").read_bytes()
    (tmp_path / "short.npy").write_bytes(whole[:-9])
    for name in ("x.npy", "x.npz", "x.pt", "x.safetensors", "x.h5"):
        (tmp_path / name).write_bytes(b"not at all what the suffix says")
    for name in ("x.npy", "x.npz", "x.safetensors", "x.h5"):
        with pytest.raises(DamagedFile, match=name):
            open_features(tmp_path / name)
    with pytest.raises(MsqError, match=r"x\.pt"):
        open_features(tmp_path / "x.pt")
    (tmp_path / "f").mkdir()
    (tmp_path / "short.npy").rename(tmp_path / "f" / "short.npy")
    with pytest.raises(DamagedFile, match=r"short\.npy: damaged"):
        read_all(tmp_path / "f")
    np.save(tmp_path / "one.npy", np.stack([A, A]))
    with pytest.raises(FeatureError, match="no list of ids"):
        open_features(tmp_path / "one.npy")
    with pytest.raises(UsageError, match="there is none"):
        open_features(tmp_path / "nowhere")
    (tmp_path / "f" / "short.pt").touch()
    with pytest.raises(FeatureError, match=r"short\.npy and short\.pt"):
        open_features(tmp_path / "f")


def clip(name: str, path: str, start: float | None = None, end: float | None = None) -> Clip:
    return Clip(name, Path("/data") / path, start, end, (), "train")


def matched(clips: list[Clip], *keys: str, template: str | None = None) -> list[object]:
    found = match_clips(clips, {key: key for key in keys}, template)
    return [None if match is None else (match.key, match.cut) for match in found]


def test_clips_are_found_by_id_path_and_name() -> None:
    run, jump = clip("run/a", "run/a.mp4"), clip("jump/a", "jump/a.mp4")
    whole = (("run/a", False), ("jump/a", False))
    assert matched([run, jump], "jump/a", "run/a") == [*whole]
    assert matched([clip("1", "run/a.mp4")], "run/a.mp4") == [("run/a.mp4", False)]
    assert matched([clip("1", "x/a.b.mp4")], "train/a.b") == [("train/a.b", False)]
    assert matched([clip("q", "q.mp4"), clip("v_r", "v_r.mp4")], "v_q", "r") == [
        ("v_q", False),
        ("r", False),
    ]
    # What belongs to jump/a is not given to run/a, whose features are missing.
    assert matched([run, jump], "jump/a") == [None, ("jump/a", False)]
    cuts = [clip("f#1-2", "f.mp4", 1, 2), clip("f#3-4", "f.mp4", 3, 4)]
    assert matched(cuts, "f", "f#3-4") == [("f", False), ("f#3-4", True)]


def test_an_item_of_two_videos_or_two_items_of_one_are_refused() -> None:
    clips = [clip("run/a", "run/a.mp4"), clip("jump/a", "jump/a.mp4")]
    with pytest.raises(FeatureError, match=r"'a' fit two videos, 'run/a' .* and 'jump/a'"):
        matched(clips, "a")
    with pytest.raises(FeatureError, match=r"fits several items, 'x/q' and 'y/q'"):
        matched([clip("q", "q.mp4")], "x/q", "y/q")
    with pytest.raises(FeatureError, match="fit two videos"):
        matched(clips, "a", template="{stem}")


def test_templates_name_items() -> None:
    clips = [clip("c7", "run/a.mp4", 1.5, 2.0)]
    assert matched(clips, "a_rgb", "a", template="{stem}_rgb") == [("a_rgb", False)]
    assert matched(clips, "run-a", template="{parent}-{stem}") == [("run-a", False)]
    assert matched(clips, "a_1.5_2.0", template="{stem}_{start}_{end}") == [("a_1.5_2.0", True)]
    assert matched(clips, "f/c7", template="f/{id}") == [("f/c7", True)]
    assert matched(clips, "a", template="{stem}_flow") == [None]
    with pytest.raises(UsageError, match=r"expected the fields \{id\}"):
        matched(clips, "a", template="{video}")


def test_layouts_bring_time_tokens_and_width_into_order() -> None:
    x = rng.normal(size=(6, 4))
    expected = x.astype(np.float32)[:, None]
    for values in (x, x[None], x[:, None], x[:, :, None, None], x[:, None, None]):
        assert np.array_equal(orient(values, "auto", "x"), expected)
    assert orient(x[0], "auto", "x").shape == (1, 1, 4)
    assert np.array_equal(orient(x.T, "DT", "x"), expected)
    y = rng.normal(size=(2, 4, 6, 3, 3))  # what a 3-D CNN puts out, for two crops
    by_hand = y.mean(axis=(0, 3, 4)).T[:, None]
    np.testing.assert_allclose(orient(y, "VDTHW", "y"), by_hand, rtol=1e-6)
    kept = orient(y[0, :, :, :, 0], "DTN", "y")
    assert kept.shape == (6, 3, 4)
    assert kept[5, 2, 1] == np.float32(y[0, 1, 5, 2, 0])
    for values in (y, y[0], y[0, 0], rng.normal(size=(1, 4, 6, 1, 1))):
        with pytest.raises(FeatureError, match="several ways; say which with --layout"):
            orient(values, "auto", "file.npy")
    with pytest.raises(FeatureError, match="expected 3 axes"):
        orient(x, "TVD", "file.npy")
    with pytest.raises(FeatureError, match="array of numbers"):
        orient(np.array(["a"]), "auto", "file.npy")
    for wrong in ("TT", "TV", "TDX", "DTD", ""):
        with pytest.raises(UsageError, match="--layout"):
            parse_layout(wrong)
    assert parse_layout("tvd") == "TVD"


@given(count=st.integers(1, 60), pieces=st.integers(1, 24))
def test_pieces_are_those_of_adaptive_average_pooling(count: int, pieces: int) -> None:
    x = np.random.default_rng(count).normal(size=(count, 1, 3)).astype(np.float32)
    found = cut_into(x, pieces)[:, 0]
    if count >= pieces:
        pooled = torch.nn.functional.adaptive_avg_pool1d(
            torch.from_numpy(x[:, 0].T.astype(np.float64))[None], pieces
        )
        np.testing.assert_allclose(found, pooled[0].T.numpy(), rtol=1e-6, atol=1e-7)
    else:  # the feature whose span holds the middle of the piece
        middles = [(j + 0.5) / pieces for j in range(pieces)]
        spans = [next(i for i in range(count) if m < (i + 1) / count + 1e-12) for m in middles]
        exact = [i for i, m in zip(spans, middles, strict=True) if abs(m * count % 1) > 1e-9]
        rows = [k for k, m in enumerate(middles) if abs(m * count % 1) > 1e-9]
        assert np.array_equal(found[rows], x[exact, 0])


def test_the_global_token_is_the_mean_of_all_features() -> None:
    x = rng.normal(size=(5, 2, 4)).astype(np.float32)
    tokens = to_tokens(x, None, global_token=True)
    assert tokens.shape == (11, 4)
    np.testing.assert_allclose(tokens[0], x.reshape(10, 4).mean(axis=0), rtol=1e-5, atol=1e-7)
    assert np.array_equal(tokens[1:], x.reshape(10, 4))


def test_rows_of_a_cut_are_those_whose_centre_lies_inside() -> None:
    # THUMOS14's I3D features: 16 frames at 30 fps every 4 frames.
    rate = Rate(4 / 30, 8 / 30)
    centres = [8 / 30 + i * 4 / 30 for i in range(50)]
    for start, end in ((1.0, 2.0), (0.0, 0.5), (None, 1.0), (6.0, None), (6.0, 99.0)):
        low, high = start or 0.0, 1e9 if end is None else end
        expected = [i for i, t in enumerate(centres) if low <= t < high]
        assert rows_inside(clip("c", "c.mp4", start, end), 50, rate).tolist() == expected
    assert rows_inside(clip("c", "c.mp4", 1.0, 1.05), 50, rate).tolist() == [6]  # 1.0667
    assert rows_inside(clip("c", "c.mp4", 0.0, 0.1), 50, rate).tolist() == [0]
    assert rows_inside(clip("c", "c.mp4", 7.0, 7.06), 50, rate).tolist() == [49]  # ends at 7.07
    assert rows_inside(clip("c", "c.mp4", 7.1, 9.0), 50, rate).tolist() == []
    shown = Clip("c", Path("c.mp4"), 0.0, 4.0, (), "train", keep=((0.5, 0.7), (3.0, 3.2)))
    expected = [i for i, t in enumerate(centres) if 0.5 < t < 0.7 or 3.0 < t < 3.2]
    assert rows_inside(shown, 50, rate).tolist() == expected
