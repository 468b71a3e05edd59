"""Stage two as a person sees it: training, scoring, zero-shot sweeps, predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from msq import config as configuration
from msq.config import Classifier, Queries, RunConfig
from msq.errors import UsageError
from msq.extract.request import resolve_device
from msq.report import terminal
from msq.report.scores import counts, metric_rows, say_exports, scope

if TYPE_CHECKING:
    from msq.head.class_splits import ClassSplit


def settings(
    file: Path | None,
    overrides: Sequence[str] | None,
    options: Mapping[str, Any],
) -> RunConfig:
    """The configuration: defaults, then the file, then `key=value`, then the command's options.

    Raises:
        UsageError: an unknown key, a value of another type or one that the protocol excludes.
    """
    config = RunConfig() if file is None else configuration.load(file)
    given = [f"{key}={value}" for key, value in options.items() if value is not None]
    # In one call: a protocol among them changes the defaults, not what is given beside it.
    return configuration.override(config, [*(overrides or ()), *given])


def train(
    store: Path,
    config: RunConfig,
    out: Path | None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train a head on a store, or one for each of its partitions; as in `result.json`."""
    from msq.extract.store import open_store
    from msq.head.features import configured_features
    from msq.head.partitions import ALL, partition_names, train_partitions
    from msq.head.train import train_head

    place = resolve_device(device)
    out = out or Path("runs") / store.stem
    if config.features.partition == ALL:
        opened = open_store(store)
        names = partition_names(opened)
        with terminal.progress("training", quiet=quiet) as update:

            def report(event: Mapping[str, Any]) -> None:
                done = names.index(event["partition"]) * event["epochs"] + event["epoch"]
                total = len(names) * event["epochs"]
                update(done, total, f"{event['partition']}: {epoch_note(event)}")

            return train_partitions(
                opened, config, out, progress=report, overwrite=overwrite, device=place
            )
    features = configured_features(open_store(store), config.features)
    if not quiet:
        terminal.say(f"{store}: {features.coverage()}")
    with terminal.progress("training", quiet=quiet) as update:
        result = train_head(
            features,
            config,
            out,
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


def evaluate(
    run: Path,
    store: Path,
    split: str,
    *,
    device: str = "auto",
    export: Path | None = None,
    ensemble: str = "none",
    test_views: str | None = None,
) -> dict[str, Any]:
    """Score a run on a split of a store; a run of several partitions on each of them."""
    from msq.extract.store import open_store
    from msq.head.evaluate import evaluate_run
    from msq.head.partitions import evaluate_partitions, is_partitioned

    opened, place = open_store(store), resolve_device(device)
    if is_partitioned(run):
        return evaluate_partitions(
            run, opened, split, place, export=export, ensemble=ensemble, test_views=test_views
        )
    return evaluate_run(
        run, opened, split, place, export=export, ensemble=ensemble, test_views=test_views
    )


def show(result: Mapping[str, Any], *, json: bool = False) -> None:
    """A run's metrics, all of them, with the protocol named."""
    say_exports(result)
    if json:
        terminal.print_json(result)
        return
    metrics = result["metrics"]
    title = f"{result['run']}: {scope(result)}, protocol {result['protocol']}"
    header, rows = metric_rows(result)
    terminal.table(title, header, rows)
    terminal.say(
        f"{counts(metrics)}; {result['coverage']}; {result['epochs']} "
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
    split_dir: Path | None = None,
    class_order: bool = False,
    device: str = "auto",
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Sweep class splits on a store; the list of results.

    Without a classifier each query mode gets the one that suits it; see `msq.head.zeroshot`. The
    class splits are drawn, unless `split_dir` holds lists or `class_order` takes the first classes
    as the seen ones; `splits` and, with lists, `seen` then play no part.

    Raises:
        UsageError: shares that are no percentages, unknown queries, both kinds of splits at once,
            or lists that do not fit the store.
    """
    from msq.extract.store import open_store
    from msq.head import zeroshot
    from msq.head.features import configured_features

    if class_order and split_dir is not None:
        raise UsageError("--class-order and --split-dir: expected one of them, found both")
    modes = _modes(queries)
    try:
        shares = [float(x) for x in seen.split(",")]
    except ValueError:
        raise UsageError(f"--seen {seen!r}: expected percentages such as 50,75") from None
    features = configured_features(open_store(store), config.features)
    given = _class_splits(features.classes, shares, split_dir, class_order)
    total = (len(shares) * splits if given is None else len(given)) * len(modes)
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
            class_splits=given,
            device=resolve_device(device),
            progress=report,
        )


def _class_splits(
    classes: Sequence[str], shares: Sequence[float], folder: Path | None, in_order: bool
) -> list[ClassSplit] | None:
    """The splits from lists or in class order; None where they are drawn."""
    from msq.head.class_splits import class_order_split, class_splits_from_folder

    if folder is not None:
        return class_splits_from_folder(classes, folder)
    return [class_order_split(classes, x / 100) for x in shares] if in_order else None


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
    """One line per (seen, queries), and a warning of every split that leaks."""
    _warn_of_leaks(results)
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
        f"zero-shot {metric}, {results[0]['splits']} splits, {results[0]['classifier']} "
        f"classifier, views {results[0].get('views', 'clean')}"
    )
    header = ("", "unseen only", "chance", "general. seen", "general. unseen", "harmonic")
    terminal.table(title, header, rows)


def _warn_of_leaks(results: Sequence[Mapping[str, Any]]) -> None:
    shown = set()
    for result in results:
        for run in result["runs"]:
            for leak in run["leaks"]:
                name = f"{result['seen']} % seen, {run['source']}"
                if (name, leak["seen"], leak["unseen"]) not in shown:
                    shown.add((name, leak["seen"], leak["unseen"]))
                    terminal.say(
                        f"warning: split {name} leaks: {terminal.percent(leak['share'])} % of the "
                        f"clips of one of {leak['seen']} (seen) and {leak['unseen']} (unseen) are "
                        "the other's too"
                    )


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
    from msq.head.partitions import require_one_run
    from msq.head.predict import load_head

    require_one_run(run)
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
