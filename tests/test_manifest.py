import json

import pytest

from msq.errors import DatasetError
from msq.extract.datasets import read_classes, read_folder, read_manifest


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding) if isinstance(text, str) else text)
    return path


def test_rows_keep_their_order_and_classes_are_sorted_names(tmp_path):
    manifest = write(
        tmp_path / "birds.csv",
        "path,labels,split\nb/2.mp4,fly;eat,train\na/1.mp4,eat,test\nc.mkv,,val\n",
    )
    dataset = read_manifest(manifest)
    assert dataset.name == "birds"
    assert dataset.classes == ("eat", "fly")
    assert [c.id for c in dataset.clips] == ["b/2", "a/1", "c"]
    assert [c.labels for c in dataset.clips] == [(0, 1), (0,), ()]
    assert [c.split for c in dataset.clips] == ["train", "test", "val"]
    assert dataset.clips[0].path == tmp_path / "b/2.mp4"
    assert dataset.skipped == ()


def test_a_cut_clip_carries_its_times_in_the_id(tmp_path):
    manifest = write(
        tmp_path / "m.csv",
        "path,labels,split,start,end\na.mp4,x,train,1.5,3\na.mp4,x,train,3,\na.mp4,x,train,,\n",
    )
    clips = read_manifest(manifest).clips
    assert [c.id for c in clips] == ["a#1.5-3", "a#3-", "a"]
    assert (clips[0].start, clips[0].end) == (1.5, 3.0)
    assert (clips[1].start, clips[1].end) == (3.0, None)


def test_every_kind_of_bad_line_is_listed_with_its_line_number_and_reason(tmp_path):
    classes = write(tmp_path / "classes.txt", "x\ny\n")
    manifest = write(
        tmp_path / "m.csv",
        "id,path,labels,split,start,end\n"
        "1,a.mp4,x,train,,\n"
        "1,b.mp4,x,train,,\n"  # duplicate id
        "2,c.mp4,z,train,,\n"  # unknown label
        "3,d.mp4,x,holdout,,\n"  # bad split
        "4,e.mp4,x\n"  # too few fields
        "5,f,g.mp4,x,train,,\n"  # an unquoted comma
        "6,,x,train,,\n"  # no path
        "7,h.mp4,x,train,5,2\n"  # reversed cut
        "8,i.mp4,x,train,soon,\n"  # not a number
        "9,j.mp4,x,train,nan,\n"
        "10,k.mp4,y,test,,\n",
    )
    dataset = read_manifest(manifest, classes=classes)
    assert [c.id for c in dataset.clips] == ["1", "10"]
    lines = dict(dataset.skipped)
    assert list(lines) == [f"line {n}" for n in range(3, 12)]
    for number, words in {
        3: "duplicate id '1', first used on line 2",
        4: "unknown label 'z'",
        5: "bad split 'holdout'",
        6: "expected 6 fields, found 3",
        7: "double quotes",
        8: "expected a path",
        9: "start 5 is not before end 2",
        10: "bad start 'soon'",
        11: "bad start 'nan'",
    }.items():
        assert words in lines[f"line {number}"]


def test_the_error_policy_stops_at_the_first_bad_line_and_names_it(tmp_path):
    manifest = write(tmp_path / "m.csv", "path,labels,split\na.mp4,x,train\nb.mp4,x,nope\n")
    with pytest.raises(DatasetError, match=r"m\.csv, line 3: bad split 'nope'"):
        read_manifest(manifest, policy="error")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_unicode_encodings_with_and_without_a_mark_are_read(tmp_path, encoding):
    text = 'path,labels,split\r\n"vidéos/it\'s ""a"" 猫.mp4",manger;sauter à la corde,train\r\n'
    dataset = read_manifest(write(tmp_path / "m.csv", text, encoding))
    assert dataset.clips[0].path.name == 'it\'s "a" 猫.mp4'
    assert dataset.classes == ("manger", "sauter à la corde")


