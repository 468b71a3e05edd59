"""Losses for rare labels against their formulas, written by hand in float64."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from msq import config as configuration
from msq.config import RunConfig, TrainConfig
from msq.errors import UsageError
from msq.head.batches import Batches
from msq.head.build import build_head
from msq.head.end_to_end_feed import PartFeed
from msq.head.loss import class_losses, head_loss
from msq.head.train import Training, train_head

toys = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("test_train.py"))))
stores = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sweep_stores.py"))))
SETTINGS: dict[str, dict[str, Any]] = {
    "asymmetric": {"loss": "asymmetric"},
    "asymmetric, all numbers": {"loss": "asymmetric", "gamma_neg": 2.5, "gamma_pos": 1.0,
                                "clip_margin": 0.2},
    "asymmetric, small powers": {"loss": "asymmetric", "gamma_neg": 0.5, "gamma_pos": 0.5,
                                 "clip_margin": 0.1},
    "asymmetric, no margin": {"loss": "asymmetric", "gamma_neg": 3.0, "clip_margin": 0.0},
    "focal": {"loss": "focal"},
    "focal, all numbers": {"loss": "focal", "focal_gamma": 0.5, "focal_alpha": 0.7},
}  # fmt: skip


def by_hand(x: float, y: float, n: TrainConfig) -> tuple[float, float]:
    """The loss of one pair and its derivative, term by term from the two papers."""
    p = 1 / (1 + math.exp(-x))
    slope = p * (1 - p)
    if n.loss == "focal":
        a, g = n.focal_alpha, n.focal_gamma
        if y:
            value = -a * (1 - p) ** g * math.log(p)
            return value, a * slope * (g * (1 - p) ** (g - 1) * math.log(p) - (1 - p) ** g / p)
        value = -(1 - a) * p**g * math.log(1 - p)
        return value, (1 - a) * slope * (p**g / (1 - p) - g * p ** (g - 1) * math.log(1 - p))
    if y:
        g = n.gamma_pos
        value = -((1 - p) ** g) * math.log(p)
        return value, slope * (g * (1 - p) ** (g - 1) * math.log(p) - (1 - p) ** g / p)
    g, q = n.gamma_neg, max(p - n.clip_margin, 0.0)
    if not q:
        return 0.0, 0.0
    value = -(q**g) * math.log(1 - q)
    return value, slope * (q**g / (1 - q) - g * q ** (g - 1) * math.log(1 - q))


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of every size, labels, and what is known."""
    g = torch.Generator().manual_seed(3)
    x = 4 * torch.randn(6, 9, generator=g, dtype=torch.float64)
    labels = (torch.rand(6, 9, generator=g) < 0.3).to(torch.uint8)
    return x.to(dtype), labels, (torch.rand(6, 9, generator=g) < 0.7).to(torch.uint8)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("partly", [False, True])
def test_values_and_gradients_are_those_of_the_formulas(name: str, partly: bool) -> None:
    n, (x, labels, known) = TrainConfig(**SETTINGS[name]), example()
    x.requires_grad_()
    given = known if partly else None
    loss = head_loss(x, labels, n.loss, given, n)
    (gradient,) = torch.autograd.grad(loss, x)
    pairs = [
        [by_hand(float(a), float(b), n) for a, b in zip(*rows, strict=True)]
        for rows in zip(x.detach(), labels, strict=True)
    ]
    found = torch.tensor(pairs, dtype=torch.float64)
    counts = known.double() if partly else torch.ones(6, 9, dtype=torch.float64)
    torch.testing.assert_close(
        loss.detach(), (found[..., 0] * counts).sum() / counts.sum(), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        gradient, found[..., 1] * counts / counts.sum(), rtol=1e-9, atol=1e-14
    )
    assert bool((gradient[labels == 1] <= 0).all())
    assert int((gradient != 0).sum()) > 10
    assert torch.autograd.gradcheck(lambda z: head_loss(z, labels, n.loss, given, n), x)


def test_without_weights_they_are_the_binary_cross_entropy() -> None:
    x, labels, known = example()
    for given in (None, known):
        plain = head_loss(x, labels, "bce", given)
        bare = TrainConfig(gamma_neg=0.0, gamma_pos=0.0, clip_margin=0.0)
        torch.testing.assert_close(head_loss(x, labels, "asymmetric", given, bare), plain)
        half = TrainConfig(focal_gamma=0.0, focal_alpha=0.5)
        torch.testing.assert_close(2 * head_loss(x, labels, "focal", given, half), plain)


