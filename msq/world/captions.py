"""Sentences about a scene, for training an image-text pair on the world."""

from __future__ import annotations

from numpy.random import Generator

from msq.world.scene import Scene

PROMPTS = (
    "{}",
    "a {}",
    "a photo of a {}",
    "a video of a {}",
    "a video of {}",
    "a photo of {}",
    "this is a {}",
    "there is a {}",
    "a picture of a {}",
)
# Words that users' prompts and labels are likely to hold besides the classes themselves.
EXTRA_WORDS = (
    *("a", "an", "the", "of", "is", "are", "this", "that", "there", "and", "with", "in", "on"),
    *("photo", "video", "picture", "image", "clip", "frame", "scene", "action", "actor", "animal"),
    *("person", "someone", "who", "it", "doing", "showing", "while", "two", "one", "at", "to"),
)


def caption(scene: Scene, rng: Generator) -> str:
    """One sentence that names every actor and one to all of its actions.

    Args:
        scene: what the frame or clip shows.
        rng: chooses the words; the scene itself is not changed.
    """
    return caption_of([(actor.kind, actor.actions) for actor in scene.actors], rng)[0]


def caption_of(
    cast: list[tuple[str, tuple[str, ...]]], rng: Generator
) -> tuple[str, tuple[str, ...]]:
    """`caption` for (kind, actions) of each actor; also the actor-action pairs that it names."""
    parts, named = [], []
    for kind, actions in cast:
        count = int(rng.integers(1, len(actions) + 1))
        kept = [actions[k] for k in rng.permutation(len(actions))[:count]]
        parts.append(f"{kind} {' and '.join(kept)}")
        named += [f"{kind} {action}" for action in kept]
    parts = [parts[k] for k in rng.permutation(len(parts))]
    text = PROMPTS[int(rng.integers(len(PROMPTS)))].format(" and a ".join(parts))
    return text, tuple(sorted(set(named)))
