"""`msq doctor`: what this machine has of what msq needs, and what to do about the rest.

Nothing heavy is imported at the top: what cannot be imported is a finding.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from msq import __version__
from msq.report import terminal
from msq.report.doctor_devices import (
    look_at_gpus,
    look_at_processor,
    look_at_torch,
    look_at_triton,
)
from msq.report.finding import Finding, Status, importable, reason_of, version_of
from msq.report.stage_one import size

GIB = 2**30
LITTLE_DISK, LITTLE_SHM = 5 * GIB, GIB
# FFmpeg's own decoder named `av1` needs a GPU that has one.
DECODERS: Mapping[str, tuple[str, ...]] = {
    "H.264": ("h264",),
    "VP9": ("vp9", "libvpx-vp9"),
    "AV1": ("libdav1d", "libaom-av1"),
}
# Library -> (what it is for, msq can do nothing without it).
LIBRARIES: Mapping[str, tuple[str, bool]] = {
    "zarr": ("feature stores", True),
    "safetensors": ("weights and heads", True),
    "open_clip": ("CLIP, the embedded one too", True),
    "timm": ("video encoders timm/…", False),
    "dask": ("--scheduler dask and tcp://…", False),
    "transformers": ("text models of Hugging Face", False),
    "openpyxl": ("Animal Kingdom's workbook", False),
}
PACKAGES: Mapping[str, str] = {
    "open_clip": "open_clip_torch",
    "dask": "dask[distributed]",
    "transformers": "msq[text]",
    "openpyxl": "msq[xlsx]",
}
VARIABLES = ("HF_HOME", "HF_HUB_OFFLINE", "TORCH_HOME", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def examine(folder: Path | None = None) -> list[Finding]:
    """Look at everything.

    Args:
        folder: whose free disk is looked at; the working folder if None.
    """
    place = folder or Path.cwd()
    looks: dict[str, Callable[[], Iterable[Finding]]] = {
        "python": _python,
        "torch": look_at_torch,
        "GPU": look_at_gpus,
        "processor": look_at_processor,
        "triton": look_at_triton,
        "PyAV": _video,
        "libraries": _libraries,
        "environment": _environment,
        "disk": lambda: _disk(place),
        "/dev/shm": _shm,
    }
    found: list[Finding] = []
    for name, look in looks.items():
        try:
            found += look()
        except Exception as error:  # a broken installation breaks in any way
            words = f"could not be looked at: {reason_of(error)}"
            found.append(Finding(name, "warning", words, "mend what the message says"))
    return found


def show(findings: list[Finding], *, json: bool = False) -> int:
    """Print them all; 1 where one of them makes msq unusable, else 0."""
    usable = all(finding.status != "failed" for finding in findings)
    if json:
        terminal.print_json({"ok": usable, "findings": [asdict(f) for f in findings]})
        return 0 if usable else 1
    for finding in findings:
        print(f"{finding.status:8} {finding.name}: {finding.found}")
        if finding.advice:
            print(f"{'':8} -> {finding.advice}")
    warnings = sum(finding.status == "warning" for finding in findings)
    can, several = "can" if usable else "can NOT", "" if warnings == 1 else "s"
    print(f"msq {can} be used here, {warnings} warning{several}")
    return 0 if usable else 1


def _python() -> Iterator[Finding]:
    system = f"{platform.system()} {platform.machine()}"
    yield Finding("python", "ok", f"{platform.python_version()} on {system}, msq {__version__}")


def _video() -> Iterator[Finding]:
    try:
        import av
        from av.codec import Codec
    except Exception as error:  # its FFmpeg may miss a library of the system
        words = f"cannot be imported: {reason_of(error)}"
        yield Finding("PyAV", "failed", words, "pip install --force-reinstall av")
        return
    library = ".".join(str(part) for part in av.library_versions["libavcodec"])
    words = f"{av.__version__}, FFmpeg {av.ffmpeg_version_info}, libavcodec {library}"
    yield Finding("PyAV", "ok", words)
    for name, decoders in DECODERS.items():
        there = []
        for decoder in decoders:
            try:
                Codec(decoder, "r")
            except ValueError:
                continue
            there.append(decoder)
        if there:
            yield Finding(f"{name} decoder", "ok", ", ".join(there))
            continue
        status: Status = "failed" if name == "H.264" else "warning"
        yield Finding(f"{name} decoder", status, f"none of {', '.join(decoders)}",
                      "install PyAV from its wheels (pip install --force-reinstall --only-binary "
                      "av av), which bring FFmpeg")  # fmt: skip


def _libraries() -> Iterator[Finding]:
    for name, (purpose, needed) in LIBRARIES.items():
        package = PACKAGES.get(name, name)
        distribution = package if name == "open_clip" else name
        if importable(name):
            yield Finding(name, "ok", f"{version_of(distribution) or 'there'}, for {purpose}")
        elif package.startswith("msq["):  # an extra, which nobody needs to have
            yield Finding(name, "ok", f"not there; pip install '{package}' for {purpose}")
        else:
            yield Finding(name, "failed" if needed else "warning", f"not there: no {purpose}",
                          f"pip install '{package}'")  # fmt: skip


def _environment() -> Iterator[Finding]:
    for name in VARIABLES:
        value = os.environ.get(name)
        if value is None:
            yield Finding(name, "ok", "not set")
        elif name.endswith("_HOME") and not Path(value).expanduser().is_dir():
            advice = "downloads make it; if weights should be there, mend the path"
            yield Finding(name, "warning", f"{value}, which is no folder yet", advice)
        elif name == "HF_HUB_OFFLINE" and value.upper() in ("1", "ON", "YES", "TRUE"):
            yield Finding(name, "ok", f"{value}: hf-hub: names are looked up in the cache alone")
        else:
            yield Finding(name, "ok", value)


def _disk(folder: Path) -> Iterator[Finding]:
    usage = shutil.disk_usage(folder)
    words = f"{size(usage.free)} free in the working folder"
    if not os.access(folder, os.W_OK):
        yield Finding("disk", "warning", f"{words}, which may not be written",
                      "name a folder of your own with --out")  # fmt: skip
    elif usage.free < LITTLE_DISK:
        yield Finding("disk", "warning", words,
                      "msq extract --dry-run says how large a store will be")  # fmt: skip
    else:
        yield Finding("disk", "ok", words)


def _shm() -> Iterator[Finding]:
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return
    total = shutil.disk_usage(shared).total
    words = f"{size(total)}; decoded frames do not need it"
    several = False
    if importable("torch"):
        import torch

        several = torch.cuda.device_count() > 1
    if several and total < LITTLE_SHM:
        yield Finding("/dev/shm", "warning", f"{words}, but msq train on several GPUs does (NCCL)",
                      "docker run --shm-size=2g, or --ipc=host")  # fmt: skip
    else:
        yield Finding("/dev/shm", "ok", words)
