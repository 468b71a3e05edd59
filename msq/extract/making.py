"""What a protocol fixes in stage one: how features have to be made to be called by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msq.errors import UsageError
from msq.protocol import EXTRACT_AMOUNTS, EXTRACT_FIXED, EXTRACT_OPTIONS, Protocol

# What a request is where neither it nor its protocol says anything.
DEFAULTS: dict[str, Any] = {
    "pooling": "frame",
    "clip_output": "projected",
    "sampling": "uniform",
    "prompts": ("{}",),
}


def preset(protocol: Protocol) -> dict[str, Any]:
    """The value of every setting that has one under this protocol."""
    return {**DEFAULTS, **EXTRACT_FIXED[protocol], **EXTRACT_AMOUNTS[protocol]}


def dataset_options(protocol: Protocol, dataset: str | None, frames: int | None) -> dict[str, str]:
    """The options that the protocol sets for a dataset, by the name it is registered under."""
    wanted = EXTRACT_OPTIONS[protocol].get(dataset or "", {})
    return {key: value.format(frames=frames) for key, value in wanted.items()}


def require_making(
    protocol: Protocol, found: Mapping[str, Any], options: Mapping[str, tuple[str, str]]
) -> None:
    """Refuse settings that the protocol does not have.

    Args:
        protocol: `paper` or `official`.
        found: the request's settings by name.
        options: dataset option -> (the protocol's value, the one given).

    Raises:
        UsageError: some differ; the message lists them all.
    """
    lines = [
        f"--{name.replace('_', '-')} {_shown(value)} (found {_shown(found[name])})"
        for name, value in EXTRACT_FIXED[protocol].items()
        if found[name] != value
    ]
    lines += [
        f"--option {key}={value} (found {key}={given})"
        for key, (value, given) in options.items()
        if given != value
    ]
    if lines:
        raise UsageError(
            f"--protocol {protocol} means {', '.join(lines)}; leave them out, or extract with "
            "--protocol paper, which fixes none of them (docs/protocols.md)"
        )


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(str(part) for part in value)
    return "nothing" if value is None else str(value)
