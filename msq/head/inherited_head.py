"""What a run takes over of another one whose head it starts from: the head's own configuration."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msq.config_values import toml_value
from msq.errors import UsageError
from msq.head.checkpoint import load_model

# These say how a head starts and trains, not which one it is.
_FREE = ("head.dropout", "head.start")


def inherited_settings(run: Path, file: Path | None, assignments: Sequence[str]) -> list[str]:
    """Assignments `head.…` and `train.protocol` of a run, for those that are not given.

    Args:
        run: the directory of a finished run of `train-head` or `train`.
        file: the TOML file that is read too.
        assignments: `section.key=value` that come after what this returns.

    Raises:
        UsageError: no finished run, or something else is asked for than its head has.
    """
    if (run / "split1").is_dir() and not (run / "head.safetensors").exists():
        raise UsageError(
            f"--init-head {run}: expected one head, found one for each partition; name one of "
            f"them, such as {run / 'split1'}"
        )
    meta = load_model(run / "head.safetensors" if run.is_dir() else run)[1]
    theirs: dict[str, Any] = {f"head.{key}": value for key, value in meta["head"].items()}
    theirs["train.protocol"] = meta["protocol"]
    for key, value in _asked(file, assignments).items():
        if key not in theirs:
            continue
        if key not in _FREE and not _agree(key, value, theirs):
            raise UsageError(
                f"--init-head {run}: expected {key} = {_word(theirs[key])}, which its head has, "
                f"found {_word(value)}; leave {key} out, or start without --init-head"
            )
        del theirs[key]
    return [f"{key}={_word(value)}" for key, value in theirs.items()]


def _asked(file: Path | None, assignments: Sequence[str]) -> dict[str, Any]:
    """What a file and assignments say, by dotted keys; whether it can be is checked elsewhere."""
    asked: dict[str, Any] = {}
    if file is not None and file.is_file():
        try:
            tables = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError):
            tables = {}
        for section, values in tables.items():
            if isinstance(values, Mapping):
                asked |= {f"{section}.{key}": value for key, value in values.items()}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if equals:
            asked[key.strip()] = toml_value(text.strip())
    return asked


def _agree(key: str, value: Any, theirs: Mapping[str, Any]) -> bool:
    """Whether a value means the same; the width, and what follows from it, may be left open."""
    found = theirs[key]
    if key == "head.width" and value is None:
        return True
    if key == "head.ffn":
        wide = 4 * theirs["head.width"]
        return bool((value or wide) == (found or wide))
    return bool(value == found)


def _word(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
