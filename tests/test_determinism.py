"""The same bits again: from process to process with 1 and 2 threads, and after any interruption."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msq import config as configuration
from msq.config import RunConfig
from msq.errors import UsageError
from msq.extract.store import open_store
from msq.extract.views import CLEAN, augmented_views
from msq.head.checkpoint import load_model, load_state
from msq.head.features import Features, configured_features
from msq.head.train import Training, train_head
from msq.report import stage_two

stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("view_stores.py"))))
SMALL = ("head.layers=2", "head.heads=2", "head.ffn=32", "train.epochs=2", "train.batch=8")

# Wide enough for torch to share products and row-wise work between two threads (32,768 elements
# and more), and for the dropout words (100,000 and more) to be drawn by two.
WORK = """
import hashlib, torch
from msq import config as configuration
from msq.config import RunConfig
from msq.head import masks
from msq.head.features import Features
from msq.head.train import Training

drawn = []
pool = masks.ThreadPoolExecutor
masks.ThreadPoolExecutor = lambda threads: drawn.append(threads) or pool(threads)
g = torch.Generator().manual_seed(0)
n, k, s, d = 24, 96, 9, 128
features = Features(
    name="t", task="multilabel", classes=tuple(map(str, range(k))), ids=tuple(map(str, range(n))),
    splits=("train",) * n, tokens=torch.randn(n, s, d, generator=g),
    labels=(torch.rand(n, k, generator=g) < 0.2).to(torch.uint8),
    image=torch.randn(n, d, generator=g), text=torch.randn(k, d, generator=g),
)
for path, precision in (("packed", "fp32"), ("packed", "bf16"), ("plain", "fp32")):
    training = Training(features, configuration.override(RunConfig(), [
        "head.layers=2", "head.heads=4", "train.batch=12", "train.val=0",
        f"train.path={path}", f"train.precision={precision}",
    ]))
    for _ in range(4):
        training._step()
    assert bool(training.flat.data.isfinite().all())
    parts = [training.flat.data, training.average.average[0], training.loss_sum]
    print(hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest())
