from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

from msq.errors import SpecMismatch, StoreError, UsageError
from msq.extract.claims import claim_store
from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.store import open_store
from msq.extract.store_writer import Failure, ShardRows, StoreWriter

fakes = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("fakes.py"))))
CLASSES = ("run", "jump", "swim")


def dataset(count: int = 10, **changes: object) -> Dataset:
    clips = tuple(
        Clip(f"ü/{row} x", Path(f"{row}.mp4"), None, None, (row % 3,) if row else (), "train")
        for row in range(count)
    )
    return replace(Dataset("toy", CLASSES, "multilabel", clips, "map"), **changes)


def shard_rows(spec, rows: range, status: list[int] | None = None, dtype: str = "float16"):
    """Rows that can be told apart: row r holds values that start at r."""
    shape = (spec.tokens, spec.channels) if spec.kind == "video" else (spec.channels,)
    count = int(np.prod(shape))
    values = np.stack([np.arange(count).reshape(shape) / 100 + row for row in rows])
    times = np.stack([np.arange(spec.frames) + row for row in rows]).astype(np.float32)
    codes = np.array(status or [1] * len(rows), dtype=np.uint8)
    return ShardRows(values.astype(dtype), times, codes)


def fill(path: Path, data: Dataset, specs, status=None, store_dtype="float16", shard=4):
    """A whole store written without videos; `status` maps rows to codes other than 1."""
    status = status or {}
    disk = {"bfloat16": "uint16"}.get(store_dtype, store_dtype)
    writer = StoreWriter(path, data, store_dtype=store_dtype, shard=shard)
    for spec in specs:
        writer.add_encoder(spec)
    for k in range(writer.shards):
        rows = writer.rows(k)
        codes = [status.get(row, 1) for row in rows]
        failures = [
            Failure(row, data.clips[row].id, code, "broken", "moov atom not found", spec.slug)
            for spec in specs
            for row, code in zip(rows, codes, strict=True)
            if code in (2, 3)
        ]
        writer.commit(k, {s.slug: shard_rows(s, rows, codes, disk) for s in specs}, failures)
    return writer


def test_what_was_written_reads_back_in_any_order_and_dtype(tmp_path: Path) -> None:
    image = fakes.image_spec()
    fill(tmp_path / "a.zarr", dataset(), [fakes.SPEC, image])
    store = open_store(tmp_path / "a.zarr")
    expected = torch.from_numpy(shard_rows(fakes.SPEC, range(10)).features)
    assert store.name == "toy"
    assert store.classes == CLASSES
    assert store.clips == tuple(f"ü/{row} x" for row in range(10))
    assert store.encoders() == ["fake-video", "fake-image"]
    assert store.encoders("image") == ["fake-image"]
    assert store.spec("fake-video") == fakes.SPEC
    assert torch.equal(store.tokens(), expected)
    assert store.tokens().dtype == torch.float16
    order = [9, 0, 5, 5, -1, 4]
    assert torch.equal(store.tokens(order), expected[order])
    assert torch.equal(store.tokens(torch.tensor(order)), expected[order])
    assert torch.equal(store.tokens(np.array([2, 3, 4])), expected[2:5])
    assert torch.equal(store.tokens(slice(1, 9, 3)), expected[1:9:3])
    mask = torch.arange(10) % 2 == 0
    assert torch.equal(store.tokens(mask), expected[mask])
    assert store.tokens([]).shape == (0, 5, 6)
    assert torch.equal(
        store.image([7]), torch.from_numpy(shard_rows(image, range(10)).features[7:8])
    )
    assert store.time([3], "fake-video").tolist() == [[3, 4, 5, 6]]
    assert store.labels([0, 1, 2]).tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert store.splits == ("train",) * 10
    assert store.verify() == []


@pytest.mark.parametrize("rows", [[10], [-11], [[0, 1]], [0.5]])
def test_rows_that_do_not_exist_are_refused(tmp_path: Path, rows: list) -> None:
    fill(tmp_path / "a.zarr", dataset(), [fakes.SPEC])
    with pytest.raises(StoreError, match="row"):
        open_store(tmp_path / "a.zarr").tokens(rows)


