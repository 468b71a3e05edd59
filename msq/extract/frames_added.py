"""Features of each frame that come to rows which are done: checked against their mean, which stays.

Only the files of the frames are written. What the clips' frames average to has to be what the store
holds of them; where it is not, or a clip cannot be read any more, the shard keeps what it has, all
others are made, and the run ends with an error that names the clips.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from msq.errors import StoreError
from msq.extract import store_schema as schema
from msq.extract.image_frames import apart
from msq.extract.shard_builder import Part
from msq.extract.store_array import StoreArray
from msq.extract.store_problems import listed
from msq.extract.store_records import Failure, ShardRows
from msq.extract.store_writer import StoreWriter

_READABLE = (schema.OK, schema.DEGRADED)


class AddedFrames:
    """What one run adds to the done rows of a store.

    Args:
        writer: of the store.
    """

    def __init__(self, writer: StoreWriter) -> None:
        self._writer = writer
        self._unread: dict[str, str] = {}  # clip -> why
        self._other: dict[str, str] = {}  # clip -> of which features

    def takes(self, part: Part, shard: int) -> bool:
        """Whether a shard is done but for features of each frame."""
        return self._writer.lacks_frames(part[0], shard, part[1])

    def add(
        self,
        part: Part,
        shard: int,
        made: ShardRows,
        failures: Iterable[Failure],
        smaller_batches: Sequence[int],
    ) -> None:
        """Write the frames of such a shard, or note why not.

        Args:
            part: image encoder and view.
            shard: which shard.
            made: its rows as they come out today.
            failures: and what went wrong.
            smaller_batches: as of `StoreWriter.commit`.

        Raises:
            StoreError: the image features that are there cannot be read.
        """
        writer, (slug, view) = self._writer, part
        before = writer.status(slug, shard, view)
        assert before is not None, "takes() comes first"
        assert made.frames is not None, "an encoder without features of each frame"
        rows, clips = np.asarray(writer.rows(shard)), writer.dataset.clips
        done = np.isin(before, _READABLE)
        unread = done & ~np.isin(made.status, _READABLE)
        same = done & ~unread
        mean = StoreArray(writer.path / f"{schema.FEATURE_GROUP['image']}/{slug}")
        number = writer.views[slug].index(view)
        stored = mean.read(rows[same], number, lambda row: clips[row].id)
        other = rows[same][apart(stored, made.frames[same], writer.store_dtype)]
        if not unread.any() and not len(other):
            writer.add_frames(slug, shard, made.frames, view, smaller_batches)
            return
        reasons = {f.row: f.reason for f in failures if (f.encoder, f.view) == (slug, str(view))}
        for row in rows[unread].tolist():
            self._unread[clips[row].id] = reasons.get(row, "")
        self._other |= {clips[row].id: slug for row in other.tolist()}

    def end(self) -> None:
        """All that this run had to add has been made: show what is complete.

        Raises:
            StoreError: shards had to be left out; names their clips.
        """
        self._writer.complete_frames()
        lines = [
            *(f"  cannot be extracted now: {clip!r}: {why}" for clip, why in self._unread.items()),
            *(
                f"  their mean is not what image/{slug} holds: {listed(clips)}"
                for slug in dict.fromkeys(self._other.values())
                if (clips := [clip for clip, of in self._other.items() if of == slug])
            ),
        ]
        if not lines:
            return
        shown = "\n".join([*lines[:10], *([f"  and {len(lines) - 10} more"] * (len(lines) > 10))])
        self._unread, self._other = {}, {}
        raise StoreError(
            f"{self._writer.path}: features of each frame are not added to the shards of clips "
            "that come out otherwise than they did:\n"
            f"{shown}\nExpected the videos, weights and libraries that the rows were made with: "
            "bring them back and run msq extract --image-frames again (all other shards have "
            "theirs), or make this encoder's features anew beside all the others:\n"
            f"  msq store convert {self._writer.path} NEW.zarr --drop ENCODER\n"
            "  the same msq extract with --out NEW.zarr"
        )
