"""Animal Kingdom in each form that its annotation comes in."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import openpyxl
import pytest
import torch

from msq.errors import DatasetError, UsageError
from msq.extract.datasets.animal_kingdom import (
    ADAPTER,
    read_animal_kingdom,
    read_animal_kingdom_segments,
)
from msq.head import metrics
from msq.head.segments import segment_map

NAMES = ("Abseiling", "Attacking", "Attending", "Barking", "Flapping tail", "Yawning")
LABELS = (0, 1, 2, 3, 4, "#N/A")
AR = (
    (1, "AAACXZTV", "train", "2,3", "[('Crane', 'Attending'), ('Crane', 'Barking')]"),
    (2, "AABCQPTK", "train", "5,1", "[('Snake', 'Attacking')]"),
    (3, "AABKMGHE", "train", "0", "[('Snake', "),
    (7, "AAQNNZGK", "test", "2", "[('Dog', 'attending')]"),
    (8, "ZZQVJVEI", "test", "3, 1", "[('Dog', 'Barking'), ('Dog', 'Attacking')]"),
)
SEGMENTS = ("tail", "head", "head", "middle", "tail", "tail")


def workbook(file: Path, sheets: dict[str, list[tuple]]) -> None:
    """A true .xlsx; `#N/A` becomes an error cell, as in the official file."""
    book = openpyxl.Workbook()
    book.remove(book.active)
    for name, rows in sheets.items():
        table = book.create_sheet(name)
        for row in rows:
            table.append(row)
        for cells in table.iter_rows():
            for cell in cells:
                if cell.value == "#N/A":
                    assert cell.data_type == "e"
    file.parent.mkdir(parents=True, exist_ok=True)
    book.save(file)


def write_metadata(root: Path, *, rows=AR, labels=LABELS) -> Path:
    action = [(k, "Category", name, None) for k, name in zip(labels, NAMES, strict=True)]
    header = ("S/N", "video_id", "type", "labels", "list_animal_action")
    workbook(
        root / "AR_metadata.xlsx",
        {
            "AR": [header, *rows],
            "CARe": [("S/N", "train_test")],
            "Action": [("Label", "Category", "Action", "Description"), *reversed(action)],
            "Animal": [("Animal",), (None,)],
        },
    )
    return root


def write_actions(root: Path, names=NAMES, segments=SEGMENTS) -> None:
    """Indices 0 and 1 exchanged, names in another case: both as in the official file."""
    rows = [
        (9, "Category", name.title(), {0: 1, 1: 0}.get(k, k), segment, 10)
        for k, (name, segment) in enumerate(zip(names, segments, strict=True))
    ]
    header = ("S/N", "action_category", "action", "index", "segment", "count")
    workbook(root / "df_action.xlsx", {"AR_count": [header, *rows]})


def write_names(root: Path) -> Path:
    file = root / "names.txt"
    file.write_text("\n".join(NAMES) + "\n")
    return file


SIX = "original_vido_id video_id frame_id path labels type"
FIVE = "original_vido_id video_id frame_id path labels"
README = "clip_id clip_number frame_number clip_path action_labels"
FRAMES = {
    "train.csv": (
        "AAACXZTV 145 1 AAACXZTV/AAACXZTV_t000001.jpg 2,3 train",
        "AAACXZTV 145 2 AAACXZTV/AAACXZTV_t000002.jpg  2,3 train ",
        'AABCQPTK 146 1 AABCQPTK/AABCQPTK_t000001.jpg "5,1" train',
        'AABKMGHE 147 1 AABKMGHE/AABKMGHE_t000001.jpg "0" train',
    ),
    "val.csv": (
        "AAQNNZGK 1 1 AAQNNZGK/AAQNNZGK_t000001.jpg 2 test",
        "ZZQVJVEI 2 1 ZZQVJVEI/ZZQVJVEI_t000001.jpg 3,1 train",
    ),
}
EXPECTED = [
    ("AAACXZTV", "train", (2, 3)),
    ("AABCQPTK", "train", (1, 5)),
    ("AABKMGHE", "train", (0,)),
    ("AAQNNZGK", "test", (2,)),
    ("ZZQVJVEI", "test", (1, 3)),
]


def write_frames(root: Path, header: str = SIX, end: str = "\n") -> Path:
    folder = root / "annotation"
    folder.mkdir(parents=True, exist_ok=True)
    width = len(header.split())
    for name, rows in FRAMES.items():
        kept = [row if width == 6 else row.rstrip().rsplit(" ", 1)[0] for row in rows]
        (folder / name).write_bytes((end.join((header, *kept)) + end).encode())
    return root


def rows_of(data):
    return [(c.id, c.split, c.labels) for c in data.clips]


def test_the_workbook_gives_clips_and_names(tmp_path):
    data = read_animal_kingdom(write_metadata(tmp_path))
    assert (data.name, data.task, data.metric) == ("animal-kingdom", "multilabel", "map")
    assert data.classes == NAMES
    assert rows_of(data) == EXPECTED
    assert data.skipped == ()


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("header", [SIX, FIVE, README], ids=["six", "five", "readme"])
def test_frame_lists_of_five_or_six_columns_say_the_same(tmp_path, header, end):
    root = write_frames(tmp_path, header, end)
    options = {"classes": str(write_names(tmp_path))}
    data = ADAPTER.read(root, options)
    assert rows_of(data) == EXPECTED
    assert data.classes == NAMES
    survey = ADAPTER.survey(root, options)
    assert survey.oddities["labels_vary"] == 0
    # The last clip of val.csv calls itself train: the file decides, the trap is counted.
    assert survey.oddities.get("type_disagrees") == (1 if header == SIX else None)


def test_columns_are_found_by_name_in_any_order(tmp_path):
    folder = write_frames(tmp_path) / "annotation"
    for name, rows in FRAMES.items():
        cells = [row.split() for row in rows]
        text = ["labels path type original_vido_id"]
        text += [f"{c[4]} {c[3]} {c[5]} {c[0]}" for c in cells]
        (folder / name).write_text("\n".join(text))
    assert rows_of(read_animal_kingdom(tmp_path, classes=write_names(tmp_path))) == EXPECTED


def test_the_derived_light_lists_say_the_same(tmp_path):
    for name, split in (("train_light.csv", "train"), ("val_light.csv", "test")):
        rows = [f"{r[1]};{r[3]}" for r in AR if r[2] == split]
        (tmp_path / name).write_bytes("\r\n".join(("video_id;labels", *rows, "")).encode())
    names = write_names(tmp_path)
    assert rows_of(read_animal_kingdom(tmp_path, classes=names)) == EXPECTED
    (tmp_path / "val_light.csv").write_text("video_id;labels\nAAQNNZGK\n")
    with pytest.raises(DatasetError, match=r"val_light\.csv, line 2: expected class numbers"):
        read_animal_kingdom(tmp_path, classes=names)
    (tmp_path / "val_light.csv").write_text("video_id,labels\n")
    with pytest.raises(DatasetError, match="expected the header 'video_id;labels'"):
        read_animal_kingdom(tmp_path, classes=names)


def test_the_form_can_be_chosen_and_names_then_come_from_the_workbook(tmp_path):
    root = write_frames(write_metadata(tmp_path, rows=AR[:2]))
    assert len(read_animal_kingdom(root).clips) == 2
    data = read_animal_kingdom(root, annotation="frames")
    assert rows_of(data) == EXPECTED
    assert data.classes == NAMES
    with pytest.raises(UsageError, match="annotation=xlsx: expected auto, metadata, light, frames"):
        read_animal_kingdom(root, annotation="xlsx")


@pytest.mark.parametrize(
    ("base", "file"),
    [
        ("", "video/AAACXZTV.mp4"),
        ("", "dataset/video/AAACXZTV.mp4"),
        ("", "AAACXZTV.mp4"),
        ("", "image/AAACXZTV"),
        ("action_recognition", "action_recognition/dataset/video/AAACXZTV.mp4"),
        ("AnimalKingdom/action_recognition",
         "AnimalKingdom/action_recognition/dataset/image/AAACXZTV"),
    ],
)  # fmt: skip
def test_clips_are_found_wherever_they_were_unpacked(tmp_path, base, file):
    write_metadata(tmp_path / base / "annotation")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch() if file.endswith(".mp4") else (tmp_path / file).mkdir()
    assert read_animal_kingdom(tmp_path).clips[0].path == tmp_path / file
    survey = ADAPTER.survey(tmp_path, {})
    assert survey.missing == 4
    assert survey.oddities["empty_frame_folders"] == (0 if file.endswith(".mp4") else 1)


def test_the_survey_counts_every_oddity(tmp_path):
    root = write_metadata(tmp_path)
    write_actions(root)
    survey = ADAPTER.survey(root, {})
    assert survey.classes == 6
    assert survey.to_dict()["splits"] == {
        "train": {"clips": 3, "unlabelled": 0},
        "test": {"clips": 2, "unlabelled": 0},
    }
    assert survey.oddities == {
        "label_error_cells": 1,
        "repeated_labels": 0,
        "animal_actions_disagree": 1,
        "animal_actions_unreadable": 1,
        "classes_empty_in_test": 3,
        "segment_index_disagrees": 2,
        "empty_frame_folders": 0,
    }
    assert "segments: head 2, middle 1, tail 3 classes; with clips in test: 2, 1, 0" in survey.notes


def test_segments_are_joined_by_name_and_not_by_index(tmp_path):
    write_actions(write_metadata(tmp_path))
    assert read_animal_kingdom_segments(tmp_path) == {
        "head": (1, 2),
        "middle": (3,),
        "tail": (0, 4, 5),
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"names": ("Running", *NAMES[1:])}, "the action 'Running' is not among the 6 classes"),
        ({"segments": ("neck", *SEGMENTS[1:])}, "expected segment head, middle or tail"),
        ({"names": ("Attacking", *NAMES[1:])}, "each of the 6 classes once, not so for Abseiling"),
    ],
)
def test_segments_that_do_not_fit_are_refused(tmp_path, arguments, words):
    write_actions(write_metadata(tmp_path), **arguments)
    with pytest.raises(DatasetError) as error:
        read_animal_kingdom_segments(tmp_path)
    assert words in str(error.value)


def test_without_openpyxl_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    root = write_frames(write_metadata(tmp_path))
    (root / "df_action.xlsx").touch()
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(DatasetError, match=r"pip install 'msq\[xlsx\]'"):
        read_animal_kingdom(root)
    with pytest.raises(DatasetError, match=r"pip install 'msq\[xlsx\]'"):
        read_animal_kingdom_segments(root)
    # With the names from a text file, the frame lists need no workbook.
    assert rows_of(read_animal_kingdom(root, classes=write_names(root))) == EXPECTED


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_frame_list_saved_with_another_delimiter_is_refused(tmp_path, delimiter):
    root = write_frames(tmp_path, SIX.replace(" ", delimiter))
    with pytest.raises(DatasetError) as error:
        read_animal_kingdom(root, classes=write_names(tmp_path))
    for word in ("train.csv", "expected", "blanks", "original_vido_id video_id"):
        assert word in str(error.value)


def test_a_frame_list_that_was_cut_off_is_refused(tmp_path):
    root, names = write_frames(tmp_path), write_names(tmp_path)
    with (root / "annotation" / "val.csv").open("a") as file:
        file.write("ZZQVJVEI 2 2 ZZQV")
    with pytest.raises(DatasetError, match=r"val\.csv, line 4: expected 6 columns, found 4"):
        read_animal_kingdom(root, classes=names)
    data = read_animal_kingdom(root, classes=names, policy="skip")
    assert rows_of(data) == EXPECTED
    assert [item for item, _ in data.skipped] == ["val.csv, line 4"]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((*AR, (9, "AAACXZTV", "test", "2", "[]")), "row 7: duplicate id 'AAACXZTV'"),
        ((*AR, (9, "AAACXZTW", "test", "140", "[]")), "expected classes 0 to 5, found 140"),
        ((*AR, (9, "AAACXZTW", "test", "Eating", "[]")), "expected class numbers like 2,40"),
        ((*AR, (9, "AAACXZTW", "holdout", "2", "[]")), "expected type train or test"),
        ((*AR, (9, None, "test", "2", "[]")), "expected a video id"),
        ((), "expected one row per clip, found none"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_with_its_place(tmp_path, rows, words):
    with pytest.raises(DatasetError) as error:
        read_animal_kingdom(write_metadata(tmp_path, rows=rows))
    assert words in str(error.value)
    assert "AR_metadata.xlsx" in str(error.value)


def test_workbooks_that_are_not_what_they_should_be_are_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"expected AR_metadata\.xlsx .*an empty folder"):
        read_animal_kingdom(tmp_path)
    file = tmp_path / "AR_metadata.xlsx"
    file.write_bytes(b"PK\x03\x04 half of a zip")
    with pytest.raises(DatasetError, match=r"not an Excel workbook .* download it again"):
        read_animal_kingdom(tmp_path)
    workbook(file, {"Sheet1": [("a", "b")]})
    with pytest.raises(DatasetError, match="expected a sheet Action, found Sheet1"):
        read_animal_kingdom(tmp_path)
    workbook(file, {"Action": [("Label", "Verb"), (0, "run")]})
    with pytest.raises(DatasetError, match="expected the columns Label, Action, found label, verb"):
        read_animal_kingdom(tmp_path)
    write_metadata(tmp_path, labels=(0, 1, 2, "#N/A", 4, "#N/A"))
    with pytest.raises(DatasetError, match="one may be an error cell"):
        read_animal_kingdom(tmp_path)
    write_metadata(tmp_path, labels=(0, 1, 2, 3, 3, "#N/A"))
    with pytest.raises(DatasetError, match="label 3 stands twice"):
        read_animal_kingdom(tmp_path)


def test_frame_lists_without_class_names_say_where_names_come_from(tmp_path):
    with pytest.raises(DatasetError, match=r"AR_metadata\.xlsx.*--option classes=FILE"):
        read_animal_kingdom(write_frames(tmp_path))


@pytest.fixture(scope="module")
def real(shared: Path) -> Path:
    folder = shared / "annotations" / "animal_kingdom"
    if not folder.is_dir():
        pytest.skip(f"no annotation files in {folder}")
    return folder


@pytest.fixture(scope="module")
def data(real: Path):
    return read_animal_kingdom(real)


def labels_of(data, split: str) -> torch.Tensor:
    clips = [c for c in data.clips if c.split == split]
    labels = torch.zeros(len(clips), len(data.classes), dtype=torch.uint8)
    for row, clip in enumerate(clips):
        labels[row, list(clip.labels)] = 1
    return labels


def test_the_real_annotation_gives_the_published_counts(data):
    assert (len(data.classes), len(data.clips), data.skipped) == (140, 30100, ())
    train, test = labels_of(data, "train"), labels_of(data, "test")
    assert (len(train), len(test)) == (24004, 6096)
    assert bool(train.any(1).all())
    assert bool(test.any(1).all())
    every = torch.cat((train, test)).sum(1).double()
    assert (round(float(every.mean()), 2), int(every.max())) == (2.16, 12)
    assert round(float(test.sum(1).double().mean()), 2) == 2.12
    empty = (~test.bool().any(0)).nonzero().flatten().tolist()
    assert empty == [4, 24, 34, 36, 53, 63, 70, 77, 86, 89, 111, 113, 126]
    assert round(100 * metrics.all_negative_accuracy(test), 2) == 98.48


def test_the_real_class_names_stand_at_the_numbers_that_single_label_clips_prove(data):
    assert data.classes[139] == "Yawning"
    assert data.classes[49].lower() == "flapping tail"
    assert data.classes[50].lower() == "flapping its ears"
    alone = Counter(c.labels[0] for c in data.clips if len(c.labels) == 1)
    assert (alone[49], alone[50]) == (39, 3)
    assert data.clips[0].id == "AAACXZTV"
    assert [data.classes[k] for k in data.clips[0].labels] == ["Attending", "Eating"]


def test_the_real_segments_are_17_29_and_94_classes(real, data):
    segments = read_animal_kingdom_segments(real)
    assert {name: len(labels) for name, labels in segments.items()} == {
        "head": 17,
        "middle": 29,
        "tail": 94,
    }
    tested = {k for c in data.clips if c.split == "test" for k in c.labels}
    assert [len(tested & set(labels)) for labels in segments.values()] == [17, 29, 81]
    assert data.groups == segments


def test_class_names_of_ones_own_have_no_groups_and_those_of_the_workbook_must_fit(tmp_path):
    root = write_metadata(tmp_path)
    assert read_animal_kingdom(root).groups == {}
    write_actions(root)
    found = read_animal_kingdom(root).groups
    assert found == {"head": (1, 2), "middle": (3,), "tail": (0, 4, 5)}
    own = tmp_path / "own.txt"
    own.write_text("\n".join(f"an animal {name.lower()}" for name in NAMES))
    assert read_animal_kingdom(root, classes=own).groups == {}
    write_actions(root, names=("Flying", *NAMES[1:]))
    with pytest.raises(DatasetError, match="the action 'Flying' is not among the 6 classes"):
        read_animal_kingdom(root)


def test_the_real_annotation_has_the_oddities_that_are_known(real):
    survey = ADAPTER.survey(real, {})
    for key, value in survey.published.items():
        if key in survey.oddities:
            assert survey.oddities[key] == value, key
    assert survey.oddities["animal_actions_disagree"] == 2298
    assert survey.oddities["animal_actions_unreadable"] == 411
    assert survey.oddities["segment_index_disagrees"] == 6
    assert survey.oddities["classes_empty_in_test"] == 13
    assert survey.oddities["label_error_cells"] == 1
    assert survey.missing == 30100


def test_class_frequencies_alone_score_what_is_published_for_the_real_labels(real, data):
    train, test = labels_of(data, "train"), labels_of(data, "test")
    share = train.double().mean(0).expand(len(test), -1)
    found = {
        "map": metrics.mean_average_precision(share, test),
        "map_micro": metrics.micro_average_precision(share, test),
        "map_official": metrics.official_micro_average_precision(share, test, batch_size=32),
        "map_charades": metrics.charades_map(share, test),
    }
    percent = {key: round(100 * float(value), 2) for key, value in found.items()}
    assert (percent["map"], percent["map_micro"], percent["map_official"]) == (1.67, 18.98, 19.54)
    assert percent["map_charades"] in (1.78, 1.79)
    assert found["map"].classes_scored == 127
    # Counting the empty classes as 0, as torchmetrics does, gives another number.
    assert round(100 * float(found["map"]) * 127 / 140, 3) == 1.515
    segments = segment_map(share, test, read_animal_kingdom_segments(real))
    sizes = {name: value.classes_scored for name, value in segments.items()}
    assert sizes == {"overall": 127, "head": 17, "middle": 29, "tail": 81}
    assert segments["head"] > segments["middle"] > segments["tail"]
    total = sum(float(segments[name]) * sizes[name] for name in ("head", "middle", "tail"))
    assert total / 127 == pytest.approx(float(found["map"]), abs=1e-12)
