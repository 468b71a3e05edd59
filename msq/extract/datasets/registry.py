"""Datasets by name. An adapter's module is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

from msq.errors import UsageError
from msq.extract.datasets.adapter import Adapter
from msq.extract.datasets.dataset import Dataset
from msq.extract.datasets.options import check_options, nearest, with_class_file

PACKAGE = "msq.extract.datasets"
# name -> module, or module:attribute where that is not ADAPTER
MODULES: Mapping[str, str] = {
    "charades": "charades",
    "animal-kingdom": "animal_kingdom",
    "thumos14": "thumos14",
    "hmdb51": "hmdb51",
    "ucf101": "ucf101",
    "hockey": "hockey",
    "volleyball": "volleyball",
    "charades-json": "charades_json",
    "activitynet": "activitynet",
    "kinetics": "kinetics",
    "mmaction2": "mmaction2",
    "folder": "plain:FOLDER",
    "manifest": "plain:MANIFEST",
}


def find_adapter(name: str) -> Adapter:
    """The adapter of that name; `_` and `-`, capitals and blanks make no difference.

    Raises:
        UsageError: there is none; the message has the nearest names and the list.
    """
    key = name.strip().lower().replace("_", "-").replace(" ", "-")
    if key not in MODULES:
        raise UsageError(
            f"unknown dataset {name!r}{nearest(key, MODULES)}: expected one of "
            f"{', '.join(sorted(MODULES))}; anything else can be read through --manifest FILE"
        )
    module, _, attribute = MODULES[key].partition(":")
    found = importlib.import_module(f"{PACKAGE}.{module}")
    adapter: Adapter = getattr(found, attribute or "ADAPTER")
    return adapter


def list_adapters() -> list[Adapter]:
    """All adapters, datasets before formats."""
    return [find_adapter(name) for name in MODULES]


def read_dataset(name: str, root: Path | None, options: Mapping[str, str]) -> Dataset:
    """Read a dataset by its name.

    Raises:
        UsageError: an unknown name or option, or no root.
        DatasetError: what the adapter raises.
    """
    adapter = find_adapter(name)
    if root is None:
        raise UsageError(f"--dataset {adapter.name} needs --root DIR with {adapter.needs}")
    check_options(adapter.name, options, adapter.options)
    return adapter.read(root, with_class_file(options, root))
