"""Stage two as a person sees it: training, scoring, zero-shot sweeps, predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from msq import config as configuration
from msq.config import Classifier, Queries, RunConfig
from msq.errors import UsageError
from msq.extract.request import resolve_device
from msq.report import terminal

METRICS = (
    ("map", "mAP (macro, whole set)"),
    ("map_micro", "micro AP (whole set)"),
    ("map_official", "micro AP per batch of 32 (official)"),
    ("top1", "top-1"),
    ("top5", "top-5"),
    ("accuracy", "element-wise accuracy at 0.5"),
    ("accuracy_all_negative", "  the same for 'nothing happens'"),
)


def settings(
    file: Path | None,
    overrides: Sequence[str] | None,
    options: Mapping[str, Any],
) -> RunConfig:
    """The configuration: defaults, then the file, then `key=value`, then the command's options.

    Raises:
        UsageError: an unknown key or a value of another type.
    """
    config = RunConfig() if file is None else configuration.load(file)
    config = configuration.override(config, overrides or ())
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    return configuration.override(config, given)


def train(
    store: Path,
    config: RunConfig,
    out: Path | None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train a head on a store; the result as in `result.json`."""
    from msq.extract.store import open_store
    from msq.head.features import load_features
    from msq.head.train import train_head

    place = resolve_device(device)
    f = config.features
    features = load_features(open_store(store), f.video, f.image, f.text, f.prompt, f.view)
    if not quiet:
        terminal.say(f"{store}: {features.coverage()}")
    with terminal.progress("training", quiet=quiet) as update:
        result = train_head(
            features,
            config,
            out or Path("runs") / store.stem,
            progress=lambda event: update(event["epoch"], event["epochs"], epoch_note(event)),
            overwrite=overwrite,
            device=place,
        )
    return result.result


def epoch_note(event: Mapping[str, Any]) -> str:
    """An epoch's event in a few words."""
    note = f"loss {event['loss']:.4f}"
    val = event.get("val_map")
    return note if val is None else f"{note}, val mAP {terminal.percent(val)}"


def evaluate(run: Path, store: Path, split: str, *, device: str = "auto") -> dict[str, Any]:
    """Score a run on a split of a store."""
    from msq.extract.store import open_store
    from msq.head.evaluate import evaluate_run

    return evaluate_run(run, open_store(store), split, device=resolve_device(device))


def show(result: Mapping[str, Any], *, json: bool = False) -> None:
    """A run's metrics, all of them, with the protocol named."""
    if json:
        terminal.print_json(result)
        return
    metrics = result["metrics"]
    rows = [(title, terminal.percent(metrics[key])) for key, title in METRICS if key in metrics]
    title = f"{result['run']}: {result['split']} split, protocol {result['protocol']}"
    terminal.table(title, ("metric", "%"), rows)
    terminal.say(
        f"{metrics['classes_scored']} classes scored; {result['coverage']}; {result['epochs']} "
        f"epochs in {result['seconds']:.1f} s ({result['seconds_per_epoch']:.2f} s each)"
    )


def zero_shot(
    store: Path,
    config: RunConfig,
    seen: str,
    splits: int,
    queries: str,
    classifier: str | None,
    *,
    device: str = "auto",
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Sweep class splits on a store; the list of results.

    Without a classifier each query mode gets the one that suits it; see `msq.head.zeroshot`.

    Raises:
        UsageError: shares that are no percentages, or unknown queries.
    """
    from msq.extract.store import open_store
    from msq.head import zeroshot
    from msq.head.features import load_features

    modes = _modes(queries)
    try:
        shares = [float(x) for x in seen.split(",")]
    except ValueError:
        raise UsageError(f"--seen {seen!r}: expected percentages such as 50,75") from None
    f = config.features
    features = load_features(open_store(store), f.video, f.image, f.text, f.prompt, f.view)
    total = len(shares) * splits * len(modes)
    done = 0

    with terminal.progress("zero-shot", quiet=quiet) as update:

        def report(event: Mapping[str, Any]) -> None:
            nonlocal done
            done += 1
            unseen = terminal.percent(event["unseen"])
            update(done, total, f"{event['seen']:g} % seen, {event['queries']}: unseen {unseen}")

        return zeroshot.zero_shot(
            features,
            config,
            seen=shares,
            splits=splits,
            queries=modes,
            classifier=cast(Classifier | None, classifier),
            device=resolve_device(device),
            progress=report,
        )


def _modes(queries: str) -> tuple[Queries, ...]:
    from msq.head.zeroshot import ALL_QUERIES

    if queries == "all":
        return ALL_QUERIES
    names = tuple(x.strip() for x in queries.split(","))
    unknown = [x for x in names if x not in ALL_QUERIES]
    if unknown:
        raise UsageError(f"--queries {unknown[0]!r}: expected {', '.join(ALL_QUERIES)} or all")
    return cast(tuple[Queries, ...], names)


def show_zero_shot(results: Sequence[Mapping[str, Any]], *, json: bool = False) -> None:
    """One line per (seen, queries)."""
    if json:
        terminal.print_json(list(results))
        return
    rows = []
    for r in results:
        unseen = next(iter(r["unseen"].values()))
        general = r["generalised_splits"]
        rows.append(
            (
                f"{r['seen']} % seen, {r['queries']} ({r['classifier']})",
                terminal.spread(unseen["mean"], unseen["std"]),
                terminal.spread(r["chance"]["mean"], r["chance"]["std"]),
                *(terminal.spread(general[k]["mean"], general[k]["std"]) for k in general),
            )
        )
    metric = next(iter(results[0]["unseen"]))
    title = (
        f"zero-shot {metric}, {results[0]['splits']} splits, {results[0]['classifier']} classifier"
    )
    header = ("", "unseen only", "chance", "general. seen", "general. unseen", "harmonic")
    terminal.table(title, header, rows)


def predict(
    run: Path,
    videos: Sequence[Path],
    labels: Sequence[str] | None,
    *,
    weights: Mapping[str, str | None],
    top: int | None,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Predictions for each video; see `msq.head.predict.Head.predict`."""
    from msq.head.predict import load_head

    given = {kind: name for kind, name in weights.items() if name is not None}
    head = load_head(run, device=resolve_device(device), weights=given)
    results = head.predict(list(videos), labels=labels)
    for item in results:
        item["predictions"] = item["predictions"][:top]
    return results


def show_predictions(results: Sequence[Mapping[str, Any]], *, json: bool = False) -> None:
    """Per video the labels with their scores; what could not be read goes to stderr."""
    unknown = sorted({word for r in results for word in r.get("unknown_words", ())})
    if unknown:
        terminal.say(
            f"warning: the text encoder does not know {', '.join(unknown)}; scores of labels with "
            "these words mean nothing. Use a full CLIP (--image-encoder at extraction)"
        )
    for item in results:
        if item.get("error"):
            terminal.say(f"failed: {item['clip']}: {item['error']}")
    if json:
        terminal.print_json(list(results))
        return
    for item in results:
        rows = [(p["label"], terminal.percent(p["score"])) for p in item["predictions"]]
        if rows:
            terminal.table(item["clip"], ("label", "%"), rows)


def prediction_exit_code(results: Sequence[Mapping[str, Any]]) -> int:
    """0 done, 3 when some video could not be read, 1 when none could."""
    failed = sum(bool(item.get("error")) for item in results)
    return 0 if not failed else 1 if failed == len(results) else 3
