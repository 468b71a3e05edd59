"""Which devices a command takes: a wrong `--device` ends it with 2 before anything is loaded."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from msq.cli import main
from msq.errors import UsageError
from msq.extract.devices import resolve_device
from msq.extract.views import CLEAN

stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("life_stores.py"))))

WRONG = ("gpu", "cpu0", "cpu:0", "cuda:", "cuda:x", "cuda:01", "cuda0", "CPU", "")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    def there(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return there


def test_devices_that_are_there_are_taken_and_no_others(gpus: Any) -> None:
    gpus(0)
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    for name in ("cuda", "cuda:0"):
        with pytest.raises(UsageError, match=f"--device {name}: expected a CUDA device"):
            resolve_device(name)
    gpus(2)
    assert [resolve_device(n) for n in ("auto", "cpu", "cuda", "cuda:1")] == [
        *("cuda", "cpu", "cuda", "cuda:1")
    ]
    with pytest.raises(UsageError, match="--device cuda:7: expected one of cuda:0, cuda:1"):
        resolve_device("cuda:7")
    for name in WRONG:
        with pytest.raises(UsageError, match="expected auto, cpu, cuda or cuda:N"):
            resolve_device(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest, a store, and a grid file: all that comes before the device is asked for."""
    found = tmp_path_factory.mktemp("devices")
    stores.fill(found / "s.zarr", specs=(stores.VIDEO,), views=(CLEAN,))
    (found / "a.mp4").write_bytes(b"")
    (found / "clips.csv").write_text("path,labels,split\na.mp4,run,train\n")
    (found / "run").mkdir()
    return found


COMMANDS = {
    "extract": "extract --manifest clips.csv",
    "dry run": "extract --manifest clips.csv --dry-run",
    "train-head": "train-head s.zarr",
    "eval": "eval run s.zarr",
    "predict": "predict a.mp4 --run run",
    "train": "train clips.csv",
    "zero-shot": "zero-shot s.zarr",
    "grid": "grid table6-charades",
    "verify": "store verify s.zarr --sample 1 --manifest clips.csv",
    "bench head": "bench head --quick",
    "bench stack": "bench stack --quick",
    "bench extract": "bench extract --quick",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_command_refuses_a_device_that_is_not_there(
    folder: Path,
    command: str,
    gpus: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    gpus(1)
    for device in ("gpu", "cuda:7"):
        with pytest.raises(SystemExit) as left:
            main([*command.split(), "--device", device])
        said = capsys.readouterr().err
        assert left.value.code == 2, said
        assert f"--device {device}: expected " in said