def test_a_latin1_line_is_skipped_alone_with_what_was_found(tmp_path):
    raw = b"path,labels,split\na.mp4,eat,train\nb.mp4,caf\xe9,train\n"
    dataset = read_manifest(write(tmp_path / "m.csv", raw))
    assert [c.id for c in dataset.clips] == ["a"]
    assert "labels is not UTF-8" in dataset.skipped[0][1]
    assert "café" in dataset.skipped[0][1]


def test_jsonl_and_csv_give_the_same_clips(tmp_path):
    rows = [("a b.mp4", ["x", "y"], "train"), ("c.mp4", [], "test")]
    csv = "path,labels,split\n" + "".join(f"{p},{';'.join(ls)},{s}\n" for p, ls, s in rows)
    jsonl = "".join(json.dumps({"path": p, "labels": ls, "split": s}) + "\n" for p, ls, s in rows)
    first = read_manifest(write(tmp_path / "one.csv", csv))
    second = read_manifest(write(tmp_path / "two.jsonl", jsonl))
    assert first.clips == second.clips
    assert first.classes == second.classes


def test_a_broken_jsonl_line_is_skipped(tmp_path):
    good = json.dumps({"path": "a.mp4", "labels": ["x"], "split": "train"})
    manifest = write(tmp_path / "m.jsonl", f'{good}\n{{"path": \n[1]\n{{"path": "b.mp4"}}\n')
    dataset = read_manifest(manifest)
    assert [c.id for c in dataset.clips] == ["a"]
    assert [where for where, _ in dataset.skipped] == ["line 2", "line 3", "line 4"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected a header with the columns path, labels, split"),
        ("file,label\na,b\n", "found file, label"),
        ("path,labels,split\n", "no usable line"),
        ("path,labels,split\na.mp4,x,never\n", "the first, line 2: bad split"),
        ("path,labels,split\na.mp4,,train\n", "no line has a label"),
        ("path,path,labels,split\n", "a column stands twice"),
    ],
)
def test_an_unusable_manifest_says_why(tmp_path, text, words):
    with pytest.raises(DatasetError, match=r"m\.csv") as caught:
        read_manifest(write(tmp_path / "m.csv", text))
    assert words in str(caught.value)


def test_a_missing_manifest_is_a_usage_error(tmp_path):
    with pytest.raises(DatasetError, match="found nothing there") as caught:
        read_manifest(tmp_path / "none.csv")
    assert caught.value.exit_code == 2


def test_an_absolute_path_leaves_no_folder_in_the_id(tmp_path):
    inside = tmp_path / "data" / "v" / "a.mp4"
    manifest = write(
        tmp_path / "data" / "m.csv",
        f"path,labels,split\n{inside},x,train\n/elsewhere/deep/b.mp4,x,train\n",
    )
    dataset = read_manifest(manifest)
    assert [c.id for c in dataset.clips] == ["v/a", "b"]
    assert dataset.clips[0].path == inside


def test_files_that_differ_in_their_suffix_alone_are_two_clips(tmp_path):
    text = "path,labels,split\na.avi,x,train\na.mp4,x,train\na.mp4,x,train\n/b/a.mkv,x,test\n"
    dataset = read_manifest(write(tmp_path / "m.csv", text))
    assert [(c.id, c.path.name) for c in dataset.clips] == [
        ("a", "a.avi"),
        ("a.mp4", "a.mp4"),
        ("a.mkv", "a.mkv"),
    ]
    assert dataset.skipped == (("line 4", "duplicate id 'a.mp4', first used on line 3"),)


