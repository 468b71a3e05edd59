"""One end-to-end run: encoder and head trained together, from the same clips as stage one."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from msq.errors import MsqError
from msq.head.backbone_memory import EndToEndShape
from msq.head.backbone_room import memory_error, report_lines, require_room
from msq.head.checkpoint import load_model, load_state
from msq.head.conclusion import conclude
from msq.head.end_to_end_checkpoints import RankedCheckpoints
from msq.head.end_to_end_clips import RunClips
from msq.head.end_to_end_config import EndToEndConfig, end_to_end_changes
from msq.head.end_to_end_training import EndToEndTraining
from msq.head.ensemble import combined
from msq.head.evaluate import measure
from msq.head.kernel_choice import HeadShape
from msq.head.material import Material
from msq.head.packed_choice import StepChoice, choose_step
from msq.head.protocol import require_protocol
from msq.head.ranks import ALONE, Ranks
from msq.head.run import ENCODER, RunDirectory, RunResult, recorded_choice
from msq.head.training import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from msq.extract.encoders.spec import EncoderSpec


def train_end_to_end(
    material: Material,
    config: EndToEndConfig,
    out: Path | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    device: str | torch.device = "cpu",
    init_head: Path | None = None,
    workers: int | None = None,
    stop_after: int | None = None,
    checkpoint_seconds: float = 60.0,
    ranks: Ranks = ALONE,
) -> RunResult:
    """Train encoder and head, choose their weights on validation clips, score the test clips once.

    What `msq.head.train.train_head` says of choice, checkpoints and resume holds here, for the
    encoder too. Its weights are in the folder `encoder` of the run afterwards, for stage one.

    Args:
        material: clips, their labels and the features of the frozen towers; the video encoder in
            it is changed.
        config: the run.
        out: its directory; None writes nothing.
        resume: False starts an unfinished run anew.
        progress: called with a dict after each epoch as in `train_head`, with the `waited_share` of
            the time in which the encoder waited for clips so far, and with `event` `note`
            and a `text` for what is to be said before the first.
        overwrite: delete what another run left in `out`.
        device: where to train.
        init_head: a run of `train_head` on features of this encoder, whose head is gone on with.
        workers: decode processes; None for as many as stage one has, 0 for none.
        stop_after: leave after so many further steps, with a checkpoint.
        checkpoint_seconds: longest time between two checkpoints.
        ranks: the processes that train together.

    Raises:
        SpecMismatch: `out` holds a run of another configuration, on other clips or by another
            number of processes, or the features are not those that `train.protocol` or
            `init_head` is about.
        UsageError: no training clips, a step that does not fit into memory, or a run begun on a
            GPU whose steps need one.
        VideoError: clips that cannot be decoded, where no other can take their place.
        MsqError: the loss is not finite, or memory ran out; the last checkpoint is kept.
    """
    device, run = torch.device(device), config.run
    require_protocol(material.features, run)
    choice = ranks.of_first(
        _choice(material, config, out if not overwrite else None, device) if ranks.leads else None
    )
    assert choice is not None
    ranks.require_same("material", material.features.identity())
    finished = out is not None and (out / "result.json").exists() and not overwrite
    shape = EndToEndShape.of(material.video, material.features, config, choice, ranks.world)
    if not finished:
        choice.require_device(device)
        if shape is not None:
            require_room(shape, device)
    more = config.sections() | _start(init_head) | {"ranks": {"world": ranks.world}}
    path = out if ranks.leads else None
    directory = RunDirectory(path, run, material.features, overwrite, choice, more)
    stored = ranks.of_first(directory.finished())
    if stored is not None and out is not None:
        return RunResult(out, True, stored, load_model(out / "head.safetensors", device)[0])
    material.video.to(device)
    clips = RunClips(material, config, workers, out, ranks)
    cuda = [device] if device.type == "cuda" else []
    try:
        note = choice.surroundings(device)
        with torch.random.fork_rng(devices=cuda), choice.in_threads():
            material = clips.decodable(material)
            training = EndToEndTraining(material, config, choice, clips, init_head, ranks)
            _begin(training, directory, load_state(out / "state.pt") if out and resume else None)
            if note:
                directory.log(note)
            for line in () if shape is None else report_lines(shape, device):
                directory.log(line)
                if progress is not None:
                    progress({"event": "note", "text": line})
            saver = RankedCheckpoints(directory, training, checkpoint_seconds)
            done = _run(training, directory, saver, shape, _with_input(progress, clips), stop_after)
        if not done:
            return RunResult(out, False, {}, training.model.eval())
        training.use_chosen_weights()
        with choice.in_threads():
            result = _conclude(training, directory)
    finally:
        clips.close()
    return RunResult(out, True, result, training.model.eval())


def _with_input(progress: Progress | None, clips: RunClips) -> Progress | None:
    """The same, told of each epoch also `waited_share`: of the time, in waiting for clips."""
    if progress is None:
        return None
    return lambda event: progress({**event, "waited_share": clips.waited_share()})


def _choice(
    material: Material, config: EndToEndConfig, out: Path | None, device: torch.device
) -> StepChoice:
    """How the head takes its part of the steps: as recorded, or chosen now."""
    run = config.run
    sizes = HeadShape.of(material.features, run.head)
    found = recorded_choice(out) or choose_step(run.train, device, sizes, run.head.dropout)
    return dataclasses.replace(found, graph="off")


def _start(init_head: Path | None) -> dict[str, dict[str, Any]]:
    """What a run records of the head that it starts from."""
    if init_head is None:
        return {}
    file = init_head / "head.safetensors" if init_head.is_dir() else init_head
    load_model(file)  # with an error that says what is wrong with it
    return {"start": {"head_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}}


def _begin(
    training: EndToEndTraining, directory: RunDirectory, state: Mapping[str, Any] | None
) -> None:
    if state is not None:
        training.load(dict(state))
        directory.log(training.resumed())
    else:
        directory.write_environment(training.backbone.device)
        directory.log(training.opening())
    directory.write_history(training.history, training.batches)


def _run(
    training: EndToEndTraining,
    directory: RunDirectory,
    saver: RankedCheckpoints,
    shape: EndToEndShape | None,
    progress: Progress | None,
    stop_after: int | None,
) -> bool:
    """`Training.run`; an error is logged, and told as one of memory where it is one."""
    try:
        return training.run(directory, saver, progress, stop_after)
    except (MsqError, RuntimeError, MemoryError) as error:
        lack = memory_error(error, shape, training.backbone.device)
        known = training.ranks.explained(lack or error)
        directory.log(f"stopped: {known}")
        if known is error:
            raise
        raise known from error


def _conclude(training: EndToEndTraining, directory: RunDirectory) -> dict[str, Any]:
    """Write the encoder, then the files of a finished run."""
    spec, backbone = training.material.video.spec, training.backbone
    whole = backbone.whole_state()
    if directory.path is not None:
        spec = _saved(training, directory.path, whole)
    specs = {**training.features.specs, "video": spec.to_dict()}
    training.features = dataclasses.replace(training.features, specs=specs)
    more = {
        "encoder": None if directory.path is None else str(directory.path / ENCODER),
        "unfrozen": backbone.config.unfreeze,
        "learning": sum(p.numel() for p in training.parameters),
        "encoder_parameters": sum(p.numel() for p in backbone.encoder.model.parameters()),
        "protocol_changes": end_to_end_changes(training.whole),
        **training.run_clips.report(),
        **test_views(training),
    }
    return training.ranks.of_first(conclude(training, directory, more))


def test_views(training: EndToEndTraining) -> dict[str, Any]:
    """The entry `test_views`: metrics of the test clips over several views; none without them.

    Image features are those of the clean view in each of them.
    """
    from msq.extract.views import parse_clips_by_crops

    wanted = training.whole.clips.test_views
    rows = training.features.rows("test")
    if wanted is None or not rows.numel():
        return {}
    views = parse_clips_by_crops(wanted)
    logits = combined(
        (training.scored_in(view, rows) for view in views), training.features.task, "mean"
    )
    measured = measure(logits, training.features, rows, log_probabilities=True)
    return {"test_views": {"views": wanted, **measured}}


def _saved(
    training: EndToEndTraining, path: Path, weights: Mapping[str, Tensor] | None
) -> EncoderSpec:
    """The trained encoder in the run's folder, and the spec that stage one will give it."""
    from msq.head.encoder_file import recorded_spec, save_encoder

    encoder, config = training.backbone.encoder, training.whole
    note = {
        "started_from": {"weights": encoder.spec.weights, "sha256": encoder.spec.sha256},
        "unfrozen": config.backbone.unfreeze,
        "protocol": config.run.train.protocol,
    }
    save_encoder(path / ENCODER, encoder.model, encoder.spec, note, weights)
    return recorded_spec(path, encoder.spec)
