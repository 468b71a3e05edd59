"""Features that another program computed: into a store, and a head on them.

    python examples/import_features.py       # a minute or so

Two descriptors stand for the other program: what a video looks like, in one HDF5 file with an array
per video, and how it moves, in a folder of `.npy` files. Each goes into one store under a name of
its own, beside CLIP's features, which the queries are made of; these are copied from the small
world's store, since they are there. What comes out: `imported/store.zarr`, a head on each, and
their scores in one table.

The queries hold CLIP's image of a clip, so not all of a score is the descriptors' own: add
`--queries text` to see them by themselves. With files of your own (I3D, SlowFast, VideoMAE, …)
`compute` goes, the commands stay, and in the place of the copy CLIP's features are made after the
import: `msq extract --manifest FILE --classes FILE --out imported/store.zarr --video-encoder none`.
"""

import csv
from pathlib import Path

import av
import h5py
import numpy as np

import msq
from small_world import SMALL_HEAD, run_msq, small_store, small_videos

OUT, MOMENTS = Path("imported"), 12
SHORT = [*(x for x in SMALL_HEAD if not x.startswith("train.epochs")), "train.epochs=6"]


def moments(frames: np.ndarray) -> np.ndarray:
    """[n, 32, 32, 3] to [T, 192]: means over 4 x 4 pixels and over T parts of the time."""
    cells = frames.reshape(len(frames), 8, 4, 8, 4, 3).mean((2, 4)).reshape(len(frames), -1)
    return np.stack([part.mean(0) for part in np.array_split(cells, MOMENTS)])


def describe(video: Path) -> tuple[np.ndarray, np.ndarray]:
    """What it looks like, and how it moves: each [T, 192]."""
    with av.open(video) as file:
        decoded = file.decode(video=0)
        frames = [frame.to_ndarray(format="rgb24", width=32, height=32) for frame in decoded]
    pixels = np.stack(frames).astype(np.float32) / 255
    return moments(pixels), moments(np.abs(np.diff(pixels, axis=0)))


def compute(manifest: Path, looks: Path, motion: Path) -> None:
    """The other program: an array in `looks` and a file in `motion`, named as the video is."""
    motion.mkdir(parents=True, exist_ok=True)
    with manifest.open(newline="", encoding="utf-8") as file, h5py.File(looks, "w") as arrays:
        for row in csv.DictReader(file):
            seen, moved = describe(manifest.parent / row["path"])
            arrays[row["id"]] = seen
            np.save(motion / f"{row['id']}.npy", moved)


manifest, store = small_videos(), OUT / "store.zarr"
compute(manifest, OUT / "looks.h5", OUT / "motion")
clips = ("--manifest", manifest, "--classes", manifest.with_name("classes.txt"))

# All of the small world's store but its video features, so that no video is encoded again.
if not store.exists():
    (video,) = msq.open_store(small_store()).encoders("video")
    run_msq("store", "convert", small_store(), store, "--drop", video)

# The twelve moments become six tokens, each the mean of two, behind one that is the mean of all.
run_msq("store", "import", store, OUT / "looks.h5", "--name", "looks", "--tokens", 6, *clips)
run_msq("store", "import", store, OUT / "motion", "--name", "motion", "--tokens", 6, *clips)

runs = [OUT / "head-looks", OUT / "head-motion"]
for run, name in zip(runs, ("looks", "motion"), strict=True):
    run_msq("train-head", store, "--out", run, f"features.video={name}", *SHORT)
run_msq("report", *runs)
