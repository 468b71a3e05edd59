"""Thousands of spoilt manifests: each gives clips and reasons that add up, or one clear error.

`MSQ_FUZZ_CASES=50000 pytest tests/test_fuzz_manifest.py` runs more of them; a failure names the
case, and `spoilt(NUMBER)` makes it again.
"""

from __future__ import annotations

import csv
import faulthandler
import io
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msq.errors import DatasetError
from msq.extract.datasets import Dataset, read_classes, read_manifest
from msq.extract.datasets.dataset import SPLITS

SEED = 20_261_121
CASES = int(os.environ.get("MSQ_FUZZ_CASES", "2000"))
HANG = 120  # seconds for all

WORDS = (
    "run",
    "feed a dog",
    "élan",
    "猫",
    "a,b",
    'say "no"',
    "",
    " ",
    "run;jump",
    "None",
    "x" * 60,
)
PATHS = ("a.mp4", "b/c d.avi", "../e.mkv", "/abs/f.mp4", "猫.webm", "'; rm -rf ~; '.mp4", ".", "..")
ODD = (
    "", " ", "\0", "\ufeff", "\t", ";", ";;", "nan", "-inf", "1e400", "-1", "00:01", "١٢", "1_000",
    "\udcff", "\u2028", "\x85", "\r", "a\nb", '"', '"open', "x" * 140_000, "../" * 40, "a/" * 2100,
    "C:\\v\\a.mp4", "True", "null", "train ", "TRAIN", "training", "0" * 5000, "=1+1", "file:x",
    "a\0b",
)  # fmt: skip
JSON_ODD = (
    None, True, 1, -1, 1.5, 10**400, [], ["run"], ["run", 1], [["run"]], {}, {"a": 1}, [None],
    float("nan"), float("inf"), "\ud83d", ["\ud83d"], "a\nb", "x" * 140_000, "1e400",
)  # fmt: skip