def test_float32_and_bfloat16_are_returned_as_stored(tmp_path: Path) -> None:
    fill(tmp_path / "a.zarr", dataset(), [fakes.SPEC], store_dtype="float32")
    assert open_store(tmp_path / "a.zarr").tokens().dtype == torch.float32
    values = torch.randn(10, 5, 6).to(torch.bfloat16)
    writer = StoreWriter(tmp_path / "b.zarr", dataset(), store_dtype="bfloat16", shard=4)
    writer.add_encoder(fakes.SPEC)
    for k in range(3):
        rows = writer.rows(k)
        part = values[rows.start : rows.stop].view(torch.uint16).numpy()
        like = shard_rows(fakes.SPEC, rows)
        writer.commit(k, {"fake-video": ShardRows(part, like.times, like.status)}, [])
    store = open_store(tmp_path / "b.zarr")
    assert torch.equal(store.tokens(), values)
    assert (
        zarr.open(tmp_path / "b.zarr")["tokens/fake-video"].attrs["msq"]["store_dtype"]
        == "bfloat16"
    )


def test_plain_zarr_reads_the_same_and_nothing_warns(tmp_path: Path) -> None:
    fill(tmp_path / "a.zarr", dataset(), [fakes.SPEC, fakes.image_spec()], {2: 2, 6: 3})
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    found = dict(group.members(max_depth=None))
    assert found["tokens/fake-video"].metadata.dimension_names == (
        "clip",
        "view",
        "fake-video_token",
        "fake-video_channel",
    )
    expected = shard_rows(fakes.SPEC, range(10)).features
    expected[2] = 0
    assert np.array_equal(found["tokens/fake-video"][:, 0], expected)
    assert np.isnan(found["time/fake-video"][2]).all()
    assert found["status/fake-video"][:, 0].tolist() == [1, 1, 2, 1, 1, 1, 3, 1, 1, 1]
    assert list(found["clip"][:3]) == ["ü/0 x", "ü/1 x", "ü/2 x"]
    assert group.attrs["msq"]["classes"] == list(CLASSES)


def test_xarray_opens_the_store_with_dimension_names(tmp_path: Path) -> None:
    fill(tmp_path / "a.zarr", dataset(), [fakes.SPEC, fakes.image_spec()], {2: 2})
    root = xr.open_zarr(tmp_path / "a.zarr", consolidated=False)
    assert dict(root.sizes) | {"failure": 0} == {"clip": 10, "class": 3, "failure": 0}
    assert root["clip"].values.tolist()[9] == "ü/9 x"
    nodes = xr.open_datatree(tmp_path / "a.zarr", engine="zarr", consolidated=False)
    tokens = nodes["tokens/fake-video"]
    assert tokens.dims == ("clip", "view", "fake-video_token", "fake-video_channel")
    assert nodes["image/fake-image"].dims == ("clip", "view", "fake-image_channel")
    assert nodes["time/fake-image"].dims == ("clip", "view", "fake-image_frame")
    assert np.array_equal(tokens.values[3, 0], shard_rows(fakes.SPEC, range(4)).features[3])


def test_large_arrays_have_the_bytes_that_plain_zarr_would_write(tmp_path: Path) -> None:
    patch = replace(fakes.SPEC, slug="fake-patch", pooling="patch", tokens=7)
    fill(tmp_path / "a.zarr", dataset(), [fakes.SPEC, fakes.image_spec(), patch], {5: 2, 8: 2})
    mine = zarr.open_group(tmp_path / "a.zarr", mode="r")
    copy = zarr.open_group(tmp_path / "b.zarr", mode="w")
    for group in ("tokens", "image", "time", "status"):
        for name, array in mine[group].members():
            path = f"{group}/{name}"
            meta = tmp_path / "b.zarr" / path / "zarr.json"
            meta.parent.mkdir(parents=True)
            meta.write_bytes((tmp_path / "a.zarr" / path / "zarr.json").read_bytes())
            zarr.open_array(meta.parent)[...] = array[...]
            ours = fakes.tree(tmp_path / "a.zarr" / path)
            assert ours == fakes.tree(meta.parent)
            assert len(ours) == (9 if path == "tokens/fake-patch" else 4)
    assert copy.metadata.node_type == "group"


