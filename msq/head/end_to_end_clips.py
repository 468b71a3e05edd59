"""The decoded clips of an end-to-end run: for its steps, for scoring, and what went wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from msq.errors import VideoError
from msq.head.end_to_end_config import EndToEndConfig
from msq.head.end_to_end_feed import CleanFrames
from msq.head.memory import available_bytes
from msq.head.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from msq.extract.clip_feed import ClipFeed
    from msq.extract.decode_pool import Picture
    from msq.extract.frame_cache import FrameCache
    from msq.extract.views import View
    from msq.head.material import Material

UNDECODABLE = "not decodable"  # in `Features.left_out`


class RunClips:
    """Feeds over the clips of a run, and the cache that they share.

    Args:
        material: of the run.
        config: likewise.
        workers: decode processes; None for one per core.
        folder: where a cache on disk may lie.
        ranks: the processes of the run, which share the machine's memory.
    """

    def __init__(
        self,
        material: Material,
        config: EndToEndConfig,
        workers: int | None,
        folder: Path | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        from msq.extract.decode_pool import Picture, cores
        from msq.extract.frame_cache import FrameCache

        self._material, self._config = material, config
        self._workers = max(1, cores() // ranks.local) if workers is None else workers
        self._ranks = ranks
        self._train: ClipFeed | None = None
        self._open: list[ClipFeed] = []
        self._earlier: dict[str, Any] = {"count": 0, "reasons": {}}
        self._clean: tuple[Picture, ...] = (Picture.of(material.video.spec),)
        self._pictures: tuple[Picture, ...] = self._clean
        if material.image is not None:
            self._pictures = (*self._clean, Picture.of(material.image.spec))

        def cache(pictures: Sequence[Picture], choice: Any) -> FrameCache:
            there = available_bytes("cpu") // ranks.local
            return FrameCache(pictures, len(material.clips), choice, memory=there, folder=folder)

        self._scoring: FrameCache = cache(self._clean, config.clips.cache)
        self._training: FrameCache | None = None
        if config.clips.augment == "none":
            same = self._pictures == self._clean
            self._training = self._scoring if same else cache(self._pictures, config.clips.cache)

    @property
    def shape(self) -> tuple[int, ...]:
        """[T, 3, h, w] of a clip as the video encoder sees it."""
        return tuple(self._clean[0].shape)

    def training(self, spare: Sequence[int]) -> ClipFeed:
        """What the steps are shown; `spare` are the rows that may stand in for one another."""
        from msq.extract.clip_feed import ClipFeed

        config = self._config
        self._train = ClipFeed(
            self._material.clips,
            self._pictures,
            workers=self._workers,
            prefetch_bytes=config.clips.prefetch_mb * 2**20,
            augment=config.clips.augment,
            seed=config.run.train.seed,
            cache=self._training,
            spare=spare,
        )
        self._open.append(self._train)
        return self._train

    def clean(self, device: torch.device, view: View | None = None) -> CleanFrames:
        """Clips in one view, the clean one unless told otherwise, for scoring."""
        ids = [clip.id for clip in self._material.clips]
        return CleanFrames(self._scored(view), device, ids)

    def _scored(self, view: View | None = None) -> ClipFeed:
        from msq.extract.clip_feed import ClipFeed

        pictures = self._clean
        if view is not None:
            pictures = tuple(dataclasses.replace(picture, view=view) for picture in pictures)
        feed = ClipFeed(
            self._material.clips,
            pictures,
            workers=self._workers,
            prefetch_bytes=self._config.clips.prefetch_mb * 2**20,
            cache=None if view is not None else self._scoring,
        )
        self._open.append(feed)
        return feed

    def decodable(self, material: Material) -> Material:
        """The material without the validation and test clips that cannot be decoded.

        Where stage one made image features of the clips it has decoded them all, and there is
        nothing to be done; otherwise each of them is decoded once, into the cache where there is
        one; each process decodes those that it will score.
        """
        if material.features.image is not None:
            return material
        wanted = [r for r, split in enumerate(material.features.splits) if split != "train"]
        feed = self._scored()
        mine: dict[int, str] = {}
        for shown in feed.parts((i, [row]) for i, row in enumerate(self._own(wanted))):
            for place in shown.failed:
                row = shown.rows[place]
                mine[row] = feed.failures[material.clips[row].id]
        bad: dict[int, str] = {}
        for found in self._ranks.of_all(mine):
            bad |= found
        if not bad:
            return material
        if len(bad) == len(wanted):
            clip = material.clips[wanted[0]]
            raise VideoError(
                f"none of the {len(bad)} clips to score can be decoded; the first is {clip.path}: "
                f"{bad[wanted[0]]}"
            )
        if self._ranks.leads:
            self._earlier["reasons"] |= {material.clips[r].id: why for r, why in bad.items()}
        rows = [row for row in range(len(material.clips)) if row not in bad]
        features = material.features.select(rows=torch.tensor(rows))
        left_out = {**features.left_out, UNDECODABLE: len(bad)}
        self._material = dataclasses.replace(
            material,
            features=dataclasses.replace(features, left_out=left_out),
            clips=tuple(material.clips[row] for row in rows),
        )
        return self._material

    def _own(self, wanted: Sequence[int]) -> list[int]:
        if self._ranks.world == 1 or not wanted:
            return list(wanted)
        return list(dict.fromkeys(self._ranks.share(torch.tensor(wanted)).tolist()))

    def replaced(self) -> dict[str, Any]:
        """How often another clip stood in for one that cannot be decoded, and why.

        Over resumes, and over all processes, which ask together.
        """
        now = self._train
        mine = {
            "count": self._earlier["count"] + (0 if now is None else now.replaced),
            "reasons": {**self._earlier["reasons"], **({} if now is None else now.failures)},
        }
        every, reasons = self._ranks.of_all(mine), dict[str, str]()
        for found in every:
            reasons |= found["reasons"]
        return {"count": sum(found["count"] for found in every), "reasons": reasons}

    def restore(self, earlier: dict[str, Any]) -> None:
        """Go on from what `replaced` said."""
        if self._ranks.leads:  # it is what all processes came to
            self._earlier = {"count": earlier["count"], "reasons": dict(earlier["reasons"])}
        if self._train is not None:
            self._train.failures.update(earlier["reasons"])

    def waited_share(self) -> float | None:
        """Of this process's time in training, how much went by waiting for clips; 0 to 1."""
        return None if self._train is None else float(self._train.summary()["waited_share"])

    def report(self) -> dict[str, Any]:
        """Entries of a result: `replaced`, `failures`, `input` (of this process) and `ranks`.

        `ranks` has the `world`, and of each process `clips_per_second` and `waited_share`.
        """
        found = self.replaced()
        summary = None if self._train is None else self._train.summary()
        every = [each or {} for each in self._ranks.of_all(summary)]
        reasons = sorted(found["reasons"].items())
        return {
            "replaced": found["count"],
            "failures": [{"clip": clip, "reason": reason} for clip, reason in reasons],
            "input": summary,
            "ranks": {
                "world": self._ranks.world,
                "clips_per_second": [each.get("clips_per_second") for each in every],
                "waited_share": [each.get("waited_share") for each in every],
            },
        }

    def close(self) -> None:
        """End the decode processes; give the cache back."""
        for feed in self._open:
            feed.close()
        for cache in (self._scoring, self._training):
            if cache is not None:
                cache.close()