print(torch.get_num_threads(), max(drawn, default=1))
"""


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(run / "head.safetensors")[0].state_dict()


@pytest.mark.parametrize("threads", [1, 2])
def test_two_processes_train_the_same_bits(threads: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_DYNAMIC": "FALSE"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORK],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (out.splitlines() for out, _ in outputs)
    assert first[3] == f"{threads} {threads}"  # torch's threads, and those of the masks
    assert len(set(first[:3])) == 3  # each version of the step has bits of its own
    assert first == second


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Features]:
    """By `features.train_views`, from one store."""
    path = tmp_path_factory.mktemp("store") / "a.zarr"
    store = open_store(stores.make_store(path, (CLEAN, *augmented_views(2)), clips=36))
    return {
        which: configured_features(store, small(f"features.train_views={which}").features)
        for which in ("clean", "augmented")
    }


def small(*overrides: str) -> RunConfig:
    return configuration.override(RunConfig(), [*SMALL, *overrides])


@pytest.mark.parametrize("which", ["clean", "augmented"])
@pytest.mark.parametrize("ema", ["0", "0.99"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("path", ["plain", "packed"])
def test_a_run_stopped_in_the_middle_of_epochs_ends_with_the_same_bits(
    path: str, precision: str, ema: str, which: str, features: dict[str, Features], tmp_path: Path
) -> None:
    config = small(f"train.path={path}", f"train.precision={precision}", f"train.ema={ema}",
                   f"features.train_views={which}")  # fmt: skip
    found = features[which]
    epoch = Training(found, config).epoch_steps
    assert epoch == 3
    whole = train_head(found, config, tmp_path / "whole")
    out, taken = tmp_path / "parts", 0
    for part in (1, 4):  # in the middle of the first epoch, and of the second
        taken += part
        torch.rand(taken)  # what others draw in between is their own
        assert not train_head(found, config, out, stop_after=part).finished
        state: dict[str, Any] | None = load_state(out / "state.pt")
        assert state is not None
        assert state["step"] == taken
        assert taken % epoch in (1, 2)
        assert (state["average"] is None) == (ema == "0")
    done = train_head(found, config, out)
    first, second = weights(tmp_path / "whole"), weights(out)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert done.metrics == whole.metrics
    assert done.result["step"]["path"] == path
    assert done.result["step"]["precision"] == precision


def test_what_the_matrix_compares_can_differ(features: dict[str, Features], tmp_path: Path) -> None:
    """Another seed, precision, average or view: other bits, so that equal ones say something."""
    runs = {
        "base": (),
        "seed": ("train.seed=1",),
        "precision": ("train.precision=bf16",),
        "ema": ("train.ema=0", "train.select=last"),
        "views": ("features.train_views=augmented",),
    }
    found = {}
    for name, changes in runs.items():
        which = "augmented" if name == "views" else "clean"
        train_head(features[which], small(*changes), tmp_path / name)
        found[name] = torch.cat([t.flatten().float() for t in weights(tmp_path / name).values()])
    for name in list(runs)[1:]:
        assert not torch.equal(found[name], found["base"]), name


def wide(out: Path, stop_after: int | None = None) -> None:
    """A run of four steps, wide enough for two threads to round otherwise than one."""
    g = torch.Generator().manual_seed(0)
    n, k, s, d = 32, 96, 9, 128
    features = Features(
        name="t", task="multilabel", classes=tuple(map(str, range(k))),
        ids=tuple(map(str, range(n))), splits=("train",) * 24 + ("test",) * 8,
        tokens=torch.randn(n, s, d, generator=g),
        labels=(torch.rand(n, k, generator=g) < 0.2).to(torch.uint8),
        image=torch.randn(n, d, generator=g), text=torch.randn(k, d, generator=g),
    )  # fmt: skip
    config = configuration.override(RunConfig(), [
        "head.layers=2", "head.heads=4", "train.batch=12", "train.val=0", "train.epochs=2",
    ])  # fmt: skip
    train_head(features, config, out, stop_after=stop_after)


RESUME = """
import importlib.util, sys
from pathlib import Path
import torch
spec = importlib.util.spec_from_file_location("test_determinism_module", sys.argv[1])
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
module.wide(Path(sys.argv[2]))
print(torch.get_num_threads())
"""


def resumed_by_one_thread(out: Path) -> str:
    """Go on in a process of one thread; the log of the run."""
    done = subprocess.run(
        [sys.executable, "-c", RESUME, __file__, str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]  # the threads of the process are its own again
    return (out / "log.txt").read_text(encoding="utf-8")


def bits(run: Path) -> bytes:
    return b"".join(t.numpy().tobytes() for t in weights(run).values())


@pytest.fixture
def threads() -> Any:
    """Sets torch's number of threads; afterwards it is what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_a_run_goes_on_with_the_threads_that_it_began_with(
    tmp_path: Path, threads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(1)
    wide(tmp_path / "of one")
    threads(2)
    wide(tmp_path / "whole")
    wide(tmp_path / "parts", stop_after=3)
    log = resumed_by_one_thread(tmp_path / "parts")
    assert "2 threads, as the run began, in place of the 1 of this process" in log
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")
    # A run of before the number was recorded goes on with those of its process, as it did.
    old = tmp_path / "old"
    wide(old, stop_after=3)
    file = old / "config.toml"
    text = file.read_text(encoding="utf-8")
    shorter = re.sub(r'^(threads = 2|device = "cpu")\n', "", text, flags=re.M)
    assert len(text) - len(shorter) == len('threads = 2\ndevice = "cpu"\n')
    file.write_text(shorter, encoding="utf-8")
    taken, step = [], Training._step

    def noted(self: Training) -> None:
        taken.append(torch.get_num_threads())
        step(self)

    monkeypatch.setattr(Training, "_step", noted)
    threads(1)
    wide(old)
    assert taken == [1]
    assert torch.get_num_threads() == 1
    assert "threads, as the run began" not in (old / "log.txt").read_text(encoding="utf-8")
    if bits(tmp_path / "whole") == bits(tmp_path / "of one"):
        pytest.skip("two threads round as one does here: equal bits of the two say nothing")


def test_other_threads_are_said_with_the_way_to_those_of_the_process(
    tmp_path: Path, threads: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    store, out, other = (tmp_path / name for name in ("a.zarr", "run", "other"))
    found = configured_features(
        open_store(stores.make_store(store, (CLEAN,), clips=36)), small().features
    )
    threads(2)
    train_head(found, small(), out, stop_after=1)
    shutil.copytree(out, other)
    threads(1)
    stage_two.train(store, small(), out, device="cpu")
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "training on cpu (2 threads), fp32"
    assert said[1] == (
        f"note: {out}: 2 threads, as the run began, in place of the 1 of this process: its bits "
        "depend on their number; with threads = 1 under [data.step] in its config.toml it takes "
        "those of this process, and ends in other bits"
    )
    text = (other / "config.toml").read_text(encoding="utf-8")
    assert text.count("threads = 2\n") == 1
    text = text.replace("threads = 2\n", "threads = 1\n")
    (other / "config.toml").write_text(text, encoding="utf-8")
    for run in (other, out):  # the one as it was told to, the other finished
        stage_two.train(store, small(), run, device="cpu")
        assert "threads, as the run began" not in capsys.readouterr().err
    assert "resumed at step 1 of" in (other / "log.txt").read_text(encoding="utf-8")


def test_threads_that_are_none_are_refused(tmp_path: Path) -> None:
    wide(tmp_path / "run", stop_after=1)
    file = tmp_path / "run" / "config.toml"
    text = file.read_text(encoding="utf-8")
    for wrong in ('"two"', "-1", "true"):
        changed = re.sub(r"^threads = \d+$", f"threads = {wrong}", text, flags=re.M)
        file.write_text(changed, encoding="utf-8")
        with pytest.raises(
            UsageError, match=r"config\.toml: data\.step\.threads: expected the num"
        ):
            wide(tmp_path / "run")
