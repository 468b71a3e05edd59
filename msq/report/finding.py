"""One line of what `msq doctor` finds, and how its parts look at libraries."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        status: `failed` where msq cannot be used as it is.
        found: in words.
        advice: what to do; empty where all is well.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


def importable(name: str) -> bool:
    """Whether a library is there; torch, whether it can be imported."""
    if name != "torch":
        return importlib.util.find_spec(name) is not None
    try:
        importlib.import_module(name)
    except Exception:  # a broken installation breaks in any way; `look_at_torch` says how
        return False
    return True


def version_of(distribution: str) -> str | None:
    """The version of an installed distribution; None where it is not there."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def reason_of(error: Exception) -> str:
    """The first line of an error's message, else its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
