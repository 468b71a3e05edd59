from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec

from msq.errors import StoreError
from msq.extract.atomic import remove_temporaries, write_file
from msq.extract.shard import (
    MISSING,
    checksum,
    encode_chunk,
    encode_shard,
    equals_fill,
    read_chunk,
    read_index,
    read_rows,
)


def zarr_shards(folder: Path, values: np.ndarray, size: int, fill: float = 0.0) -> list[bytes]:
    """What zarr-python writes for `[N, ...]` values with a view axis of 1, shard by shard."""
    row = values.shape[1:]
    array = zarr.create_array(
        folder,
        shape=(len(values), 1, *row),
        dtype=values.dtype,
        chunks=(1, 1, *row),
        shards=(size, 1, *row),
        serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
        filters=None,
        fill_value=fill,
    )
    array[:, 0] = values
    tail = "/".join(["0"] * (1 + len(row)))
    files = [folder / "c" / str(k) / tail for k in range(-(-len(values) // size))]
    return [file.read_bytes() if file.exists() else b"" for file in files]


def rows(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=shape) * 10
    return np.abs(values).astype(dtype) if dtype.startswith("u") else values.astype(dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint16"])
@pytest.mark.parametrize("count", [8, 5, 13])
def test_full_and_partial_shards_have_the_bytes_zarr_python_writes(
    tmp_path: Path, dtype: str, count: int
) -> None:
    values = rows((count, 3, 5), dtype)
    expected = zarr_shards(tmp_path / "a", values, 8)
    found = [b"".join(encode_shard(values[k : k + 8], 8)) for k in range(0, count, 8)]
    assert found == expected


def test_rows_that_equal_the_fill_value_are_left_out_as_zarr_python_does(tmp_path: Path) -> None:
    values = rows((7, 4), "float16")
    values[2] = 0.0
    values[5] = -0.0  # other bits than the fill value, so zarr keeps it
    expected = zarr_shards(tmp_path / "a", values, 8)
    assert b"".join(encode_shard(values, 8)) == expected[0]
    times = rows((7, 4), "float32")
    times[3] = np.nan
    times[4, 1] = np.nan
    expected = zarr_shards(tmp_path / "b", times, 8, float("nan"))
    assert b"".join(encode_shard(times, 8, float("nan"))) == expected[0]


def test_rows_marked_absent_are_missing_whatever_they_hold(tmp_path: Path) -> None:
    values = rows((4, 6), "float32")
    present = np.array([True, False, True, True])
    blanked = np.where(present[:, None], values, np.float32(0))
    expected = zarr_shards(tmp_path / "a", blanked, 4)
    assert b"".join(encode_shard(values, 4, present=present)) == expected[0]


def test_an_unsharded_chunk_has_the_bytes_zarr_python_writes(tmp_path: Path) -> None:
    values = rows((1, 1, 7, 3), "float16")
    array = zarr.create_array(
        tmp_path / "a",
        shape=values.shape,
        dtype=values.dtype,
        chunks=values.shape,
        compressors=[Crc32cCodec()],
        filters=None,
    )
    array[...] = values
    assert b"".join(encode_chunk(values)) == (tmp_path / "a/c/0/0/0/0").read_bytes()


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 9),
    width=st.integers(1, 5),
    keep=st.lists(st.booleans(), min_size=1, max_size=9),
    seed=st.integers(0, 100),
)
def test_rows_read_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, size: int, width: int, keep: list[bool], seed: int
) -> None:
    present = np.array(keep[:size])
    values = rows((len(present), width), "float32", seed)
    path = tmp_path_factory.mktemp("shard") / "0"
    write_file(path, encode_shard(values, size, present=present))
    slots = np.random.default_rng(seed).permutation(len(present)).tolist()
    out = np.empty((len(slots), width * 4), dtype=np.uint8)
    read_rows(path, slots, size, out, np.zeros(width * 4, np.uint8), str)
    assert np.array_equal(out.view(np.float32), (values * present[:, None])[slots])
    index = read_index(path, size, width * 4)
    assert ((index[:, 0] == MISSING).sum()) == size - present.sum()


def write_shard(folder: Path, count: int = 4, size: int = 4) -> tuple[Path, np.ndarray]:
    values = rows((count, 8), "float32")
    path = folder / "c" / "0"
    write_file(path, encode_shard(values, size))
    return path, values


def read(path: Path, slots: list[int], size: int = 4) -> np.ndarray:
    out = np.empty((len(slots), 32), dtype=np.uint8)
    read_rows(path, slots, size, out, np.zeros(32, np.uint8), lambda slot: f"clip-{slot}")
    return out.view(np.float32)


def test_any_flipped_bit_is_found_and_the_clip_is_named(tmp_path: Path) -> None:
    path, values = write_shard(tmp_path)
    content = path.read_bytes()
    assert np.array_equal(read(path, [0, 1, 2, 3]), values)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        with pytest.raises(StoreError, match=r"clip-\d.*checksum") as caught:
            read(path, [0, 1, 2, 3])
        assert str(path) in str(caught.value)
        if place < 36 * 4:  # in a row: the message names that row's clip, the others are readable
            hit = place // 36
            assert f"clip-{hit}" in str(caught.value)
            others = [slot for slot in range(4) if slot != hit]
            assert np.array_equal(read(path, others), values[others])


def test_a_shard_cut_at_any_length_is_refused(tmp_path: Path) -> None:
    path, _ = write_shard(tmp_path)
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(StoreError, match="clip-1"):
            read(path, [1])


def test_a_missing_shard_file_is_an_error_not_zeros(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"clip-2.*missing although"):
        read(tmp_path / "c" / "0", [2])


def test_a_chunk_of_another_size_or_content_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "0"
    write_file(path, encode_chunk(np.arange(4, dtype=np.uint8)))
    assert read_chunk(path, 4).tolist() == [0, 1, 2, 3]
    with pytest.raises(StoreError, match="expected 9 bytes, found 8"):
        read_chunk(path, 5)
    path.write_bytes(b"\x01" + path.read_bytes()[1:])
    with pytest.raises(StoreError, match="checksum"):
        read_chunk(path, 4)


def test_checksum_is_crc32c() -> None:
    # The check value of CRC-32C in RFC 3720, appendix B.4: 32 bytes of zeros.
    assert checksum(np.zeros(32, dtype=np.uint8)) == 0x8A9136AA


def test_equality_with_the_fill_value_follows_the_bits() -> None:
    values = np.array([[0.0, 0.0], [-0.0, 0.0], [1.0, 0.0]], dtype=np.float16)
    assert equals_fill(values, 0.0).tolist() == [True, False, False]
    nan = np.array([[np.nan, np.nan], [np.nan, 1.0]], dtype=np.float32)
    assert equals_fill(nan, float("nan")).tolist() == [True, False]
    with pytest.raises(ValueError, match="0 or NaN"):
        equals_fill(values, 1.0)


def test_a_failing_write_leaves_the_old_file_and_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "0"
    write_file(path, [b"old"])

    def broken():
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(path, broken())
    assert [p.name for p in path.parent.iterdir()] == ["0"]
    assert path.read_bytes() == b"old"


def test_temporaries_of_dead_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "0", [b"x"])
    (tmp_path / "a" / ".0.4711.tmp").write_bytes(b"half")
    (tmp_path / ".zarr.json.12.tmp").write_bytes(b"half")
    assert remove_temporaries(tmp_path) == 2
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["0"]
