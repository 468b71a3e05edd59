"""Training that goes wrong says where and why, before it costs a checkpoint or the machine."""

from __future__ import annotations

import itertools
import json
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from msq.cli import main
from msq.errors import MsqError, SpecMismatch, StoreError, UsageError
from msq.extract.datasets.dataset import Clip, Dataset
from msq.extract.store import open_store
from msq.extract.store_writer import ShardRows, StoreWriter
from msq.head import memory
from msq.head.checkpoint import load_state
from msq.head.evaluate import evaluate_run, score
from msq.head.features import Features, load_features
from msq.head.finite import LossWatch, listed
from msq.head.memory import StepShape, scoring_batch, step_bytes
from msq.head.metrics import all_metrics, mean_average_precision
from msq.head.predict import load_head
from msq.head.train import Training, split_rows, train_head

beside = Path(__file__)
toys = SimpleNamespace(**runpy.run_path(str(beside.with_name("test_train.py"))))
fakes = SimpleNamespace(**runpy.run_path(str(beside.with_name("fakes.py"))))
VANILLA = ("head.queries=vanilla", "head.width=16")


def first_met(training: Training, row: int) -> int:
    """The first step whose batch holds a row."""
    return next(s for s in range(training.steps) if row in training.batches.of(s).tolist())


def trained_on(features: Features, seed: int) -> list[str]:
    """Ids of the training clips; the others of the split are validated on."""
    return [features.ids[row] for row in split_rows(features, 0.1, seed)[0].tolist()]


def write_store(
    path: Path, dtype: str = "float16", width: int = 6, bad: tuple[int, ...] = ()
) -> Path:
    """40 clips of 4 classes; in the rows `bad` one value of the tokens is infinite."""
    clips = tuple(
        Clip(f"c{r}", Path(f"{r}.mp4"), None, None, (r % 4,), "train" if r < 28 else "test")
        for r in range(40)
    )
    data = Dataset("toy", ("a", "b", "c", "d"), "multilabel", clips, "map")
    spec = replace(fakes.SPEC, channels=width)
    values = torch.randn(40, 5, width, generator=torch.Generator().manual_seed(1))
    values[:, :, 0] += torch.arange(40)[:, None] % 4
    values[list(bad), 2, 1] = 1e6  # more than float16 holds
    writer = StoreWriter(path, data, store_dtype=dtype, shard=16)  # type: ignore[arg-type]
    writer.add_encoder(spec)
    stored = values.to(getattr(torch, dtype)).numpy()
    for shard in range(writer.shards):
        rows = writer.rows(shard)
        times = np.zeros((len(rows), spec.frames), dtype=np.float32)
        status = np.ones(len(rows), dtype=np.uint8)
        part = ShardRows(stored[rows.start : rows.stop], times, status)
        writer.commit(shard, {spec.slug: part}, [])
    return path


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_the_first_step_with_a_bad_clip_is_found_and_the_clip_named(
    value: float, tmp_path: Path
) -> None:
    features, config, out = toys.toy(), toys.small(), tmp_path / "run"
    probe = Training(toys.toy(), config)
    row = next(r for r in probe.train_rows.tolist() if first_met(probe, r) in (3, 4))
    step = first_met(probe, row)
    train_head(toys.toy(), config, out, stop_after=2)
    kept = (out / "state.pt").read_bytes()
    features.tokens[row, 1, 3] = value
    for part, expected in ((features.tokens, f"step {step + 1} of its 5"), (features.image, "")):
        with pytest.raises(MsqError) as found:
            train_head(features, config, out, checkpoint_seconds=1000)
        assert found.value.exit_code == 1
        text = str(found.value)
        assert f"the loss is not finite in epoch 1, first at step {step + 1} of its 5" in text
        assert f"the features of {features.ids[row]!r} among the 16 clips" in text
        assert text.count("'clip ") == 1
        assert "the last good checkpoint, after step 2, is kept" in text
        assert expected in text
        assert (out / "state.pt").read_bytes() == kept
        assert text in (out / "log.txt").read_text(encoding="utf-8")
        part[row] = 0  # the tokens are mended, then the image feature is broken in their place
        features.image[row, 0] = value
    features.image[row] = 0
    assert train_head(features, config, out).finished  # nothing of the run was lost


