"""THUMOS14 as the paper uses it: trimmed test segments of 20 classes, single-label.

Every CliffDiving segment is also a Diving segment, so the set is not truly single-label. The
`official` view has one row per (segment, class file) as in the authors' code, and no scorer can be
right on both rows of a segment: top-1 cannot exceed 3140 / 3358 = 93.51 %. The `dedup` view has
one multi-label row per distinct segment; there a top-1 hit is any of its labels.

Oddities: `ambiguous` (lines of the Ambiguous file, left out), `double_labelled` (distinct segments
of two classes), `end_past_length` (segments that end after the video, counted where
`*_video_info.csv` says how long it is; those of the published set begin there too and fail in
stage one unless `past_end=skip`), `reversed` and `repeated` (left out), `malformed` (lines left
out), `videos_without_class` (named in the Ambiguous file alone). Those of the validation set begin
with `validation_`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from msq.errors import DatasetError
from msq.extract.datasets.adapter import SplitCount
from msq.extract.datasets.annotation_text import (
    Skipped,
    class_names,
    positive,
)
from msq.extract.datasets.dataset import Clip, Dataset, Task
from msq.extract.datasets.folder import SUFFIXES
from msq.extract.datasets.locate import absent
from msq.extract.datasets.media_index import MediaIndex, Place, without_suffix
from msq.extract.datasets.options import choice
from msq.extract.datasets.reading import Reading, make_adapter
from msq.extract.datasets.segments import (
    Cuts,
    Film,
    View,
    cut_segments,
    film_fps,
    past_the_end,
    read_video_info,
)
from msq.extract.datasets.thumos14_annotation import CLASSES, Part, read_part, read_validation

NAME = "thumos14"
PUBLISHED = {
    "test": 3358,
    "validation": 3007,
    "train": 2765,
    "ambiguous": 99,
    "validation_ambiguous": 89,
    "double_labelled": 218,
    "validation_double_labelled": 143,
    "end_past_length": 26,
    "validation_end_past_length": 4,
}
CAP = (
    "official view: one row per (segment, class file); 218 segments have two classes, so top-1 "
    "cannot exceed 93.51 % (3140 of 3358)"
)
OPTIONS = {
    "view": "official (a row per segment and class file) or dedup (distinct segments); official",
    "train": "auto, ucf101 (trimmed clips, as the authors), validation (segments) or none; auto: "
    "the first of them that is there",
    "past_end": "keep or skip segments that begin after the video's end, where it is known; keep",
    "fps": "frame rate of frame folders; from *_video_info.csv where it is there",
    "ucf101": "folder of UCF101 clips in one folder per class, below the root or absolute",
    "names": "official (CliffDiving) or readable (Cliff Diving); official",
}
_VIDEOS = (
    *("", "videos", "videos/test", "videos/val", "test", "val", "TH14_test_set_mp4"),
    *("TH14_Test_set_mp4", "TH14_validation_set_mp4", "validation", "frames/test", "frames/val"),
    *("rawframes/test", "rawframes/val", "frames", "rawframes"),
)
_UCF101 = (
    *("UCF-101", "UCF101", "UCF101/UCF-101", "ucf101", "train", "videos/train", "frames/train"),
    "rawframes/train",
)


def read_thumos14(
    root: Path,
    *,
    view: str = "official",
    train: str = "auto",
    past_end: str = "keep",
    fps: float | None = None,
    ucf101: str = "",
    names: str = "official",
) -> Dataset:
    """Read the annotation folder (20 class files); the arguments are those of `OPTIONS`.

    Raises:
        DatasetError: class files are missing, empty, of another dataset or in another format.
        UsageError: an unknown option or value; frame folders without a known frame rate.
    """
    options = {"view": view, "train": train, "past_end": past_end, "ucf101": ucf101, "names": names}
    return ADAPTER.read(Path(root), options | ({} if fps is None else {"fps": str(fps)}))


def _load(root: Path, options: Mapping[str, str]) -> Reading:
    view = cast(View, choice(NAME, options, "view", ("official", "dedup"), "official"))
    wanted = choice(NAME, options, "train", ("auto", "ucf101", "validation", "none"), "auto")
    past_end = choice(NAME, options, "past_end", ("keep", "skip"), "keep")
    style = choice(NAME, options, "names", ("official", "readable"), "official")
    classes = class_names(CLASSES, style)
    fps = positive(NAME, options, "fps")
    skipped: Skipped = []
    regular: Skipped = []
    films = read_video_info(sorted(root.glob("*video_info.csv")), skipped)
    media = MediaIndex(root, _VIDEOS)

    def place(video: str) -> tuple[Place, float | None]:
        found = media.find(f"{video}.mp4")
        return found, film_fps(NAME, video, found, films.get(video, Film()), fps)

    parts = {"test": _test_part(root)}
    ucf = _ucf101(root, options.get("ucf101", ""), classes)
    validation = read_validation(root, required=wanted == "validation")
    if wanted == "ucf101" and not ucf:
        raise DatasetError(
            f"{root}: expected UCF101 clips as {_UCF101[0]}/<Class>/<clip>.avi for training, found "
            "none; name their folder with --option ucf101=DIR, or take --option train=validation"
        )
    if wanted == "auto":
        wanted = "ucf101" if ucf else "validation" if validation is not None else "none"
    if validation is not None:
        parts["validation"] = validation
    clips: list[Clip] = list(ucf) if wanted == "ucf101" else []
    splits = {"train": SplitCount(len(ucf))} if ucf else {}
    oddities: Counter[str] = Counter()
    for name, part in reversed(parts.items()):
        cuts = _cut(part, classes, view, films, past_end, place)
        splits[name] = SplitCount(len(cuts.clips))
        prefix = "" if name == "test" else f"{name}_"
        oddities.update({prefix + key: count for key, count in cuts.oddities.items()})
        if name == "test" or wanted == "validation":
            clips += cuts.clips
            skipped += cuts.skipped
            regular += part.regular
    task: Task = "singlelabel" if view == "official" else "multilabel"
    return Reading(
        Dataset(
            NAME,
            classes,
            task,
            tuple(clips),
            "top1",
            (*regular, *skipped),
            variant=f"{view} view",
        ),
        splits,
        media.missing,
        oddities,
        PUBLISHED if view == "official" else {**PUBLISHED, "test": 3140, "validation": 2864},
        _notes(view, wanted, films),
        frozenset(regular),
    )


def _test_part(root: Path) -> Part:
    test = read_part(root, "test", "test")
    if test is None:
        raise absent(
            root,
            f"the class files of THUMOS14 (annotation/{CLASSES[0]}_test.txt and 19 more)",
            "unpack TH14_Temporal_annotations_test.zip here",
        )
    return test


def _cut(
    part: Part,
    classes: tuple[str, ...],
    view: View,
    films: Mapping[str, Film],
    past_end: str,
    place: Callable[[str], tuple[Place, float | None]],
) -> Cuts:
    """Clips of a part; counts and, where asked for, leaves out what lies past its video's end."""
    late = list(past_the_end(part.segments, films))
    segments = part.segments
    if past_end == "skip":
        gone = {s for s in late if s.start >= films[s.video].duration}
        segments = [s for s in segments if s not in gone]
        for s in sorted(gone, key=lambda s: (s.id, s.label)):
            reason = f"{s.where}: begins after {films[s.video].duration:.2f} s, the video's end"
            part.regular.append((s.id, reason))
    cuts = cut_segments(segments, classes, view, place)
    counted = part.oddities + Counter({"end_past_length": len(late)}) + cuts.oddities
    counted["double_labelled"] = cuts.oddities["double_labelled"]
    return Cuts(cuts.clips, part.skipped + cuts.skipped, counted)


