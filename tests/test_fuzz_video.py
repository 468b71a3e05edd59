"""Thousands of damaged video files: no crash, no hang, no clip without an account.

`MSQ_FUZZ_CASES=50000 pytest tests/test_fuzz_video.py` runs more of them. A case that fails is made
again by `python tests/fuzz_video.py FOLDER NUMBER NUMBER+1`.
"""

from __future__ import annotations

import csv
import json
import os
import queue
import runpy
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msq.extract.datasets import read_manifest
from msq.extract.decode_task import DecodeTask, Picture, decode
from msq.extract.pipeline import extract
from msq.extract.store import open_store

SCRIPT = Path(__file__).with_name("fuzz_video.py")
CASES = int(os.environ.get("MSQ_FUZZ_CASES", "3600"))
AT_ONCE = 1200  # cases of one process
STORED = 160  # cases that also go through a whole run of stage one
PATIENCE = 300  # seconds for one clip, which takes milliseconds
START = 900  # seconds until a process says its first word

fakes = SimpleNamespace(**runpy.run_path(str(SCRIPT.with_name("fakes.py"))))


def real_clips() -> Path | None:
    """The folder of real clips; what is missing makes other cases, not fewer."""
    shared = os.environ.get("MSQ_SHARED", SCRIPT.parents[2] / "shared")
    clips = Path(shared) / "clips"
    return clips if clips.is_dir() else None


class Fuzzer:
    """A process that decodes cases and says what came of each."""

    def __init__(self, folder: Path, first: int, last: int, script: Path = SCRIPT) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if (clips := real_clips()) is not None:
            environment["MSQ_FUZZ_CLIPS"] = str(clips)
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(folder), str(first), str(last)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def events(self, patience: float) -> Iterator[dict[str, Any]]:
        """What it says; {"lost": ...} at the end where it died or took too long."""
        limit = float(START)
        try:
            while (line := self._lines.get(timeout=limit)) is not None:
                limit = patience
                yield json.loads(line)
            if self.process.wait() != 0:
                yield {"lost": f"the process died with {self.process.returncode}"}
        except queue.Empty:
            yield {"lost": f"no answer within {limit:g} s"}
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join()


def fuzz(
    folder: Path, first: int, last: int, script: Path = SCRIPT, patience: float = PATIENCE
) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """(case -> what came of it, what went wrong); goes on after a crash and after a hang."""
    found: dict[int, dict[str, Any]] = {}
    wrong: list[str] = []
    while first < last:
        running: dict[str, Any] = {"case": first - 1, "what": "before the first case"}
        for event in Fuzzer(folder, first, min(first + AT_ONCE, last), script).events(patience):
            if "case" in event:
                running = event
            elif "done" in event:
                found[event["done"]] = event
                wrong += [
                    f"case {running['case']} ({running['what']}): {w}" for w in event["wrong"]
                ]
            else:
                wrong.append(f"case {running['case']} ({running['what']}): {event['lost']}")
        first = max(running["case"] + 1, first + 1)
    return found, wrong


@pytest.mark.slow
def test_no_damaged_file_crashes_hangs_or_goes_unaccounted(tmp_path: Path) -> None:
    found, wrong = fuzz(tmp_path, 0, CASES)
    counts = Counter(event["status"] for event in found.values())
    slowest = max(found.values(), key=lambda event: event["seconds"])
    print(f"{len(found)} cases: {dict(counts)}; slowest {slowest['done']}: {slowest['seconds']} s")
    assert wrong == []
    assert sorted(found) == list(range(CASES))
    # Damage that is always noticed, or never, would say that the cases are no good.
    assert all(counts[status] > len(found) / 10 for status in ("ok", "degraded", "failed"))
    assert all(event["reason"] for event in found.values() if event["status"] != "ok")


def test_a_run_over_damaged_files_accounts_for_each(tmp_path: Path) -> None:
    names = runpy.run_path(str(SCRIPT))
    cases = names["Cases"](tmp_path, real_clips())
    rows = [("id", "path", "labels", "split", "start", "end")]
    for number in range(STORED):
        path, _, cut = cases.make(number)
        times = ("" if cut[key] is None else cut[key] for key in ("start", "end"))
        rows.append((str(number), str(path), "x", "train", *times))
    rows += [("0", rows[1][1], "x", "train", "", ""), ("bad", rows[1][1], "x", "holdout", "", "")]
    with (tmp_path / "m.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    dataset = read_manifest(tmp_path / "m.csv")
    assert len(dataset.clips) + len(dataset.skipped) == len(rows) - 1
    out = tmp_path / "s.zarr"
    result = extract(
        dataset, out, video=fakes.FakeEncoder(), image=None, text=None, workers=2, shard=32
    )
    assert (result.clips, result.done + result.failed) == (STORED, STORED)
    status = open_store(out).status("fake-video")
    reasons = {item["row"]: item["reason"] for item in (*result.failures, *result.degraded)}
    picture = Picture.of(fakes.SPEC)
    for row, clip in enumerate(dataset.clips):
        task = DecodeTask(row, clip.path, clip.start, clip.end, (picture,), id=clip.id)
        alone = decode(task)
        expected = 2 if alone.reason else 3 if alone.degraded[0] else 1
        assert (row, int(status[row])) == (row, expected)
        assert reasons.get(row) == (alone.reason or alone.degraded[0])
    assert {*status.tolist()} == {1, 2, 3}


SICK = """
import json, os, signal, sys, time
for case in range(int(sys.argv[2]), int(sys.argv[3])):
    print(json.dumps({"case": case, "what": "sick"}), flush=True)
    if case == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if case == 3:
        time.sleep(600)
    done = {"done": case, "status": "ok", "wrong": ["odd"] * (case == 4), "reason": None}
    print(json.dumps(done), flush=True)
"""


def test_the_fuzzer_sees_crashes_hangs_and_broken_promises(tmp_path: Path) -> None:
    script = tmp_path / "sick.py"
    script.write_text(SICK)
    found, wrong = fuzz(tmp_path, 0, 6, script, patience=8)
    assert sorted(found) == [0, 2, 4, 5]
    assert wrong == [
        "case 1 (sick): the process died with -11",
        "case 3 (sick): no answer within 8 s",
        "case 4 (sick): odd",
    ]


def test_a_case_is_made_of_its_number_alone(tmp_path: Path) -> None:
    names = runpy.run_path(str(SCRIPT))
    cases = names["Cases"](tmp_path, None)
    first, what, cut = cases.make(17)
    before = first.read_bytes()
    cases.make(18)
    again = names["Cases"](tmp_path, None).make(17)
    assert again == (first, what, cut)
    assert first.read_bytes() == before