def test_files_of_one_name_in_folders_elsewhere_are_told_how_to_be_clips(tmp_path):
    paths = ["/cam1/001.mp4", "/cam2/001.mp4", "/cam3/001.mp4", "/cam1/001.mp4", "/cam1/002.mp4"]
    lines = "".join(f"{path},x,train\n" for path in paths)
    manifest = write(tmp_path / "m.csv", f"path,labels,split\n{lines}")
    dataset = read_manifest(manifest)
    assert [c.id for c in dataset.clips] == ["001", "001.mp4", "002"]  # as in stores that are there
    (where, another), (_, same) = dataset.skipped
    assert where == "line 4"
    assert another.startswith("duplicate id '001.mp4', first used on line 3: ")
    for words in ("outside the manifest's folder", "an id column", "--policy keep"):
        assert words in another
    assert same == "duplicate id '001', first used on line 2"  # the same file again
    # What the message names does mend it.
    assert len(read_manifest(manifest, policy="keep").clips) == 4
    numbered = "".join(f"{path},x,train,{k}\n" for k, path in enumerate(paths))
    write(manifest, f"path,labels,split,id\n{numbered}")
    assert len(read_manifest(manifest).clips) == 5
    # An id of one's own that stands twice is what it is.
    write(manifest, "path,labels,split,id\n/a/1.mp4,x,train,1\n/b/1.mp4,x,train,1\n")
    assert read_manifest(manifest).skipped == (
        ("line 3", "duplicate id '1', first used on line 2"),
    )


def test_single_label_rows_have_at_most_one_label(tmp_path):
    manifest = write(tmp_path / "m.csv", "path,labels,split\na.mp4,x,train\nb.mp4,x;y,train\n")
    dataset = read_manifest(manifest, task="singlelabel")
    assert [c.id for c in dataset.clips] == ["a"]
    assert "expected one label" in dataset.skipped[0][1]
    assert dataset.metric == "top1"


def test_classes_files_fix_the_order(tmp_path):
    plain = write(tmp_path / "plain.txt", "walk\n run \n\n")
    table = write(tmp_path / "table.csv", "id,name\n1,run\n0,walk\n")
    assert read_classes(plain) == read_classes(table) == ("walk", "run")
    with pytest.raises(DatasetError, match="stands more than once"):
        read_classes(write(tmp_path / "twice.txt", "walk\nwalk\n"))
    with pytest.raises(DatasetError, match="expected the ids 0 to 1"):
        read_classes(write(tmp_path / "gap.csv", "id,name\n0,walk\n2,run\n"))


def test_a_folder_per_class_with_split_folders(tmp_path):
    for name in ("train/eat/a.mp4", "train/fly/b.avi", "test/eat/a.mp4", "test/eat/notes.txt"):
        write(tmp_path / "pets" / name, "x")
    dataset = read_folder(tmp_path / "pets")
    assert dataset.task == "singlelabel"
    assert dataset.classes == ("eat", "fly")
    assert [(c.id, c.split) for c in dataset.clips] == [
        ("train/eat/a", "train"),
        ("train/fly/b", "train"),
        ("test/eat/a", "test"),
    ]
    assert dataset.skipped == (("test/eat/notes.txt", "not a video by its suffix '.txt'"),)


def test_without_split_folders_a_clip_keeps_its_split_when_others_come(tmp_path):
    for k in range(40):
        write(tmp_path / "x" / f"c{k % 2}" / f"{k}.mp4", "x")
    before = {c.id: c.split for c in read_folder(tmp_path / "x").clips}
    for k in range(40, 80):
        write(tmp_path / "x" / f"c{k % 2}" / f"{k}.mp4", "x")
    after = {c.id: c.split for c in read_folder(tmp_path / "x").clips}
    assert before.items() <= after.items()
    assert 0 < sum(s == "test" for s in after.values()) < 32


def test_two_files_of_one_name_are_not_one_clip(tmp_path):
    write(tmp_path / "x" / "c" / "a.mp4", "x")
    write(tmp_path / "x" / "c" / "a.avi", "x")
    dataset = read_folder(tmp_path / "x")
    assert [c.path.name for c in dataset.clips] == ["a.avi"]
    assert "duplicate id 'c/a'" in dataset.skipped[0][1]


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="found none"):
        read_folder(tmp_path)