def test_what_is_easily_lacking_counts_nothing_within_the_margin() -> None:
    n = TrainConfig(clip_margin=0.05)
    x = torch.tensor([[-3.5, -2.9]], dtype=torch.float64, requires_grad=True)  # p 0.029 and 0.052
    lacking = torch.zeros(1, 2)
    each = class_losses(x, lacking.double(), "asymmetric", n)
    assert float(each.detach()[0, 0]) == 0
    assert float(each.detach()[0, 1]) > 0
    torch.autograd.backward(each.sum())
    assert x.grad is not None
    assert float(x.grad[0, 0]) == 0
    assert float(x.grad[0, 1]) > 0


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_logit_makes_loss_or_gradient_infinite(name: str, dtype: torch.dtype) -> None:
    n = TrainConfig(**SETTINGS[name])
    sizes = [0.0, 1e-4, 1.0, 17.0, 88.0, 104.0, 1e4, 1e30]
    x = torch.tensor([[*sizes, *(-s for s in sizes)]] * 2, dtype=dtype, requires_grad=True)
    labels = torch.tensor([[1] * 16, [0] * 16])
    for margin in (n.clip_margin, 1e-9):
        numbers = TrainConfig(**{**SETTINGS[name], "clip_margin": margin})
        loss = head_loss(x, labels, n.loss, None, numbers)
        (gradient,) = torch.autograd.grad(loss, x)
        assert loss.dtype == torch.float32
        assert bool(loss.isfinite())
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("kind", ["bce", "ce", "asymmetric", "focal"])
def test_logits_of_16_bits_are_widened_before_anything_is_computed(kind: str) -> None:
    x, labels, known = example(torch.bfloat16)
    for given in (None, known):
        found = head_loss(x, labels, kind, given)
        assert found.dtype == torch.float32
        assert torch.equal(found, head_loss(x.float(), labels, kind, given))


@pytest.mark.parametrize("kind", ["asymmetric", "focal"])
def test_what_stands_under_an_unknown_pair_changes_nothing(kind: str) -> None:
    x, labels, known = example()
    other = torch.where(known == 0, 1 - labels, labels)
    moved = torch.where(known == 0, -x, x)
    assert torch.equal(head_loss(moved, other, kind, known), head_loss(x, labels, kind, known))
    some = known.bool()
    each = class_losses(x, labels.double(), kind)
    torch.testing.assert_close(head_loss(x, labels, kind, known), each[some].mean())


@pytest.mark.parametrize("kind", ["asymmetric", "focal"])
def test_parts_of_a_batch_weigh_as_many_labels_as_they_know(kind: str) -> None:
    """`msq train` cuts a batch: the weighted parts add up to the loss of the whole."""
    x, labels, known = example()
    features = SimpleNamespace(known=known, labels=labels, image=None)
    batches = Batches(torch.arange(6), 6, 0, seed=0)
    feed = PartFeed(features, batches, None, 1, 2, kind)  # type: ignore[arg-type]
    whole, total = torch.arange(6), torch.zeros((), dtype=torch.float64)
    for rows in torch.split(whole, 4):
        weight = feed._weight(rows, whole)
        total = total + weight * head_loss(x[rows], labels[rows], kind, known[rows])
    torch.testing.assert_close(total, head_loss(x, labels, kind, known))


@pytest.mark.parametrize("kind", ["asymmetric", "focal"])
@pytest.mark.parametrize("path", ["packed", "plain"])
def test_a_head_learns_by_them(kind: str, path: str, tmp_path: Path) -> None:
    config = toys.small(f"train.loss={kind}", f"train.path={path}", "train.epochs=20",
                        "optim.lr=3e-3")  # fmt: skip
    features = toys.toy(300)
    done = train_head(features, config, tmp_path / "run")
    assert done.metrics["map"] > 0.75
    assert done.metrics["map_chance"] < 0.4
    assert done.result["loss"] == kind
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < 0.7 * losses[0]
    # The start knows how frequent the classes are, as it does for binary cross-entropy.
    training = Training(features, config)
    like = build_head(features, toys.small("train.loss=bce"), training.train_rows)
    bias = build_head(features, config, training.train_rows).get_parameter("classifier.bias")
    assert torch.equal(bias, like.get_parameter("classifier.bias"))


def test_the_numbers_of_the_configuration_reach_the_step() -> None:
    losses = []
    for numbers in ((), ("train.gamma_neg=1",), ("train.gamma_pos=2",), ("train.clip_margin=0.3",)):
        training = Training(toys.toy(), toys.small("train.loss=asymmetric", *numbers))
        training._step()
        losses.append(float(training.taking.loss))
    assert len(set(losses)) == 4


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.gamma_neg=-1", "train.gamma_neg: expected at least 0"),
        ("train.gamma_pos=inf", "train.gamma_pos: expected a finite number"),
        ("train.focal_gamma=nan", "train.focal_gamma: expected at least 0"),
        ("train.clip_margin=1", "train.clip_margin: expected a share"),
        ("train.focal_alpha=1", "train.focal_alpha: expected a share between 0 and 1"),
        ("train.loss=asl", "one of auto, bce, ce, asymmetric, focal, found 'asl'"),
    ],
)
def test_numbers_that_no_loss_can_have_are_refused(assignment: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        configuration.override(RunConfig(), [assignment])


def test_the_authors_protocol_has_no_other_loss_than_theirs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official = configuration.official_config()
    for kind in ("bce", "ce"):
        assert configuration.override(official, [f"train.loss={kind}"]).train.loss == kind
    for kind in ("asymmetric", "focal"):
        with pytest.raises(UsageError, match=f"train.loss = {kind}: protocol official"):
            configuration.override(official, [f"train.loss={kind}"])
    store = stores.make_store(tmp_path / "a.zarr")
    command = ("train-head", store, *stores.HEAD, "--loss", "focal", "--epochs", 1, "--device",
               "cpu", "--quiet", "--out", tmp_path / "run")  # fmt: skip
    assert stores.msq(*command, "--protocol", "official") == 2
    assert "--protocol paper" in capsys.readouterr().err.replace("\n", " ")
    assert stores.msq(*command) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["loss"] == "focal"