def test_a_diverging_run_names_the_batch_and_keeps_the_checkpoint_before_it(tmp_path: Path) -> None:
    # The rate is harmless in the warm-up's first steps and absurd later on.
    config = toys.small("optim.lr=1e30", "optim.clip_grad=0", "train.ema=0", "train.val=0")
    probe = Training(toys.toy(), config)
    losses = []
    while not losses or np.isfinite(losses[-1]):
        before = float(probe.loss_sum)
        probe._step()
        losses.append(float(probe.loss_sum) - before)
        assert len(losses) < probe.steps
    step = len(losses) - 1
    out = tmp_path / "run"
    train_head(toys.toy(), config, out, stop_after=0)
    with pytest.raises(MsqError) as found:
        train_head(toys.toy(), config, out, checkpoint_seconds=1000)
    text = str(found.value)
    assert f"(step {step + 1} of the run): training diverged" in text
    ids = [probe.features.ids[row] for row in probe.batches.of(step).tolist()]
    assert listed(ids) in text
    assert len(ids) == 16
    assert "the last good checkpoint, after step 0, is kept" in text
    state = load_state(out / "state.pt")
    assert state is not None
    assert all(bool(t.isfinite().all()) for t in state["model"].values())


def test_weights_that_are_not_finite_behind_a_finite_loss_reach_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Training._step

    def step(self: Training) -> None:
        real(self)
        if self.step == 4:
            self.flat.data[7] = float("inf")

    monkeypatch.setattr(Training, "_step", step)
    with pytest.raises(
        MsqError, match=r"the weights are not finite in epoch 1, first at step 4 of"
    ):
        train_head(toys.toy(), toys.small(), tmp_path / "run", stop_after=4)
    assert not (tmp_path / "run/state.pt").exists()
    monkeypatch.setattr(Training, "_step", real)
    broken = toys.toy()
    broken.tokens.fill_(float("nan"))
    with pytest.raises(MsqError, match="there is no checkpoint yet"):
        train_head(broken, toys.small(), tmp_path / "other")


def test_text_features_that_are_not_finite_are_named_by_class() -> None:
    features = toys.toy()
    features.text[2, 3] = float("nan")
    with pytest.raises(MsqError, match="the text features of 'class 2' are not finite"):
        train_head(features, toys.small("head.queries=text"))


def test_a_watch_looks_once_and_forgets() -> None:
    watch, fine = LossWatch(), torch.zeros(3)
    assert watch.first_bad(fine) is None
    for step, loss in enumerate((1.0, float("inf"), float("nan")), start=5):
        watch.note(step, torch.tensor(loss))
    assert watch.first_bad(fine) == (6, "the loss is")
    watch.note(9, torch.tensor(1.0))
    assert watch.first_bad(fine) is None
    watch.note(10, torch.tensor(1.0))
    assert watch.first_bad(torch.full((3,), 3e38)) is None  # their sum overflows, they do not
    watch.note(11, torch.tensor(1.0))
    assert watch.first_bad(torch.tensor([0.0, float("nan")])) == (11, "the weights are")