def test_failed_and_missing_rows_are_refused_by_name(tmp_path: Path) -> None:
    data = dataset()
    writer = fill(tmp_path / "a.zarr", data, [fakes.SPEC], {2: 2, 6: 3})
    store = open_store(tmp_path / "a.zarr")
    with pytest.raises(StoreError, match=r"1 of the 10 rows.*failed.*'ü/2 x'.*ok_rows"):
        store.tokens()
    assert store.ok_rows().tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert store.tokens(store.ok_rows()).shape == (9, 5, 6)
    assert [(f["clip"], f["status"], f["reason"]) for f in store.failures()] == [
        ("ü/2 x", 2, "broken"),
        ("ü/6 x", 3, "broken"),
    ]
    (tmp_path / "a.zarr/status/fake-video/c/2/0").unlink()
    with pytest.raises(StoreError, match=r"2 of the 9 rows.*not extracted yet.*'ü/8 x'"):
        store.tokens([*store.ok_rows().tolist(), 8, 9])
    assert store.status("fake-video").tolist() == [1, 1, 2, 1, 1, 1, 3, 1, 0, 0]
    assert [writer.is_done("fake-video", k) for k in range(3)] == [True, True, False]


def test_a_shard_without_any_readable_row_has_a_status_and_nothing_else(tmp_path: Path) -> None:
    writer = fill(tmp_path / "a.zarr", dataset(), [fakes.SPEC], dict.fromkeys(range(4, 8), 2))
    store = open_store(tmp_path / "a.zarr")
    assert not (tmp_path / "a.zarr/tokens/fake-video/c/1").exists()
    assert store.status("fake-video").tolist() == [1] * 4 + [2] * 4 + [1] * 2
    assert writer.is_done("fake-video", 1)
    assert store.tokens([0, 9]).shape == (2, 5, 6)


