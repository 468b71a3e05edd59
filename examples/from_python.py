"""Both stages without a shell: do two kinds of queries differ by more than seeds do?

    python examples/from_python.py                # on a small world, half a minute
    python examples/from_python.py MANIFEST       # on your videos

What a notebook would do, cell by cell. Each call is a command, with the same options, defaults and
files: `msq.extract_features` is `msq extract`, `msq.train_head` is `msq train-head`. What comes
out: mean and standard deviation of mAP over three seeds for each kind of query, a run directory
for each head in `from-python/`, and what the best one says of a video. What is finished is not
done again, here neither: run it twice.
"""

import statistics
import sys
from pathlib import Path

import msq
from small_world import small_store, small_videos

OUT = Path("from-python")
HEAD = {"head.layers": 2, "head.heads": 4, "head.ffn": 256, "optim.lr": 2e-3}  # for few videos


def main() -> None:
    """Under a main guard, since processes that decode videos import this file; see the end."""
    if sys.argv[1:]:
        manifest, place, classes = Path(sys.argv[1]), OUT / "store.zarr", None
    else:
        place, manifest = small_store(), small_videos()
        classes = manifest.with_name("classes.txt")
    # Real work needs real encoders, named here and nowhere else, and another HEAD:
    # video_encoder="hf-hub:facebook/timesformer-base-finetuned-k400", frames=16, …
    made = msq.extract_features(manifest, place, classes=classes, progress=True)
    print(f"{made.store}: {made.done} of {made.clips} clips; {made.failures}")
    store = msq.open_store(made.store)

    runs = []
    for queries in ("text", "multimodal"):
        for seed in range(3):
            run = msq.train_head(
                store, OUT / f"{queries}-{seed}", queries=queries, seed=seed,
                classifier="text", epochs=4, overrides=HEAD,
            )  # fmt: skip
            runs.append((queries, run))
        found = [run.metrics["map"] for kind, run in runs if kind == queries]
        mean, std = statistics.mean(found), statistics.stdev(found)
        print(f"{queries:10}  mAP {mean:.3f} ± {std:.3f} over {len(found)} seeds")

    # By the validation clips, and not by the test clips: those are for the table alone.
    best = max((run for _, run in runs), key=lambda run: run.document["best_val_map"])
    head = msq.load_head(best.run)
    row = list(store.splits).index("test")
    (item,) = head.predict([row], store=store, top=3)
    words = [f"{one['label']} {one['score']:.2f}" for one in item["predictions"]]
    print(f"{best.run} says of {item['clip']}:", ", ".join(words))


if __name__ == "__main__":
    main()
