"""The values of a configuration: what a text means, and whether it is what a field takes."""

from __future__ import annotations

import difflib
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from msq.errors import UsageError


def toml_value(text: str) -> Any:
    """What a bare text means: a TOML value, None for `none`, else the text itself."""
    if text.lower() in ("none", "null"):
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def checked_section(
    section: str, values: Any, known: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """The values of one table, each of the type that its field has.

    Args:
        section: its name, one of `known`.
        values: what was found there.
        known: section -> its dataclass, all of them: a wrong key is told the nearest.
        source: of the values, for messages.

    Raises:
        UsageError: no table, an unknown field, or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise UsageError(f"{source}: {section} is a section, found the value {values!r}")
    hints = typing.get_type_hints(known[section])
    checked = {}
    for key, value in values.items():
        if key not in hints:
            dotted = [f"{s}.{k}" for s, t in known.items() for k in typing.get_type_hints(t)]
            raise UsageError(
                f"{source}: unknown key {section}.{key}{nearest(f'{section}.{key}', dotted)}"
            )
        checked[key] = _checked(f"{source}: {section}.{key}", value, hints[key])
    return checked


def _checked(name: str, value: Any, hint: Any) -> Any:
    """`value` if it has the type `hint`; whole numbers pass for fractions.

    Raises:
        UsageError: another type, or a word that is not one of the allowed ones.
    """
    either = typing.get_origin(hint) in (types.UnionType, typing.Union)  # the latter: of Literals
    options = typing.get_args(hint) if either else (hint,)
    if value is None and type(None) not in options:
        value = "none"  # the word: `toml_value` cannot know that it is one of the field's own
    for option in options:
        if typing.get_origin(option) is Literal:
            if value in typing.get_args(option) and isinstance(value, str):
                return value
        elif option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif option is type(None):
            if value is None:
                return None
        elif type(value) is option:
            return value
    wanted = " or ".join(_type_words(option) for option in options)
    raise UsageError(f"{name}: expected {wanted}, found {value!r}")


def _type_words(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(typing.get_args(option))
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return words.get(option, "none")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known ones, else all."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else f"; known: {', '.join(names)}"
