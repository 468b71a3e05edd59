"""Stage one beside what its parts cost alone.

- pipeline: `extract` against the same clips decoded and encoded one after the other by one thread
  (cores / (decode + encode core-seconds per clip) would be the most there is to reach, if a core
  worked as fast beside busy ones), and by one process per core at once, which is what it can reach;
- decode processes: two against one;
- base-size encoders: the share of the time that goes into writing the store;
- workers: the default number of decode processes against others (`extract_workers`);
- on a GPU: `extract` against decoding alone and encoding alone (`extract_on_gpu`);
- long runs: memory and processor time per clip of many clips against few.

Videos are 640x480 with a keyframe every second, made in a temporary folder and used under several
ids; encoders have random weights. Processor time of a side is that of this process alone; the
figures below the tables count decode processes, too.
"""

from __future__ import annotations

import functools
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msq.bench.cases import Case, Figure, Gate, Prepared, Settings, Side
from msq.bench.decode_cases import make_video
from msq.bench.extract_alone import BATCH, alone, alone_on_every_core
from msq.bench.process_memory import PeakMemory
from msq.bench.random_encoders import image_encoder, video_encoder
from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.decode_pool import DecodeTask, Picture, cores, decode, decode_in_order
from msq.extract.encoders import ImageEncoder, TimeSformerConfig, VideoEncoder
from msq.extract.extract_result import ExtractResult
from msq.extract.pipeline import extract
from msq.extract.store import open_store

Taken = Mapping[str, Sequence[tuple[float, float]]]
TOLERANCE = 1e-4  # of float32 features, over their largest: batches differ
TINY = TimeSformerConfig(image_size=(32, 32), patch_size=16, frames=4, width=16, depth=1, heads=1)
MIDDLE = TimeSformerConfig(image_size=(112, 112), frames=8, width=192, depth=6, heads=3)
BASE = TimeSformerConfig(frames=8)


def cases(settings: Settings) -> Iterable[Case]:
    """All of them; on a GPU those that are about one."""
    from msq.bench import extract_on_gpu, extract_workers

    if settings.device.startswith("cuda") or settings.quick:
        yield from extract_on_gpu.cases()
    if settings.device.startswith("cuda"):
        return
    yield extract_workers.case()
    for name, config, clips in (("decoding", TINY, 96), ("both", MIDDLE, 48)):
        yield Case(
            name=f"pipeline, cost is {name}",
            compares=f"{clips} clips through extract, against each decoded, then encoded",
            base="alone",
            unit="ms",
            rounds=5,
            prepare=functools.partial(_pipeline, config, clips),
        )
    yield Case(
        name="decode processes",
        compares="48 clips decoded and resized by two processes, against one",
        base="one",
        unit="ms",
        rounds=7,
        prepare=_decoding,
    )
    yield Case(
        name="base-size encoders",
        compares="8 clips with TimeSformer-B and ViT-B/16 at 8 frames, against each alone",
        base="alone",
        unit="ms",
        rounds=5,
        prepare=functools.partial(_pipeline, BASE, 8),
    )
    yield Case(
        name="long run",
        compares="5,000 short clips against 200, tiny encoders",
        base="few",
        unit="ms",
        rounds=5,
        prepare=_long,
    )


@dataclass
class Runs:
    """Runs of `extract` on clips of a folder, each into a store of its own."""

    folder: Path
    encoders: tuple[VideoEncoder, ImageEncoder]
    watched: bool = False  # their memory is
    batch: int = BATCH
    results: list[ExtractResult] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    @property
    def store(self) -> Path:
        """Of the last run."""
        return self.folder / "out.zarr"

    def forget(self) -> None:
        """Remove the store of the last run."""
        shutil.rmtree(self.store, ignore_errors=True)

    def __call__(self, data: Dataset, **options: Any) -> ExtractResult:
        """One run."""
        video, image = self.encoders
        with PeakMemory() if self.watched else nullcontext() as peak:
            result = extract(
                data, self.store, video=video, image=image, batch=self.batch, **options
            )
        self.results.append(result)
        if peak is not None:
            self.peaks.append(peak.bytes)
        return result


def dataset(folder: Path, clips: int, files: Sequence[Path]) -> Dataset:
    """Clips with ids of their own on a few files."""
    rows = [Clip(f"c{i}", files[i % len(files)], None, None, (0,), "train") for i in range(clips)]
    return Dataset("bench", ("a", "b"), "multilabel", tuple(rows), "map")


