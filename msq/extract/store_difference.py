"""What tells two feature stores apart, line by line for a person to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msq.extract.encoders.spec import difference
from msq.extract.store_schema import CONVERTED, templates_in


def root_difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Lines that tell a dataset's root attributes from those of a store; the version is no part."""
    lines = []
    for name in ("schema", "dataset", "task", "metric"):
        if expected[name] != found.get(name):
            lines.append(f"{name}: expected {expected[name]}, found {found.get(name)}")
    lines += sequence_difference("classes", expected["classes"], list(found.get("classes", ())))
    if expected["clips"] != found.get("clips"):
        lines.append(f"clips: expected {expected['clips']}, found {found.get('clips')}")
    elif expected["clip_list_hash"] != found.get("clip_list_hash"):
        lines.append(
            "clip list (ids, cuts, labels, splits in order): expected hash "
            f"{expected['clip_list_hash'][:16]}…, found {str(found.get('clip_list_hash'))[:16]}…"
        )
    wanted, there = (
        {p["name"]: p["sha256"] for p in root.get("partitions", ())} for root in (expected, found)
    )
    if list(wanted) != list(there):
        names = (", ".join(x) or "none" for x in (wanted, there))
        lines.append("partitions: expected {}, found {}".format(*names))
    else:
        lines += [f"partition {k}: other splits" for k in wanted if wanted[k] != there[k]]
    # Stores were written before there were groups: they are no part of the identity then.
    if "groups" in expected and "groups" in found and expected["groups"] != found["groups"]:
        lines.append(f"groups: expected {expected['groups']}, found {found['groups']}")
    return lines


def sequence_difference(name: str, expected: Sequence[Any], found: Sequence[Any]) -> list[str]:
    """At most two lines: the lengths, and the first place where they differ."""
    lines = []
    if len(expected) != len(found):
        lines.append(f"{name}: expected {len(expected)}, found {len(found)}")
    for place, (a, b) in enumerate(zip(expected, found, strict=False)):
        if a != b:
            lines.append(f"{name}, first difference at row {place}: expected {a!r}, found {b!r}")
            break
    return lines


def encoder_difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Lines that tell two encoders' attributes apart."""
    slug = expected["encoder"]["slug"]
    lines = difference(expected["encoder"], found.get("encoder", {}))
    for name in ("store_dtype", "shard"):
        if name in expected and expected[name] != found.get(name):
            lines.append(f"{name}: expected {expected[name]!r}, found {found.get(name)!r}")
    # Widened from float16, float32 holds fewer digits than an extraction in float32 has.
    if expected.get(CONVERTED) != found.get(CONVERTED):
        before = found.get(CONVERTED) or "nothing"
        lines.append(f"converted: expected {expected.get(CONVERTED) or 'nothing'}, found {before}")
    if "template" in expected:
        lines += _template_difference(expected, found)
    return [f"{slug}: {line}" for line in lines]


def _template_difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Lines that tell two prompts apart; sets by their first difference."""
    wanted, there = templates_in(expected), templates_in({"template": None, **found})
    if len(wanted) == len(there) == 1:
        same = wanted == there
        return [] if same else [f"template: expected {wanted[0]!r}, found {there[0]!r}"]
    lines = sequence_difference("templates", wanted, there)
    rules = expected.get("average"), found.get("average")
    if not lines and rules[0] != rules[1]:
        lines.append(f"average: expected {rules[0]!r}, found {rules[1]!r}")
    return lines
