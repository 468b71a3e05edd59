"""Class splits of the world for zero-shot: pairs are held out, their words are not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def compositional_split(
    classes: Sequence[str], unseen_share: float, seed: int
) -> tuple[list[str], list[str]]:
    """Hold out pairs such as `dog eating` whose kind and action both stay in other seen pairs.

    A word that no seen pair contains can't be learned from the others, so a pair with such a word
    is never held out; where that leaves too few, fewer are.

    Args:
        classes: names of the form `KIND ACTION`.
        unseen_share: share of the classes to hold out, rounded down.
        seed: of the draw.

    Returns:
        Seen and unseen names, each in the order of `classes`.
    """
    words = {name: tuple(name.split(" ", 1)) for name in classes}
    seen = list(classes)
    wanted = int(len(classes) * unseen_share)
    for k in np.random.default_rng(seed).permutation(len(classes)):
        if len(classes) - len(seen) == wanted:
            break
        name = classes[int(k)]
        rest = [words[other] for other in seen if other != name]
        if all(any(pair[part] == words[name][part] for pair in rest) for part in (0, 1)):
            seen.remove(name)
    return seen, [name for name in classes if name not in seen]
