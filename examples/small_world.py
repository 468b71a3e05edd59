"""Videos, a store and a head for the other examples, where they are given none of your own.

    python examples/small_world.py

renders 160 videos of people, dogs, horses, birds, fish and snakes, encodes them with the embedded
encoders and trains a head: about a minute on two cores, no network. What is there is left as it is.
What comes out:

    small-world/videos/manifest.csv    which video shows what, and its split; beside it the videos
    small-world/store.zarr             the feature store
    small-world/head/                  the head: result.json, predictions.npz, head.safetensors, …

Pictures and encoders are made for each other: the numbers say nothing about real videos.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import msq

FOLDER = Path("small-world")
TRAIN, TEST = 120, 40
# For few videos; the head of the paper has six layers and is trained for a hundred epochs.
SMALL_HEAD = ("head.layers=2", "head.heads=4", "head.ffn=256", "optim.lr=2e-3", "train.epochs=8")


def run_msq(*words: object, codes: tuple[int, ...] = (0,)) -> None:
    """Run a command of msq as it would be typed; end where it leaves with none of `codes`."""
    command = ["msq", *map(str, words)]
    print("$", shlex.join(command), flush=True)
    code = subprocess.run([sys.executable, "-m", *command]).returncode
    if code not in codes:
        sys.exit(code)


def small_videos() -> Path:
    """The manifest of the small world's videos."""
    manifest = FOLDER / "videos" / "manifest.csv"
    if not manifest.exists():
        run_msq("world", manifest.parent, "--train", TRAIN, "--test", TEST)
    return manifest


def small_store() -> Path:
    """The feature store of these videos."""
    store, manifest = FOLDER / "store.zarr", small_videos()
    if not (store.exists() and len(msq.open_store(store).ok_rows()) == TRAIN + TEST):
        classes = manifest.with_name("classes.txt")
        run_msq("extract", "--manifest", manifest, "--classes", classes, "--out", store)
    return store


def small_head() -> Path:
    """The run directory of a head on that store; its classifier takes any words as labels."""
    run = FOLDER / "head"
    if not (run / "result.json").exists():
        run_msq("train-head", small_store(), "--out", run, "--classifier", "text", *SMALL_HEAD)
    return run


if __name__ == "__main__":
    small_head()
