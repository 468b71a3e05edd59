"""The encoders that a run recorded: loaded when they are first needed, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from msq.errors import SpecMismatch, UsageError, WeightsError


class RunEncoders:
    """Encoders of one run by kind: `video`, `image`, `text`.

    Args:
        recorded: for each kind `EncoderSpec.to_dict()`.
        name: of the run, for messages.
        device: where they run.
        weights: where they lie now, if they moved.
        folder: run directory, which holds the video encoder where the run trained one.
    """

    def __init__(
        self,
        recorded: Mapping[str, Mapping[str, Any]],
        name: str,
        device: torch.device,
        weights: Mapping[str, str],
        folder: Path | None = None,
    ) -> None:
        self._recorded, self._name, self._device = recorded, name, device
        self._weights, self._folder = dict(weights), folder
        self._loaded: dict[str, Any] = {}

    def __getitem__(self, kind: str) -> Any:
        """The encoder of a kind.

        Raises:
            UsageError: the run recorded none, or its features were imported.
            SpecMismatch: the encoder at hand is not the recorded one.
            WeightsError: not found, or unreadable.
        """
        if kind not in self._loaded:
            if kind not in self._recorded:
                raise UsageError(f"{self._name}: the run recorded no {kind} encoder; predict from "
                                 "features in place of videos")  # fmt: skip
            self._refuse_imported(self._recorded[kind])
            try:
                self._loaded.update(self._load(kind, self._recorded[kind]))
            except WeightsError as error:
                # What was typed and is not there is usage; what the run recorded and moved is not.
                raised = type(error) if kind in self._weights else WeightsError
                raise raised(
                    f"{self._name}: its {kind} encoder cannot be loaded: {error}. If the weights "
                    "moved, say where they are with --video-encoder, --image-encoder or "
                    "--text-encoder"
                ) from error
        return self._loaded[kind]

    def _refuse_imported(self, recorded: Mapping[str, Any]) -> None:
        """Features that were computed elsewhere have no encoder here to make more of them."""
        from msq.extract.encoders.spec import IMPORTED

        if str(recorded["weights"]).startswith(IMPORTED):
            slug, source = recorded["slug"], str(recorded["weights"]).removeprefix(IMPORTED)
            raise UsageError(
                f"{self._name}: its features {slug!r} were imported from {source!r}, and msq has "
                "no encoder that makes them of new videos; expected rows of the store that the "
                "head was trained on: msq eval RUN STORE, or in Python "
                "msq.load_head(RUN).predict(rows, store=msq.open_store(STORE))"
            )

    def _load(self, kind: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
        """Encoders by kind: a video encoder alone, or both towers of a CLIP."""
        from msq.extract.encoders.recorded import find_place, load_towers

        moved = self._weights.get(kind)
        image = self._recorded.get("image", {})
        if kind == "text" and recorded["sha256"] == image.get("sha256", recorded["sha256"]):
            moved = moved or self._weights.get("image")
        place = find_place(kind, recorded, moved, self._folder)
        on_gpu = str(self._device).startswith("cuda")
        kernels = recorded.get("kernels", "") if on_gpu else ""
        found = load_towers(kind, recorded, place, self._device, kernels=kernels)
        lines = _difference(recorded, found[kind])
        if lines:
            raise SpecMismatch(
                f"{self._name}: the {kind} encoder from {place[0]!r} is not the one the head was "
                "trained on:\n  " + "\n  ".join(lines)
            )
        # The text tower that came along serves only if it is the recorded one, too.
        if kind == "image" and _difference(self._recorded.get("text", {}), found["text"]):
            del found["text"]
        return found


def _difference(recorded: Mapping[str, Any], encoder: Any) -> list[str]:
    """Lines that tell an encoder from a recorded spec.

    Its name may change. Kernels, like devices, move the last bits: they part the rows of a store,
    but a run trained on a GPU predicts anywhere.
    """
    from msq.extract.encoders import difference

    free = {"slug": "", "kernels": ""}
    return difference({**recorded, **free}, {**encoder.spec.to_dict(), **free})
