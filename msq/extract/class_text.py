"""Class names on their way into a store, as vectors of a text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msq.extract.encoders import TextEncoder
from msq.extract.encoders.prompts import Prompt, described
from msq.extract.store_writer import StoreWriter


def cut_names(
    classes: Sequence[str], text: TextEncoder, prompts: Mapping[str, Prompt]
) -> list[str]:
    """A line for each prompt with which class names do not fit into the text encoder's context."""
    lines = []
    for name, prompt in prompts.items():
        if cut := text.too_long(classes, prompt):
            shown = ", ".join(repr(label[:60]) for label in cut[:3])
            lines.append(
                f"{len(cut)} of {len(classes)} class names with prompt {name!r} "
                f"({described(prompt)}) are longer than {text.spec.slug} can read, and their ends "
                f"play no part: {shown}{', …' if len(cut) > 3 else ''}"
            )
    return lines


def add_text(
    writer: StoreWriter, text: TextEncoder, prompts: Mapping[str, Prompt]
) -> dict[str, list[str]]:
    """Class embeddings of each prompt where they are missing; returns unknown words by class."""
    classes = list(writer.dataset.classes)
    unknown = {name: words for name in classes if (words := text.unknown_words(name))}
    for prompt, template in prompts.items():
        if not writer.has_text(text.spec, prompt, template):
            values = text(classes, prompt=template).float().cpu().numpy()
            writer.add_text(text.spec, prompt, template, unknown, values)
    return unknown