def rows(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Between none and twelve rows, most of them in order."""
    out = []
    for n in range(int(rng.integers(13))):
        row: dict[str, Any] = {
            "path": PATHS[rng.integers(len(PATHS))] if rng.random() < 0.5 else f"{n}.mp4",
            "labels": WORDS[rng.integers(len(WORDS))],
            "split": SPLITS[rng.integers(3)],
        }
        if rng.random() < 0.4:
            row["id"] = f"clip {rng.integers(9)}"
        if rng.random() < 0.4:
            row["start"], row["end"] = (f"{x:g}" for x in rng.integers(0, 9, 2) / 2)
        out.append(row)
    return out


def field(rng: np.random.Generator, values: tuple[Any, ...], row: dict[str, Any]) -> None:
    names = ("path", "labels", "split", "id", "start", "end", "unknown")
    row[names[rng.integers(len(names))]] = values[rng.integers(len(values))]


def as_csv(rng: np.random.Generator, records: list[dict[str, Any]]) -> bytes:
    columns = ["path", "labels", "split", *rng.permutation(["id", "start", "end", "unknown"])[:3]]
    if rng.random() < 0.05:
        columns.remove(str(rng.choice(columns[:3])))
    if rng.random() < 0.05:
        columns.append(str(rng.choice(["path", "", "weight", "Labels"])))
    file = io.StringIO(newline="")
    writer = csv.writer(
        file,
        delimiter="\t" if rng.random() < 0.1 else ",",
        lineterminator=str(rng.choice(["\n", "\r\n", "\n", "\r", "\n\n"])),
        quoting=csv.QUOTE_ALL if rng.random() < 0.2 else csv.QUOTE_MINIMAL,
    )
    writer.writerow([c.upper() if rng.random() < 0.1 else c for c in columns])
    for record in records:
        cells = [record.get(column, "") for column in columns]
        if rng.random() < 0.05:
            cells = cells[: rng.integers(len(cells) + 1)] + ["more"] * int(rng.integers(3))
        writer.writerow(cells)
    text = file.getvalue()
    for _ in range(int(rng.choice([0, 0, 0, 1, 2]))):  # a quote too many or too few
        at = int(rng.integers(len(text) + 1))
        text = text[:at] + '"' + text[at:] if rng.random() < 0.6 else text.replace('"', "", 1)
    return encoded(rng, text)


def as_jsonl(rng: np.random.Generator, records: list[dict[str, Any]]) -> bytes:
    lines = []
    for record in records:
        if rng.random() < 0.5:
            record["labels"] = str(record["labels"]).split(";")
        if rng.random() < 0.2:
            field(rng, JSON_ODD, record)
        line = json.dumps(record, ensure_ascii=bool(rng.random() < 0.5))
        if rng.random() < 0.1:
            bad = (
                "[1, 2]",
                "3",
                "null",
                '"text"',
                "{}",
                line[:-3],
                line * 2,
                "[" * 100_000,
                "{'a': 1}",
            )
            line = bad[rng.integers(len(bad))]
        lines.append(line)
    return encoded(rng, str(rng.choice(["\n", "\r\n", "\n\n"])).join(lines))


def encoded(rng: np.random.Generator, text: str) -> bytes:
    code = str(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252", "utf-8"]))
    wrong = "surrogatepass" if code.startswith("utf") else "replace"
    return text.encode(code, errors=wrong)


def spoil(rng: np.random.Generator, data: bytearray) -> None:
    """Bytes flipped, zeroed, cut off, doubled or put in."""
    if not data:
        return
    at, size = int(rng.integers(len(data))), int(rng.integers(1, 40))
    kind = rng.integers(6)
    if kind == 0:
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        del data[at : at + size]
    elif kind == 3:
        data[at:at] = data[at : at + 4 * size]
    elif kind == 4:
        data[at : at + size] = bytes(len(data[at : at + size]))
    else:
        data[at:at] = rng.bytes(size)


def spoilt(number: int) -> tuple[str, bytes, bytes]:
    """(suffix, manifest, classes file) of a case."""
    rng = np.random.default_rng([SEED, number])
    records = rows(rng)
    for record in records:
        if rng.random() < 0.15:
            field(rng, ODD, record)
    suffix = str(rng.choice([".csv", ".csv", ".jsonl", ".tsv"]))
    data = bytearray((as_jsonl if suffix == ".jsonl" else as_csv)(rng, records))
    for _ in range(int(rng.choice([0, 0, 1, 1, 3]))):
        spoil(rng, data)
    names = [str(x) for x in rng.choice(WORDS, int(rng.integers(9)))]
    lines = [f"{i},{name}" for i, name in enumerate(names)] if rng.random() < 0.5 else names
    classes = bytearray(encoded(rng, "\n".join(["id,name", *lines] if lines != names else lines)))
    if rng.random() < 0.5:
        spoil(rng, classes)
    return suffix, bytes(data), bytes(classes)


def records_in(suffix: str, data: bytes) -> int:
    """Lines that hold anything, counted without msq: clips and skipped items must come to it."""
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = data.decode("utf-16" if utf16 else "utf-8-sig", errors="surrogateescape")
    if suffix == ".jsonl":
        return sum(bool(line.strip()) for line in text.split("\n"))
    first = text.split("\n", 1)[0]
    delimiter = "\t" if "\t" in first and "," not in first else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    count = -1  # the header
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return count
        except csv.Error:
            cells = ["malformed"]
        count += count < 0 or any(cell.strip() for cell in cells)


def check(dataset: Dataset, suffix: str, data: bytes) -> None:
    assert len(dataset.clips) + len(dataset.skipped) == records_in(suffix, data)
    assert all(where and reason.strip() for where, reason in dataset.skipped)
    assert len({clip.id for clip in dataset.clips}) == len(dataset.clips)
    text = [*dataset.classes, *(clip.id for clip in dataset.clips)]
    assert not any("\n" in x or "\r" in x or "\0" in x for x in text), "a line swallowed another"
    for words in (*text, *(part for item in dataset.skipped for part in item)):
        words.encode()  # fit for a store and for a terminal
    for clip in dataset.clips:
        assert clip.split in SPLITS
        assert {*clip.labels, *clip.unknown} <= {*range(len(dataset.classes))}
        assert clip.start is None or clip.end is None or clip.start < clip.end
        os.fsencode(clip.path)
    dataset.clip_list_hash()


def attempt(read: Callable[[], Any], path: Path) -> tuple[Any, str]:
    """What was read and `read`, or None and `refused`; any other error is the test's failure."""
    try:
        return read(), "read"
    except DatasetError as error:
        said = str(error)
    if str(path) not in said:
        raise AssertionError(f"the error does not name {path}: {said}")
    said.encode()
    return None, "refused"


def run_case(number: int, folder: Path, counts: Counter[str]) -> None:
    """Read the files of a case, alone and together, and hold what comes of it to the rules."""
    suffix, data, listed = spoilt(number)
    path, classes = folder / f"m{suffix}", folder / "classes.txt"
    path.write_bytes(data)
    classes.write_bytes(listed)
    task: Any = "singlelabel" if number % 5 == 0 else "multilabel"
    dataset, how = attempt(lambda: read_manifest(path, task=task), path)
    counts[how] += 1
    if dataset is not None:
        check(dataset, suffix, data)
        counts["with skipped lines"] += bool(dataset.skipped)
    names, how = attempt(lambda: read_classes(classes), classes)
    counts[f"classes {how}"] += 1
    if names is not None:
        assert len(set(names)) == len(names) > 0
        code = "utf-16" if listed[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
        text = listed.decode(code).replace('"', "")  # what CSV doubles and takes away
        assert all(name.strip() and name.replace('"', "") in text for name in names)
        attempt(lambda: check(read_manifest(path, classes=classes), suffix, data), folder)


def test_spoilt_manifests_are_read_or_refused_and_every_line_counts(tmp_path: Path) -> None:
    faulthandler.dump_traceback_later(max(HANG, CASES // 20), exit=True)
    counts: Counter[str] = Counter()
    wrong = []
    for number in range(CASES):
        try:
            run_case(number, tmp_path, counts)
        except Exception as error:
            wrong.append(f"case {number}: {type(error).__name__}: {str(error)[:300]}")
    faulthandler.cancel_dump_traceback_later()
    print(f"seed {SEED}, {CASES} cases: {dict(counts)}")
    assert wrong == []
    assert min(counts["read"], counts["refused"], counts["with skipped lines"]) > CASES / 20


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_the_counter_knows_the_lines(suffix: str) -> None:
    lines = b'{"a": 1}\n\n{}\n' if suffix == ".jsonl" else b'path,x\n"1",2\n\n3,"4"\n'
    assert records_in(suffix, lines) == 2
