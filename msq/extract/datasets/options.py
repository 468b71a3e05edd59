"""`--option key=value` of a dataset, checked."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from msq.errors import UsageError


def parse_options(pairs: Sequence[str]) -> dict[str, str]:
    """`["split=2", …]` -> {"split": "2", …}.

    Raises:
        UsageError: no `=`, an empty name, or a name given twice.
    """
    options: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"--option {pair!r}: expected KEY=VALUE")
        if key in options:
            raise UsageError(f"--option {key} is given twice: {options[key]!r} and {value!r}")
        options[key] = value.strip()
    return options


def find_class_file(classes: Path, root: Path | None) -> Path:
    """The file of class names that is meant, absolute: in the working folder, else in the root.

    One that is in neither is left as it is: the dataset says where it has looked.
    """
    folder = None if root is None else root if root.is_dir() else root.parent
    for path in (classes, *([] if folder is None else [folder / classes])):
        if path.exists():
            return path.absolute()
    return classes


def with_class_file(options: Mapping[str, str], root: Path | None) -> dict[str, str]:
    """Options of a dataset whose `classes`, where they are among them, is `find_class_file`'s."""
    found = dict(options)
    if found.get("classes"):
        found["classes"] = str(find_class_file(Path(found["classes"]).expanduser(), root))
    return found


def check_options(dataset: str, options: Mapping[str, str], known: Mapping[str, str]) -> None:
    """Every option is one the dataset has.

    Raises:
        UsageError: one is not; the message names the nearest and all of them.
    """
    for key in options:
        if key not in known:
            have = "; ".join(f"{name}: {text}" for name, text in known.items()) or "none"
            raise UsageError(
                f"dataset {dataset} has no option {key!r}{nearest(key, known)}; its options: {have}"
            )


def choice(
    dataset: str, options: Mapping[str, str], key: str, allowed: Sequence[str], default: str
) -> str:
    """The value of an option that has a few values.

    Raises:
        UsageError: another value; the message lists them.
    """
    value = options.get(key, default)
    if value not in allowed:
        raise UsageError(
            f"dataset {dataset}, --option {key}={value}: expected {', '.join(allowed)}"
        )
    return value


def nearest(word: str, known: Collection[str]) -> str:
    """` (did you mean a, b?)`, or nothing when no name is near."""
    near = difflib.get_close_matches(word.lower(), list(known), n=3, cutoff=0.5)
    return f" (did you mean {', '.join(near)}?)" if near else ""
