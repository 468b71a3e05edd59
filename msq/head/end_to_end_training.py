"""The state of an end-to-end run between two steps: that of a head's, and the encoder's."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from msq.errors import MsqError, UsageError
from msq.head import distributed_backbone as distributed
from msq.head.backbone import Backbone
from msq.head.checkpoint import load_model
from msq.head.encoded_tokens import AT_ONCE, EncodedTokens
from msq.head.end_to_end_config import EndToEndConfig
from msq.head.end_to_end_feed import PartFeed
from msq.head.end_to_end_step import EndToEndStep
from msq.head.evaluate import require_same_making, score
from msq.head.finite import listed
from msq.head.model import MSQNet
from msq.head.packed_choice import StepChoice
from msq.head.ranks import ALONE, Ranks
from msq.head.training import Training

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from msq.extract.views import View
    from msq.head.end_to_end_clips import RunClips
    from msq.head.features import Features
    from msq.head.material import Material


class EndToEndTraining(Training):
    """The state of one run between two steps.

    Args:
        material: what it is trained on, and the encoder that it starts from.
        config: of the run.
        choice: how the head takes its part of the steps.
        clips: the decoded clips of the run.
        init_head: a run whose head it starts from.
        ranks: the processes that train together.

    Raises:
        SpecMismatch: the head to start from was trained on features of another encoder.
        UsageError: it has another shape, or nothing is there to be trained.
    """

    taking: EndToEndStep

    def __init__(
        self,
        material: Material,
        config: EndToEndConfig,
        choice: StepChoice,
        clips: RunClips,
        init_head: Path | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.material, self.whole, self.run_clips, self.ranks = material, config, clips, ranks
        self._init_head = init_head
        self.backbone = Backbone(material.video, config.backbone, choice.precision, ranks)
        features = dataclasses.replace(material.features, tokens=self._tokens())
        super().__init__(features.to(self.backbone.device), config.run, choice)
        self.parameters += self.backbone.learning.values()

    def _tokens(self, view: View | None = None) -> EncodedTokens:
        """Tokens of all clips by the encoder as it is, in the clean view or another one."""
        features, device = self.material.features, self.backbone.device
        return EncodedTokens(
            self.run_clips.clean(device, view),
            self.backbone.scored,
            range(len(features.ids)),
            (features.tokens.shape[1], features.tokens.shape[2]),
            device,
        )

    def scored_in(self, view: View, rows: Tensor) -> Tensor:
        """As `scored`, in another view of the clips; image features stay those that are there."""
        return self._scored(dataclasses.replace(self.features, tokens=self._tokens(view)), rows)

    def scored(self, rows: Tensor) -> Tensor:
        """Logits [n, K] of some clips; each process scores a part, and all have all of them."""
        return self._scored(self.features, rows)

    def _scored(self, features: Features, rows: Tensor) -> Tensor:
        if self.ranks.world == 1 or not rows.numel():
            return score(self.model, features, rows)
        # Passes of a divided encoder are taken together: as many in each process.
        mine, at_once = self.ranks.share(rows), AT_ONCE if self.backbone.divided else 64
        return self.ranks.together(score(self.model, features, mine, batch=at_once), len(rows))

    def epoch_numbers(self) -> tuple[Tensor, Tensor | None]:
        """As that of a head's training; the numbers are those of the first process."""
        numbers, logits = super().epoch_numbers()
        return self.ranks.of_first(numbers.cpu()), logits

    def _head(self) -> MSQNet:
        head = super()._head()
        if self._init_head is not None:
            head.load_state_dict(started(self._init_head, self, head).state_dict())
        return head

    def _feed_and_step(self) -> tuple[PartFeed, EndToEndStep]:
        backbone, shown = self.whole.backbone, self.whole.clips.image == "shown"
        feed = PartFeed(
            self.features,
            self.batches,
            self.run_clips.training(self.train_rows.tolist()),
            self.steps,
            backbone.accumulate,
            self.loss,
            self.material.image if shown and self.model.fuse_image is not None else None,
            self.ranks,
            self.run_clips.shape,
        )
        step = EndToEndStep(
            self.model,
            self.choice,
            self.whole,
            self.loss,
            self.steps,
            self.epoch_steps,
            self.backbone,
            self.ranks,
        )
        return feed, step

    def step_error(self, what: str, step: int, kept: str) -> MsqError:
        """The error of a step that left numbers that are not finite."""
        rows = self.feed.last_rows if self.ranks.world == 1 else self.batches.of(step).tolist()
        per, clips = self.epoch_steps, listed([self.features.ids[row] for row in rows])
        return MsqError(
            f"{what} not finite in epoch {step // per + 1}, first at step {step % per + 1} of its "
            f"{per} (step {step + 1} of the run): training diverged. Start anew (--overwrite) with "
            "a lower backbone.lr or optim.lr, with optim.clip_grad=1, or with train.precision=fp32 "
            f"if it was bf16. The last batch: {clips}; {kept}"
        )

    def state(self) -> dict[str, Any]:
        """As that of a head's training, with what learns in the encoder.

        Several processes ask for it together; it is the same in each.
        """
        tuning = self.taking.tuning
        state = super().state() | {
            "backbone": self.backbone.state(),
            "tuning": None if tuning is None else tuning.state_dict(),
            "replaced": self.run_clips.replaced(),
        }
        whole: dict[str, Any] = distributed.gathered(state) if self.backbone.divided else state
        return whole

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`.

        Raises:
            MsqError: it is that of a run that trained a head only.
        """
        if "backbone" not in state:
            raise MsqError("state.pt: expected that of an end-to-end run, found a head's alone")
        if self.backbone.divided:
            state = self._divided(state)
        super().load(state)
        self.backbone.load(state["backbone"])
        if self.taking.tuning is not None:
            self.taking.tuning.load_state_dict(state["tuning"])
        self.run_clips.restore(state["replaced"])

    def _divided(self, state: dict[str, Any]) -> dict[str, Any]:
        """A gathered state with everything as this process has it."""
        tuning, best = self.taking.tuning, state["best"]
        assert tuning is not None
        found = {**state, "tuning": distributed.placed_moments(state["tuning"], tuning)}
        if self.average is not None:
            found["average"] = distributed.placed_list(state["average"], self.average.parameters)
        if best is not None:
            weights = distributed.placed_list(best["weights"], self.parameters)
            found["best"] = {**best, "weights": weights}
        return found

    def opening(self) -> str:
        """A line on what is about to happen."""
        learning = sum(p.numel() for p in self.backbone.learning.values())
        spec = self.material.video.spec
        return (
            f"{super().opening()}; {spec.slug}: {self.whole.backbone.unfreeze} unfrozen, "
            f"{learning} parameters learn; augmentation {self.whole.clips.augment}"
            + f"; {self.ranks.world} processes, encoder "
            f"{'divided (FSDP)' if self.backbone.divided else 'whole in each (DDP)'}"
            * (self.ranks.world > 1)
        )


def started(run: Path, training: Training, head: MSQNet) -> MSQNet:
    """The head of a run, where it can go on with these features.

    Raises:
        SpecMismatch: it was trained on features that were made otherwise.
        UsageError: it has another shape.
    """
    file = run / "head.safetensors" if run.is_dir() else run
    model, meta = load_model(file)
    require_same_making(meta, training.features, str(run))
    found = {name: list(p.shape) for name, p in model.named_parameters()}
    wanted = {name: list(p.shape) for name, p in head.named_parameters()}
    wrong = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if wrong:
        raise UsageError(
            f"--init-head {run}: expected a head of the configuration of this run; other or "
            f"missing are {listed(wrong)} ({wrong[0]}: expected {wanted.get(wrong[0])}, found "
            f"{found.get(wrong[0])}); take its head.* settings, or leave --init-head out"
        )
    return model