def damage(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_every_kind_of_damage_is_refused_with_file_and_clip(tmp_path: Path) -> None:
    writer = fill(tmp_path / "a.zarr", dataset(), [fakes.SPEC])
    store = open_store(tmp_path / "a.zarr")
    file = tmp_path / "a.zarr/tokens/fake-video/c/1/0/0/0"
    content = file.read_bytes()

    damage(file, 64 * 2 + 3)  # in the third row of the shard, 60 bytes and 4 of checksum a row
    with pytest.raises(StoreError, match=r"'ü/6 x'.*tokens/fake-video/c/1.*checksum"):
        store.tokens()
    assert store.tokens([5, 7]).shape == (2, 5, 6)
    assert "ü/6 x" in " ".join(store.verify())

    file.write_bytes(content[:-10])
    with pytest.raises(StoreError, match=r"'ü/4 x'.*index"):
        store.tokens([4])
    assert not writer.is_done("fake-video", 1)
    file.unlink()
    with pytest.raises(StoreError, match=r"'ü/4 x'.*missing although"):
        store.tokens([4])
    assert not writer.is_done("fake-video", 1)
    file.write_bytes(content)
    assert store.verify() == []

    record = tmp_path / "a.zarr/status/fake-video/c/1/0"
    damage(record, 0)
    for read in (store.ok_rows, lambda: store.tokens([4]), lambda: store.tokens([0, 7])):
        with pytest.raises(StoreError, match=r"status/fake-video/c/1/0.*checksum"):
            read()
    assert store.tokens([0, 9]).shape == (2, 5, 6)  # of the other shards
    assert writer.status("fake-video", 1) is None


def test_a_changed_small_array_or_spec_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    fill(path, dataset(), [fakes.SPEC])
    damage(path / "label/c/0/0", 1)
    with pytest.raises(StoreError, match=r"label.*damaged"):
        open_store(path).labels()
    with pytest.raises(StoreError, match="label/c/0/0: the bytes changed"):
        StoreWriter(path, dataset(), shard=4)
    (path / "label/c/0/0").unlink()
    with pytest.raises(StoreError, match=r"label: its data is missing"):
        open_store(path).labels()
    StoreWriter(path, dataset(), shard=4)  # puts it back
    assert open_store(path).labels().sum() == 9
    meta = path / "tokens/fake-video/zarr.json"
    meta.write_text(meta.read_text().replace('"size": 16', '"size": 17'))
    with pytest.raises(StoreError, match=r"fake-video/zarr.json: the metadata was changed"):
        open_store(path)
    old = json.loads(meta.read_text())  # without a digest, as stores were before there was one
    del old["attributes"]["msq"]["metadata_sha256"]
    meta.write_text(json.dumps(old))
    with pytest.raises(StoreError, match="does not agree with itself"):
        open_store(path)


def test_places_that_hold_no_store_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no feature store here"):
        open_store(tmp_path / "nothing.zarr")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("three years")
    with pytest.raises(StoreError, match="not a feature store of msq"):
        StoreWriter(tmp_path / "other", dataset())
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.txt"]
    zarr.create_group(tmp_path / "plain.zarr")
    with pytest.raises(StoreError, match="not a feature store of msq"):
        open_store(tmp_path / "plain.zarr")
    with pytest.raises(UsageError, match="found a file"):
        StoreWriter(tmp_path / "other" / "thesis.txt", dataset())
    with pytest.raises(UsageError, match="no clips"):
        StoreWriter(tmp_path / "empty.zarr", dataset(0))


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (
            {"classes": ("run", "leap", "swim")},
            "classes, first difference at row 1: .*'leap'.*'jump'",
        ),
        ({"classes": CLASSES[:2]}, "classes: expected 2, found 3"),
        ({"task": "singlelabel"}, "task: expected singlelabel, found multilabel"),
        ({"name": "other"}, "dataset: expected other, found toy"),
        ({"clips": dataset(8).clips}, "clips: expected 8, found 10"),
        ({"clips": dataset(10).clips[::-1]}, "clip, first difference at row 0: .*ü/9 x.*ü/0 x"),
    ],
)
def test_a_store_of_another_dataset_is_refused_line_by_line(
    tmp_path: Path, changed: dict, line: str
) -> None:
    fill(tmp_path / "a.zarr", dataset(), [fakes.SPEC])
    before = fakes.tree(tmp_path / "a.zarr")
    with pytest.raises(SpecMismatch, match=f"\n  {line}"):
        StoreWriter(tmp_path / "a.zarr", dataset(**changed), shard=4)
    assert fakes.tree(tmp_path / "a.zarr") == before


def test_an_encoder_of_another_making_is_refused_line_by_line(tmp_path: Path) -> None:
    fill(tmp_path / "a.zarr", dataset(), [fakes.SPEC])
    writer = StoreWriter(tmp_path / "a.zarr", dataset(), shard=8, store_dtype="float32")
    with pytest.raises(SpecMismatch) as caught:
        writer.add_encoder(replace(fakes.SPEC, frames=8, sha256="1" * 64, precision="bf16"))
    message = str(caught.value)
    for line in (
        "fake-video: frames: expected 8, found 4",
        f"fake-video: sha256: expected {'1' * 64}, found {'0' * 64}",
        "fake-video: precision: expected bf16, found fp32",
        "fake-video: shard: expected 8, found 4",
        "fake-video: store_dtype: expected 'float32', found 'float16'",
    ):
        assert f"\n  {line}\n" in message
    # The same weights under another readable name are the same encoder.
    again = StoreWriter(tmp_path / "a.zarr", dataset(), shard=4)
    again.add_encoder(replace(fakes.SPEC, weights="elsewhere"))


