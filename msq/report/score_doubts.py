"""What a result's numbers do not show: which clips were scored, and whether they can be low."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CERTAIN = 1 - 1e-9
UNTESTED = {
    "train": "the clips that the head was trained on are scored",
    "val": "the clips that chose its epoch are scored",
}


def doubts(result: Mapping[str, Any]) -> list[str]:
    """A line for each reason not to take the metrics of a run for what they seem.

    Args:
        result: of `msq train-head`, `msq train` or `msq eval`.
    """
    found = []
    by_split, split = result.get("clips_by_split") or {}, result["split"]
    if by_split.get("test") == 0 and split in UNTESTED:
        found.append(f"no test clip is in the store: {UNTESTED[split]}, and no other model can be "
                     "compared by that")  # fmt: skip
    metrics = result["metrics"]
    chance = metrics.get("map_chance")
    if metrics.get("classes_scored") == 0:
        found.append(f"no clip of the {split} split has a label: there is nothing to rank")
    elif chance is not None and chance >= CERTAIN:
        found.append(
            "mAP is 100 % for any scores here: clips without a label are not ranked, and each that "
            "has one has every class that is scored. With one class, name its absence as another"
        )
    return found
