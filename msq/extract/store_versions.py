"""Versions of the libraries on which the last bits of a store's features depend."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


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
