"""The training step: the same as one written plainly, and fit to be recorded in a CUDA graph."""

from __future__ import annotations

import runpy
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from msq.bench.gpu_timing import captured
from msq.config import HeadConfig, RunConfig, TrainConfig
from msq.errors import MsqError, UsageError
from msq.head import attention_backend
from msq.head.attention_backend import NAMES, AttentionChoice, attention_by, choose_attention
from msq.head.batches import Batches
from msq.head.evaluate import score
from msq.head.feeding import Batch, Feed
from msq.head.graph import WARM_UP, StepGraph, recorded
from msq.head.kernel_choice import HeadShape
from msq.head.loss import head_loss
from msq.head.masks import CountedMasks, Masks, Part, Site, step_masks
from msq.head.metrics import mean_average_precision
from msq.head.model import MSQNet
from msq.head.optim import build_optimiser
from msq.head.packed import PackedHead
from msq.head.packed_choice import StepChoice, choose_step
from msq.head.packed_parameters import flat_parameters
from msq.head.ranking import labelled, macro_ap
from msq.head.schedule import learning_rate
from msq.head.stack_training import StackedTraining
from msq.head.step import TrainingStep
from msq.head.train import Training, train_head
from msq.kernels.cross_attention_short import cross_attention
from msq.kernels.self_attention import require_launchable, self_attention

toys = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_train.py"))))
STEPS = 9


