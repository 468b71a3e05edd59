"""One training run on resident features: the loop, its checkpoints, its result."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msq import config as configuration
from msq.config import RunConfig
from msq.errors import MsqError, UsageError
from msq.head.batches import Batches
from msq.head.checkpoint import load_model, load_state, save_head, save_predictions, save_state
from msq.head.checkpoint import write_json as write_result
from msq.head.evaluate import measure, official_score, probabilities, score
from msq.head.features import Features
from msq.head.feeding import Feed
from msq.head.finite import LossWatch, loss_error
from msq.head.loss import head_loss, loss_kind
from msq.head.masks import step_masks
from msq.head.memory import StepShape, moving_bytes, require_room
from msq.head.metrics import mean_average_precision
from msq.head.model import MSQNet
from msq.head.optim import WeightAverage, build_optimiser
from msq.head.packed import PackedHead, flat_parameters
from msq.head.packed_choice import StepChoice, choose_step
from msq.head.protocol import require_protocol
from msq.head.run import RunDirectory, RunResult
from msq.head.schedule import learning_rate
from msq.head.start import initialise

Progress = Callable[[dict[str, Any]], None]
STATE_FORMAT = 2  # of state.pt; 1 drew its dropout from a generator


def train_head(
    features: Features,
    config: RunConfig,
    out: Path | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    device: str | torch.device = "cpu",
    stop_after: int | None = None,
    checkpoint_seconds: float = 60.0,
) -> RunResult:
    """Train a head, choose its weights on validation clips, score the test clips once.

    The weights validated and kept are the averaged ones where `train.ema` is not 0, else the raw
    ones. A run found unfinished in `out` goes on where its last checkpoint stands, in the middle
    of an epoch too, and ends with the same bits as one that was never interrupted (same torch,
    processor and thread count). A finished one is returned as it is.

    Args:
        features: of train, validation and test clips together.
        config: the run.
        out: its directory; None writes nothing.
        resume: False starts an unfinished run anew.
        progress: called with a dict after each epoch: `event, epoch, epochs, loss, lr, val_map,
            seconds`.
        overwrite: delete what another run left in `out`.
        device: where to train.
        stop_after: leave after so many further steps, with a checkpoint.
        checkpoint_seconds: longest time between two checkpoints. One is also written after each
            epoch, unless writing would take more than a twentieth of the time.

    Raises:
        SpecMismatch: `out` holds a run of another configuration or on other features, or the
            features are not those that `train.protocol` is about.
        UsageError: no training clips, features that the configuration needs are not there, or a
            step that does not fit into memory.
        MsqError: the loss is not finite; it names the step and its clips, and the last checkpoint
            is kept.
    """
    require_protocol(features, config)
    device = torch.device(device)
    text = None if features.text is None else features.text.shape[1]
    choice = choose_step(
        config.train,
        device,
        keys=len(features.classes),
        width=config.head.width or text or features.tokens.shape[-1],
        heads=config.head.heads,
    )
    if overwrite or out is None or not (out / "result.json").exists():
        shape = StepShape.of(features, config, choice)
        require_room(shape, device, moving_bytes(features, device))
    directory = RunDirectory(out, config, features, overwrite, choice)
    stored = directory.stored_result()
    if stored is not None and out is not None:
        return RunResult(out, True, stored, load_model(out / "head.safetensors", device)[0])
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        training = Training(features.to(device), config, directory.choice)
        state = load_state(out / "state.pt") if out is not None and resume else None
        if state is not None:
            training.load(state)
            directory.log(f"resumed at step {training.step} of {training.steps}")
        else:
            directory.write_environment(device)
            directory.log(training.opening())
        directory.write_history(training.history)
        saver = _Saver(directory, training, checkpoint_seconds)
        try:
            finished = training.run(directory, saver, progress, stop_after)
        except MsqError as error:
            directory.log(f"stopped: {error}")
            raise
    if not finished:
        return RunResult(out, False, {}, training.model.eval())
    training.use_chosen_weights()
    result = _conclude(training, directory)
    return RunResult(out, True, result, training.model.eval())


class Training:
    """The state of one run between two steps.

    Args:
        features: on the device to train on.
        config: of the run.
        choice: how to take the steps; None chooses by the configuration and the device.
    """

    def __init__(
        self, features: Features, config: RunConfig, choice: StepChoice | None = None
    ) -> None:
        self.features, self.config = features, config
        self.loss = loss_kind(config.train.loss, features.task)
        self.train_rows, self.val_rows = split_rows(features, config.train.val, config.train.seed)
        if not self.train_rows.numel():
            raise UsageError(f"features of {features.name}: no training clip among "
                             f"{features.coverage()}")  # fmt: skip
        self.clips = len(self.train_rows)
        t = config.train
        self.batches = Batches(self.train_rows, t.batch, t.epoch_clips, t.seed)
        self.feed = Feed(features, self.batches, t.seed)
        self.batch, self.epoch_steps = self.batches.size, self.batches.epoch_steps
        self.steps = self.epoch_steps * config.train.epochs
        device = features.tokens.device
        self.model = build_head(features, config, self.train_rows).to(device)
        self.choice = choice or choose_step(config.train, device)
        precision = self.choice.precision
        self.flat = flat_parameters(self.model, precision)
        self.packed = (
            PackedHead(
                self.model,
                precision=precision,
                flat=self.flat,
                kernels=[name for name in self.choice.kernels.split(",") if name],
            )
            if self.choice.path == "packed"
            else None
        )
        self.optimiser = build_optimiser(self.flat, config.optim)
        self.parameters = list(self.model.parameters())
        ema = config.train.ema
        self.average = WeightAverage([self.flat.data], ema) if ema else None
        self.step = 0
        self.seconds = 0.0
        self.loss_sum = torch.zeros((), device=features.tokens.device)
        self.watch = LossWatch()
        self.saved: int | None = None  # step of the last checkpoint
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None

    def run(
        self,
        directory: RunDirectory,
        saver: _Saver,
        progress: Progress | None,
        stop_after: int | None,
    ) -> bool:
        """Take steps until the end (True) or until `stop_after` further ones are taken (False)."""
        last = self.steps if stop_after is None else min(self.steps, self.step + stop_after)
        began = time.perf_counter()
        while self.step < self.steps and not self.out_of_patience():
            if self.step >= last:
                saver.save()
                return False
            self._step()
            now = time.perf_counter()
            self.seconds, began = self.seconds + now - began, now
            epoch_done = self.step % self.epoch_steps == 0
            if epoch_done:
                self._end_epoch()
                now = time.perf_counter()
                self.seconds, began = self.seconds + now - began, now
                line = self.history[-1]
                directory.append_history(line)
                if progress is not None:
                    progress({"event": "epoch", "epochs": self.config.train.epochs, **line})
            saver.save_if_due(epoch_done)
        return True

    def _step(self) -> None:
        """One step of the optimiser."""
        rate = learning_rate(self.config.optim, self.step, self.steps, self.epoch_steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        batch = self.feed.of(self.step)
        self.flat.begin()
        logits = self._logits(batch.tokens, batch.image)
        loss = head_loss(logits, batch.labels, self.loss, batch.known)
        torch.autograd.backward(loss)
        self.flat.gather()
        if self.config.optim.clip_grad:
            both = [self.flat.matrices, self.flat.vectors]
            torch.nn.utils.clip_grad_norm_(both, self.config.optim.clip_grad)
        self.optimiser.step()
        if self.average is not None:
            self.average.update(self.step)
        self.loss_sum += loss.detach()
        self.watch.note(self.step, loss)
        self.step += 1

    def _logits(self, tokens: Tensor, image: Tensor | None) -> Tensor:
        """Forward pass of this step, in float32 at the end; its dropout is the masks'."""
        dropout, device = self.config.head.dropout, tokens.device
        masks = step_masks(self.config.train.seed, self.step, dropout, device)
        if self.packed is not None:
            return self.packed(tokens, image, masks=masks)["logits"]
        low = self.choice.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            logits: Tensor = self.model.eval()(tokens, image, masks=masks)["logits"]
        return logits.float()

    def _end_epoch(self) -> None:
        self.require_finite()
        epoch = self.step // self.epoch_steps
        line: dict[str, float] = {
            "epoch": epoch,
            "loss": float(self.loss_sum) / self.epoch_steps,
            "lr": self.optimiser.param_groups[0]["lr"],
        }
        self.loss_sum.zero_()
        if self.val_rows.numel():
            if self.average is not None:
                self.average.swap()
            logits = score(self.model, self.features, self.val_rows)
            f = self.features
            labels = f.labels[self.val_rows]
            known = None if f.known is None else f.known[self.val_rows]
            value = line["val_map"] = float(mean_average_precision(logits, labels, known))
            if self.config.train.select_by == "official":
                value = line["val_official"] = official_score(logits, labels, f.task, known)
            # Without a positive among the validation clips it is NaN, and chooses nothing.
            if value == value and (self.best is None or value > self.best["value"]):
                weights = [p.detach().clone() for p in self.parameters]
                self.best = {"value": value, "val_map": line["val_map"], "epoch": epoch,
                             "weights": weights}  # fmt: skip
            if self.average is not None:
                self.average.swap()
        line["seconds"] = self.seconds
        self.history.append(line)

    def require_finite(self) -> None:
        """Stop before a loss or weights that are not finite can reach a checkpoint.

        Raises:
            MsqError: naming the step and its clips, and which of their features are not finite.
        """
        found = self.watch.first_bad(self.flat.data)
        if found is not None:
            step, what = found
            kept = (
                "there is no checkpoint yet"
                if self.saved is None
                else f"the last good checkpoint, after step {self.saved}, is kept"
            )
            batch = self.feed.of(step)
            raise loss_error(what, self.features, batch, step, self.epoch_steps, kept)

    def out_of_patience(self) -> bool:
        """Whether so many epochs went by without a better validation score."""
        patience = self.config.train.patience
        return bool(patience and self.best and len(self.history) - self.best["epoch"] >= patience)

    @torch.no_grad()
    def use_chosen_weights(self) -> None:
        """Put the weights into the model that the configuration selects."""
        if self.config.train.select == "best" and self.best is not None:
            for parameter, weight in zip(self.parameters, self.best["weights"], strict=True):
                parameter.copy_(weight)
        elif self.average is not None:
            self.average.swap()

    def state(self) -> dict[str, Any]:
        """Everything that going on exactly here needs; plain values and tensors."""
        on_cuda = self.loss_sum.is_cuda
        return {
            "format": STATE_FORMAT,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": None if self.average is None else self.average.average,
            "best": self.best,
            "history": self.history,
            "loss_sum": self.loss_sum,
            "seconds": self.seconds,
            "random_cpu": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.loss_sum.device) if on_cuda else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`.

        Raises:
            MsqError: another version of msq wrote it, and trained otherwise.
        """
        if state.get("format") != STATE_FORMAT:
            raise MsqError(
                f"state.pt: expected format {STATE_FORMAT}, found {state.get('format', 1)}: the "
                "unfinished run is of another version of msq; finish it with that one, or start "
                "it anew with --overwrite"
            )
        self.step, self.seconds = state["step"], state["seconds"]
        self.saved = self.step
        self.history, self.best = state["history"], state["best"]
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        if self.average is not None:
            self.average.load(state["average"])
        self.loss_sum.copy_(state["loss_sum"])
        torch.set_rng_state(state["random_cpu"])
        if self.loss_sum.is_cuda and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self.loss_sum.device)

    def opening(self) -> str:
        """A line on what is about to happen."""
        f = self.features
        return (
            f"protocol {self.config.train.protocol}; {f.name}: {f.coverage()}; training on "
            f"{self.clips}, validating on {len(self.val_rows)}, {len(f.classes)} classes, "
            f"{self.steps} steps of {self.batch}; {self.choice.path} head in "
            f"{self.choice.precision}, Triton kernels: {self.choice.kernels or 'none'}"
        )


class _Saver:
    """Decides when a checkpoint is written."""

    def __init__(self, directory: RunDirectory, training: Training, seconds: float) -> None:
        self.directory, self.training, self.seconds = directory, training, seconds
        self.last, self.cost = time.perf_counter(), 0.0

    def save(self) -> None:
        """Write one now."""
        if self.directory.path is None:
            return
        self.training.require_finite()
        began = time.perf_counter()
        save_state(self.directory.path / "state.pt", self.training.state())
        self.training.saved = self.training.step
        self.last = time.perf_counter()
        self.cost = self.last - began

    def save_if_due(self, epoch_done: bool) -> None:
        """Write one after an epoch where that is cheap, and whenever the last one is old."""
        since = time.perf_counter() - self.last
        if since >= self.seconds or (epoch_done and since >= 20 * self.cost):
            self.save()


def build_head(features: Features, config: RunConfig, train_rows: Tensor) -> MSQNet:
    """A head at its start for these features; the class priors are those of `train_rows`."""
    image = features.image
    model = MSQNet(
        config.head,
        classes=len(features.classes),
        token_width=features.tokens.shape[-1],
        image_width=None if image is None else image.shape[-1],
        text=None if features.text is None else features.text.cpu(),
        seed=config.train.seed,
    )
    labels = features.labels[train_rows].double().cpu()
    # Half a clip is added to either side, so that a class never seen keeps a finite log-odds.
    counted: float | Tensor = len(labels)
    if features.known is not None:
        known = features.known[train_rows].double().cpu()
        labels, counted = labels * known, known.sum(0)
    positive = labels.sum(0) + 0.5
    if loss_kind(config.train.loss, features.task) == "bce":
        prior = (positive / (counted + 1 - positive)).log()
    else:
        prior = (positive / positive.sum()).log()
    seen = None if image is None else image[train_rows]
    initialise(model, config.train.seed, image=seen, prior=prior.float())
    return model


def split_rows(features: Features, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to validate on, both ascending.

    The dataset's validation split where it has one; otherwise a seeded `share` of the training
    clips, at least one; none where the share is 0.
    """
    train, val = features.rows("train"), features.rows("val")
    if val.numel() or not share or len(train) < 2:
        return train, val
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held = max(1, round(len(train) * share))
    order = order.to(train.device)
    return train[order[held:].sort().values], train[order[:held].sort().values]


def _conclude(training: Training, directory: RunDirectory) -> dict[str, Any]:
    """Score the test clips, write the files of a finished run, `result.json` last."""
    f, config, model = training.features, training.config, training.model
    split = next((name for name in ("test", "val", "train") if f.rows(name).numel()), "train")
    rows = f.rows(split)
    logits = score(model, f, rows)
    epochs, best = len(training.history), training.best
    result: dict[str, Any] = {
        "run": None if directory.path is None else str(directory.path),
        "protocol": config.train.protocol,
        **measure(logits, f, rows),
        "split": split,
        "partition": f.partition,
        "views": f.view_name,
        "train_views": [f.view_name] if f.train_views is None else list(f.train_views.names),
        "epochs": epochs,
        "seconds": training.seconds,
        "seconds_per_epoch": training.seconds / max(epochs, 1),
        "selected": config.train.select if best is not None else "last",
        "weights": "averaged" if training.average is not None else "raw",
        "best_epoch": None if best is None else best["epoch"],
        "best_val_map": None if best is None else best["val_map"],
        "selected_by": config.train.select_by,
        "best_val_score": None if best is None else best["value"],
        "protocol_changes": configuration.protocol_changes(config),
        "dataset": f.name,
        "variant": f.variant,
        "task": f.task,
        "queries": config.head.queries,
        "classifier": config.head.classifier,
        "loss": training.loss,
        "step": training.choice.to_dict(),
        "seed": config.train.seed,
        "clips": {
            "train": training.clips,
            "val": len(training.val_rows),
            "test": len(f.rows("test")),
            "train_unlabelled": int((f.labels[training.train_rows] == 0).all(1).sum()),
        },
        "coverage": f.coverage(),
        "left_out": dict(f.left_out),
        "degraded": list(f.degraded),
        "parameters": sum(p.numel() for p in training.parameters),
        "fingerprint": configuration.fingerprint(config),
    }
    if directory.path is not None:
        save_head(directory.path / "head.safetensors", model, f, config.train.protocol)
        ids = [f.ids[row] for row in rows.tolist()]
        save_predictions(directory.path / "predictions.npz", ids, logits,
                         probabilities(logits, f.task), f.labels[rows])  # fmt: skip
        directory.log(f"done after {epochs} epochs: {split} mAP {result['metrics']['map']:.4f}")
        write_result(directory.path / "result.json", result)
    return result
