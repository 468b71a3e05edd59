"""`result.json`, which is written last: a run that has it is finished."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msq.errors import UsageError


def read_result(run: Path) -> dict[str, Any]:
    """The result of a finished run.

    Args:
        run: its directory.

    Raises:
        UsageError: the run is unfinished, or its result is damaged.
    """
    file = run / "result.json"
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{run}: expected a finished run, found no result.json; the command that began it goes "
            "on with it"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{file}: expected the result of a run; {error}; take the file from a copy, or train "
            "again with --overwrite"
        ) from None
    if not isinstance(result, dict) or not isinstance(result.get("metrics"), dict):
        raise UsageError(
            f"{file}: expected the result of a run, found no metrics in it; take the file from a "
            "copy, or train again with --overwrite"
        )
    return result
