"""What WHAT names: a manifest, a folder with a folder per class, or a dataset."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msq.errors import UsageError
from msq.extract.datasets.registry import MODULES, find_adapter


def named_clips(
    what: str, root: Path | None, options: Mapping[str, object], *, store_hint: str
) -> dict[str, Any]:
    """The fields of an `ExtractRequest` that say where the clips are: `manifest`, or `dataset`.

    Args:
        what: as it was typed.
        root: where a dataset lies.
        options: of a dataset.
        store_hint: what to do with a feature store instead, if that is what was named.

    Raises:
        UsageError: nothing of that name, a name that means two things, or a root and options
            beside a manifest.
    """
    path, key = Path(what), what.strip().lower().replace("_", "-").replace(" ", "-")
    named = key in MODULES
    if (path / "zarr.json").is_file():
        raise UsageError(
            f"{path}: expected videos (a manifest, a folder of classes, a dataset's name), "
            f"found a feature store; {store_hint}"
        )
    if root is not None or options:
        if named:
            return {"dataset": what, "root": root}
        raise UsageError(
            f"{what}: --root and --option go with the name of a dataset "
            f"({', '.join(MODULES)}), found "
            + ("a path" if path.exists() else f"no such name{_near(key)}")
        )
    if path.exists() and named:
        raise UsageError(
            f"{what}: both a path here and the name of a dataset; ./{path} means the "
            "path, and --root DIR the dataset"
        )
    if path.exists():
        return {"manifest": path}
    if named:
        adapter = find_adapter(what)
        raise UsageError(f"dataset {adapter.name} needs --root DIR with {adapter.needs}")
    raise UsageError(
        f"{what}: expected a manifest (CSV or JSONL), a folder with a folder per class, "
        f"or a dataset's name with --root DIR; found no such file{_near(key)}"
    )


def _near(key: str) -> str:
    near = difflib.get_close_matches(key, MODULES, n=2, cutoff=0.6)
    return f"; did you mean the dataset {' or '.join(near)}?" if near else ""
