"""The video encoder that a run trained: the folder `encoder/` of its run directory.

`config.json` says what it is, `model.safetensors` holds the weights; `msq.head.encoder_file` writes
both. Its name is that of the run when it was trained and stands in `config.json`: a run directory
that is renamed, moved or copied later holds the same encoder, and stores made by it still fit.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, Final

import safetensors

from msq.errors import UsageError, WeightsError
from msq.extract.encoders.weights import (
    FOLDER_PREFIX,
    HUB_PREFIX,
    WeightFiles,
    find_weights,
    sha256_file,
)

RUN_PREFIX: Final = "run:"  # begins the weights' id in specs; the run's name follows
FOLDER: Final = "encoder"  # of the run directory
CONFIG, MODEL = "config.json", "model.safetensors"
FORMAT = 1  # of config.json
_RUN_CONFIG = "config.toml"
_HEAD = "head.safetensors"


def find_video_weights(name: str) -> WeightFiles:
    """Weights of a video encoder by name: those of a run, or of what `find_weights` knows.

    Args:
        name: a run directory, its `encoder` folder or the file in it, or any other name.

    Raises:
        UsageError: a run that trained a head only.
        WeightsError: there are none.
    """
    return find_run_encoder(name) or find_weights(name)


def find_run_encoder(name: str) -> WeightFiles | None:
    """The encoder of a run; None where `name` has nothing to do with one.

    Raises:
        UsageError: a run that trained a head only.
        WeightsError: one that is not finished, files that are missing or damaged.
    """
    if name.startswith(RUN_PREFIX):
        raise WeightsError(
            f"weights {name}: the encoder that a run of that name trained; expected the run's "
            f"directory (RUN) or its folder RUN/{FOLDER}, which it can be copied from"
        )
    if name.startswith(HUB_PREFIX):
        return None
    path = Path(name.removeprefix(FOLDER_PREFIX)).expanduser()
    if path.name == MODEL and path.is_file():
        path = path.parent
    if not path.is_dir():
        return None
    if _is_run(path):
        if not (path / FOLDER).is_dir():
            _refuse_head_only(path)
            return None
        return _files(path / FOLDER)
    inside = path.resolve()
    if inside.name == FOLDER and _is_run(inside.parent):
        return _files(path)
    values = _read(path / CONFIG) if (path / CONFIG).is_file() else {}
    return _files(path) if {"run", "sha256"} <= set(values) else None


def require_whole(files: WeightFiles) -> WeightFiles:
    """The same files, their weights read and compared with the SHA-256 that the folder states.

    Raises:
        WeightsError: they differ.
    """
    if files.sha256 and (found := sha256_file(files.file)) != files.sha256:
        raise WeightsError(
            f"{files.file}: expected SHA-256 {files.sha256[:16]}…, as {CONFIG} beside it says, "
            f"found {found[:16]}…: damaged, or from another run; copy the folder again, or let "
            "msq train write it anew"
        )
    return files


def _is_run(path: Path) -> bool:
    """Whether a folder is a run directory, and no folder of weights itself."""
    if (path / CONFIG).is_file():
        return False
    return (path / _RUN_CONFIG).is_file() or (path / FOLDER / CONFIG).is_file()


def _files(folder: Path) -> WeightFiles:
    """The two files of the folder, named as `config.json` says."""
    missing = [name for name in (CONFIG, MODEL) if not (folder / name).is_file()]
    if missing:
        raise WeightsError(
            f"{folder}: expected {CONFIG} and {MODEL} of the encoder that a run trained, found no "
            f"{' and no '.join(missing)}: a run that was stopped before its end (msq train goes on "
            "with it), or a copy in part"
        )
    values = _read(folder / CONFIG)
    if int(values.get("format", FORMAT)) > FORMAT:
        raise WeightsError(
            f"{folder / CONFIG}: expected format {FORMAT}, found {values['format']}; update msq"
        )
    run, sha256 = values.get("run"), values.get("sha256")
    if not (isinstance(run, str) and run and isinstance(sha256, str) and sha256):
        raise WeightsError(
            f"{folder / CONFIG}: expected the entries run and sha256 that msq train writes, found "
            f"{', '.join(sorted(values)) or 'nothing'}"
        )
    return WeightFiles(folder / MODEL, folder, f"{RUN_PREFIX}{run}", run, sha256)


def _read(path: Path) -> dict[str, Any]:
    return WeightFiles(path, path.parent, "", "").read_json(path.name) or {}


def _refuse_head_only(run: Path) -> None:
    """Refuse a run without an encoder; pass over a folder that is no run after all.

    Raises:
        UsageError: it trained a head only.
        WeightsError: it is not finished.
    """
    try:
        sections = tomllib.loads((run / _RUN_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if "backbone" in sections:
        raise WeightsError(
            f"{run}: expected the encoder that this run trains in {FOLDER}/, found none yet: the "
            "run is not finished; msq train goes on with it"
        )
    if "head" not in sections:
        return
    spec = _recorded_video(run / _HEAD)
    used = "" if spec is None else f", on features of {spec['slug']} ({spec['weights']})"
    raise UsageError(
        f"{run}: expected a run of msq train, which trains the video encoder too; this run trained "
        f"a head only{used}" + ("" if spec is None else ": name that encoder")
    )


def _recorded_video(head: Path) -> dict[str, Any] | None:
    """What a head recorded of the video encoder that its features came from."""
    try:
        with safetensors.safe_open(str(head), framework="pt") as file:
            header = file.metadata() or {}
        found: dict[str, Any] = json.loads(header["msq"])["encoders"]["video"]
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return None
    return found if {"slug", "weights"} <= set(found) else None
