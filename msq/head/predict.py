"""A trained head as a tool: videos in, labels with scores out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from msq.errors import UsageError
from msq.head.checkpoint import load_model
from msq.head.evaluate import probabilities, require_same_making, score
from msq.head.features import Features, StoreLike
from msq.head.model import MSQNet
from msq.head.predict_best import ALL, Best
from msq.head.predict_features import encoded_clips, rows_of_store
from msq.head.predict_labels import Asked, asked_labels, unknown_words
from msq.head.predict_videos import predict_videos
from msq.head.predict_windows import Progress, Score, Windows, scored_windows
from msq.head.run_encoders import RunEncoders

if TYPE_CHECKING:
    from msq.head.predict_attention import AttentionMaps


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
        top: int | None = None,
        threshold: float | None = None,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """Score labels for videos, or for rows of a store.

        Args:
            what: a video file or frame folder, several of them, row numbers of `store`, or
                features.
            labels: what to look for; None means the classes of the run. Any words can be given to
                a head with a `text` classifier, or a `shared` one and queries that are not
                `vanilla`; any of its own classes to all.
            prompt: template for labels the run did not have, or several, which are averaged;
                None is the run's own.
            store: an open feature store, for row numbers; its classes may be any, no label is read.
            every: seconds; a window of each video begins so often, and each is scored by itself.
            window: seconds that each lasts; None is `every`.
            fps: frames per second of folders of pictures, which windows of them need.
            top: only so many labels of each clip and each window, the best; None for all.
            threshold: only labels of this score or more, 0 to 1, among these; None for all.
            progress: told of windows done, of how many, and of which video.

        Returns:
            For each clip `clip` (its id; for a video the file's name without suffix, or its path
            where several have that name), `predictions` (a list of `label` and `score`, highest
            first; the score is a probability) and, where there are any, `unknown_words`: words of
            the labels that mean nothing to the text encoder. `degraded` says what was wrong with a
            video that could be read in part; `error` that it could not be read, and then there are
            no predictions. `seconds_between_frames` is there where it is more than a minute, so
            that what is short may have been missed. With `every`, `segments`: see
            `msq.head.predict_windows.scored_windows`.

        Raises:
            UsageError: labels that the classifier cannot score, row numbers without a store,
                windows of what is no video, or a `top` or `threshold` that cannot be.
            SpecMismatch: a store, or encoder weights, other than those of the run.
        """
        asked, windows = self._asked(labels, prompt), Windows.asked(every, window)
        best = Best(top, threshold).checked()
        if isinstance(what, str | Path):
            what = [what]
        if not isinstance(what, Features) and all(isinstance(x, str | Path) for x in what):
            paths = [Path(str(x)) for x in what]
            results = predict_videos(
                paths, self._towers(), self._score(asked, best), windows, fps, progress
            )
        elif windows is not None:
            raise UsageError("windows in time (every=) are cut from videos: expected video files "
                             "or folders of frames, found features")  # fmt: skip
        else:
            features = what if isinstance(what, Features) else rows_of_store(self.meta, what, store)
            require_same_making(self.meta, features, self.name, labels=False)
            scored = self._scored(features.to(self.device), asked, best)
            results = [
                {"clip": clip, "predictions": predictions}
                for clip, predictions in zip(features.ids, scored, strict=True)
            ]
        if asked.unknown:
            for item in results:
                item["unknown_words"] = list(asked.unknown)
        return results

    def attention(
        self,
        video: str | Path,
        labels: Sequence[str] | None = None,
        *,
        start: float | None = None,
        end: float | None = None,
        top: int | None = None,
        prompt: str | Sequence[str] | None = None,
        through_encoder: bool = True,
        fps: float | None = None,
    ) -> AttentionMaps:
        """What the encoders and each class's query look at in a video, by attention rollout.

        The formulas stand in `msq.head.rollout` (the head) and `msq.extract.encoders.rollout` (the
        encoders). A map says where information may have come from; it is no proof that a score
        rests on it.

        Args:
            video: a video file, or a folder of frames.
            labels: as for `predict`.
            start: first second of the part to look at; None is the beginning.
            end: its end in seconds, exclusive; None is the end of the video.
            top: only so many labels, those of the highest scores.
            prompt: as for `predict`.
            through_encoder: follow the attention of the encoders back to the patches. Without it
                weights stay where the stored tokens lie, which any encoder allows.
            fps: frames per second of a folder of pictures, which `start` and `end` need.

        Raises:
            VideoError: nothing can be decoded, or no frame lies in the part.
            UsageError: labels that the classifier cannot score, a part without length, `top`
                below 1, or an encoder whose attention cannot be followed.
            SpecMismatch: encoder weights other than those of the run.
        """
        from msq.head.predict_attention import attention_maps

        asked = self._asked(labels, prompt)
        return attention_maps(
            self,
            Path(video),
            asked,
            start,
            end,
            top=top,
            through_encoder=through_encoder,
            fps=fps,
        )

    def segments(
        self,
        video: str | Path,
        labels: Sequence[str] | None = None,
        *,
        every: float,
        window: float | None = None,
        prompt: str | Sequence[str] | None = None,
        fps: float | None = None,
        top: int | None = None,
        threshold: float | None = None,
        progress: Progress | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Score the windows of one long video, and hand each out as soon as it is done.

        The windows are those of `predict(video, every=...)["segments"]`, in the same order; none is
        kept, and the video as a whole is not scored. The file is read when the first is asked for.

        Args:
            video: a video file or frame folder.
            labels: as for `predict`.
            every: seconds; a window begins so often.
            window: seconds that each lasts; None is `every`.
            prompt: as for `predict`.
            fps: frames per second of a folder of pictures, which has no times otherwise.
            top: as for `predict`.
            threshold: as for `predict`.
            progress: told of windows done, of how many, and the video's name.

        Yields:
            `start`, `end` and `predictions` of each window; see
            `msq.head.predict_windows.scored_windows`.

        Raises:
            VideoError: the video cannot be opened, or shows nothing.
            UsageError: labels that the classifier cannot score, or windows that cannot be.
        """
        from msq.extract.video_survey import survey

        asked, windows = self._asked(labels, prompt), Windows.asked(every, window)
        assert windows is not None
        scored = self._score(asked, Best(top, threshold).checked())
        film = survey(Path(video), fps=fps)
        yield from scored_windows(film, windows, self._towers(), scored, progress)

    def unknown_words(self, labels: Sequence[str]) -> list[str]:
        """Words of the labels that mean nothing to the run's text encoder."""
        return unknown_words(labels, self.model, self.encoders)

    def _asked(self, labels: Sequence[str] | None, prompt: str | Sequence[str] | None) -> Asked:
        if labels is None:
            return Asked(self.classes)
        return asked_labels(labels, prompt, self.model, self.meta, self.encoders, self.name)

    def _scored(
        self, features: Features, asked: Asked, best: Best = ALL
    ) -> list[list[dict[str, Any]]]:
        """Per clip the labels that are handed out, with their scores, highest first."""
        rows = torch.arange(len(features.ids), device=self.device)
        logits = score(self.model, features, rows, text=asked.text, trained=asked.trained)
        found = []
        for scores in probabilities(logits, self.meta["task"]).tolist():
            pairs = sorted(zip(asked.names, scores, strict=True), key=lambda p: -p[1])
            found.append(best.of([{"label": name, "score": value} for name, value in pairs]))
        return found

    def _score(self, asked: Asked, best: Best) -> Score:
        """What scores the labels for features of videos."""
        return lambda outputs: self._scored(
            encoded_clips(self.meta, outputs, self.device), asked, best
        )

    def _towers(self) -> list[Any]:
        """The encoders of videos that the head needs."""
        kinds = ["video"] if self.model.fuse_image is None else ["video", "image"]
        return [self.encoders[kind] for kind in kinds]