def test_adding_an_encoder_touches_nothing_that_is_there(tmp_path: Path) -> None:
    fill(tmp_path / "a.zarr", dataset(), [fakes.SPEC])
    before = fakes.tree(tmp_path / "a.zarr")
    other = replace(fakes.SPEC, slug="second", frames=2, tokens=3)
    fill(tmp_path / "a.zarr", dataset(), [other, fakes.image_spec()])
    after = fakes.tree(tmp_path / "a.zarr")
    assert {key: after[key] for key in before} == before
    store = open_store(tmp_path / "a.zarr")
    with pytest.raises(StoreError, match="expected one video encoder, found fake-video, second"):
        store.tokens()
    assert store.tokens(encoder="second").shape == (10, 3, 6)
    with pytest.raises(StoreError, match="no video encoder 'third'; there are: fake-video, second"):
        store.tokens(encoder="third")
    xr.open_datatree(tmp_path / "a.zarr", engine="zarr", consolidated=False)


@pytest.mark.parametrize("slug", ["clip", "view", "fake-video_token", "class"])
def test_an_encoder_cannot_have_a_dimensions_name(tmp_path: Path, slug: str) -> None:
    writer = StoreWriter(tmp_path / "a.zarr", dataset())
    writer.add_encoder(fakes.SPEC)
    with pytest.raises(UsageError, match="dimension"):
        writer.add_encoder(replace(fakes.SPEC, slug=slug))
    other = StoreWriter(tmp_path / "b.zarr", dataset())
    other.add_encoder(replace(fakes.SPEC, slug="fake-video_token"))
    with pytest.raises(UsageError, match="dimension would have the name of 'fake-video_token'"):
        other.add_encoder(fakes.SPEC)


def test_video_and_image_encoders_need_names_of_their_own(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "a.zarr", dataset())
    writer.add_encoder(fakes.SPEC)
    with pytest.raises(UsageError, match="names of their own"):
        writer.add_encoder(fakes.image_spec(slug="fake-video"))


def test_text_is_kept_by_prompt_with_its_template_and_unknown_words(tmp_path: Path) -> None:
    writer = fill(tmp_path / "a.zarr", dataset(), [fakes.SPEC])
    spec = fakes.text_spec()
    values = np.arange(18, dtype=np.float32).reshape(3, 6)
    assert not writer.has_text(spec, "plain", "{}")
    writer.add_text(spec, "plain", "{}", {"jump": ["jump"]}, values)
    writer.add_text(spec, "long", "a video of {}", {}, values * 0)
    assert writer.has_text(spec, "plain", "{}")
    store = open_store(tmp_path / "a.zarr")
    assert store.encoders("text") == ["fake-text"]
    assert store.prompts() == {"long": "a video of {}", "plain": "{}"}
    assert torch.equal(store.text(prompt="plain"), torch.from_numpy(values))
    assert torch.equal(store.text("fake-text", "long"), torch.zeros(3, 6))
    assert store.unknown_words(prompt="plain") == {"jump": ["jump"]}
    with pytest.raises(StoreError, match="expected one prompt, found long, plain"):
        store.text()
    with pytest.raises(SpecMismatch, match=r"template: expected 'the \{\}', found '\{\}'"):
        writer.has_text(spec, "plain", "the {}")
    with pytest.raises(UsageError, match="only a-z"):
        writer.has_text(spec, "Plain!", "{}")
    with pytest.raises(UsageError, match="dimension"):
        writer.has_text(spec, "class", "{}")
    nodes = xr.open_datatree(tmp_path / "a.zarr", engine="zarr", consolidated=False)
    assert nodes["text/fake-text/plain"].dims == ("class", "fake-text_channel")
    damage(tmp_path / "a.zarr/text/fake-text/plain/c/0/0", 5)
    with pytest.raises(StoreError, match="checksum"):
        store.text(prompt="plain")


def test_labels_that_are_not_known_are_told_apart(tmp_path: Path) -> None:
    known = np.ones((10, 3), dtype=bool)
    known[4, 1] = False
    StoreWriter(tmp_path / "a.zarr", dataset(), label_known=known)
    found = open_store(tmp_path / "a.zarr").label_known()
    assert found is not None
    assert np.array_equal(found.numpy(), known)
    StoreWriter(tmp_path / "b.zarr", dataset())
    assert open_store(tmp_path / "b.zarr").label_known() is None


