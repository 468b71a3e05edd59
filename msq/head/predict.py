"""A trained head as a tool: videos in, labels with scores out."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msq.errors import SpecMismatch, UsageError, VideoError, WeightsError
from msq.head.checkpoint import load_model
from msq.head.evaluate import probabilities, require_same_making, score
from msq.head.features import Features, StoreLike, load_features
from msq.head.model import MSQNet


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
        self.weights = dict(weights)
        self._encoders: dict[str, Any] = {}

    def predict(
        self,
        what: str | Path | Sequence[str | Path] | Sequence[int] | Tensor | Features,
        labels: Sequence[str] | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        store: StoreLike | None = None,
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

        Returns:
            For each clip `clip` (its id; for a video the file's name without suffix, or its path
            where several have that name), `predictions` (a list of `label` and `score`, highest
            first; the score is a probability) and, where there are any, `unknown_words`: words of
            the labels that mean nothing to the text encoder. `degraded` says what was wrong with a
            video that could be read in part; `error` that it could not be read, and then there are
            no predictions.

        Raises:
            UsageError: labels that the classifier cannot score, or row numbers without a store.
            SpecMismatch: a store, or encoder weights, other than those of the run.
        """
        text, trained, unknown = self._labels(labels, prompt)
        names = list(labels) if labels is not None else list(self.classes)
        features, notes = self._features(what, store)
        rows = torch.arange(len(features.ids), device=self.device)
        logits = score(self.model, features, rows, text=text, trained=trained)
        scores = probabilities(logits, self.meta["task"]).tolist()
        results, row = [], 0
        for clip, note in notes:
            item: dict[str, Any] = {"clip": clip, "predictions": [], **note}
            if "error" not in note:
                pairs = sorted(zip(names, scores[row], strict=True), key=lambda p: -p[1])
                item["predictions"] = [{"label": name, "score": value} for name, value in pairs]
                row += 1
            if unknown:
                item["unknown_words"] = unknown
            results.append(item)
        return results

    def unknown_words(self, labels: Sequence[str]) -> list[str]:
        """Words of the labels that mean nothing to the run's text encoder."""
        if self.model.text is None and self.model.config.queries == "vanilla":
            return []
        encoder = self._encoder("text")
        words = (word for label in labels for word in encoder.unknown_words(label))
        return list(dict.fromkeys(words))

    def _labels(
        self, labels: Sequence[str] | None, prompt: str | Sequence[str] | None
    ) -> tuple[Tensor | None, Tensor | None, list[str]]:
        """Text embeddings and places among the trained classes, for `MSQNet.forward`."""
        if labels is None:
            return None, None, []
        repeated = sorted({name for name in labels if list(labels).count(name) > 1})
        if isinstance(labels, str) or not labels or repeated:
            raise UsageError(
                f"labels: expected a list of different names, found {labels!r}"
                + (f" with {repeated} repeated" if repeated else "")
            )
        place = {name: k for k, name in enumerate(self.classes)}
        # Under another prompt, a class of the run is no longer what was trained.
        own_prompt = _templates(self.meta["prompt"] or "{}")
        templates = own_prompt if prompt is None else _templates(prompt)
        same_prompt = templates == own_prompt
        trained = [place.get(name, -1) if same_prompt else -1 for name in labels]
        others = [name for name, k in zip(labels, trained, strict=True) if k < 0]
        if others and self.meta["head"]["classifier"] == "per-class":
            near = difflib.get_close_matches(others[0], self.classes, n=3)
            raise UsageError(
                f"{self.name}: {others[0]!r} is not among its {len(self.classes)} classes"
                f"{f' (nearest: {near})' if near else ''}, and its classifier 'per-class' has no "
                "weights for other labels; train the head with --classifier text or "
                "--classifier shared"
            )
        if self.model.text is None:
            return None, torch.tensor(trained), []  # `vanilla`: words play no part
        text = torch.zeros(len(labels), self.model.text.shape[1], device=self.device)
        own = [(i, k) for i, k in enumerate(trained) if k >= 0]
        if own:
            i, k = (list(x) for x in zip(*own, strict=True))
            text[i] = self.model.text[k]
        if others:
            new = [i for i, k in enumerate(trained) if k < 0]
            text[new] = self._encoder("text")(others, templates).to(text)
        return text, torch.tensor(trained), self.unknown_words(others) if others else []

    def _features(
        self, what: Any, store: StoreLike | None
    ) -> tuple[Features, list[tuple[str, dict[str, str]]]]:
        """Features of the clips that can be scored, and for every clip its name and notes."""
        if isinstance(what, str | Path):
            what = [what]
        if not isinstance(what, Features) and all(isinstance(x, str | Path) for x in what):
            return self._encode([Path(x) for x in what])
        if not isinstance(what, Features):
            what = self._rows(what, store)
        require_same_making(self.meta, what, self.name)
        return what.to(self.device), [(clip, {}) for clip in what.ids]

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
        own = _templates(self.meta["prompt"] or "{}")
        names = [name for name in store.prompts(text) if list(store.templates(text, name)) == own]
        return names[0] if names else None

    def _encode(self, paths: Sequence[Path]) -> tuple[Features, list[tuple[str, dict[str, str]]]]:
        """Decode and encode videos one by one; each is decoded once for all encoders."""
        kinds = ["video"] if self.model.fuse_image is None else ["video", "image"]
        notes, outputs = [], []
        stems = [path.stem for path in paths]
        for path in paths:
            note: dict[str, str] = {}
            try:
                outputs.append([x.to(self.device) for x in self._encode_one(path, kinds, note)])
            except VideoError as error:
                note["error"] = str(error)
            notes.append((path.stem if stems.count(path.stem) == 1 else path.as_posix(), note))
        n, k = len(outputs), len(self.classes)
        spec = self.meta["encoders"]["video"]
        empty = torch.zeros(0, spec["tokens"], spec["channels"], device=self.device)
        features = Features(
            name=self.meta["dataset"],
            task=self.meta["task"],
            classes=self.classes,
            ids=tuple(str(i) for i in range(n)),
            splits=("test",) * n,
            tokens=torch.cat([x[0] for x in outputs]) if n else empty,
            labels=torch.zeros(n, k, dtype=torch.uint8, device=self.device),
            image=torch.cat([x[1] for x in outputs]) if n and len(kinds) > 1 else None,
        )
        return features, notes

    def _encode_one(self, path: Path, kinds: Sequence[str], note: dict[str, str]) -> list[Tensor]:
        """Tokens [1, S, D'] and, with an image encoder, the mean of its vectors [1, D'']."""
        from msq.extract.transforms import normalise, resize_crop
        from msq.extract.video import decode_samples

        encoders = [self._encoder(kind) for kind in kinds]
        clips = decode_samples(path, [(e.spec.frames, e.spec.sampling) for e in encoders])
        outputs = []
        for kind, encoder, clip in zip(kinds, encoders, clips, strict=True):
            spec = encoder.spec
            if clip.degraded:
                note["degraded"] = clip.degraded
            frames = resize_crop(clip.frames, spec.size, spec.resize, short_side=spec.short_side)
            out = encoder(normalise(frames, spec.mean, spec.std)[None])
            outputs.append(out if kind == "video" else out.mean(1))
        return outputs

    def _encoder(self, kind: str) -> Any:
        """The run's encoder of one kind, loaded once and checked against the recorded spec."""
        if kind not in self._encoders:
            if kind not in self.meta["encoders"]:
                raise UsageError(f"{self.name}: the run recorded no {kind} encoder; predict from "
                                 "features in place of videos")  # fmt: skip
            self._refuse_imported(self.meta["encoders"][kind])
            try:
                self._encoders.update(self._loaded(kind, self.meta["encoders"][kind]))
            except WeightsError as error:
                raise WeightsError(
                    f"{self.name}: its {kind} encoder cannot be loaded: {error}. If the weights "
                    "moved, say where they are with --video-encoder, --image-encoder or "
                    "--text-encoder"
                ) from error
        return self._encoders[kind]

    def _refuse_imported(self, recorded: Mapping[str, Any]) -> None:
        """Features that were computed elsewhere have no encoder here to make more of them."""
        from msq.extract.encoders.spec import IMPORTED

        if str(recorded["weights"]).startswith(IMPORTED):
            slug, source = recorded["slug"], str(recorded["weights"]).removeprefix(IMPORTED)
            raise UsageError(
                f"{self.name}: its features {slug!r} were imported from {source!r}, and msq has no "
                "encoder that makes them of new videos; expected rows of the store that the head "
                "was trained on: msq eval RUN STORE, or in Python "
                "msq.load_head(RUN).predict(rows, store=msq.open_store(STORE))"
            )

    def _loaded(self, kind: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """Encoders by kind: a video encoder alone, or both towers of a CLIP.

        Raises:
            SpecMismatch: the encoder at hand is not the recorded one; the message holds the
                difference.
            WeightsError: not found, or unreadable.
        """
        from msq.extract.encoders.recorded import find_place, load_towers

        moved = self.weights.get(kind)
        image = self.meta["encoders"].get("image", {})
        if kind == "text" and recorded["sha256"] == image.get("sha256", recorded["sha256"]):
            moved = moved or self.weights.get("image")
        place = find_place(kind, recorded, moved, self.folder)
        on_gpu = str(self.device).startswith("cuda")
        kernels = recorded.get("kernels", "") if on_gpu else ""
        found = load_towers(kind, recorded, place, self.device, kernels=kernels)
        lines = _difference(recorded, found[kind])
        if lines:
            raise SpecMismatch(
                f"{self.name}: the {kind} encoder from {place[0]!r} is not the one the head was "
                "trained on:\n  " + "\n  ".join(lines)
            )
        # The text tower that came along serves only if it is the recorded one, too.
        if kind == "image" and _difference(self.meta["encoders"].get("text", {}), found["text"]):
            del found["text"]
        return found


def _templates(prompt: str | Sequence[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt)


def _difference(recorded: Mapping[str, Any], encoder: Any) -> list[str]:
    """Lines that tell an encoder from a recorded spec.

    Its name may change. Kernels, like devices, move the last bits: they part the rows of a store,
    but a run trained on a GPU predicts anywhere.
    """
    from msq.extract.encoders import difference

    free = {"slug": "", "kernels": ""}
    return difference({**recorded, **free}, {**encoder.spec.to_dict(), **free})
