"""How long a sweep will take, from a measurement of a few steps and a count of multiplications.

One trial is measured; the others are scaled by their share of the work, which is a sum of products
over the shapes of the head. Where trials of the sweep are done already, their time is the
measurement. It is an estimate: within a factor of about 1.5 where the shapes are alike.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from msq.config import RunConfig
from msq.head.features import Features
from msq.head.sweep import Load, load_source
from msq.head.sweep_plan import Plan, outcomes_of, read_outcome
from msq.head.train import split_rows, train_head
from msq.head.trial import Trial
from msq.head.trials import shown

STEPS, BATCH = 3, 16
FORWARD_SHARE = 1 / 3  # of a training step: the backward pass costs two forward passes


def clip_products(features: Features, config: RunConfig) -> float:
    """Multiplications of one training step for one clip, forward and backward."""
    head = config.head
    k, (s, wide) = len(features.classes), features.tokens.shape[1:]
    text = None if features.text is None else features.text.shape[1]
    d = head.width or text or wide
    ffn = head.ffn or 4 * d
    encoder = head.encoder_layers * (4 * s * d * d + 2 * s * s * d + 2 * s * d * ffn)
    decoder = head.layers * (
        6 * k * d * d + 2 * s * d * d + 2 * k * k * d + 2 * k * s * d + 2 * k * d * ffn
    )
    return 3.0 * (s * wide * d + encoder + decoder)


def trial_products(trial: Trial, features: Features) -> float:
    """The same for a whole trial: training, validation, and the scoring of its test clips."""
    seen = shown(trial, features)
    train, val = split_rows(seen, trial.config.train.val, trial.config.train.seed)
    t = trial.config.train
    clips = t.epochs * (t.epoch_clips or len(train))
    passes = 3 if trial.split is not None else 1  # unseen alone, all at once, seen alone
    scored = t.epochs * len(val) + passes * len(features.rows("test"))
    return clip_products(seen, trial.config) * (clips + FORWARD_SHARE * scored)


def measured_rate(trial: Trial, features: Features, device: str) -> float:
    """Seconds per multiplication, by a few steps of this trial; nothing is written."""
    seen = shown(trial, features)
    small = dataclasses.replace(
        trial.config.train, epochs=1, val=0.0, batch=min(BATCH, trial.config.train.batch)
    )
    config = dataclasses.replace(trial.config, train=small)
    clips = min(small.batch, len(seen.rows("train", "val")))

    def seconds(steps: int) -> float:
        began = time.perf_counter()
        train_head(seen, config, None, device=device, stop_after=steps)
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    seconds(1)  # what the first step alone costs
    short, long = seconds(1), seconds(1 + STEPS)
    return max(long - short, 1e-6) / (STEPS * clips * clip_products(seen, config))


def estimate(
    plan: Plan,
    folder: Path,
    workers: int,
    device: str = "cpu",
    load: Load = load_source,
    *,
    retry_failed: bool = False,
) -> dict[str, Any]:
    """What a sweep would do and take; nothing is written.

    Args:
        plan: of the sweep.
        folder: of it, which need not be there.
        workers: that would share the work.
        device: to train on.
        load: gives the features of a trial.
        retry_failed: trials that failed would be tried again.

    Returns:
        `name, trials[{id, name, store, state, seconds}]` (`state` is `done`, `failed`, which is
        tried again on request only, `to do` or `needs extraction`, whose seconds are not known),
        `to_do` (how many), `seconds` (of all to be done, divided by the workers; None where a store
        is missing), `stores{path: exists}` and `measured` (how).
    """
    outcomes = outcomes_of(folder, plan) if folder.exists() else {}
    residents = _loaded(plan, load)
    ended = dict.fromkeys(outcomes, "done")
    if not retry_failed:
        failed = (t.id for t in plan.trials if t.id not in outcomes and read_outcome(folder, t.id))
        ended |= dict.fromkeys(failed, "failed")
    todo = [t for t in plan.trials if t.id not in ended]
    rate, how = _rate(plan, outcomes, residents, device, todo)
    listed, total = [], 0.0
    for trial in plan.trials:
        features = residents.get(trial.source)
        state = ended.get(trial.id) or ("to do" if features else "needs extraction")
        seconds = None
        if state == "to do" and features is not None and rate is not None:
            seconds = rate * trial_products(trial, features)
            total += seconds
        listed.append({"id": trial.id, "name": trial.name(), "state": state,
                       "store": plan.sources[trial.source].store, "seconds": seconds})  # fmt: skip
    known = all(one["state"] != "needs extraction" for one in listed)
    return {
        "name": plan.name,
        "trials": listed,
        "to_do": len(todo),
        "seconds": total / workers if known else None,
        "workers": workers,
        "stores": {one.store: Path(one.store).exists() for one in plan.sources.values()},
        "measured": how,
    }


def _loaded(plan: Plan, load: Load) -> dict[str, Features]:
    found = {}
    for key, source in plan.sources.items():
        if Path(source.store).exists():
            first = next(trial for trial in plan.trials if trial.source == key)
            found[key] = load(first, source)
    return found


def _rate(
    plan: Plan,
    outcomes: Mapping[str, Mapping[str, Any]],
    residents: Mapping[str, Features],
    device: str,
    todo: list[Trial],
) -> tuple[float | None, str]:
    done = [(t, outcomes[t.id]["seconds"]) for t in plan.trials
            if t.id in outcomes and t.source in residents]  # fmt: skip
    if done:
        products = sum(trial_products(t, residents[t.source]) for t, _ in done)
        return sum(s for _, s in done) / products, f"{len(done)} finished trials"
    ready = [t for t in todo if t.source in residents]
    if not ready:
        return None, "nothing"
    middle = ready[len(ready) // 2]
    torch.set_num_threads(plan.threads)
    return (measured_rate(middle, residents[middle.source].to(device), device),
            f"{STEPS} steps of {middle.name()}")  # fmt: skip