def test_a_store_rewritten_by_plain_zarr_with_other_chunks_and_a_compressor_is_read(
    tmp_path: Path,
) -> None:
    fill(tmp_path / "a.zarr", dataset(), [fakes.SPEC], {2: 2})
    path = tmp_path / "a.zarr"
    for name in ("tokens/fake-video", "status/fake-video", "time/fake-video"):
        array = zarr.open_array(path / name)
        values, attrs = array[...], dict(array.attrs)
        names = array.metadata.dimension_names
        chunks = (3, *array.shape[1:])
        new = zarr.create_array(
            path / name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=chunks,
            compressors=zarr.codecs.ZstdCodec(level=1),
            dimension_names=names,
            attributes=attrs,
            overwrite=True,
        )
        new[...] = values
    store = open_store(path)
    expected = torch.from_numpy(shard_rows(fakes.SPEC, range(10)).features)
    assert torch.equal(store.tokens([9, 1, 3]), expected[[9, 1, 3]])
    assert store.status("fake-video").tolist() == [1, 1, 2] + [1] * 7
    with pytest.raises(StoreError, match="ü/2 x"):
        store.tokens([2])
    (path / "tokens/fake-video/c/1/0/0/0").unlink()
    with pytest.raises(StoreError, match=r"missing although clip 'ü/4 x'"):
        store.tokens([4])


def test_unsharded_patch_tokens_are_one_verified_file_a_clip(tmp_path: Path) -> None:
    patch = replace(fakes.SPEC, pooling="patch", tokens=9)
    writer = fill(tmp_path / "a.zarr", dataset(), [patch], {3: 2})
    store = open_store(tmp_path / "a.zarr")
    folder = tmp_path / "a.zarr/tokens/fake-video/c"
    assert sorted(int(p.name) for p in folder.iterdir()) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    expected = torch.from_numpy(shard_rows(patch, range(10)).features)
    assert torch.equal(store.tokens([8, 1]), expected[[8, 1]])
    damage(folder / "1/0/0/0", 7)
    with pytest.raises(StoreError, match=r"'ü/1 x'.*c/1/0/0/0.*checksum"):
        store.tokens([1])
    (folder / "1/0/0/0").unlink()
    with pytest.raises(StoreError, match=r"'ü/1 x'.*missing although"):
        store.tokens([1])
    assert not writer.is_done("fake-video", 0)


def test_failures_are_sorted_json_without_encoders_of_their_own(tmp_path: Path) -> None:
    fill(tmp_path / "a.zarr", dataset(), [fakes.SPEC, fakes.image_spec()], {5: 2, 4: 3})
    files = sorted(p.name for p in (tmp_path / "a.zarr/failures").glob("0*"))
    assert files == ["00001.json"]
    text = (tmp_path / "a.zarr/failures/00001.json").read_text()
    found = json.loads(text)
    assert text == json.dumps(found, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    assert [entry["row"] for entry in found["clips"]] == [4, 5]
    assert found["clips"][0]["encoders"] == ["fake-image", "fake-video"]


def test_a_second_writer_is_told_who_holds_the_store(tmp_path: Path) -> None:
    store = tmp_path / "a.zarr"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib, time\n"
            "from msq.extract.claims import claim_store\n"
            "with claim_store(pathlib.Path(sys.argv[1])):\n"
            "    print('held', flush=True); time.sleep(600)\n",
            str(store),
        ],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(StoreError, match=f"process {holder.pid} is writing"),
            claim_store(store),
        ):
            pass
        holder.kill()
        holder.wait()
    assert (tmp_path / "a.zarr.claims").exists()  # left by the killed one, and no obstacle
    with claim_store(store):
        assert (tmp_path / "a.zarr.claims").exists()
    assert list(tmp_path.iterdir()) == []
