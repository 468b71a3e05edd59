"""Versions of the libraries on which the last bits of a store's features depend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def library_versions() -> dict[str, str]:
    """Library -> version: torch, PyAV (`av`) and its libavcodec; without those that are not here.

    What PyAV was built with can differ under one version of it, hence both.
    """
    found: dict[str, str] = {}
    for name in ("torch", "av"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    try:
        import av  # takes a tenth of a second, and who imports features may be without it
    except ImportError:
        return found
    found["libavcodec"] = ".".join(str(part) for part in av.library_versions["libavcodec"])
    return found


def in_words(making: Mapping[str, Any]) -> str:
    """`msq 1.0, torch 2.15`; stores of earlier versions of msq name msq's alone."""
    libraries = "".join(f", {name} {said}" for name, said in making.get("versions", {}).items())
    return f"msq {making.get('version')}{libraries}"


def runs_in_words(runs: Sequence[Mapping[str, Any]]) -> str:
    """Rows of an encoder that follow one another and were made alike; `made_with` of a copy."""
    counted = (f"of {run['clips']} clips " if "clips" in run else "" for run in runs)
    return "; ".join(f"{n}by {in_words(run)}" for n, run in zip(counted, runs, strict=True))


def copy_in_words(root: Mapping[str, Any]) -> str | None:
    """A line on a copy's versions, from its root's attributes; None for what is no copy."""
    copied = root.get("copied_by")
    if copied is None:
        return None
    made = [f"{slug} {runs_in_words(runs)}" for slug, runs in root.get("made_with", {}).items()]
    return (
        f"a copy ({copied['by']} by {in_words(copied)}) of features made "
        f"{'; '.join(made) or f'by {in_words(root)}'}"
    )