class Waits(TorchDispatchMode):
    """Counts the operations that a GPU would make the processor wait for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        by_mask = "aten.index.Tensor" in name and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        self.count += "_local_scalar_dense" in name or "nonzero" in name or by_mask
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", ["packed", "plain"])
def test_a_step_waits_for_nothing(path: str) -> None:
    training = Training(toys.toy(), toys.small(f"train.path={path}"))
    training._step()
    with Waits() as waits:
        training._step()
        training._step()
    assert waits.count == 0
    with Waits() as waits:
        float(training.loss_sum)
    assert waits.count == 1  # the counter counts


def test_metrics_wait_no_more_often_for_more_clips_and_keep_no_graph() -> None:
    counts = []
    for clips in (40, 400):
        g = torch.Generator().manual_seed(0)
        scores = torch.randn(clips, 7, generator=g)
        labels = (torch.rand(clips, 7, generator=g) < 0.3).to(torch.uint8)
        with Waits() as waits:
            mean_average_precision(scores, labels)
        with Waits() as all_waits:
            all_metrics(scores, labels, "multilabel")
        counts.append((waits.count, all_waits.count))
    assert counts[0] == counts[1]
    assert counts[0][0] <= 3
    features = toys.toy()
    model = Training(features, toys.small()).model
    saved: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        logits = score(model, features)
        assert not saved
        model(features.tokens, features.image)
    assert saved  # the hook sees what a forward pass with gradients keeps
    assert logits.grad_fn is None


def test_a_store_with_infinite_values_is_refused_at_once_naming_the_clips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.errstate(over="ignore"):
        path = write_store(tmp_path / "a.zarr", bad=(3, 31))
    with pytest.raises(StoreError, match=r"infinite values in tokens of 'c3', 'c31'\. .*float32"):
        load_features(open_store(path))
    with pytest.raises(SystemExit) as left:
        main(["train-head", str(path), "--out", str(tmp_path / "run"), "--quiet", *VANILLA])
    assert left.value.code == 1
    assert "tokens of 'c3', 'c31'" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "run").exists()
    # Left on disk nothing is read beforehand: the step that meets the clip names it.
    streamed = load_features(open_store(path), feed="stream")
    seeds = [s for s in range(9) if "c3" in trained_on(streamed, s)]
    with pytest.raises(MsqError, match="the features of 'c3' among the 16 clips of its batch"):
        train_head(streamed, toys.small(*VANILLA, f"train.seed={seeds[0]}"))
    held_out = next(s for s in range(99) if "c3" not in trained_on(streamed, s))
    with pytest.raises(StoreError, match=r"infinite values in tokens of 'c3'\."):
        train_head(streamed, toys.small(*VANILLA, f"train.seed={held_out}"))
    wide = load_features(open_store(write_store(tmp_path / "b.zarr", "float32", bad=(3, 31))))
    assert float(wide.tokens.max()) == 1e6


def test_a_store_of_another_dtype_scores_and_predicts_but_resumes_no_run(tmp_path: Path) -> None:
    half, full, config = tmp_path / "half.zarr", tmp_path / "full.zarr", toys.small(*VANILLA)
    write_store(half)
    write_store(full, "float32")
    narrow, wide = (load_features(open_store(path)) for path in (half, full))
    assert narrow.tokens.dtype == wide.tokens.dtype == torch.float32
    assert not torch.equal(narrow.tokens, wide.tokens)
    run = tmp_path / "run"
    train_head(narrow, config, run, stop_after=1)
    with pytest.raises(
        SpecMismatch, match=r"data\.stored\.video: expected 'float16', found 'float32'"
    ):
        train_head(wide, config, run)
    done = train_head(narrow, config, run)
    scored = evaluate_run(run, open_store(full))
    assert scored["metrics"]["map"] == pytest.approx(done.metrics["map"], abs=0.02)
    head = load_head(run)
    a, b = (head.predict([30], store=open_store(path))[0] for path in (half, full))
    assert {p["label"] for p in a["predictions"]} == {p["label"] for p in b["predictions"]}
    # A run of before the dtype was noted goes on as it did.
    old = tmp_path / "old"
    train_head(narrow, config, old, stop_after=1)
    text = (old / "config.toml").read_text(encoding="utf-8")
    start = text.index("[data.stored]")
    end = text.find("\n[", start)
    cut = text[:start] + (text[end + 1 :] if end > 0 else "")
    (old / "config.toml").write_text(cut, encoding="utf-8")
    assert train_head(narrow, config, old).finished


def test_a_store_of_another_width_is_refused_with_both(tmp_path: Path) -> None:
    six, eight = write_store(tmp_path / "6.zarr"), write_store(tmp_path / "8.zarr", width=8)
    config, run = toys.small(*VANILLA), tmp_path / "run"
    features = load_features(open_store(six))
    train_head(features, config, run, stop_after=1)
    with pytest.raises(SpecMismatch, match=r"data\.tokens: expected \[5, 6\], found \[5, 8\]"):
        train_head(load_features(open_store(eight)), config, run)
    train_head(features, config, run)
    for use in (
        lambda: evaluate_run(run, open_store(eight)),
        lambda: load_head(run).predict([0], store=open_store(eight)),
    ):
        with pytest.raises(SpecMismatch, match=r"encoders\.video\.channels: expected 6, found 8"):
            use()
    # Also where specs say nothing, as for features made in memory.
    bare = replace(features, tokens=torch.zeros(40, 5, 9))
    with pytest.raises(SpecMismatch, match=r"width\.tokens: expected 6, found 9"):
        evaluate_run(run, bare)


def features_of(clips: int, classes: int, tokens: int, width: int) -> Features:
    g = torch.Generator().manual_seed(0)
    return Features(
        name="t", task="multilabel", classes=tuple(map(str, range(classes))),
        ids=tuple(map(str, range(clips))), splits=("train",) * clips,
        tokens=torch.randn(clips, tokens, 96, generator=g),
        labels=(torch.rand(clips, classes, generator=g) < 0.2).to(torch.uint8),
        image=torch.randn(clips, width, generator=g),
        text=torch.randn(classes, width, generator=g),
    )  # fmt: skip


def peak_bytes(work: Callable[[], object], file: Path) -> int:
    """The most that was allocated at a time beyond what was there, as torch's profiler saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    seen.export_chrome_trace(str(file))
    events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    return max(itertools.accumulate(x for _, x in sorted(changes, key=lambda c: c[0])))


# B, K, S, D, F, L, encoder layers, H: many classes, few; wide hidden layer; many tokens.
SHAPES = [(16, 157, 17, 128, 512, 2, 0, 8), (32, 20, 17, 128, 512, 3, 0, 4),
          (4, 300, 5, 64, 256, 2, 0, 8), (64, 3, 40, 64, 128, 2, 0, 4),
          (8, 20, 90, 64, 256, 2, 2, 4)]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("path", ["packed", "plain"])
