"""What end-to-end training begins with: clips and labels, the encoder to train, frozen towers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msq.errors import UsageError
from msq.head.feature_set import Features

if TYPE_CHECKING:
    from msq.extract.datasets.dataset import Clip
    from msq.extract.encoders import ImageEncoder, VideoEncoder


@dataclass(frozen=True, eq=False)
class Material:
    """N clips that can be used, where they lie, and the encoders.

    Attributes:
        features: of these clips. `tokens` is an empty [N, S, D'] on the device `meta`: the encoder
            that makes them is being trained. All else is real and on the CPU; `image` [N, D'']
            float32 is of the clean view, or None.
        clips: N, in the order of `features.ids`: where they lie.
        video: the encoder that training starts from.
        image: the image tower, where it runs on the frames of each step; else None.
        failures: clips that could not be decoded when the towers' features were made, and are not
            among the N: `clip, reason` and what else stage one records.
        skipped: (item, reason) of what the dataset could not use.
        kept: (item, change) of what its policy `keep` changed.
        notes: what the user should know, one line each.
    """

    features: Features
    clips: tuple[Clip, ...]
    video: VideoEncoder
    image: ImageEncoder | None = None
    failures: tuple[Mapping[str, Any], ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    kept: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse parts that do not fit each other.

        Raises:
            UsageError: clips that are not those of the features, tokens of another encoder, or
                not a single training clip.
        """
        f, spec = self.features, self.video.spec
        ids = tuple(clip.id for clip in self.clips)
        if ids != f.ids:
            raise UsageError(
                f"material of {f.name}: expected the {len(f.ids)} clips of its features in their "
                f"order, found {len(ids)} clips, others or in another order"
            )
        expected = [len(ids), spec.tokens, spec.channels]
        if list(f.tokens.shape) != expected:
            raise UsageError(
                f"material of {f.name}: expected tokens {expected} of {spec.slug}, found "
                f"{list(f.tokens.shape)}"
            )
        recorded = f.specs.get("video")
        if recorded is None or dict(recorded) != spec.to_dict():
            raise UsageError(f"material of {f.name}: its video spec is not that of {spec.slug}")
        if "train" not in f.splits:
            raise UsageError(
                f"{f.name}: expected clips of split train, found none among {len(ids)} that can "
                f"be used{_reasons(f)}"
            )


def _reasons(features: Features) -> str:
    found = [f"{count} {reason}" for reason, count in features.left_out.items() if count]
    return f" ({'; '.join(found)})" if found else ""
