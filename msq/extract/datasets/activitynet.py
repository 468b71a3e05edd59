"""ActivityNet-style annotations: labelled segments of untrimmed videos.

Three forms, told apart by the file itself: JSON with a `database` (ActivityNet; AFSD's THUMOS14
file, whose segments are strings; ActionFormer's, with `label_id` and `fps`), mmaction2's BMN JSON
without one (`{"v_x": {"duration_second", "annotations", …}}`), and AFSD's CSV (`video,type,
type_idx,start,end,…`). Classes are in the order of `label_id` where every class has one and they
are 0 … K-1, else by name.

`clips=segments` gives a row per segment; one that stands under several classes is several rows
(`view=official`) or one with all its labels (`view=dedup`). `clips=videos` gives a multi-label row
per video with its segments as intervals; videos without segments (hidden test sets) are kept,
unlabelled.

Oddities: `string_times` (segments written as strings), `end_past_length` (cut at the video's
length), `start_past_length` and `reversed` (left out), `repeated` (left out), `double_labelled`,
`ambiguous` (label `Ambiguous`, left out), `malformed` (left out), `without_segments` (videos),
`in_two_splits` (a video that an earlier file has in another split: left out here).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import cast

from msq.errors import DatasetError, UsageError
from msq.extract.datasets.activitynet_annotation import NAME, Annotation, read_annotation
from msq.extract.datasets.annotation_text import positive
from msq.extract.datasets.dataset import SPLIT_WORDS, Clip, Dataset, Task
from msq.extract.datasets.kept_segments import Unit, known_segments
from msq.extract.datasets.list_files import resolve
from msq.extract.datasets.locate import absent
from msq.extract.datasets.manifest import read_classes
from msq.extract.datasets.media_index import MediaIndex, Place
from msq.extract.datasets.options import choice
from msq.extract.datasets.reading import Reading, make_adapter
from msq.extract.datasets.segments import Segment, View, cut_segments, film_fps, segment_id
from msq.extract.datasets.survey import count_splits

OPTIONS = {
    "annotations": "one or more files, joined by commas; the one JSON (or CSV) file of the root",
    "clips": "segments or videos; segments",
    "view": "official (a row per segment and label) or dedup (distinct segments); official",
    "subset": "split of files that do not say (BMN JSON, CSV): train, val or test; from file or "
    "video names",
    "classes": "file of class names in index order; label_id, else sorted names",
    "videos": "folder of the videos; the root and usual folders",
    "fps": "frame rate of frame folders; from the annotation where it is there",
}
_VIDEOS = (
    *("", "videos", "train", "val", "test", "videos/train", "videos/val", "videos/test"),
    *("rawframes", "frames"),
)


def read_activitynet(root: Path, **options: str) -> Dataset:
    """Read the annotation of a folder; the arguments are those of `OPTIONS`.

    Raises:
        DatasetError: no annotation is there, or it has another form, or labels that the class file
            does not have.
        UsageError: an unknown option or value; several files could be the annotation; frame
            folders to be cut without a known frame rate.
    """
    return ADAPTER.read(Path(root), options)


def _load(root: Path, options: Mapping[str, str]) -> Reading:
    by = choice(NAME, options, "clips", ("segments", "videos"), "segments")
    view = cast(View, choice(NAME, options, "view", ("official", "dedup"), "official"))
    subset = choice(NAME, options, "subset", ("", *SPLIT_WORDS), "")
    fps = positive(NAME, options, "fps")
    found = read_annotation(_files(root, options.get("annotations", "")), subset)
    named = resolve(root, options["classes"]) if options.get("classes") else None
    keep = options.get("policy") == "keep"
    classes = _classes(found, named, keep=keep)
    if keep:
        unit: Unit = "video" if by == "videos" else "segment" if view == "dedup" else "label"
        _leave_off(found, classes, str(named), unit)
    media = MediaIndex(root, [options["videos"]] if options.get("videos") else _VIDEOS)

    def place(video: str) -> tuple[Place, float | None]:
        there = media.find(f"{video}.mp4", f"v_{video}.mp4")
        return there, film_fps(NAME, video, there, found.videos[video].film, fps)

    task: Task = "multilabel"
    if by == "videos":
        clips = _whole(found, classes, media)
    else:
        cuts = cut_segments(list(_segments(found, classes)), classes, view, place, keep=keep)
        found.skipped += cuts.skipped
        found.kept += cuts.kept
        found.oddities.update(cuts.oddities)
        clips = cuts.clips
        task = "singlelabel" if view == "official" else "multilabel"
    metric = "map" if by == "videos" else "top1"
    return Reading(
        Dataset(
            NAME,
            classes,
            task,
            clips,
            metric,
            (*found.regular, *found.skipped),
            kept=tuple(found.kept),
        ),
        count_splits(clips),
        media.missing,
        found.oddities,
        {},
        (f"a row per {by[:-1]}", f"{len(found.videos)} videos in the annotation"),
        frozenset(found.regular),
    )


def _files(root: Path, given: str) -> list[Path]:
    if given:
        files = [resolve(root, name.strip()) for name in given.split(",") if name.strip()]
        if gone := [file for file in files if not file.is_file()]:
            raise DatasetError(f"{gone[0]}: expected an annotation file, found no file there")
        return files
    for pattern in ("*.json", "annotations/*.json", "*nnotation*.csv"):
        files = sorted(root.glob(pattern))
        if len(files) > 1:
            raise UsageError(
                f"dataset {NAME}: expected one annotation file below {root}, found "
                f"{', '.join(f.name for f in files)}; name it with --option annotations=FILE"
            )
        if files:
            return files
    raise absent(root, "an ActivityNet-style JSON file", "name it with --option annotations=FILE")


def _classes(found: Annotation, file: Path | None, *, keep: bool) -> tuple[str, ...]:
    """Class names in index order.

    Raises:
        DatasetError: the annotation has a label that the class file does not have (with `keep`:
            only such labels), or none at all.
    """
    used = {label for video in found.videos.values() for label, _, _ in video.segments}
    if not used:
        raise DatasetError("the annotation has no labelled segment, so there are no classes")
    if file is not None:
        names = read_classes(file)
        unknown = sorted(used - set(names))
        if unknown and not (keep and len(unknown) < len(used)):
            raise DatasetError(
                f"{file}: expected the classes of the annotation, found no {unknown[0]!r}: is it "
                "the class file of another dataset?"
            )
        return names
    if set(found.ids) == used and sorted(found.ids.values()) == list(range(len(used))):
        return tuple(sorted(used, key=found.ids.__getitem__))
    return tuple(sorted(used))


def _leave_off(found: Annotation, classes: Collection[str], source: str, unit: Unit) -> None:
    """Take out what is of no class, and videos of which nothing is left then."""
    for name, video in list(found.videos.items()):
        known = known_segments(name, video.segments, {*classes}, source, unit)
        if video.segments and not known.segments:
            del found.videos[name]
        video.segments = known.segments
        found.kept += known.changes
        found.skipped += known.skipped


def _segments(found: Annotation, classes: tuple[str, ...]) -> Iterator[Segment]:
    """Segments within their videos."""
    index = {name: k for k, name in enumerate(classes)}
    for name, video in found.videos.items():
        found.oddities["without_segments"] += not video.segments
        if not video.segments:
            found.regular.append((name, "no segment: take --option clips=videos to keep it"))
        for label, start, end in video.segments:
            length = video.film.duration
            if start >= length:
                found.oddities["start_past_length"] += 1
                found.skipped.append(
                    (segment_id(name, start, end), f"begins after {length:g} s, the video's end")
                )
                continue
            found.oddities["end_past_length"] += end > length
            yield Segment(name, start, min(end, length), index[label], video.split, name)


def _whole(found: Annotation, classes: tuple[str, ...], media: MediaIndex) -> tuple[Clip, ...]:
    """A row per video; a whole frame folder needs no frame rate."""
    index = {name: k for k, name in enumerate(classes)}
    clips = []
    for name, video in found.videos.items():
        found.oddities["without_segments"] += not video.segments
        found.oddities["reversed"] += sum(start >= end for _, start, end in video.segments)
        found.oddities["end_past_length"] += sum(
            end > video.film.duration for _, _, end in video.segments
        )
        intervals = tuple((index[label], start, end) for label, start, end in video.segments)
        path = media.find(f"{name}.mp4", f"v_{name}.mp4").path
        labels = tuple(sorted({k for k, _, _ in intervals}))
        clips.append(Clip(name, path, None, None, labels, video.split, intervals))
    return tuple(clips)


ADAPTER = make_adapter(
    NAME,
    "ActivityNet-style JSON (also AFSD, ActionFormer and mmaction2 BMN files)",
    "one annotation file (activity_net.v1-3.min.json, thumos_gt.json, anet_anno_*.json, …) and the "
    "videos or frame folders, `<id>` or `v_<id>`",
    "ActivityNet: list public, missing videos on request; videos from YouTube",
    OPTIONS,
    _load,
    keeps=True,
)
