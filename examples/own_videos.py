"""A folder of videos and a table of labels: what is done in videos that nobody has labelled?

    python examples/own_videos.py                           # on rendered videos, about a minute
    python examples/own_videos.py VIDEOS TABLE.csv NEW…     # on yours; NEW: videos without labels

TABLE.csv has the columns `file` (a file in VIDEOS) and `labels` (`bird flying;bird singing`). What
comes out, in `own-videos/`:

    manifest.csv        the table as msq reads it: with paths, and with a split
    store.zarr          the features; a video that cannot be read is named, and left out of the rest
    head/               the trained head; result.json has its scores on the test clips
    predictions.json    for each new video the labels with their probabilities, the highest first

Two of the rendered videos cannot be read, on purpose: msq says why, and goes on (exit code 3).
"""

import csv
import hashlib
import json
import shutil
import sys
from pathlib import Path

import msq
from small_world import SMALL_HEAD, run_msq, small_videos

OUT = Path("own-videos")


def split_of(recording: str) -> str:
    """A tenth is `test`, by a hash: a clip stays where it is when others are added.

    Clips cut from one recording belong in one split, else a head is tested on what it has seen. If
    yours have such a name, hash that.
    """
    return "test" if hashlib.sha256(recording.encode()).digest()[0] < 26 else "train"


def write_manifest(videos: Path, table: Path) -> Path:
    """The manifest of a table. Its ids name the clips in the store, which holds no paths."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    manifest = OUT / "manifest.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        write = csv.writer(file).writerow
        write(["id", "path", "labels", "split"])
        for row in rows:
            name = row["file"]
            write([name, (videos / name).resolve(), row["labels"], split_of(name)])
    return manifest


def rendered() -> tuple[Path, Path, list[Path]]:
    """Folder, table and new videos, out of the small world; two files cannot be read."""
    world = small_videos()
    with world.open(newline="", encoding="utf-8") as file:
        clips = list(csv.DictReader(file))
    folder, table, rows = OUT / "videos", OUT / "labels.csv", [("file", "labels")]
    folder.mkdir(exist_ok=True)
    for clip in clips[:60]:
        copied = shutil.copy(world.parent / clip["path"], folder)
        rows.append((Path(copied).name, clip["labels"]))
    (folder / "broken.mp4").write_bytes(b"the disk was full")
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([*rows, ("broken.mp4", "dog eating"), ("lost.mp4", "")])
    return folder, table, [world.parent / clip["path"] for clip in clips[-10:]]


OUT.mkdir(exist_ok=True)
if len(sys.argv) > 1:
    videos, table, *new = map(Path, sys.argv[1:])
else:
    videos, table, new = rendered()
manifest = write_manifest(videos, table)

store, head = OUT / "store.zarr", OUT / "head"
# Real work needs real encoders, named here and nowhere else, and no SMALL_HEAD:
# --video-encoder hf-hub:facebook/timesformer-base-finetuned-k400 --image-encoder ViT-B-16/openai
run_msq("extract", "--manifest", manifest, "--out", store, codes=(0, 3))
run_msq("train-head", store, "--out", head, "--classifier", "text", *SMALL_HEAD)

# In a shell: msq predict NEW… --run own-videos/head --top 3
trained = msq.load_head(head)
found = trained.predict(new)
for item in found:
    best = [f"{one['label']} {one['score']:.2f}" for one in item["predictions"][:3]]
    print(item["clip"], *best, sep="  ")
(OUT / "predictions.json").write_text(json.dumps(found, indent=1), encoding="utf-8")

# Its classifier is made of words, so it takes others than it was trained on (--labels in a shell).
asked = ["dog sleeping", "bird flying", "human reading"]
for item in trained.predict(new[:3], labels=asked):
    print(item["clip"], *(f"{x['label']} {x['score']:.2f}" for x in item["predictions"]), sep="  ")
