"""A trained head as a tool: videos in, labels with scores out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from msq.errors import UsageError, VideoError
from msq.head.checkpoint import load_model
from msq.head.evaluate import probabilities, require_same_making, score
from msq.head.features import Features, StoreLike, load_features
from msq.head.model import MSQNet
from msq.head.predict_labels import Asked, asked_labels, templates_of, unknown_words
from msq.head.predict_windows import Progress, Windows, predict_windows
from msq.head.run_encoders import RunEncoders

if TYPE_CHECKING:
    from msq.extract.encode import Encoded

FAR_APART = 60.0  # seconds between sampled frames from which a result says so


def load_head(
    run: str | Path,
    *,
    device: str | torch.device = "cpu",
    weights: Mapping[str, str] | None = None,
) -> Head:
    """Load the head of a finished run; its encoders are loaded when they are first needed.

    Args:
        run: the run directory, or its `head.safetensors`.
        device: where to compute.
        weights: where the encoders' weights lie now, if they moved, for `video`, `image` and
            `text` (which falls back on `image` where both are towers of one CLIP). They are
            accepted only with the SHA-256 that the run recorded.

    Raises:
        MsqError: no finished run there.
    """
    path = Path(run)
    file = path / "head.safetensors" if path.is_dir() or path.suffix != ".safetensors" else path
    model, meta = load_model(file, device)
    return Head(model, meta, str(run), torch.device(device), dict(weights or {}), file.parent)


class Head:
    """A trained head with the means to encode new videos and new labels.

    Attributes:
        model: the head.
        meta: the header of `head.safetensors`.
        classes: names of the classes it was trained on.
        folder: run directory, which holds the video encoder too where the run trained one.
    """

    def __init__(
        self,
        model: MSQNet,
        meta: Mapping[str, Any],
        name: str,
        device: torch.device,
        weights: Mapping[str, str],
        folder: Path | None = None,
    ) -> None:
        self.folder = folder
        self.model, self.meta, self.name, self.device = model, dict(meta), name, device
        self.classes: tuple[str, ...] = tuple(meta["classes"])
        self.encoders = RunEncoders(self.meta["encoders"], name, device, weights, folder)

    def predict(
        self,
        what: str | Path | Sequence[str | Path] | Sequence[int] | Tensor | Features,
        labels: Sequence[str] | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        store: StoreLike | None = None,
        every: float | None = None,
        window: float | None = None,
        fps: float | None = None,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """Score labels for videos, or for rows of a store.

        Args:
            what: a video file or frame folder, several of them, row numbers of `store`, or
                features.
            labels: what to look for; None means the classes of the run. Any words can be given to
                a head with a `shared` or `text` classifier, and any of its own classes to all.
            prompt: template for labels the run did not have, or several, which are averaged;
                None is the run's own.
            store: an open feature store, for row numbers.
            every: seconds; a window of each video begins so often, and each is scored by itself.
            window: seconds that each lasts; None is `every`.
            fps: frames per second of folders of pictures, which windows of them need.
            progress: told of windows done, of how many, and of which video.

        Returns:
            For each clip `clip` (its id; for a video the file's name without suffix, or its path
            where several have that name), `predictions` (a list of `label` and `score`, highest
            first; the score is a probability) and, where there are any, `unknown_words`: words of
            the labels that mean nothing to the text encoder. `degraded` says what was wrong with a
            video that could be read in part; `error` that it could not be read, and then there are
            no predictions. `seconds_between_frames` is there where it is more than a minute, so
            that what is short may have been missed. With `every`, `segments`: see
            `msq.head.predict_windows.predict_windows`.

        Raises:
            UsageError: labels that the classifier cannot score, row numbers without a store, or
                windows of what is no video.
            SpecMismatch: a store, or encoder weights, other than those of the run.
        """
        asked, windows = self._asked(labels, prompt), Windows.asked(every, window)
        if isinstance(what, str | Path):
            what = [what]
        if not isinstance(what, Features) and all(isinstance(x, str | Path) for x in what):
            paths = [Path(str(x)) for x in what]
            results = self._predict_videos(paths, asked, windows, fps, progress)
        elif windows is not None:
            raise UsageError("windows in time (every=) are cut from videos: expected video files "
                             "or folders of frames, found features")  # fmt: skip
        else:
            features = what if isinstance(what, Features) else self._rows(what, store)
            require_same_making(self.meta, features, self.name)
            scored = self._scored(features.to(self.device), asked)
            results = [
                {"clip": clip, "predictions": predictions}
                for clip, predictions in zip(features.ids, scored, strict=True)
            ]
        if asked.unknown:
            for item in results:
                item["unknown_words"] = list(asked.unknown)
        return results

    def unknown_words(self, labels: Sequence[str]) -> list[str]:
        """Words of the labels that mean nothing to the run's text encoder."""
        return unknown_words(labels, self.model, self.encoders)

    def _asked(self, labels: Sequence[str] | None, prompt: str | Sequence[str] | None) -> Asked:
        if labels is None:
            return Asked(self.classes)
        return asked_labels(labels, prompt, self.model, self.meta, self.encoders, self.name)

    def _scored(self, features: Features, asked: Asked) -> list[list[dict[str, Any]]]:
        """Per clip the labels with their scores, highest first."""
        rows = torch.arange(len(features.ids), device=self.device)
        logits = score(self.model, features, rows, text=asked.text, trained=asked.trained)
        found = []
        for scores in probabilities(logits, self.meta["task"]).tolist():
            pairs = sorted(zip(asked.names, scores, strict=True), key=lambda p: -p[1])
            found.append([{"label": name, "score": value} for name, value in pairs])
        return found

    def _rows(self, rows: Any, store: StoreLike | None) -> Features:
        if store is None:
            raise UsageError("predict: row numbers need store=, an open feature store")
        specs = self.meta["encoders"]
        video, image, text = (specs.get(k, {}).get("slug") for k in ("video", "image", "text"))
        prompt = self._prompt_in(store, text)
        features = load_features(store, video, image, text, prompt, view=self.meta["view"])
        ids = list(store.clips)
        wanted = [ids[int(row)] for row in rows]
        place = {clip: row for row, clip in enumerate(features.ids)}
        missing = [clip for clip in wanted if clip not in place]
        if missing:
            raise UsageError(f"store of {store.name}: {len(missing)} of the rows asked for have no "
                             f"features, the first is {missing[0]!r}")  # fmt: skip
        return features.select(rows=torch.tensor([place[clip] for clip in wanted]))

    def _prompt_in(self, store: StoreLike, text: str | None) -> str | None:
        """Name of the run's own prompt in a store that may hold several."""
        if text is None or not hasattr(store, "templates") or not hasattr(store, "prompts"):
            return None
        own = templates_of(self.meta["prompt"] or "{}")
        names = [name for name in store.prompts(text) if list(store.templates(text, name)) == own]
        return names[0] if names else None

    def _predict_videos(
        self,
        paths: Sequence[Path],
        asked: Asked,
        windows: Windows | None,
        fps: float | None,
        progress: Progress | None,
    ) -> list[dict[str, Any]]:
        """Decode and encode videos one by one; each is decoded once for all encoders."""
        stems = [path.stem for path in paths]
        results: list[dict[str, Any]] = []
        whole: list[tuple[dict[str, Any], Sequence[Tensor]]] = []
        for path in paths:
            item: dict[str, Any] = {
                "clip": path.stem if stems.count(path.stem) == 1 else path.as_posix(),
                "predictions": [],
            }
            results.append(item)
            try:
                found = self._encoded(path, item, asked, windows, fps, progress)
            except VideoError as error:
                item["error"] = str(error)
                continue
            whole.append((item, found.features))
            if found.degraded is not None:
                item["degraded"] = found.degraded
            if (gap := _widest_gap(found)) > FAR_APART:
                item["seconds_between_frames"] = gap
        scored = self._scored(self._features_of([x for _, x in whole]), asked)
        for (item, _), predictions in zip(whole, scored, strict=True):
            item["predictions"] = predictions
        return results

    def _encoded(
        self,
        path: Path,
        item: dict[str, Any],
        asked: Asked,
        windows: Windows | None,
        fps: float | None,
        progress: Progress | None,
    ) -> Encoded:
        """The whole video; its windows, where there are to be any, go into the item.

        Raises:
            VideoError: it cannot be read; windows of it may have been, all the same.
        """
        from msq.extract.encode import encode_clip, encode_cuts
        from msq.extract.timeline import Cut
        from msq.extract.video_survey import survey

        kinds = ["video"] if self.model.fuse_image is None else ["video", "image"]
        encoders = [self.encoders[kind] for kind in kinds]
        if windows is None:
            return encode_clip(path, encoders, fps=fps)
        item["segments"] = []
        video = survey(path, fps=fps)
        ((_, found),) = encode_cuts(video, [Cut(None, None)], encoders)
        item["segments"] = predict_windows(
            video,
            windows,
            encoders,
            lambda outputs: self._scored(self._features_of(outputs), asked),
            progress,
        )
        if isinstance(found, VideoError):
            raise found
        return found

    def _features_of(self, outputs: Sequence[Sequence[Tensor]]) -> Features:
        """Clips, of which there may be none, each [S, D'] and, with an image encoder, [D'']."""
        n, k = len(outputs), len(self.classes)
        spec = self.meta["encoders"]["video"]
        empty = torch.zeros(0, spec["tokens"], spec["channels"], device=self.device)
        fused = n > 0 and len(outputs[0]) > 1
        return Features(
            name=self.meta["dataset"],
            task=self.meta["task"],
            classes=self.classes,
            ids=tuple(str(i) for i in range(n)),
            splits=("test",) * n,
            tokens=torch.stack([x[0] for x in outputs]).to(self.device) if n else empty,
            labels=torch.zeros(n, k, dtype=torch.uint8, device=self.device),
            image=torch.stack([x[1] for x in outputs]).to(self.device) if fused else None,
        )


def _widest_gap(found: Encoded) -> float:
    """Seconds between two sampled frames at most, over all encoders; 0 where unknown."""
    gaps = (float(np.diff(times).max()) for times in found.times if len(times) > 1)
    return max((gap for gap in gaps if gap == gap), default=0.0)