class Plain:
    """Training as one would write it down: numbers where the step has tensors."""

    def __init__(self, like: Training, masks: Callable[[int], Masks | None]) -> None:
        self.like, self.masks = like, masks
        fresh = Training(like.features, like.config)
        self.model, precision = fresh.model, like.choice.precision
        self.flat = flat_parameters(self.model, precision)
        self.packed = PackedHead(self.model, precision=precision, flat=self.flat)
        self.optimiser = build_optimiser(self.flat, like.config.optim)
        self.average = self.flat.data.detach().clone()
        self.loss_sum = torch.zeros(())

    def step(self, number: int) -> None:
        config = self.like.config
        rate = learning_rate(config.optim, number, self.like.steps, self.like.epoch_steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        f, rows = self.like.features, self.like.batches.of(number)
        image = None if f.image is None else f.image[rows]
        self.flat.begin()
        masks = self.masks(number)
        if config.train.path == "plain":
            low = self.like.choice.precision == "bf16"
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                found = self.model.eval()(f.tokens[rows], image, masks=masks)["logits"]
            logits = found.float()
        else:
            logits = self.packed(f.tokens[rows], image, masks=masks)["logits"]
        loss = head_loss(logits, f.labels[rows], "bce")
        torch.autograd.backward(loss)
        self.flat.gather()
        torch.nn.utils.clip_grad_norm_([self.flat.matrices, self.flat.vectors],
                                       config.optim.clip_grad)  # fmt: skip
        self.optimiser.step()
        decay = min(config.train.ema, (1 + number) / (10 + number))
        torch._foreach_lerp_([self.average], [self.flat.data.detach()], 1 - decay)
        self.loss_sum += loss.detach()


def same(training: Training, plain: Plain) -> bool:
    assert training.average is not None
    pairs = [
        (training.flat.data, plain.flat.data),
        (training.average.average[0], plain.average),
        (training.loss_sum, plain.loss_sum),
    ]
    moments = [step.state_dict()["state"] for step in (training.taking.optimiser, plain.optimiser)]
    for place, kept in moments[0].items():
        pairs += [(value, moments[1][place][name]) for name, value in kept.items()]
    assert len(pairs) == 3 + 2 * 3
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("path", ["packed", "plain"])
def test_the_step_is_the_one_written_plainly_bit_for_bit(path: str, precision: str) -> None:
    config = toys.small(f"train.path={path}", f"train.precision={precision}", "optim.warmup=2")
    training = Training(toys.toy(), config)
    plain = Plain(training, lambda n: step_masks(0, n, config.head.dropout))
    for number in range(STEPS):
        training._step()
        plain.step(number)
        assert same(training, plain), number


class Recording:
    """Stands for CUDA's recording: what the processor knows is gone when a replay comes."""

    def __init__(self, training: Training) -> None:
        self.training, self.calls, self.replays, self.warm = training, 0, 0, 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self.calls += 1

        def replay() -> None:
            taking = self.training.taking
            number, taking._number = taking._number, -(10**9)
            run()
            taking._number = number
            self.replays += 1

        return replay

    def warmed(self, run: Callable[[], None]) -> None:
        self.warm += 1
        run()


def shortened(training: Training) -> Training:
    """The same with epochs of 20 clips, whose last batch is short."""
    training.batches = Batches(training.train_rows, training.batch, 20, 0)
    assert training.batch == 16
    training.feed = Feed(training.features, training.batches, 0)
    return training


def in_a_graph(training: Training) -> Recording:
    """Its steps counted on the device and, after the first ones, replayed."""
    recording = Recording(training)
    training.taking._counted = True
    training.graph = StepGraph(training.taking.run, training.batch, recording, recording.warmed)
    return recording


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("short", [False, True], ids=["one size", "a short last batch"])
def test_replayed_steps_are_those_written_plainly_bit_for_bit(short: bool, precision: str) -> None:
    config = toys.small(f"train.precision={precision}", "train.ema=0.999", "train.batch=16")
    training = Training(toys.toy(), config)
    if short:
        shortened(training)
    recording = in_a_graph(training)
    dropout = config.head.dropout
    plain = Plain(training, lambda n: CountedMasks(torch.tensor([0, n]), dropout))
    sizes = []
    for number in range(STEPS):
        sizes.append(len(training.batches.of(number)))
        training._step()
        plain.step(number)
        assert same(training, plain), number
    full = sum(size == training.batch for size in sizes)
    assert (full < STEPS) == short
    assert (recording.calls, recording.warm, recording.replays) == (1, WARM_UP, full - WARM_UP)


class Issued(TorchDispatchMode):
    """The operations that reach the device, with all that is no tensor, and tensors' shapes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(x: Any) -> Any:
            if isinstance(x, Tensor):
                return tuple(x.shape), x.dtype
            if isinstance(x, list | tuple):
                return tuple(plain(one) for one in x)
            return x

        given = plain(args), {name: plain(value) for name, value in (kwargs or {}).items()}
        if not str(func).startswith("profiler."):
            self.seen.append(f"{func} {given}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_steps_ask_the_device_for_the_same_with_the_same_numbers(precision: str) -> None:
    training = Training(toys.toy(), toys.small(f"train.precision={precision}"))
    in_a_graph(training)
    for _ in range(2):
        training._step()
    seen, kept = [], training.feed.of(2)
    for number in (2, 7):  # another rate, another decay, other masks
        training.taking.plan(number)
        with Issued() as issued:
            training.taking.run(Batch(*kept))
        seen.append(issued.seen)
    assert len(seen[0]) > 100
    assert seen[0] == seen[1]
    # Nothing waits for the device, and nothing is brought there from the processor's memory.
    assert not [op for op in seen[0] if "_local_scalar_dense" in op or "lift_fresh" in op]


WAITS = ("_local_scalar_dense", "lift_fresh", "random_", "nonzero", "masked_select")
OFFICIAL = HeadConfig(width=32, layers=2, heads=2, encoder_layers=2, start="torch",
                      memory_position="sincos-input", label_projection="fused")  # fmt: skip
SMALL = HeadConfig(width=32, layers=2, heads=2)
SHORT = ("cross_attention", "drop_add_norm", "relu_drop", "self_attention")


@pytest.mark.parametrize(
    ("head", "kernels", "kind"),
    [
        (OFFICIAL, (), "bce"), (OFFICIAL, ("absorbed_cross", *SHORT[1:]), "bce"),
        (replace(SMALL, queries="vanilla"), (), "ce"),
        (replace(SMALL, classifier="text"), SHORT, "ce"),
        (replace(SMALL, query_position=True), SHORT, "bce"), (SMALL, (), "asymmetric"),
        (replace(SMALL, memory_position="sincos"), (), "focal"),
    ],
)  # fmt: skip
def test_no_step_of_any_head_waits_or_draws_so_that_all_can_be_captured(
    head: HeadConfig, kernels: tuple[str, ...], kind: str
) -> None:
    g = torch.Generator().manual_seed(0)
    model = MSQNet(head, classes=7, token_width=12, image_width=10,
                   text=torch.randn(7, 32, generator=g))  # fmt: skip
    config = RunConfig(train=TrainConfig(batch=4))
    taking = TrainingStep(model, StepChoice("packed", "bf16"), config, kind, 9, 3, counted=True)
    taking.packed = PackedHead(
        model, precision="bf16", flat=taking.flat, kernels=kernels, triton=False
    )
    known = torch.ones(4, 7, dtype=torch.uint8)
    batch = Batch(torch.arange(4), torch.randn(4, 5, 12, generator=g),
                  torch.randn(4, 10, generator=g), known, known)  # fmt: skip
    for step in range(2):
        taking.plan(step)
        with Issued() as issued:
            taking.run(batch)
    assert bool(taking.loss.isfinite())
    assert any("mask_bits" in op for op in issued.seen)
    assert not [op for op in issued.seen if any(word in op for word in WAITS)]


def test_no_step_of_stacked_heads_waits_or_draws() -> None:
    config = toys.small("train.batch=16")
    stack = StackedTraining([Training(toys.toy(classes=k), config) for k in (6, 4)])
    stack.taking._graph = True
    stack.take_step()
    batch = stack.feed.of(1)
    stack.taking.plan(1)
    with Issued() as issued:
        stack.taking.run(batch)
    assert any("mask_bits" in op for op in issued.seen)
    assert not [op for op in issued.seen if any(word in op for word in WAITS)]


def test_a_replayed_run_goes_on_in_the_middle_of_an_epoch_with_the_same_bits() -> None:
    config = toys.small()
    whole, first, second = (Training(toys.toy(), config) for _ in range(3))
    recordings = [in_a_graph(training) for training in (whole, first, second)]
    for _ in range(STEPS):
        whole._step()
    assert whole.epoch_steps == 5
    for _ in range(7):
        first._step()
    for _ in range(5):
        second._step()
    second.load(first.state())  # the optimiser has other tensors now
    assert second.graph is not None
    while second.step < STEPS + 2:
        second._step()
    assert [recording.calls for recording in recordings] == [1, 1, 2]
    for _ in range(2):
        whole._step()
    assert torch.equal(whole.flat.data, second.flat.data)
    assert torch.equal(whole.loss_sum, second.loss_sum)
    assert whole.average is not None
    assert second.average is not None
    assert torch.equal(whole.average.average[0], second.average.average[0])
    rates = [group["lr"] for group in second.state()["optimiser"]["param_groups"]]
    assert all(isinstance(rate, float) for rate in rates)  # as states have always held it


def test_what_cannot_be_captured_runs_as_it_is_unless_a_graph_was_insisted_on() -> None:
    def refuse(run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    losses = []
    for record in (None, refuse):
        training = Training(toys.toy(), toys.small())
        in_a_graph(training)
        if record is not None:
            training.graph = StepGraph(
                training.taking.run, training.batch, record, lambda run: run()
            )
        for _ in range(STEPS):
            training._step()
        losses.append(float(training.loss_sum))
    assert losses[0] == losses[1]
    assert training.graph is not None
    assert training.graph.refused == "operation not permitted"
    assert "operation not permitted" in training.graph_report()
    insisting = Training(toys.toy(), toys.small("train.graph=on"), StepChoice("packed", "fp32"))
    insisting.graph = StepGraph(insisting.taking.run, insisting.batch, refuse, lambda run: run())
    for _ in range(WARM_UP):
        insisting._step()
    with pytest.raises(MsqError, match=r"cannot be captured: operation not permitted; .*graph"):
        insisting._step()


def test_a_graph_is_refused_where_there_is_no_gpu_and_auto_takes_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def graph(*changes: str, device: str = "cuda") -> str:
        return choose_step(toys.small(*changes).train, device).graph

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert graph(device="cpu") == "off"
    assert graph("train.graph=on") == "on"
    assert graph() == "off"
    assert graph("train.graph=off") == "off"
    with pytest.raises(UsageError, match=r"train.graph = on: it needs a CUDA device, found cpu"):
        train_head(toys.toy(), toys.small("train.graph=on"))
    for other in ("train.path=plain", "train.kernels=reference"):
        assert graph(other) == "off"
        with pytest.raises(UsageError, match=f"train.graph = on: .*{other.replace('=', ' = ')}"):
            graph("train.graph=on", other)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert graph() == "off"
    with pytest.raises(UsageError, match=r"needs compute capability 8\.0"):
        graph("train.graph=on")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setenv("MSQ_KERNELS", "reference")
    assert graph() == "off"


def test_a_run_that_began_as_a_graph_says_what_it_needs_to_go_on(tmp_path: Path) -> None:
    train_head(toys.toy(), toys.small(), tmp_path / "run", stop_after=1)
    file = tmp_path / "run" / "config.toml"
    text = file.read_text(encoding="utf-8")
    before, after = text.split("[data.step]")
    assert 'graph = "off"' in after
    after = after.replace('graph = "off"', 'graph = "on"')
    file.write_text(f"{before}[data.step]{after}", encoding="utf-8")
    with pytest.raises(UsageError, match=r"data.step.graph = on\), and it is on cpu"):
        train_head(toys.toy(), toys.small(), tmp_path / "run")


def test_a_graph_is_recorded_and_replayed_on_the_device_of_its_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside: list[Tensor] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        inside.append(x)
        yield
        inside.pop()

    seen: list[Tensor] = []

    def note() -> None:
        seen.append(inside[-1])

    def record(run: Callable[[], None]) -> Callable[[], None]:
        note()
        return note

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    graph = StepGraph(lambda batch: note(), 3, record, lambda run: run())
    rows = torch.arange(3)
    for _ in range(WARM_UP + 2):
        graph(Batch(rows, torch.zeros(3, 1, 1), None, torch.zeros(3, 2), None))
    assert len(seen) == WARM_UP + 1 + 2  # the recording, and two replays
    assert all(one is rows for one in seen)
    assert not inside


@pytest.mark.parametrize("form", ["step", "benchmark"])
def test_a_recording_that_fails_leaves_the_stream_that_was_the_current_one(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = ["main"]

    @contextmanager
    def stream(wanted: str) -> Iterator[None]:
        before, streams[0] = streams[0], wanted
        try:
            yield
        finally:
            streams[0] = before

    class Graph:  # as in torch 2.11: where ending it fails, the stream stays
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def __enter__(self) -> None:
            streams[0] = "capture"

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    side = SimpleNamespace(wait_stream=lambda other: None)
    current = SimpleNamespace(wait_stream=lambda other: None)
    for name, stands in (
        ("stream", stream), ("graph", Graph), ("CUDAGraph", Graph), ("synchronize", lambda: None),
        ("Stream", lambda *_: side),
        ("current_stream", lambda: current if form == "benchmark" else streams[0]),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stands)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("msq.head.graph._side_stream", lambda device: side)
    if form == "step":
        with pytest.raises(RuntimeError, match="previous error"):
            recorded(lambda: None)
        assert streams == ["main"]
    else:
        again, reason = captured(lambda: None, "cuda")
        assert "previous error" in reason
        assert streams == ["main"]
        again()


def test_more_clips_than_a_launch_takes_are_refused_before_it() -> None:
    for op in ("self_attention", "cross_attention"):
        require_launchable(op, 8191, 8)
        with pytest.raises(ValueError, match=f"{op}: expected at most 8191 clips of 8 heads"):
            require_launchable(op, 8192, 8)
    many = 70_000
    with pytest.raises(ValueError, match=f"self_attention: .* found {many}; use a smaller batch"):
        self_attention(torch.zeros(many, 3 * 16), many, 1, triton=True)
    with pytest.raises(ValueError, match=f"cross_attention: .* found {many}; use a smaller batch"):
        cross_attention(torch.zeros(many, 16), torch.zeros(many, 32), many, 1, triton=True)


def test_counted_masks_have_the_layout_of_the_others_and_follow_their_key() -> None:
    places = [(part, layer, site) for part in Part for layer in (0, 5) for site in Site]
    key = torch.tensor([3, 8])
    found = {}
    for step in (8, 9):
        key[1] = step
        masks = CountedMasks(key, 0.1)
        for place in places:
            bits = found[step, place] = masks.bits(*place, 40, 70)
            assert bits.shape == Masks(3, step, 0.1).bits(*place, 40, 70).shape
            assert bits.dtype == torch.uint8
    everything = list(found.values())
    assert len({bits.numpy().tobytes() for bits in everything}) == len(everything)
    again = CountedMasks(torch.tensor([3, 8]), 0.1).bits(*places[7], 40, 70)
    assert torch.equal(again, found[8, places[7]])
    shape = (40, 70)
    kept = torch.stack([CountedMasks(torch.tensor([s, 0]), 0.1).at(Part.decoder).kept(
        Site.hidden, shape, torch.float32) for s in range(60)])  # fmt: skip
    expected, n = 1 - 410 / 4096, kept.numel()
    assert abs(float(kept.mean()) - expected) < 4 * (expected * (1 - expected) / n) ** 0.5


SIZES = HeadShape(5, 4, 16, 2, 32)


def test_the_fastest_backend_wins_and_one_that_refuses_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = {"MATH": [9.0, 3.0, 2.5], "FLASH_ATTENTION": [1.0, 2.0, 4.0]}

    def timed(backend: Any, run: Any, device: Any) -> float | None:
        left = times.get(backend.name)
        return left.pop(0) if left else None

    monkeypatch.setattr(attention_backend, "_timed", timed)
    found = attention_backend.fastest(NAMES, lambda: None, torch.device("cpu"), rounds=2)
    assert found == AttentionChoice("flash", {"math": 2.5, "flash": 2.0})  # the first warms up
    assert str(found) == "flash (math 2.5e+03 ms, flash 2e+03 ms)"
    monkeypatch.undo()
    real = attention_backend.fastest(
        attention_backend.usable_backends(torch.device("cpu")),
        lambda: torch.nn.functional.scaled_dot_product_attention(*[torch.randn(1, 2, 3, 8)] * 3),
        torch.device("cpu"),
        rounds=1,
    )
    assert real.seconds.keys() == {"math", "flash"}
    assert all(value > 0 for value in real.seconds.values())


def test_the_backend_is_chosen_once_logged_recorded_and_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    used: list[tuple[bool, bool]] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        used.append(
            (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())
        )
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    config = toys.small("train.path=plain", "head.dropout=0", "train.precision=bf16")
    train_head(toys.toy(), config, tmp_path / "run", stop_after=1)
    assert used
    assert set(used) == {(False, True)}
    step = tomllib.loads((tmp_path / "run/config.toml").read_text(encoding="utf-8"))["data"]["step"]
    assert step["attention"] == "math"
    assert "attention: math (by the rule" in (tmp_path / "run/log.txt").read_text(encoding="utf-8")

    def again(*args: Any, **kwargs: Any) -> AttentionChoice:
        raise AssertionError("chosen again")

    monkeypatch.setattr("msq.head.packed_choice.choose_attention", again)
    done = train_head(toys.toy(), config, tmp_path / "run")
    assert done.result["step"]["attention"] == "math"
    assert set(used) == {(False, True)}
    with pytest.raises(AssertionError, match="chosen again"):
        train_head(toys.toy(), config, tmp_path / "other")
    monkeypatch.undo()
    # With masks, and in the packed head, torch's attention is not asked.
    assert choose_step(toys.small().train, "cpu", SIZES, 0.0).attention == ""
    plain = toys.small("train.path=plain").train
    assert choose_step(plain, "cpu", SIZES, 0.1).attention == ""
    assert choose_step(plain, "cpu", SIZES, 0.0).attention == "flash"


def test_a_backend_that_refuses_gives_way_to_plain_products() -> None:
    q = torch.randn(1, 2, 3, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    for name in ("", "math", "flash", "cudnn"):
        with attention_by(name):
            found = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        torch.testing.assert_close(found, expected)
    sizes = {"clips": 2, "queries": 5, "tokens": 3, "heads": 2, "width": 16}
    assert choose_attention(torch.device("cpu"), "bf16", **sizes).name == "math"


def test_training_never_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(torch, "compile", compiled)
    for path in ("auto", "plain"):
        train_head(toys.toy(), toys.small(f"train.path={path}"), stop_after=1)


def test_an_evaluation_waits_once_and_its_number_is_the_metric(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = Training(toys.toy(), toys.small("train.ema=0"))
    for _ in range(training.epoch_steps):
        training._step()
    training.require_finite()  # a look of its own, before each checkpoint too
    lists: list[Tensor] = []
    as_list = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: lists.append(self) or as_list(self))
    with Issued() as issued:
        training._end_epoch()
    monkeypatch.undo()
    waits = ("_local_scalar_dense", "nonzero", "masked_select")
    assert not [op for op in issued.seen if any(word in op for word in waits)]
    assert len(lists) == 1
    logits = score(training.model, training.features, training.val_rows)
    expected = mean_average_precision(logits, training.features.labels[training.val_rows])
    assert training.history[-1]["val_map"] == float(expected)


def test_the_trainings_map_is_the_metric_with_ties_unknown_pairs_and_empty_rows() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(50, 6, generator=g).round(decimals=1)
    labels = (torch.rand(50, 6, generator=g) < 0.2).to(torch.uint8)
    labels[:, 4] = 0
    known = (torch.rand(50, 6, generator=g) < 0.8).to(torch.uint8)
    for there in (None, known):
        rows = labelled(labels, there)
        part = None if there is None else there[rows]
        value, bad = macro_ap(scores[rows], labels[rows], part).tolist()
        assert (value, bad) == (float(mean_average_precision(scores, labels, there)), 0)
    none = macro_ap(scores[:0], labels[:0])
    assert bool(none[0].isnan())
    scores[3, 2] = torch.nan
    assert macro_ap(scores, labels)[1] == 1


def test_the_best_weights_so_far_outlive_an_interruption(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ends = []
    for name, stops in (("whole", ()), ("parts", (7, 2))):  # within the second epoch, twice
        values = iter([0.9, 0.1, 0.2])
        monkeypatch.setattr(
            "msq.head.validation.macro_ap",
            lambda *_, values=values: torch.tensor([next(values), 0.0], dtype=torch.float64),
        )
        for part in stops:
            train_head(toys.toy(), toys.small("train.epochs=3"), tmp_path / name, stop_after=part)
        done = train_head(toys.toy(), toys.small("train.epochs=3"), tmp_path / name)
        assert (done.result["best_epoch"], done.result["best_val_map"]) == (1, 0.9)
        ends.append(torch.cat([p.detach().flatten() for p in done.model.parameters()]))
    assert torch.equal(*ends)
    monkeypatch.undo()
    last = train_head(toys.toy(), toys.small("train.epochs=3", "train.select=last"))
    other = torch.cat([p.detach().flatten() for p in last.model.parameters()])
    assert not torch.equal(ends[0], other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("short", [False, True], ids=["one size", "a short last batch"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_the_graph_ends_with_the_bits_of_the_step_as_it_is(
    precision: str, short: bool
) -> None:
    config = toys.small(f"train.precision={precision}", "train.batch=16")
    features = toys.toy().to("cuda")
    graph, eager = (
        Training(features, config, StepChoice("packed", precision, graph="on")) for _ in range(2)
    )
    eager.graph = None  # the same step, with the same masks
    for training in (graph, eager):
        if short:
            shortened(training)
        for _ in range(STEPS):
            training._step()
    assert graph.graph is not None
    assert graph.graph.refused == ""
    assert torch.equal(graph.flat.data, eager.flat.data)
    assert torch.equal(graph.loss_sum, eager.loss_sum)
