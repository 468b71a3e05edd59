"""The store's life as a person sees it: inspect, verify, repair, convert, merge, export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq.errors import UsageError
from msq.report import terminal
from msq.report.stage_one import SHOWN, size

if TYPE_CHECKING:
    from msq.extract.request import ExtractRequest
    from msq.extract.store import FeatureStore
    from msq.extract.store_convert import CopyResult
    from msq.extract.store_export import ExportResult
    from msq.extract.store_problems import Verification
    from msq.extract.store_relabel import RelabelResult
    from msq.extract.views import View


def show_store(path: str | Path, *, json: bool = False) -> None:
    """What a store holds, how it was made, how complete it is."""
    from msq.extract.encoders.prompts import described
    from msq.extract.store import open_store
    from msq.extract.store_inspect import STATUS, inspect_store
    from msq.extract.store_versions import runs_in_words

    store = open_store(path)
    document = inspect_store(store)
    if json:
        terminal.print_json(document)
        return
    splits = ", ".join(f"{n} {s}" for s, n in document["splits"].items())
    title = f"{path}: {store.name}, {len(store)} clips ({splits}), {len(store.classes)} classes"
    encoders = document["encoders"]
    rows = [row for slug in encoders for row in _view_rows(slug, store.views(slug), encoders[slug])]
    terminal.table(title, ("encoder", "views", *STATUS), rows)
    for slug, encoder in encoders.items():
        shapes = encoder["shapes"]
        shape = "x".join(map(str, next(iter(shapes.values()))))
        if frames := shapes.get(f"image_frames/{slug}"):
            shape += f", of each frame {'x'.join(map(str, frames))}"
        widened = encoder["converted_from"]
        print(
            f"{slug}: {encoder['spec']}, stored as {encoder['stored']}"
            f"{f', converted from {widened}' if widened else ''}; {shape}, shards of "
            f"{encoder['shard']}, {size(encoder['bytes'])}, {100 * encoder['coverage']:.1f} % there"
        )
    for name, counts in document["partitions"].items():
        print(f"partition {name}: {', '.join(f'{n} {s}' for s, n in counts.items())}")
    for slug, prompts in document["text"].items():
        shown = (described(store.templates(slug, name)) for name in prompts)
        print(f"text {slug}: {', '.join(shown)}")
    for line in document["reasons"][:SHOWN]:
        print(f"{line['status']}: {line['clips']} clips: {line['reason']}")
    smaller: dict[tuple[str, int], set[int]] = {}
    for entry in document["smaller_batches"]:
        smaller.setdefault((entry["encoder"], entry["batch"]), set()).add(entry["shard"])
    for (slug, batch), shards in sorted(smaller.items()):
        print(
            f"{slug}: {len(shards)} shards made in batches of {batch}, since memory was too short "
            "for those asked for"
        )
    for slug, runs in document["made_with"].items():
        print(f"{slug}: features {runs_in_words(runs)}")
    print(f"{size(document['bytes']['total'])} in {document['files']} files, {_begun(document)}")


def _begun(document: Mapping[str, Any]) -> str:
    """With which versions a store was begun; of a copy its features, and then what copied them."""
    from msq.extract.store_versions import in_words

    copied = document["copied_by"]
    if copied is None:
        return f"begun by {in_words(document)}"
    made = "" if document["made_with"] else f"features by {in_words(document)}; "
    return f"{made}{copied['by']} by {in_words(copied)}"


def _view_rows(
    slug: str, views: Sequence[View], encoder: Mapping[str, Any]
) -> list[tuple[str, ...]]:
    """A line for each kind of view of an encoder, counts added up."""
    from msq.extract.store_inspect import STATUS
    from msq.extract.store_views import groups_of

    rows = []
    for first, last, words in groups_of(views):
        counted = encoder["views"][first : last + 1]
        name = words if first == last else f"{words} ({last - first + 1})"
        rows.append((slug, name, *(str(sum(v[word] for v in counted)) for word in STATUS)))
    return rows


def verify(
    path: str | Path,
    sample: int = 0,
    request: ExtractRequest | None = None,
    weights: Mapping[str, str] | None = None,
    *,
    quiet: bool = False,
) -> Verification:
    """Read all of a store, and extract `sample` rows of it again.

    Args:
        path: the store.
        sample: rows.
        request: names the dataset, the device and the batch; needed for a sample.
        weights: encoder -> where its weights are now, where they moved.
        quiet: no progress.

    Raises:
        UsageError: a sample without a dataset, or no encoder of the store can be loaded.
    """
    from msq.extract.location import locate
    from msq.extract.store import open_store
    from msq.extract.store_verify import verify_store

    found = verify_store(locate(path))
    if not sample:
        return found
    if request is None or (request.manifest is None and request.dataset is None):
        raise UsageError(
            f"--sample {sample}: expected --manifest FILE, or --dataset NAME with --root DIR: the "
            "store holds no paths of videos"
        )
    if any(problem.kind == "metadata" for problem in found.problems):
        found.notes.append("no row was extracted again: metadata is damaged")
        return found
    from msq.extract.store_sample import check_sample

    store = open_store(path)
    encoders = _encoders(store, request.device, weights or {}, found)
    with terminal.progress("extracting again", quiet=quiet) as update:
        check_sample(
            store,
            request.read_dataset(),
            encoders,
            sample,
            found,
            batch=request.batch,
            progress=lambda event: update(event["done"], event["total"]),
        )
    return found


def _encoders(
    store: FeatureStore, device: str, weights: Mapping[str, str], found: Verification
) -> dict[str, Any]:
    """The store's encoders, loaded; what was imported has none, which is said."""
    from msq.extract.devices import resolve_device
    from msq.extract.encoders.recorded import load_recorded
    from msq.extract.store_sample import imported

    encoders = {}
    place = resolve_device(device)
    for kind in ("video", "image"):
        for slug in store.encoders(kind):
            if imported(store, slug, kind):
                found.notes.append(f"{slug}: was imported, and is not extracted again")
            else:
                encoders[slug] = load_recorded(store.spec(slug, kind), weights.get(slug), place)
    if not encoders:
        raise UsageError(f"{store.path}: --sample: all of its features were imported")
    return encoders


