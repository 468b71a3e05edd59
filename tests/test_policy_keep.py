"""The policy `keep`: duplicates joined or renamed, unknown labels left off, and each said."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msq.errors import DatasetError, UsageError
from msq.extract.datasets import Dataset, read_folder, read_manifest
from msq.extract.datasets.activitynet import read_activitynet
from msq.extract.datasets.kept_rows import keep_rows
from msq.extract.datasets.kinetics import ADAPTER as KINETICS
from msq.extract.datasets.kinetics import read_kinetics
from msq.extract.datasets.manifest_row import Row
from msq.extract.datasets.mmaction2 import read_mmaction2
from msq.extract.datasets.registry import find_adapter


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def manifest(folder: Path, lines: str, columns: str = "path,labels,split") -> Path:
    return write(folder / "m.csv", f"{columns}\n{lines}")


def found(data: Dataset) -> list[tuple[str, tuple[str, ...], str]]:
    """Ids, names of labels and splits."""
    return [(c.id, tuple(data.classes[k] for k in c.labels), c.split) for c in data.clips]


# --- manifests ----------------------------------------------------------------------------------


def test_a_line_for_each_label_makes_one_clip_with_all_of_them(tmp_path: Path) -> None:
    lines = "a.mp4,run,train\nb.mp4,eat,test\na.mp4,eat,train\n./a.mp4,run;fly,train\n"
    data = read_manifest(manifest(tmp_path, lines), policy="keep")
    assert found(data) == [("a", ("eat", "fly", "run"), "train"), ("b", ("eat",), "test")]
    assert data.skipped == ()
    assert data.kept == (
        ("m.csv line 4", "joined with line 2, clip 'a': adds 'eat'"),
        ("m.csv line 5", "joined with line 2, clip 'a': adds 'fly'"),
    )
    skipping = read_manifest(manifest(tmp_path, lines))
    assert found(skipping) == [("a", ("run",), "train"), ("b", ("eat",), "test")]
    assert skipping.kept == ()
    assert data.clip_list_hash() != skipping.clip_list_hash()
    one = manifest(tmp_path / "one", "a.mp4,run;eat;fly,train\nb.mp4,eat,test\n")
    assert data.clip_list_hash() == read_manifest(one, policy="keep").clip_list_hash()


def test_a_line_that_says_nothing_new_is_joined_and_said(tmp_path: Path) -> None:
    data = read_manifest(manifest(tmp_path, "a.mp4,x,train\na.mp4,x,train\n"), policy="keep")
    assert found(data) == [("a", ("x",), "train")]
    assert data.kept == (("m.csv line 3", "joined with line 2, clip 'a': adds nothing"),)


def test_other_files_and_cuts_of_an_id_get_numbers_that_no_line_asks_for(tmp_path: Path) -> None:
    lines = (
        "v,a.mp4,x,train,,\n"
        "v,b.mp4,x,train,,\n"  # another file
        "v,a.mp4,x,train,0,2\n"  # another cut
        "v~2,c.mp4,x,train,,\n"  # has the first of the ids that could be made
        "v,sub/../b.mp4,y,train,,\n"  # the second line again
        "v,a.mp4,y,train,0,\n"  # from the beginning, as the first
    )
    path = manifest(tmp_path, lines, "id,path,labels,split,start,end")
    data = read_manifest(path, policy="keep")
    assert found(data) == [
        ("v", ("x", "y"), "train"),
        ("v~3", ("x", "y"), "train"),
        ("v~4", ("x",), "train"),
        ("v~2", ("x",), "train"),
    ]
    assert [clip.path.name for clip in data.clips] == ["a.mp4", "b.mp4", "a.mp4", "c.mp4"]
    assert (data.clips[0].end, data.clips[2].end) == (None, 2.0)
    assert data.kept == (
        ("m.csv line 3", "duplicate id 'v', first used on line 2 for another file: its id is "
                         "'v~3'"),
        ("m.csv line 4", "duplicate id 'v', first used on line 2 for another cut of it: its id is "
                         "'v~4'"),
        ("m.csv line 6", "joined with line 3, clip 'v~3': adds 'y'"),
        ("m.csv line 7", "joined with line 2, clip 'v': adds 'y'"),
    )  # fmt: skip


def test_files_that_differ_in_their_suffix_keep_the_ids_of_the_other_policies(
    tmp_path: Path,
) -> None:
    path = manifest(tmp_path, "a.avi,x,train\na.mp4,x,train\na.mp4,y,train\n")
    data = read_manifest(path, policy="keep")
    assert found(data) == [("a", ("x",), "train"), ("a.mp4", ("x", "y"), "train")]
    assert data.kept == (("m.csv line 4", "joined with line 3, clip 'a.mp4': adds 'y'"),)


def test_a_label_that_is_no_class_is_left_off_where_the_clip_keeps_another(tmp_path: Path) -> None:
    classes = write(tmp_path / "classes.txt", "bird flying\ndog eating\n")
    lines = (
        "a.mp4,bird flyin;dog eating,train\n"
        "b.mp4,zebra,train\n"  # no class at all: zeros would say that it shows none of them
        "c.mp4,zebra,train\n"  # none here, and one on the next line
        "c.mp4,bird flying,train\n"
        "d.mp4,,train\n"  # unlabelled as it is written
        "d.mp4,zebra,train\n"
    )
    data = read_manifest(manifest(tmp_path, lines), classes=classes, policy="keep")
    assert found(data) == [
        ("a", ("dog eating",), "train"),
        ("c", ("bird flying",), "train"),
        ("d", (), "train"),
    ]
    said = dict(data.kept)
    assert said["m.csv line 2"] == (
        f"label 'bird flyin' left off: not in {classes} (did you mean bird flying?); clip 'a' "
        "keeps 'dog eating'"
    )
    assert [where for where, _ in data.kept] == ["m.csv line 2", "m.csv line 4", "m.csv line 4"]
    assert data.kept[1][1] == "joined with line 5, clip 'c': adds nothing"
    assert "label 'zebra' left off" in data.kept[2][1]
    assert data.skipped == (
        ("line 3", f"unknown label 'zebra': not in {classes}"),
        ("line 7", f"unknown label 'zebra': not in {classes}"),
    )


def test_what_one_line_knows_and_another_does_not_is_known(tmp_path: Path) -> None:
    classes = write(tmp_path / "classes.txt", "x\ny\nz\n")
    lines = (
        "a.mp4,x,train,y\n"
        "a.mp4,y,train,x;z\n"  # settles y, doubts z; x stays
        "b.mp4,x,train,q\n"
    )
    path = manifest(tmp_path, lines, "path,labels,split,unknown")
    data = read_manifest(path, classes=classes, policy="keep")
    assert [(c.labels, c.unknown) for c in data.clips] == [((0, 1), (2,)), ((0,), ())]
    assert dict(data.kept) == {
        "m.csv line 3": "joined with line 2, clip 'a': adds 'y', adds unknown 'z', 'y' is unknown "
        "no more, 'x' stays a label",
        "m.csv line 4": f"unknown 'q' left off: not in {classes}; clip 'b' keeps 'x'",
    }


def test_the_same_clip_in_two_splits_stays_skipped(tmp_path: Path) -> None:
    path = manifest(tmp_path, "a.mp4,x,train\na.mp4,x,test\na.mp4,y,train\n")
    data = read_manifest(path, policy="keep")
    assert found(data) == [("a", ("x", "y"), "train")]
    assert data.skipped == (
        ("line 3", "duplicate id 'a', first used on line 2: the same clip, there in split train "
                   "and here in test; it can be in one of them"),
    )  # fmt: skip


def test_a_second_label_of_a_clip_that_has_one_stays_skipped(tmp_path: Path) -> None:
    classes = write(tmp_path / "classes.txt", "x\ny\n")
    rows = ("a.mp4,x", "a.mp4,y", "a.mp4,x", "b.mp4,z", "b.mp4,y", "c.mp4,x;y")
    lines = "".join(f"{row},train\n" for row in rows)
    data = read_manifest(
        manifest(tmp_path, lines), classes=classes, task="singlelabel", policy="keep"
    )
    assert found(data) == [("a", ("x",), "train"), ("b", ("y",), "train")]
    assert [where for where, _ in data.skipped] == ["line 3", "line 5", "line 7"]
    assert (
        "expected one label (single-label task), found 'x' on line 2 and 'y' here"
        in (data.skipped[0][1])
    )
    assert "unknown label 'z'" in data.skipped[1][1]
    assert [where for where, _ in data.kept] == ["m.csv line 4"]


def test_what_cannot_be_kept_stays_skipped_in_the_order_of_its_lines(tmp_path: Path) -> None:
    lines = "a.mp4,x,train\na.mp4,x,test\nb.mp4,x,never\n,x,train\nc.mp4,x\na.mp4,y,val\n"
    path = manifest(tmp_path, lines)
    data = read_manifest(path, policy="keep")
    assert found(data) == [("a", ("x",), "train")]
    assert [where for where, _ in data.skipped] == [f"line {n}" for n in range(3, 8)]
    write(path, "path,labels,split\na.mp4,x,never\n")
    with pytest.raises(DatasetError, match="no usable line, 1 left out; the first, line 2: bad"):
        read_manifest(path, policy="keep")


def test_jsonl_is_kept_as_csv_is(tmp_path: Path) -> None:
    rows = [{"path": "a.mp4", "labels": [label], "split": "train"} for label in ("x", "y")]
    path = write(tmp_path / "m.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
    data = read_manifest(path, policy="keep")
    assert found(data) == [("a", ("x", "y"), "train")]
    assert data.kept == (("m.jsonl line 2", "joined with line 1, clip 'a': adds 'y'"),)


_LINES = st.lists(
    st.tuples(
        st.sampled_from(["", "p", "p~2", "q"]),  # id
        st.sampled_from(["p.mp4", "p.avi", "q.mp4"]),
        st.sampled_from(["", "x", "y", "x;y", "z", "x;z"]),  # z is no class
        st.sampled_from(["train", "test"]),
        st.sampled_from(["", "3"]),  # end
        st.sampled_from(["", "x", "z"]),  # unknown
    ),
    min_size=1,
    max_size=9,
)


@given(lines=_LINES, task=st.sampled_from(["multilabel", "singlelabel"]))
def test_no_clip_and_no_label_is_lost_and_no_line_goes_without_a_word(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, ...]], task: Any
) -> None:
    """Against what `skip` reads of the same lines, and what the lines say."""
    folder = tmp_path_factory.mktemp("keep")
    classes = write(folder / "classes.txt", "x\ny\n")
    text = "".join(",".join(line) + "\n" for line in lines)
    path = manifest(folder, text, "id,path,labels,split,end,unknown")

    def read(policy: Any) -> Dataset | None:
        try:
            return read_manifest(path, classes=classes, task=task, policy=policy)
        except DatasetError:
            return None

    kept, skipping = read("keep"), read("skip")
    assert kept == read("keep")  # the same each time
    if kept is None:
        assert skipping is None
        return
    ids = {clip.id: clip for clip in kept.clips}
    assert len(ids) == len(kept.clips)
    assert all(not {*c.labels} & {*c.unknown} for c in kept.clips)
    assert task == "multilabel" or all(len(c.labels) <= 1 for c in kept.clips)
    all_known = not any("z" in line[2] + line[5] for line in lines)
    for clip in skipping.clips if skipping and all_known else ():
        same = ids[clip.id]
        assert {*clip.labels} <= {*same.labels}, clip.id
        assert (clip.path, clip.end, clip.split) == (same.path, same.end, same.split)
    # Each line begins a clip, or was joined, or skipped.
    joined = sum("joined with" in change for _, change in kept.kept)
    assert len(kept.clips) + joined + len({where for where, _ in kept.skipped}) == len(lines)


def test_many_lines_of_one_id_are_read_in_time_that_grows_with_them() -> None:
    rows = [
        Row(f"line {k}", "v", None, Path("v.mp4"), float(k), None, ("x",), "train")
        for k in range(1, 40_001)
    ]
    made = keep_rows(rows, {"x"}, "", "multilabel")
    assert [made.rows[k].id for k in (0, 1, 39_999)] == ["v", "v~2", "v~40000"]


# --- lists of other tools and folders -----------------------------------------------------------


def test_repeated_lines_of_a_list_are_joined_and_conflicts_stay_skipped(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "a.mp4 0\na.mp4 0\na.mp4 1\nb.avi 1\nb.mp4 1\n")
    write(tmp_path / "val.csv", "a.mp4 0\n")
    write(tmp_path / "b.avi", "")
    write(tmp_path / "b.mp4", "")
    data = read_kinetics(tmp_path, policy="keep")
    assert found(data) == [
        ("a", ("class 0",), "train"), ("b", ("class 1",), "train"), ("b~2", ("class 1",), "train")
    ]  # fmt: skip
    assert [clip.path.name for clip in data.clips] == ["a.mp4", "b.avi", "b.mp4"]
    assert [where for where, _ in data.skipped] == ["train.csv line 3", "val.csv line 1"]
    assert "found 'class 0' on train.csv line 1 and 'class 1' here" in data.skipped[0][1]
    assert "there in split train and here in val" in data.skipped[1][1]
    assert [where for where, _ in data.kept] == ["train.csv line 2", "train.csv line 5"]
    survey = KINETICS.survey(tmp_path, {"policy": "keep"})
    assert survey.oddities == {"repeated": 4, "skipped": 2}
    assert [item["item"] for item in survey.kept_items] == ["train.csv line 2", "train.csv line 5"]
    assert KINETICS.survey(tmp_path, {}).oddities == {"repeated": 4, "skipped": 4}
    assert KINETICS.survey(tmp_path, {}).kept_items == ()
    (tmp_path / "b.avi").unlink()  # then both lines mean the file that is there
    assert [c.id for c in read_kinetics(tmp_path, policy="keep").clips] == ["a", "b"]


def test_a_name_that_is_no_class_is_skipped_and_a_number_past_the_last_is_an_error(
    tmp_path: Path,
) -> None:
    header = "label,youtube_id,time_start,time_end,split\n"
    write(tmp_path / "train.csv", f"{header}run,a,0,10,train\nzoom,b,0,10,train\n")
    write(tmp_path / "classes.txt", "run\neat\n")
    data = read_kinetics(tmp_path, policy="keep")
    assert found(data) == [("a_000000_000010", ("run",), "train")]
    unknown = f"unknown label 'zoom': not in {tmp_path / 'classes.txt'}"
    assert data.skipped == (("train.csv line 3", unknown),)
    for policy in ("skip", "keep"):  # the class file of another dataset
        write(tmp_path / "train.csv", "a.mp4 0\nb.mp4 7\n")
        with pytest.raises(DatasetError, match="is it the class file of another dataset"):
            read_kinetics(tmp_path, policy=policy)
        write(tmp_path / "train.csv", f"{header}zoom,b,0,10,train\n")
        with pytest.raises(DatasetError, match="is it the class file of another dataset"):
            read_kinetics(tmp_path, policy=policy)


def test_an_mmaction2_list_of_a_label_a_line_is_joined_where_the_task_is_named(
    tmp_path: Path,
) -> None:
    write(tmp_path / "train_videos.txt", "a.mp4 0\na.mp4 2\nb.mp4 1\n")
    data = read_mmaction2(tmp_path, policy="keep", task="multilabel")
    assert [(c.id, c.labels) for c in data.clips] == [("a", (0, 2)), ("b", (1,))]
    assert data.kept[0][1] == "joined with train_videos.txt line 1, clip 'a': adds 'class 2'"
    guessed = read_mmaction2(tmp_path, policy="keep")  # no line has two, so a clip has one
    assert (guessed.task, [c.labels for c in guessed.clips]) == ("singlelabel", [(0,), (1,)])
    assert guessed.skipped[0][1].endswith("here; --option task=multilabel joins them")
    write(tmp_path / "train_rawframes.txt", "a 0 5 0\na 0 5 2\na 5 5 1\n")
    cuts = read_mmaction2(
        tmp_path, train="train_rawframes.txt", kind="rawframes_offset", policy="keep",
        task="multilabel",
    )  # fmt: skip
    assert [(c.id, c.labels, c.fps) for c in cuts.clips] == [
        ("a#f0-5", (0, 2), 30.0), ("a#f5-10", (1,), 30.0)
    ]  # fmt: skip


def segments(path: Path, **videos: list[tuple[list[float], str]]) -> None:
    database = {
        name: {
            "subset": "training",
            "annotations": [{"segment": times, "label": label} for times, label in listed],
        }
        for name, listed in videos.items()
    }
    write(path / "a.json", json.dumps({"database": database}))


def test_segments_that_stand_twice_are_joined_and_labels_that_are_no_class_left_off(
    tmp_path: Path,
) -> None:
    segments(
        tmp_path,
        v=[([1, 2], "run"), ([1, 2], "run"), ([1, 2], "zoom"), ([3, 4], "zoom")],
        w=[([1, 2], "zoom")],
        empty=[],
    )
    options: dict[str, Any] = {"classes": "classes.txt", "policy": "keep"}
    write(tmp_path / "classes.txt", "run\neat\n")
    with pytest.raises(DatasetError, match="found no 'zoom'"):
        read_activitynet(tmp_path, classes="classes.txt")
    official = read_activitynet(tmp_path, **options)
    assert found(official) == [("v#1-2", ("run",), "train")]
    assert [item for item, _ in official.unusable] == ["v#1-2", "v#3-4", "w#1-2"]
    assert official.kept == (("v#1-2", "v: the same segment as v; joined, adds nothing"),)
    dedup = read_activitynet(tmp_path, view="dedup", **options)
    assert found(dedup) == [("v#1-2", ("run",), "train")]
    assert [item for item, _ in dedup.unusable] == ["v#3-4", "w#1-2"]
    assert "label 'zoom' left off" in dedup.kept[0][1]
    videos = read_activitynet(tmp_path, clips="videos", **options)
    assert found(videos) == [("v", ("run",), "train"), ("empty", (), "train")]
    assert [item for item, _ in videos.unusable] == ["w#1-2"]
    assert len(videos.kept) == 2
    assert all(clip.intervals == ((0, 1.0, 2.0),) * 2 for clip in videos.clips[:1])
    write(tmp_path / "classes.txt", "else\n")
    with pytest.raises(DatasetError, match="is it the class file of another dataset"):
        read_activitynet(tmp_path, **options)


def test_of_two_files_of_one_name_in_a_folder_the_second_is_kept_with_a_number(
    tmp_path: Path,
) -> None:
    for name in ("run/a.avi", "run/a.mp4", "run/a~2.mp4", "eat/b.mp4"):
        write(tmp_path / name, "")
    data = read_folder(tmp_path, policy="keep")
    assert [c.id for c in data.clips] == ["eat/b", "run/a", "run/a~3", "run/a~2"]
    assert data.clips[2].path == tmp_path / "run" / "a.mp4"
    assert data.clips[2].labels == (1,)
    assert data.skipped == ()
    said = "duplicate id 'run/a', first used on run/a.avi for another file: its id is 'run/a~3'"
    assert data.kept == (("run/a.mp4", said),)
    assert [item for item, _ in read_folder(tmp_path).skipped] == ["a.mp4"]
    adapter = find_adapter("folder")
    assert adapter.read(tmp_path, {"policy": "keep"}).kept == data.kept
    assert adapter.survey(tmp_path, {"policy": "keep"}).kept_items == (
        {"item": "run/a.mp4", "change": said},
    )
    with pytest.raises(DatasetError, match=r"a\.mp4: duplicate id .*1 such items"):
        adapter.read(tmp_path, {"policy": "error"})


@pytest.mark.parametrize("way", ["read", "survey"])
@pytest.mark.parametrize("name", ["hmdb51", "thumos14", "charades", "animal-kingdom", "kinetics"])
def test_a_policy_that_a_dataset_does_not_have_is_refused(
    name: str, way: str, tmp_path: Path
) -> None:
    policy = "kept" if name == "kinetics" else "keep"
    with pytest.raises((UsageError, DatasetError)) as error:
        getattr(find_adapter(name), way)(tmp_path, {"policy": policy})
    if name not in ("animal-kingdom", "charades"):  # these miss their files first
        assert f"--option policy={policy}: expected skip, error" in str(error.value)


def test_a_policy_that_there_is_not_is_no_policy_skip(tmp_path: Path) -> None:
    unknown: Any = "kep"
    with pytest.raises(UsageError, match="policy 'kep': expected one of skip, error, keep"):
        read_manifest(manifest(tmp_path, "a.mp4,x,train\n"), policy=unknown)


def test_every_pair_of_policies_reads_a_clean_manifest_alike(tmp_path: Path) -> None:
    path = manifest(tmp_path, "a.mp4,x;y,train\na.avi,,test\nb.mp4,y,val\n")
    policies: tuple[Any, ...] = ("skip", "error", "keep")
    read = {policy: read_manifest(path, policy=policy) for policy in policies}
    assert all(read[one] == read[other] for one, other in product(policies, policies))