def test_the_estimate_of_a_step_is_what_it_allocates(
    path: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    b, k, s, d, f, layers, encoder, h = shape
    features = features_of(b, k, s, d)
    for precision, dropout in itertools.product(("fp32", "bf16"), (0.1, 0.0)):
        config = toys.small(
            f"head.layers={layers}", f"head.heads={h}", f"head.ffn={f}", f"head.width={d}",
            f"head.dropout={dropout}", f"train.batch={b}", f"train.path={path}",
            f"train.precision={precision}", "train.val=0",
        )  # fmt: skip
        # No protocol has encoder layers of this size: set past the check of the protocol.
        object.__setattr__(config, "head", replace(config.head, encoder_layers=encoder))
        training = Training(features, config)
        training._step()  # buffers and the optimiser's state are there from now on
        found = peak_bytes(training._step, tmp_path / "trace.json")
        estimated = StepShape.of(features, config, training.choice)
        assert 0.75 < step_bytes(estimated) / found < 1.5, (precision, dropout)
        count = sum(p.numel() for p in training.parameters)
        assert 0.95 < estimated.parameters / count < 1.05
    rows = torch.arange(b)
    found = peak_bytes(lambda: score(training.model, features, rows, batch=b), tmp_path / "s.json")
    assert 0.6 < memory.scoring_bytes(estimated) / found < 1.5


def test_too_many_classes_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = features_of(40, 150, 5, 32)
    config = toys.small("train.batch=32", "head.heads=4", "train.epochs=1", "train.val=0")
    free = 60_000_000
    monkeypatch.setattr(memory, "available_bytes", lambda device: free)
    with pytest.raises(UsageError) as found:
        train_head(features, config, tmp_path / "run")
    assert found.value.exit_code == 2
    text = str(found.value)
    assert "32 clips with 150 classes and 5 tokens in fp32 needs about" in text
    assert "0.06 GB free" in text
    assert not (tmp_path / "run").exists()
    largest = int(text.split("train.batch=")[1].split()[0])
    classes = int(text.split(" or ")[-1].split()[0])
    assert 1 < largest < 32
    assert 1 < classes < 150
    base = StepShape.of(features, config, Training(features, config).choice)
    for shape, fits in ((replace(base, batch=largest), True),
                        (replace(base, batch=largest + 1), False),
                        (replace(base, classes=classes), True),
                        (replace(base, classes=classes + 1), False)):  # fmt: skip
        assert (step_bytes(shape) + 12 * shape.parameters <= free) == fits
    done = train_head(features, toys.small(f"train.batch={largest}", "head.heads=4",
                                           "train.epochs=1", "train.val=0"))  # fmt: skip
    assert done.finished
    free = 1000
    with pytest.raises(UsageError, match="no batch of this head"):
        train_head(features, config)


def test_features_that_are_brought_to_a_device_take_their_room_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = features_of(40, 10, 5, 32)
    assert features.image is not None
    size = 40 * 5 * 96 * 4
    beside = features.image.nbytes + features.labels.nbytes
    free = 2 * size
    monkeypatch.setattr(memory, "available_bytes", lambda device: free)
    assert memory.moving_bytes(features, "cpu") == 0
    assert memory.moving_bytes(features, "cuda") == size + beside
    free = 2 * size - 1  # the tokens come batch by batch then
    assert memory.moving_bytes(features, "cuda") == beside
    shape = StepShape(batch=4, classes=10, tokens=5, token_width=96, width=32, ffn=32, layers=1,
                      heads=2)  # fmt: skip
    free = step_bytes(shape) + 12 * shape.parameters + 100
    memory.require_room(shape, "cuda", moving=100)
    with pytest.raises(UsageError, match=r"on cuda.*train\.batch=3 or 9 classes"):
        memory.require_room(shape, "cuda", moving=101)


def test_scoring_takes_as_many_clips_at_a_time_as_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features = features_of(40, 30, 5, 32)
    model = Training(features, toys.small()).model
    expected = score(model, features)
    shape = StepShape(batch=64, classes=30, tokens=5, token_width=96, width=32, ffn=32, layers=1,
                      heads=2)  # fmt: skip
    free = memory.scoring_bytes(replace(shape, batch=7))
    monkeypatch.setattr(memory, "available_bytes", lambda device: free)
    assert scoring_batch(shape, "cpu") == 7
    torch.testing.assert_close(score(model, features), expected, atol=1e-5, rtol=0)
    free = 100
    with pytest.raises(UsageError, match="scoring one clip with 30 classes needs about"):
        score(model, features)
