"""One manifest with every kind of broken file and line: the run goes on and names each."""

import json

import pytest

from msq.cli import main

DAMAGED = ("truncated faststart.mp4", "flipped.mp4")


def test_every_broken_file_gets_a_line_and_the_run_ends_with_3(media, tmp_path, capsys):
    good = media("cfr.mp4")
    awkward = tmp_path / 'it\'s "a" video; 猫.mp4'
    awkward.write_bytes(good.read_bytes())
    rows = [("id", "path", "labels", "split"), ("good", good, "x", "train")]
    rows += [(name, media(name), "x", "train") for name in media.broken()]
    rows += [(name, media.damaged(name), "x", "train") for name in DAMAGED]
    rows += [
        ("missing", tmp_path / "missing.mp4", "x", "test"),
        ("awkward", awkward, "x", "test"),
        ("unlabelled", good, "", "test"),
        ("good", good, "x", "train"),  # duplicate id
        ("bad-split", good, "x", "holdout"),
    ]
    manifest = tmp_path / "m.csv"
    manifest.write_text(
        "\n".join(",".join('"' + str(c).replace('"', '""') + '"' for c in row) for row in rows)
        + "\n",
        encoding="utf-8",
    )
    with pytest.raises(SystemExit) as left:
        main(["extract", "--manifest", str(manifest), "--out", str(tmp_path / "s.zarr"), "--json"])
    assert left.value.code == 3
    out, err = capsys.readouterr()
    result = json.loads(out)
    failed = {item["clip"] for item in result["failures"]}
    degraded = {item["clip"] for item in result["degraded"]}
    assert "missing" in failed
    assert {"good", "awkward", "unlabelled"}.isdisjoint(failed | degraded)
    assert failed == {"missing", *media.broken()}
    assert degraded == set(DAMAGED)
    assert result["clips"] == len(rows) - 3
    assert result["failed"] == len(failed)
    assert result["done"] == result["clips"] - result["failed"]
    assert result["skipped"] == 2
    for name in failed | degraded:
        assert name in err
    for item in result["failures"]:
        assert str(tmp_path) not in json.dumps(item)
        assert item["reason"]
    assert "duplicate id 'good'" in err
    assert "bad split 'holdout'" in err


def test_words_outside_the_small_vocabulary_are_named_and_marked(media, tmp_path, capsys):
    manifest = tmp_path / "m.csv"
    manifest.write_text(
        f"path,labels,split\n{media('cfr.mp4')},zebra skating;dog eating,train\n", encoding="utf-8"
    )
    with pytest.raises(SystemExit) as left:
        main(["extract", "--manifest", str(manifest), "--out", str(tmp_path / "s.zarr"), "--json"])
    assert left.value.code == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["unknown_words"] == {"zebra skating": ["zebra", "skating"]}
    assert "does not know skating, zebra" in err