def _ucf101(root: Path, folder: str, classes: tuple[str, ...]) -> tuple[Clip, ...]:
    """Trimmed UCF101 clips (or frame folders) of the 20 classes, whole."""
    places = [root / name for name in ([folder] if folder else _UCF101)]
    top = next((p for p in places if any((p / name).is_dir() for name in CLASSES)), None)
    if top is None:
        if folder:
            raise DatasetError(f"{places[0]}: expected folders {CLASSES[0]}, …, found none of them")
        return ()
    if gone := [name for name in CLASSES if not (top / name).is_dir()]:
        raise DatasetError(
            f"{top}: expected UCF101 clips of the 20 classes of THUMOS14, found no folder "
            f"{gone[0]}: unpack UCF101 again"
        )
    clips = []
    for label, name in enumerate(CLASSES):
        entries = sorted(p for p in (top / name).iterdir() if not p.name.startswith("."))
        for entry in entries:
            if entry.suffix.lower() in SUFFIXES or entry.is_dir():
                identity = f"{name}/{without_suffix(entry.name)}"
                clips.append(Clip(identity, entry, None, None, (label,), "train"))
    return tuple(clips)


def _notes(view: View, train: str, films: Mapping[str, Film]) -> tuple[str, ...]:
    notes = [CAP] if view == "official" else ["dedup view: a top-1 hit is any label of the segment"]
    training = {
        "ucf101": "training rows are the trimmed UCF101 clips of the 20 classes",
        "validation": "training rows are the validation segments, not UCF101 as the paper has it",
        "none": "no training rows: neither UCF101 clips nor validation annotations were taken",
    }
    notes.append(training[train])
    if not films:
        notes.append(
            "no *_video_info.csv: segments past their video's end (26 in the published test set) "
            "cannot be counted here and fail in stage one"
        )
    return tuple(notes)


ADAPTER = make_adapter(
    NAME,
    "THUMOS14, 20 action classes (Idrees et al. 2017)",
    "annotation/<Class>_test.txt (20 files), the test videos, and UCF-101/<Class>/ or the "
    "validation annotations for training",
    "registration at the THUMOS14 site (zip password by mail); research use",
    OPTIONS,
    _load,
)
