"""Which of the features that others computed belong to which clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from msq.errors import UsageError
from msq.extract.array_file import FeatureError
from msq.extract.datasets.dataset import Clip

FIELDS = ("id", "stem", "parent", "start", "end")
_PREFIX = "v_"  # ActivityNet's files carry it, its annotation does not


@dataclass(frozen=True)
class Match:
    """The item of one clip.

    Attributes:
        key: its own key in the source.
        cut: whether the item is of this cut alone; else it is of the whole video.
    """

    key: str
    cut: bool


def match_clips(
    clips: Sequence[Clip], keys: Mapping[str, str], template: str | None = None
) -> list[Match | None]:
    """The item of each clip, None where there is none.

    Without a template: the clip's id; else the end of its path, as long as possible, with or
    without suffix; else an item in any folder whose last name is the video's. What belongs to a
    clip by one rule is not looked at for others by a later one.

    Args:
        clips: what is wanted.
        keys: `FeatureSource.keys`.
        template: a key with fields `{id}`, `{stem}`, `{parent}`, `{start}`, `{end}`.

    Raises:
        FeatureError: two videos would get the same item, or a video fits several.
        UsageError: a field that there is not.
    """
    if template is None:
        found = [_by_path(clip, keys) for clip in clips]
    else:
        found = [_by_template(clip, keys, template) for clip in clips]
    owner: dict[str, Clip] = {}
    for clip, match in zip(clips, found, strict=True):
        if match is not None:
            _claim(owner, match.key, clip)
    if template is not None:
        return found
    last: dict[str, set[str]] = {}
    for name, key in keys.items():
        if key not in owner:
            last.setdefault(name.rpartition("/")[2], set()).add(key)
    for row, clip in enumerate(clips):
        item = _by_name(clip, last) if found[row] is None else None
        if item is not None:
            _claim(owner, item, clip)
            found[row] = Match(item, cut=False)
    return found


def _by_template(clip: Clip, keys: Mapping[str, str], template: str) -> Match | None:
    own = "{start" in template or "{end" in template
    values = {
        "id": clip.id,
        "stem": clip.path.stem,
        "parent": clip.path.parent.name,
        "start": clip.start,
        "end": clip.end,
    }
    try:
        name = template.format(**values)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise UsageError(
            f"--key-template {template!r}: expected the fields "
            f"{', '.join(f'{{{field}}}' for field in FIELDS)}, found {error}"
        ) from None
    own |= "{id" in template and clip.id not in _tails(clip.path)
    return Match(keys[name], cut=own) if name in keys else None


def _by_path(clip: Clip, keys: Mapping[str, str]) -> Match | None:
    tails = _tails(clip.path)
    if clip.id in keys:
        return Match(keys[clip.id], cut=clip.id not in tails)
    return next((Match(keys[name], cut=False) for name in tails if name in keys), None)


def _by_name(clip: Clip, last: Mapping[str, set[str]]) -> str | None:
    stem = clip.path.stem
    for name in (clip.path.name, stem, _PREFIX + stem, stem.removeprefix(_PREFIX)):
        items = sorted(last.get(name, ()))
        if len(items) > 1:
            raise FeatureError(
                f"clip {clip.id!r}: its video {clip.path.name} fits several items, "
                f"{items[0]!r} and {items[1]!r}; --key-template says which, for example "
                f"{str(Path(items[0]).parent / '{stem}')!r}"
            )
        if items:
            return items[0]
    return None


def _claim(owner: dict[str, Clip], key: str, clip: Clip) -> None:
    """Several cuts of one video may share its features; two videos may not."""
    other = owner.setdefault(key, clip)
    if other.path != clip.path:
        raise FeatureError(
            f"features {key!r} fit two videos, {other.id!r} ({other.path.name}) and {clip.id!r} "
            f"({clip.path.name}); expected an item for each; --key-template says which, for "
            "example '{parent}/{stem}'"
        )


def _tails(path: Path) -> list[str]:
    """`a/b/c`, `b/c`, `c` of a path, each without suffix and with it, longest first."""
    parts = [part for part in path.parts if part != path.anchor]
    tails = []
    for first in range(len(parts)):
        head = "/".join([*parts[first:-1], ""]) if first < len(parts) - 1 else ""
        tails += [head + path.stem, head + path.name]
    return tails
