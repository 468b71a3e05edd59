"""The whole pipeline on a small world: render, extract, train, compare, predict, show."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq import config as configuration
from msq.config import Queries, RunConfig
from msq.errors import MsqError
from msq.report import demo_page, stage_one, stage_two, terminal

if TYPE_CHECKING:
    from msq.head.features import Features
    from msq.head.run import RunResult
    from msq.world import World

MODES: tuple[Queries, ...] = ("vanilla", "text", "multimodal")
UNSEEN_SHARE = 0.25
# A small head is enough for a small world; on two cores an epoch takes about a second.
HEAD = (
    "head.layers=2",
    "head.heads=4",
    "head.ffn=256",
    "optim.lr=2e-3",
    "train.epochs=12",
    "train.batch=32",
)
ZERO_SHOT = ("train.epochs=10",)


@dataclass
class Demo:
    """One run of the demo.

    Attributes:
        out: folder for everything it makes.
        seed: of the world, the class split and the training.
        small: a few clips and epochs, to see that everything works; its numbers mean little.
        quiet: no progress on stderr.
        videos: training and test videos.
    """

    out: Path
    seed: int = 0
    small: bool = False
    quiet: bool = False
    videos: tuple[int, int] = (640, 240)
    artifacts: dict[str, str] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Do it all; the result has the keys that `msq demo --json` prints.

        Raises:
            MsqError: no video of the world could be used.
        """
        began = time.perf_counter()
        if self.small:
            self.videos = (96, 48)
        self.out.mkdir(parents=True, exist_ok=True)
        world = self._render()
        features = self._extract(world)
        train = self._train(features)
        baselines = self._baselines(features)
        zero_shot = self._zero_shot(features, world, baselines["clip_similarity"])
        predictions = self._predict(world)
        result: dict[str, Any] = {
            "protocol": RunConfig().train.protocol,
            "videos": sum(self.videos),
            "classes": len(features.classes),
            "seed": self.seed,
            "train": {mode: run["metrics"] for mode, run in train.items()},
            "heads": {mode: _making(run) for mode, run in train.items()},
            "baselines": baselines,
            "zero_shot": zero_shot,
            "predictions": predictions,
            "artifacts": self.artifacts,
        }
        self._say("writing the page")
        page = demo_page.build(result, world, train, self.out)
        self.artifacts["report"] = str(page)
        result["seconds"] = time.perf_counter() - began
        terminal.write_json(self.out / "demo.json", result)
        self._say(f"done in {result['seconds']:.0f} s; look at {page}")
        return result

    def _say(self, message: str) -> None:
        if not self.quiet:
            terminal.say(message)

    def _render(self) -> World:
        from msq.world import generate_world

        train, test = self.videos
        self._say(
            f"1/6  rendering {train + test} videos of people, dogs, horses, birds, fish and snakes"
        )
        with terminal.progress("rendering", quiet=self.quiet) as update:
            world = generate_world(
                self.out / "world", train=train, test=test, seed=self.seed, progress=update
            )
        self.artifacts["world"] = str(world.manifest)
        return world

    def _extract(self, world: World) -> Features:
        from msq.extract.request import ExtractRequest
        from msq.extract.store import open_store
        from msq.head.features import load_features

        self._say("2/6  decoding each video once, encoding it with TimeSformer and CLIP")
        request = ExtractRequest(
            manifest=world.manifest, classes=world.classes_file, out=self.out / "world.zarr"
        )
        made = stage_one.run(request, quiet=self.quiet)
        if not made.done:
            raise MsqError(f"{world.manifest}: none of its {made.clips} videos could be encoded")
        self.artifacts["store"] = str(request.out)
        features = load_features(open_store(self.out / "world.zarr"))
        self._say(f"     {features.coverage()}")
        return features

    def _config(self, mode: Queries, *, zero_shot: bool) -> RunConfig:
        config = demo_config(mode, self.seed, zero_shot=zero_shot)
        return configuration.override(config, ["train.epochs=3"]) if self.small else config

    def _train(self, features: Features) -> dict[str, dict[str, Any]]:
        """A head for each query mode, all classes trained; the contents of each `result.json`."""
        self._say("3/6  training a head on the stored features, once for each kind of query")
        results: dict[str, dict[str, Any]] = {}
        for mode in MODES:
            place = self.out / f"run_{mode}"
            run = self._train_one(features, self._config(mode, zero_shot=False), place)
            self.artifacts[f"run_{mode}"] = str(place)
            results[mode] = run.result
        return results

    def _train_one(self, features: Features, config: RunConfig, place: Path | None) -> RunResult:
        from msq.head.train import train_head

        with terminal.progress(f"training {config.head.queries}", quiet=self.quiet) as update:

            def report(event: dict[str, Any]) -> None:
                update(event["epoch"], event["epochs"], stage_two.epoch_note(event))

            return train_head(features, config, place, progress=report, overwrite=True)

    def _baselines(self, features: Features) -> dict[str, dict[str, Any]]:
        """What is reached without a head: class frequencies, a linear probe, CLIP as it is."""
        from msq.head.baselines import class_frequency, clip_similarity, linear_probe
        from msq.head.metrics import all_metrics

        self._say("4/6  honest baselines: class frequency, a linear probe, CLIP without training")
        rows = features.rows("test")
        labels = features.labels[rows]
        probe, chosen = linear_probe(features, rows, seed=self.seed)
        frequency = class_frequency(features, rows)
        return {
            "frequency": all_metrics(frequency, labels, features.task),
            "clip_similarity": all_metrics(clip_similarity(features, rows), labels, features.task),
            "linear_probe": {**all_metrics(probe, labels, features.task), **chosen},
        }

    def _zero_shot(
        self, features: Features, world: World, clip: dict[str, Any]
    ) -> dict[str, dict[str, Any]]:
        """Classes held out of training, scored alone; those told by looks and by motion apart.

        The scores of CLIP without training on the same clips and classes are added to `clip`.
        """
        from msq.head.zeroshot import ClassSplit, evaluate_split, seen_features
        from msq.world import compositional_split

        seen, unseen = compositional_split(features.classes, UNSEEN_SHARE, self.seed)
        split = ClassSplit(tuple(seen), tuple(unseen), self.seed)
        self._say(f"5/6  zero-shot: training on {len(seen)} classes, scoring on {len(unseen)}")
        clip |= unseen_scores(clip_unseen(features, unseen), world.told_by)
        shown = seen_features(features, split)
        results: dict[str, dict[str, Any]] = {}
        for mode in MODES:
            run = self._train_one(shown, self._config(mode, zero_shot=True), None)
            scored = evaluate_split(run.model, features, split)
            results[mode] = {
                **_making(run.result),
                **unseen_scores(scored["per_class"], world.told_by),
                "seen_map": scored["seen"],
                "chance_map": scored["chance"],
                "generalised": {
                    "seen": scored["generalised_seen"],
                    "unseen": scored["generalised_unseen"],
                    "harmonic": scored["harmonic"],
                },
                "unseen_classes": list(split.unseen),
                "split_hash": split.hash,
                "per_class": scored["per_class"],
            }
        return results

    def _predict(self, world: World) -> list[dict[str, Any]]:
        """The first two labelled test videos, from the file to the labels."""
        from msq.extract.datasets import read_manifest
        from msq.head.predict import load_head

        self._say("6/6  predicting two videos that no training has seen")
        data = read_manifest(world.manifest, classes=world.classes_file)
        clips = [c for c in data.clips if c.split == "test" and c.labels][:2]
        head = load_head(self.out / "run_multimodal")
        found = head.predict([clip.path for clip in clips])
        return [
            {**item, "truth": [data.classes[k] for k in clip.labels], "path": str(clip.path)}
            for item, clip in zip(found, clips, strict=True)
        ]


