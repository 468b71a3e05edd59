"""What a head is asked for: labels of the run or other words, as `MSQNet.forward` takes them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msq.errors import UsageError
from msq.head.model import MSQNet
from msq.head.run_encoders import RunEncoders


class Asked(NamedTuple):
    """Labels to score.

    Attributes:
        names: K labels.
        text: their embeddings [K, D_text]; None for the classes of the run, or where words play no
            part.
        trained: [K] places among the classes of the run, -1 for others; None for all of them.
        unknown: words that mean nothing to the text encoder.
    """

    names: Sequence[str]
    text: Tensor | None = None
    trained: Tensor | None = None
    unknown: Sequence[str] = ()


def asked_labels(
    labels: Sequence[str],
    prompt: str | Sequence[str] | None,
    model: MSQNet,
    meta: Mapping[str, Any],
    encoders: RunEncoders,
    name: str,
) -> Asked:
    """Labels given by a caller.

    Args:
        labels: different names, of the run's classes or others.
        prompt: template for labels the run did not have, or several, which are averaged; None is
            the run's own. Under another prompt a class of the run is a new label, too.
        model: the head.
        meta: header of `head.safetensors`.
        encoders: of the run.
        name: of the run, for messages.

    Raises:
        UsageError: no list of different names, or others than the run's where its classifier has
            weights for these alone, or nothing of it reads words.
    """
    repeated = sorted({label for label in labels if list(labels).count(label) > 1})
    if isinstance(labels, str) or not labels or repeated:
        raise UsageError(
            f"labels: expected a list of different names, found {labels!r}"
            + (f" with {repeated} repeated" if repeated else "")
        )
    classes = tuple(meta["classes"])
    place = {label: k for k, label in enumerate(classes)}
    own_prompt = templates_of(meta["prompt"] or "{}")
    templates = own_prompt if prompt is None else templates_of(prompt)
    same_prompt = templates == own_prompt
    trained = [place.get(label, -1) if same_prompt else -1 for label in labels]
    others = [label for label, k in zip(labels, trained, strict=True) if k < 0]
    if others and meta["head"]["classifier"] == "per-class":
        near = difflib.get_close_matches(others[0], classes, n=3)
        raise UsageError(
            f"{name}: {others[0]!r} is not among its {len(classes)} classes"
            f"{f' (nearest: {near})' if near else ''}, and its classifier 'per-class' has no "
            "weights for other labels; train the head with --classifier text or "
            "--classifier shared"
        )
    if model.text is None:  # words play no part: a prompt neither
        return Asked(list(labels), None, torch.tensor(_places(labels, classes, name)))
    text = torch.zeros(len(labels), model.text.shape[1], device=model.text.device)
    own = [(i, k) for i, k in enumerate(trained) if k >= 0]
    if own:
        i, k = (list(x) for x in zip(*own, strict=True))
        text[i] = model.text[k]
    if others:
        new = [i for i, k in enumerate(trained) if k < 0]
        text[new] = encoders["text"](others, templates).to(text)
    unknown = unknown_words(others, model, encoders) if others else []
    return Asked(list(labels), text, torch.tensor(trained), unknown)


def _places(labels: Sequence[str], classes: Sequence[str], name: str) -> list[int]:
    """Where a head that knows no words has these classes.

    Raises:
        UsageError: one is not there: its query and its score would be those of its place in the
            list, whatever it is called.
    """
    for label in labels:
        if label not in classes:
            near = difflib.get_close_matches(label, classes, n=3)
            raise UsageError(
                f"{name}: {label!r} is not among its {len(classes)} classes"
                f"{f' (nearest: {near})' if near else ''}, and neither its queries 'vanilla' nor "
                "its classifier 'shared' read words; train the head with --queries text or "
                "multimodal, or with --classifier text"
            )
    return [list(classes).index(label) for label in labels]


def unknown_words(labels: Sequence[str], model: MSQNet, encoders: RunEncoders) -> list[str]:
    """Words of the labels that mean nothing to the run's text encoder, each once."""
    if model.text is None and model.config.queries == "vanilla":
        return []
    encoder = encoders["text"]
    words = (word for label in labels for word in encoder.unknown_words(label))
    return list(dict.fromkeys(words))


def templates_of(prompt: str | Sequence[str]) -> list[str]:
    """The templates of a prompt: one, or several that are averaged."""
    return [prompt] if isinstance(prompt, str) else list(prompt)
