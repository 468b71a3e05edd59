"""No command loads a package that it does not need: seconds of waiting before anything happens.

Commands follow one another in one process, each with all that it may load, which grows from one to
the next; what is loaded is looked at after each. What is counted is what is in `sys.modules`, so
the machine's speed plays no part.
"""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from msq.cli import app

stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sweep_stores.py"))))

HEAVY = (
    "PIL", "av", "dask", "distributed", "fsspec", "h5py", "huggingface_hub", "matplotlib", "numpy",
    "open_clip", "openpyxl", "pandas", "scipy", "sklearn", "tensorboard", "timm",
    "torch", "torch._dynamo", "torch._inductor", "torchvision", "transformers", "triton", "xarray",
    "zarr",
)  # fmt: skip
NUMPY = ("numpy",)
STORE = (*NUMPY, "zarr", "fsspec")  # zarr imports fsspec
TORCH = (*STORE, "torch")
# torch.optim and torchvision import torch's compiler, which imports Triton.
TRAINING = (*TORCH, "torch._dynamo", "torch._inductor", "triton")
# Which libavcodec is here stands in every copy of a store.
COPYING = (*TRAINING, "av")
# open_clip imports all of its own: torchvision, timm, transformers.
EXTRACTING = (*COPYING, "PIL", "open_clip", "torchvision", "timm", "transformers",
              "huggingface_hub")  # fmt: skip

PROGRAM = """
import json, sys
from msq.cli import main

heavy, commands = json.loads(sys.argv[1])
for allowed, command in commands:
    try:
        main(command)
    except SystemExit as left:
        assert not left.code, (command, left.code)
    loaded = [name for name in heavy if sys.modules.get(name) and name not in allowed]
    assert not loaded, f"msq {' '.join(command)} loaded {', '.join(loaded)}"
"""


def check(*commands):
    """Run commands, each with what may be loaded after it, in a process of their own."""
    given = json.dumps([HEAVY, [[may, [*map(str, command)]] for may, *command in commands]])
    done = subprocess.run([sys.executable, "-c", PROGRAM, given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def made(tmp_path_factory, media):
    """A store, a run on it, and one video."""
    folder = tmp_path_factory.mktemp("loaded")
    store = stores.make_store(folder / "toy.zarr", clips=24)
    assert stores.msq("train-head", store, "--out", folder / "run", "--epochs", 1, "--val", 0,
                      "-q", *stores.HEAD) == 0  # fmt: skip
    media.encode(folder / "a.mp4", 12, size=(64, 48), gop=6, bframes=0)
    (folder / "clips.csv").write_text("path,labels,split\na.mp4,run,train\n")
    return SimpleNamespace(folder=folder, store=store, run=folder / "run")


def names_of_commands():
    for name, command in typer.main.get_command(app).commands.items():
        yield from ([name], *([name, inner] for inner in getattr(command, "commands", {})))


def test_commands_that_compute_nothing_load_no_torch(made):
    assert ["store", "inspect"] in [*names_of_commands()]
    check(
        ((), "--help"),
        *(((), *names, "--help") for names in names_of_commands()),
        ((), "--version"),
        ((), "encoders", "list"),
        ((), "datasets", "check", "manifest", "--root", made.folder / "clips.csv"),
        ((), "report", made.run),
        ((), "report", made.run, "--out", made.folder / "table.tex"),
        (NUMPY, "report", made.run, "--out", made.folder / "page.html"),
        (NUMPY, "datasets", "list"),
        (STORE, "store", "inspect", made.store),
        (STORE, "store", "verify", made.store),
        (STORE, "store", "repair", made.store, "--dry-run"),
        (STORE, "store", "export", made.store, made.folder / "toy.zip"),
    )


def test_commands_with_torch_load_what_they_compute_with(made):
    again = ("--out", made.folder / "again", "--epochs", "1", "--val", "0", "-q", *stores.HEAD)
    sweep = ("--seen", "50", "--splits", "1", "--dry-run", "-q", *stores.HEAD)
    copy = (made.store, made.folder / "copy.zarr", "--store-dtype", "float32")
    clips = ("--manifest", made.folder / "clips.csv", "--out", made.folder / "clips.zarr")
    check(
        (TORCH, "eval", made.run, made.store),
        (TRAINING, "train-head", made.store, *again),
        (TRAINING, "zero-shot", made.store, *sweep),
        (COPYING, "store", "convert", *copy),
        (EXTRACTING, "extract", *clips, "--workers", "0", "-q"),
    )