@contextmanager
def _pipeline(config: TimeSformerConfig, clips: int, settings: Settings) -> Iterator[Prepared]:
    config, clips = (TINY, 6) if settings.quick else (config, clips)
    with tempfile.TemporaryDirectory(prefix="msq-bench-") as name:
        folder = Path(name)
        data = dataset(folder, clips, videos(folder, 2, 1 if settings.quick else 4))
        runs = Runs(folder, (video_encoder(config), image_encoder(config)))

        def gate() -> Gate:
            runs(data, store_dtype="float32")
            store = open_store(runs.store)
            kept = [store.tokens(range(clips)), store.image(range(clips))]
            wanted = [torch.stack(features) for features in alone(data, runs.encoders)]
            worst = max(
                float((a - b).abs().max() / b.abs().max())
                for a, b in zip(kept, wanted, strict=True)
            )
            runs.forget()
            runs.results.clear()
            return Gate(worst, TOLERANCE, "features in the store, and of clips made one by one")

        def figures(taken: Taken) -> dict[str, Figure]:
            # Processor time is what a clip costs, whoever else is on the machine.
            costs = statistics.median(cpu for _, cpu in taken["alone"])
            wall = statistics.median(wall for wall, _ in taken["extract"])
            pairs = zip(taken["on every core"], taken["extract"], strict=True)
            results = runs.results[-len(taken["extract"]) :]
            writing = [r.stages["busy_seconds"]["write"] / r.seconds for r in results]
            used = statistics.median(r.stages["cpu_seconds"] for r in results)
            return {
                "throughput over cores / core-seconds": Figure(costs / cores() / wall, 0.9),
                "throughput over that of a process per core": Figure(
                    statistics.median(each[0] / ours[0] for each, ours in pairs)
                ),
                "processor time over that of the parts": Figure(used / costs),
                "share of writing": Figure(statistics.median(writing), 0.02, most=True)
                if config is BASE
                else Figure(statistics.median(writing)),
            }

        with alone_on_every_core(data, config) as on_every_core:
            sides = {
                "alone": Side(lambda: alone(data, runs.encoders)),
                "on every core": Side(on_every_core),
                "extract": Side(lambda: runs(data), runs.forget),
            }
            yield Prepared(gate, lambda: sides, figures=figures)


@contextmanager
def _decoding(settings: Settings) -> Iterator[Prepared]:
    with tempfile.TemporaryDirectory(prefix="msq-bench-") as name:
        files = videos(Path(name), 2, 1 if settings.quick else 4)
        picture = Picture(16, "uniform", 224, "torch")
        tasks = [
            DecodeTask(row, files[row % 2], None, None, (picture,))
            for row in range(4 if settings.quick else 48)
        ]

        def run(processes: int) -> None:
            for result in decode_in_order(tasks, processes):
                result.release()

        def gate() -> Gate:
            wanted = [decode(task).frames[0] for task in tasks[:2]]
            found = [result.frames[0] for result in decode_in_order(tasks[:2], 2)]
            same = all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
            return Gate(0.0 if same else 1.0, 0.0, "frames, bit for bit")

        def figures(taken: Taken) -> dict[str, Figure]:
            pairs = zip(taken["one"], taken["two"], strict=True)
            speedup = statistics.median(one[0] / two[0] for one, two in pairs)
            return {"two processes over one": Figure(speedup, 1.6)}

        sides = {"one": Side(lambda: run(1)), "two": Side(lambda: run(2))}
        yield Prepared(gate, lambda: sides, figures=figures)


@contextmanager
def _long(settings: Settings) -> Iterator[Prepared]:
    counts = (8, 16) if settings.quick else (200, 5000)
    with tempfile.TemporaryDirectory(prefix="msq-bench-") as name:
        folder = Path(name)
        files = videos(folder, 4, 1, size=(64, 48))
        few, many = (dataset(folder, count, files) for count in counts)
        runs = {
            side: Runs(folder, (video_encoder(TINY), image_encoder(TINY)), watched=True)
            for side in ("few", "many")
        }

        def gate() -> Gate:
            runs["few"](few, store_dtype="float32")
            kept = open_store(runs["few"].store).tokens(range(8))
            part = dataset(folder, 8, files)
            wanted = torch.stack(alone(part, runs["few"].encoders[:1])[0])
            worst = float((kept - wanted).abs().max() / wanted.abs().max())
            runs["few"].forget()
            return Gate(worst, TOLERANCE, "the first features, and of clips made one by one")

        def figures(taken: Taken) -> dict[str, Figure]:
            rounds = len(taken["few"])
            peaks = {s: statistics.median(r.peaks[-rounds:]) for s, r in runs.items()}
            costs = {
                side: statistics.median(
                    r.stages["cpu_seconds"] / r.clips for r in run.results[-rounds:]
                )
                for side, run in runs.items()
            }
            return {
                "peak memory of few, MB": Figure(peaks["few"] / 2**20),
                "peak memory of many over few": Figure(peaks["many"] / peaks["few"], 1.05, True),
                "processor time per clip, ms": Figure(1e3 * costs["many"]),
                "processor time per clip of many over few": Figure(
                    costs["many"] / costs["few"], 1.05, True
                ),
            }

        def side(name: str, data: Dataset) -> Side:
            work: Callable[[], object] = functools.partial(runs[name], data)
            return Side(work, runs[name].forget)

        yield Prepared(
            gate, lambda: {"few": side("few", few), "many": side("many", many)}, figures=figures
        )


def videos(
    folder: Path, count: int, seconds: int, size: tuple[int, int] = (640, 480)
) -> list[Path]:
    """Files of noise and moving blocks, a keyframe a second."""
    files = [folder / f"{k}.mp4" for k in range(count)]
    for k, file in enumerate(files):
        make_video(file, seconds, 30 + k, size)
    return files
