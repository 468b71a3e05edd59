"""The default number of decode processes beside the other ones there are to choose from."""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msq.bench.cases import Case, Figure, Gate, Prepared, Settings, Side
from msq.bench.extract_cases import MIDDLE, TINY, Runs, Taken, dataset, videos
from msq.bench.random_encoders import image_encoder, video_encoder
from msq.extract.decode_pool import cores
from msq.extract.store import open_store


def case() -> Case:
    """As many processes as there are cores, the default, against fewer and none."""
    return Case(
        name="workers",
        compares="48 clips through extract, with the default number of decode processes and others",
        base="default",
        unit="ms",
        rounds=5,
        prepare=_workers,
    )


@contextmanager
def _workers(settings: Settings) -> Iterator[Prepared]:
    clips = 6 if settings.quick else 48
    config = TINY if settings.quick else MIDDLE
    others = {f"{n} processes": n for n in (0, 1, 2 * cores()) if n != cores()}
    with tempfile.TemporaryDirectory(prefix="msq-bench-") as name:
        folder = Path(name)
        data = dataset(folder, clips, videos(folder, 2, 1 if settings.quick else 4))
        runs = Runs(folder, (video_encoder(config), image_encoder(config)))

        def gate() -> Gate:
            kept = []
            for workers in (None, *others.values()):
                runs(data, workers=workers)
                kept.append(open_store(runs.store).tokens(range(clips)))
                runs.forget()
            worst = max(float((one - kept[0]).abs().max()) for one in kept)
            return Gate(worst, 0.0, "features of all, bit for bit")

        def figures(taken: Taken) -> dict[str, Figure]:
            walls = {side: statistics.median(w for w, _ in found) for side, found in taken.items()}
            best = min(walls[side] for side in others)
            return {"the fastest other over the default": Figure(best / walls["default"])}

        sides = {"default": Side(lambda: runs(data), runs.forget)}
        for side, workers in others.items():
            sides[side] = Side(functools.partial(runs, data, workers=workers), runs.forget)
        yield Prepared(gate, lambda: sides, figures=figures)
