"""`msq doctor` and `msq encoders check`: what is here, is it usable, and what to do if not."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import pytest
import torch

from msq.cli import main
from msq.extract.encoders.encoder import VideoEncoder
from msq.extract.request import ExtractRequest
from msq.head.device import in_words
from msq.report import doctor, doctor_devices, encoder_check, stage_one
from msq.report.finding import Finding

fixtures = runpy.run_path(str(Path(__file__).with_name("encoder_fixtures.py")))


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


def found(*, folder: Path | None = None) -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.examine(folder)}


def test_this_machine_can_run_msq_and_every_line_says_what_is_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("doctor", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is True
    lines = {line["name"]: line for line in document["findings"]}
    assert {
        "python", "torch", "processor", "threads", "triton", "PyAV", "H.264 decoder",
        "VP9 decoder", "AV1 decoder", "zarr", "open_clip", "timm", "dask", "HF_HOME",
        "HF_HUB_OFFLINE", "TORCH_HOME", "disk",
    } <= lines.keys()  # fmt: skip
    assert lines["torch"]["found"].startswith(torch.__version__)
    assert av.__version__ in lines["PyAV"]["found"]
    assert f"{torch.get_num_threads()} threads" in lines["threads"]["found"]
    assert lines["HF_HOME"]["found"] == "not set"
    assert "cache alone" in lines["HF_HUB_OFFLINE"]["found"]
    for line in lines.values():
        assert (line["status"] == "ok") == (line["advice"] == ""), line
    assert run("doctor") == 0
    said = capsys.readouterr()
    assert said.err == ""
    for line in lines.values():
        assert f"{line['name']}: " in said.out
    assert "msq can be used here" in said.out


def test_without_torch_it_still_speaks_and_leaves_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run("doctor") == 1
    out = capsys.readouterr().out
    assert "failed   torch: cannot be imported" in out
    assert "-> install it again: https://pytorch.org" in out
    assert "H.264 decoder" in out
    assert "msq can NOT be used here" in out


def test_without_a_decoder_of_h264_it_leaves_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = av.codec.Codec

    def codec(name: str, mode: str) -> Any:
        if name in ("h264", "libdav1d", "libaom-av1"):
            raise av.codec.codec.UnknownCodecError(name)
        return wanted(name, "r")

    monkeypatch.setattr("av.codec.Codec", codec)
    assert run("doctor", "--json") == 1
    document = json.loads(capsys.readouterr().out)
    status = {line["name"]: line["status"] for line in document["findings"]}
    assert document["ok"] is False
    assert (status["H.264 decoder"], status["AV1 decoder"], status["VP9 decoder"]) == (
        "failed", "warning", "ok",
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "av", None)
    assert found()["PyAV"].status == "failed"


def test_a_build_for_the_cpu_beside_a_driver_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_devices, "has_driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    torch_line = found()["torch"]
    assert torch_line.status == "warning"
    assert "built for the CPU, on a machine with an NVIDIA driver" in torch_line.found
    assert "install a build for CUDA" in torch_line.advice
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch_line = found()["torch"]
    assert (torch_line.status, "driver to one for CUDA 12.8" in torch_line.advice) == (
        "warning", True,
    )  # fmt: skip
    monkeypatch.setattr(doctor_devices, "has_driver", lambda: False)
    assert found()["torch"].status == "ok"


def fake_gpus(monkeypatch: pytest.MonkeyPatch, *gpus: tuple[str, int, int, int]) -> None:
    """GPUs of (name, major of the compute capability, free and total GB)."""
    about = [
        SimpleNamespace(name=name, major=major, minor=0, total_memory=total * 10**9)
        for name, major, _, total in gpus
    ]
    memory = [(free * 10**9, total * 10**9) for _, _, free, total in gpus]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", about.__getitem__)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory.__getitem__)


def test_gpus_are_named_with_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpus(monkeypatch, ("H200", 9, 140, 150), ("T4", 7, 15, 16), ("L4", 8, 3, 24))
    lines = found()
    assert (lines["cuda:0"].status, lines["cuda:1"].status, lines["cuda:2"].status) == (
        "ok", "warning", "warning",
    )  # fmt: skip
    assert "H200" in lines["cuda:0"].found
    assert "140.0 GB free of 150.0 GB" in lines["cuda:0"].found
    assert "without bf16" in lines["cuda:1"].found
    assert "another program" in lines["cuda:2"].advice
    assert "GPU" not in lines


def test_what_is_short_is_warned_of_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1, total=2**26))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    monkeypatch.setattr(doctor, "importable", lambda name: name != "zarr")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "absent"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    fake_gpus(monkeypatch, ("H200", 9, 140, 150), ("H200", 9, 140, 150))
    lines = found(folder=tmp_path)
    for name in ("disk", "threads", "HF_HOME", "triton", "/dev/shm"):
        assert (lines[name].status, bool(lines[name].advice)) == ("warning", True), name
    assert lines["threads"].advice.startswith("set OMP_NUM_THREADS=")
    assert "--shm-size" in lines["/dev/shm"].advice
    assert (lines["zarr"].status, lines["zarr"].advice) == ("failed", "pip install 'zarr'")


def test_a_device_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    assert in_words("cpu", "fp32") == f"cpu ({threads} thread{'s' * (threads > 1)}), fp32"
    fake_gpus(monkeypatch, ("T4", 7, 15, 16), ("H200", 9, 140, 150))
    assert in_words("cuda", "bf16") == "cuda:1 (H200, 140 GiB), bf16"
    assert in_words(torch.device("cuda:0")) == "cuda:0 (T4, 15 GiB)"


def test_an_extraction_by_others_names_them() -> None:
    made = ExtractRequest(manifest=Path("m.csv"), device="cpu", precision="bf16")
    assert stage_one.place(made) == in_words("cpu", "bf16")
    two = replace(made, devices="cuda:0,cuda:1")
    assert stage_one.place(two) == "cuda:0,cuda:1 (--devices), bf16"
    handed = replace(made, scheduler="tcp://node:8786")
    assert stage_one.place(handed) == "the workers of tcp://node:8786, bf16"


def test_encoders_check_runs_one_batch_of_either_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("encoders", "check", "embedded", "--json") == 0
    video = json.loads(capsys.readouterr().out)
    assert (video["kind"], video["tokens"], video["channels"]) == ("video", 9, 128)
    assert (video["shape"], video["finite"], len(video["sha256"])) == ([2, 9, 128], True, 64)
    assert run("encoders", "check", "embedded", "--kind", "image", "--precision", "bf16") == 0
    said = capsys.readouterr()
    assert "clip-embedded: image encoder" in said.out
    assert "|projected|bf16|" in said.out
    assert "of width 128 (D')" in said.out
    assert ", bf16: loaded in" in said.out


def test_encoders_check_takes_weights_beside_a_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixtures["write_clip_folder"](tmp_path / "tiny", fixtures["TINY_CLIP"])
    for name in (tmp_path / "tiny", f"local-dir:{tmp_path / 'tiny'}"):
        assert encoder_check.check(str(name))["kind"] == "image"
    with pytest.raises(SystemExit) as left:
        main(["encoders", "check", "timesformer", "--weights", str(tmp_path / "absent.pyth")])
    assert left.value.code == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["local-dir:nowhere", "nowhere.pyth", "ViT-B-16/nowhere.pt", "nowhere", "ViT-B-99/x"]
)
def test_what_is_not_there_leaves_with_2(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("encoders", "check", name) == 2
    assert name.removeprefix("local-dir:").partition("/")[0] in capsys.readouterr().err


def test_an_output_that_is_not_finite_leaves_with_4(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = VideoEncoder.__call__

    def overflowing(self: VideoEncoder, video: torch.Tensor) -> torch.Tensor:
        out = call(self, video)
        out[0, 0, 0] = torch.inf
        return out

    monkeypatch.setattr(VideoEncoder, "__call__", overflowing)
    assert run("encoders", "check", "embedded") == 4
    assert "NOT finite" in capsys.readouterr().out
    assert run("encoders", "check", "embedded", "--json") == 4
    assert json.loads(capsys.readouterr().out)["finite"] is False