def _making(result: Mapping[str, Any]) -> dict[str, str]:
    """What a run was asked for, in the words by which it can be asked for again."""
    return {key: result[key] for key in ("protocol", "classifier", "fingerprint")}


def demo_config(mode: Queries, seed: int, *, zero_shot: bool) -> RunConfig:
    """The demo's head for one query mode; for zero-shot with a classifier that can do it."""
    from msq.head.zeroshot import zero_shot_classifier

    assignments = [*HEAD, f"head.queries={mode}", f"train.seed={seed}"]
    if zero_shot:
        assignments += [*ZERO_SHOT, f"head.classifier={zero_shot_classifier(mode)}"]
    return configuration.override(RunConfig(), assignments)


def clip_unseen(features: Features, unseen: Sequence[str]) -> dict[str, float]:
    """AP of each unseen class by CLIP's own similarity, on the clips that `evaluate_split` uses."""
    from msq.head.baselines import clip_similarity
    from msq.head.metrics import average_precision

    columns = [features.classes.index(name) for name in unseen]
    rows = features.rows("test")
    rows = rows[(features.labels[rows][:, columns] != 0).any(1)]
    scores = clip_similarity(features, rows, columns)
    ap = average_precision(scores, features.labels[rows][:, columns])
    return dict(zip(unseen, ap.tolist(), strict=True))


def unseen_scores(
    per_class: Mapping[str, float], told_by: Mapping[str, str]
) -> dict[str, float | None]:
    """`unseen_map`, and apart for the classes told by looks and by motion."""
    return {
        "unseen_map": mean_told_by(per_class, dict.fromkeys(per_class, "all"), "all"),
        "unseen_map_looks": mean_told_by(per_class, told_by, "looks"),
        "unseen_map_motion": mean_told_by(per_class, told_by, "motion"),
    }


def mean_told_by(
    per_class: Mapping[str, float], told_by: Mapping[str, str], kind: str
) -> float | None:
    """Mean AP over the classes told by `kind` that have test clips; None where there is none."""
    values = [ap for name, ap in per_class.items() if told_by[name] == kind and ap == ap]
    return sum(values) / len(values) if values else None
