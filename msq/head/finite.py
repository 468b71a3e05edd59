"""Numbers that are not finite: looked for in features before training, and in what a step leaves.

The losses of the steps since the last look stay on the device. So nothing waits for the device in a
step; a look, once an epoch and before each checkpoint, waits once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msq.errors import MsqError, StoreError

if TYPE_CHECKING:
    from msq.head.features import Features
    from msq.head.feeding import Batch

NAMED = 32  # clips, at most, in a message
_ROWS = 1024  # looked at together
_PART = 1 << 20  # numbers that are widened together


class LossWatch:
    """The losses since the last look, on their device."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._first = 0

    def note(self, step: int, loss: Tensor) -> None:
        """Keep the loss of a step; steps come one after the other."""
        if not self._losses:
            self._first = step
        self._losses.append(loss.detach())

    def first_bad(self, parameters: Tensor) -> tuple[int, str] | None:
        """The first step after which something is not finite, and what: the loss, or the weights.

        Weights that are not finite make the next loss so: only the last step can leave them
        behind a finite loss. What was looked at is forgotten.

        Args:
            parameters: all of them, as they are after the last step noted.
        """
        if not self._losses:
            return None
        losses = torch.stack(self._losses).isfinite()
        good = [*torch.cat([losses, _all_finite(parameters)[None]]).tolist()]
        first, count, self._losses = self._first, len(self._losses), []
        for place, fine in enumerate(good[:count]):
            if not fine:
                return first + place, "the loss is"
        if good[count] or bool(parameters.isfinite().all()):
            return None
        return first + count - 1, "the weights are"


def loss_error(
    what: str, features: Features, batch: Batch, step: int, epoch_steps: int, kept: str
) -> MsqError:
    """The error that names the step, its clips and the likely cause.

    Args:
        what: is not finite: `the loss is` or `the weights are`.
        features: that were trained on.
        batch: of that step, gathered again.
        step: 0 for the first of the run.
        epoch_steps: steps of an epoch.
        kept: what remains of the run, as a sentence.
    """
    clips = [features.ids[row] for row in batch.rows.tolist()]
    bad = bad_rows(batch.tokens)
    if batch.image is not None:
        bad |= bad_rows(batch.image)
    culprits = [clip for clip, wrong in zip(clips, bad.tolist(), strict=True) if wrong]
    words = [] if features.text is None else _named(features.classes, bad_rows(features.text))
    head = (
        f"{what} not finite in epoch {step // epoch_steps + 1}, first at step "
        f"{step % epoch_steps + 1} of its {epoch_steps} (step {step + 1} of the run)"
    )
    if culprits:
        why = (
            f"the features of {listed(culprits)} among the {len(clips)} clips of its batch are not "
            "finite: extract these clips again, or leave them out"
        )
    elif words:
        why = f"the text features of {listed(words)} are not finite: extract the text again"
    else:
        why = (
            "training diverged: all features of its batch are finite. Start anew (--overwrite) "
            "with a lower optim.lr, or with train.precision=fp32 if it was bf16. The batch: "
            f"{listed(clips)}"
        )
    return MsqError(f"{head}: {why}; {kept}")


def require_finite_features(features: Features) -> None:
    """Refuse features in memory that hold NaN or infinite values.

    One sum over each array tells; only where it is not finite are clips looked at one by one.
    Tokens that stay on disk are not read for this: a step that meets such a clip names it.

    Raises:
        StoreError: naming the clips or the classes.
    """
    arrays: dict[str, tuple[Tensor, Sequence[str]]] = {}
    if isinstance(features.tokens, Tensor):
        arrays["tokens"] = (features.tokens, features.ids)
    if features.image is not None:
        arrays["image features"] = (features.image, features.ids)
    if features.text is not None:
        arrays["text features"] = (features.text, features.classes)
    if (views := features.train_views) is not None:
        training = [features.ids[row] for row in (views.place >= 0).nonzero().flatten().tolist()]
        for v, name in enumerate(views.names):
            arrays[f"tokens of view {name}"] = (views.tokens[v], training)
            if views.image is not None:
                arrays[f"image features of view {name}"] = (views.image[v], training)
    if not arrays:
        return
    fine = torch.stack([_all_finite(values) for values, _ in arrays.values()]).tolist()
    suspects = {what: x for (what, x), good in zip(arrays.items(), fine, strict=True) if not good}
    found: Mapping[str, list[str]] = {
        what: _named(names, bad_rows(values)) for what, (values, names) in suspects.items()
    }
    lines = [f"{what} of {listed(names)}" for what, names in found.items() if names]
    if lines:
        raise _not_finite(features, "; ".join(lines))


def refuse_clips(features: Features, rows: Tensor, bad: Tensor) -> None:
    """Refuse clips whose tokens were just read from disk and are not finite.

    Args:
        features: whose tokens they are.
        rows: [n] of the features.
        bad: [n] bool.

    Raises:
        StoreError: naming them, if there are any.
    """
    both = torch.stack([rows, bad.to(rows.dtype)]).tolist()  # read together
    clips = [features.ids[row] for row, wrong in zip(*both, strict=True) if wrong]
    if clips:
        raise _not_finite(features, f"tokens of {listed(clips)}")


def _not_finite(features: Features, where: str) -> StoreError:
    return StoreError(
        f"store of {features.name}: expected finite features, found NaN or infinite values in "
        f"{where}. Extract these again into a new store (--store-dtype float32 if they are too "
        "large for float16, above 65504), or leave them out of the manifest"
    )


def bad_rows(values: Tensor) -> Tensor:
    """Which rows [N] of values [N, ...] hold a number that is not finite."""
    parts = [~part.isfinite().flatten(1).all(1) for part in torch.split(values, _ROWS)]
    return torch.cat(parts)


def listed(names: Sequence[str]) -> str:
    """Names for a message: all where they are few, else the first ones and how many more."""
    shown = ", ".join(repr(name) for name in names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"


def _named(names: Iterable[str], chosen: Tensor) -> list[str]:
    return [name for name, here in zip(names, chosen.tolist(), strict=True) if here]


def _all_finite(values: Tensor) -> Tensor:
    """Whether all are, as far as one sum tells: a sum of finite values may overflow, too.

    Narrow values are widened part by part: on a CPU torch would make a wide copy of them all.
    """
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    values = values.detach()
    if values.dtype == wide or values.is_cuda:
        return values.sum(dtype=wide).isfinite()
    parts = torch.split(values.reshape(-1), _PART)
    return torch.stack([part.sum(dtype=wide) for part in parts]).isfinite().all()