def show_verification(path: str | Path, found: Verification, *, json: bool = False) -> None:
    """Problems, notes and counts on stdout; beside `--json`, the first two are on stderr."""
    tell = terminal.say if json else print
    for problem in found.problems:
        tell(str(problem))
    for note in found.notes:
        tell(f"note: {note}")
    if json:
        terminal.print_json(found.to_dict(str(path)))
        return
    verdict = "sound" if found.ok else f"{len(found.problems)} problems"
    again = f"{found.equal} of {found.sampled} bit by bit" if found.sampled else "–"
    terminal.table(
        str(path),
        ("files", "rows read", "extracted again", "result"),
        [(str(found.files), str(found.checked), again, verdict)],
    )


def repair(path: str | Path, *, dry_run: bool = False, json: bool = False) -> int:
    """Mark what is bad for re-doing; 0, or 3 where something is left that cannot be repaired."""
    from msq.extract.location import locate
    from msq.extract.store_repair import repair_store

    done = repair_store(locate(path), dry_run=dry_run)
    tell = terminal.say if json else print
    for problem in done.problems:
        tell(problem)
    for line in done.left:
        tell(f"left: {line}")
    if json:
        terminal.print_json(done.to_dict())
        return 3 if done.left else 0
    for action in done.actions:
        print(f"{'would have ' if dry_run else ''}{action}")
    counts = f"{len(done.problems)} problems, {len(done.redo)} shards to be made again"
    print(f"{path}: {counts}{', nothing touched' if dry_run else ''}")
    if done.redo and not dry_run:
        print("run msq extract as before: it makes these and leaves the others as they are")
    return 3 if done.left else 0


@contextmanager
def copying(title: str, *, quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Progress of a copy on stderr."""
    with terminal.progress(title, quiet=quiet) as update:
        yield lambda event: update(event["done"], event["total"])


def show_copy(result: CopyResult, *, json: bool = False) -> None:
    """What was written."""
    for warning in result.warnings:
        terminal.say(f"warning: {warning}")
    if json:
        terminal.print_json(result.to_dict())
        return
    rows = [(result.store, str(result.clips), str(len(result.encoders)), str(result.copied))]
    terminal.table(
        f"from {', '.join(result.sources)}", ("store", "clips", "encoders", "rows copied"), rows
    )


def show_relabel(result: RelabelResult, *, json: bool = False) -> None:
    """What was written, and what became of the clips."""
    for warning in result.warnings:
        terminal.say(f"warning: {warning}")
    if json:
        terminal.print_json(result.to_dict())
        return
    counts = (len(result.missing), result.left_out, result.relabelled, result.moved)
    terminal.table(
        f"from {', '.join(result.sources)}",
        ("store", "clips", "rows copied", "new", "left out", "other labels", "other split"),
        [(result.store, str(result.clips), str(result.copied), *map(str, counts))],
    )


def show_export(result: ExportResult, *, json: bool = False) -> None:
    """What was written, and which clips are not in it."""
    if result.left_out:
        names = ", ".join(map(repr, result.left_out[:SHOWN]))
        more = ", …" if len(result.left_out) > SHOWN else ""
        terminal.say(f"{len(result.left_out)} clips have no features and are not in it: "
                     f"{names}{more}")  # fmt: skip
    if json:
        terminal.print_json(result.to_dict())
        return
    print(f"{result.out}: {result.clips} clips, {result.format}")
    if result.manifest:
        print(f"{result.manifest}, {result.classes}: ids, labels, splits and classes, for import")


def wanted_views(names: Sequence[str] | None) -> list[View] | None:
    """Views by name (`aug-3`), or None for all.

    Raises:
        UsageError: a name that is no view's.
    """
    from msq.extract.views import parse_view

    return None if names is None else [parse_view(name) for name in names]
