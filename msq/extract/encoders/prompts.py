"""Prompts: one template, or a set of templates whose embeddings are averaged.

A prompt is a template with `{}` for the class name, or several of them. The embedding of class k
under templates 1 … M with raw vectors r_m = text(template_m(k)) is

    u = mean over m of r_m / |r_m|        the mean of unit vectors, CLIP's recipe
    e = (mean over m of |r_m|) · u / |u|  at the mean length of the raw vectors

so that a set stands at the scale of a single prompt and a head sees no difference in size. One
template gives r_1 itself, bit for bit. The recipe is that of "Learning Transferable Visual Models
From Natural Language Supervision" (arXiv 2103.00020, section 3.1.4), which stops at u / |u|.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

from msq.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

Prompt: TypeAlias = str | Sequence[str]

# How the vectors of a set become one; part of what is stored with them.
AVERAGE: Final = "mean of unit vectors, at the mean length of the raw ones"
_SHOWN = 60
_BUILT_IN = {"clip": "clip-ensemble", "clip-simple": "clip-simple"}


@dataclass(frozen=True)
class PromptSet:
    """Templates under a name.

    Attributes:
        name: of the array in a feature store, `[a-z0-9_-]+`.
        templates: M of them, each with `{}` for the class name.
    """

    name: str
    templates: tuple[str, ...]

    def __post_init__(self) -> None:
        """Refuses templates without a place for the name, and sets without templates."""
        object.__setattr__(self, "templates", templates_of(self.templates))

    @property
    def prompt(self) -> str | tuple[str, ...]:
        """What encoders and stores take: the template itself where there is only one."""
        return self.templates[0] if len(self.templates) == 1 else self.templates

    @classmethod
    def parse(cls, given: str) -> PromptSet:
        """A prompt as typed: a template, `clip`, `clip-simple`, or a file of templates.

        `clip` and `clip-simple` are the 80 and the 7 templates that CLIP was published with for
        ImageNet, as open_clip has them.

        Raises:
            UsageError: it is none of these, or the file holds something else.
        """
        if "{}" in given:
            return cls(prompt_name(given), (given,))
        if given in _BUILT_IN:
            return cls(_BUILT_IN[given], _published(given))
        path = Path(given).expanduser()
        if path.is_file():
            return cls(prompt_name(path.stem), read_templates(path))
        raise UsageError(
            f"prompt {given!r}: expected a template with {{}} for the class name, "
            f"{' or '.join(_BUILT_IN)}, or a file with one template a line; found no such file"
        )


def parse_prompts(given: Sequence[str]) -> dict[str, str | tuple[str, ...]]:
    """Name -> template or templates, of prompts as typed; see `PromptSet.parse`.

    Raises:
        UsageError: a prompt that is none, or two different ones under one name.
    """
    prompts: dict[str, str | tuple[str, ...]] = {}
    for text in given:
        one = PromptSet.parse(text)
        if prompts.setdefault(one.name, one.prompt) != one.prompt:
            raise UsageError(
                f"prompts: two different ones are both named {one.name!r} in a store: "
                f"{described(prompts[one.name])} and {described(one.prompt)}; put one of them into "
                "a file of another name"
            )
    return prompts


def prompt_name(template: str) -> str:
    """`{}` is `plain`; `a video of {}` is `a-video-of`."""
    if template.strip() == "{}":
        return "plain"
    words = template.replace("{}", " ").lower()
    return re.sub(r"[^a-z0-9_-]+", "-", words).strip("-") or "prompt"


def read_templates(path: Path) -> tuple[str, ...]:
    """The templates of a file: one a line; empty lines and lines that start with `#` are left out.

    Raises:
        UsageError: a line without `{}` or given twice, no template at all, or no text in UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected templates as UTF-8 text, found {error}") from error
    found: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        template = line.strip()
        if not template or template.startswith("#"):
            continue
        if "{}" not in template:
            raise UsageError(
                f"{path}, line {number}: expected a template with {{}} for the class name, found "
                f"{template[:_SHOWN]!r}"
            )
        if template in found:
            raise UsageError(
                f"{path}, line {number}: {template!r} stands in line {found[template]} already; "
                "every template counts once"
            )
        found[template] = number
    if not found:
        raise UsageError(f"{path}: expected one template a line, such as 'a video of {{}}', "
                         "found none")  # fmt: skip
    return tuple(found)


def templates_of(prompt: Prompt) -> tuple[str, ...]:
    """The templates of a prompt, at least one.

    Raises:
        UsageError: there is none, or one has no `{}`.
    """
    templates = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    if not templates:
        raise UsageError("prompt: expected at least one template, found none")
    for template in templates:
        if "{}" not in template:
            raise UsageError(f"prompt {template!r} has no {{}} for the class name")
    return templates


def joined(prompt: Prompt) -> str:
    """All templates in one line; a single one as it is."""
    return " | ".join(templates_of(prompt))


def described(prompt: Prompt) -> str:
    """The same for a person: of a set only how many there are and how they begin."""
    templates = templates_of(prompt)
    if len(templates) == 1:
        return templates[0]
    text = joined(prompt)
    shown = text if len(text) <= _SHOWN else text[:_SHOWN].rstrip() + "…"
    return f"{len(templates)} templates averaged ({shown})"


def averaged(vectors: Iterable[Tensor]) -> Tensor:
    """One vector per class from those of several templates, as at the top; computed in float64.

    Args:
        vectors: M tensors [K, D], one per template.

    Returns:
        [K, D] float32.
    """
    from torch.nn import functional as F

    sum_of_units = sum_of_lengths = None
    count = 0
    for raw in vectors:
        lengths = raw.double().norm(dim=1, keepdim=True)
        units = F.normalize(raw.double(), dim=1)
        sum_of_units = units if sum_of_units is None else sum_of_units + units
        sum_of_lengths = lengths if sum_of_lengths is None else sum_of_lengths + lengths
        count += 1
    if sum_of_units is None or sum_of_lengths is None:
        raise UsageError("prompt: expected at least one template, found none")
    mean: Tensor = F.normalize(sum_of_units, dim=1) * sum_of_lengths / count
    return mean.float()


def _published(name: str) -> tuple[str, ...]:
    # open_clip takes seconds to import.
    from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    templates = OPENAI_IMAGENET_TEMPLATES if name == "clip" else SIMPLE_IMAGENET_TEMPLATES
    return tuple(str(template("{}")) for template in templates)
