"""Stage one as a person sees it: what is made, the live bar, the list of what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq.report import terminal

if TYPE_CHECKING:
    from msq.extract.pipeline import ExtractResult
    from msq.extract.request import ExtractRequest
    from msq.extract.views import View

SHOWN = 20
STATUS = ("missing", "ok", "failed", "degraded")  # by the store's status code


def run(request: ExtractRequest, *, quiet: bool = False) -> ExtractResult:
    """Run the request with progress on stderr."""
    with terminal.progress("extracting", quiet=quiet) as update:
        return request.run(lambda event: update(event["done"], event["total"], note(event)))


def note(event: dict[str, Any]) -> str:
    """Rates of a progress event in a few words: videos/s, frames/s per stage, the bottleneck."""
    parts = []
    if event.get("clips_per_second"):
        parts.append(f"{event['clips_per_second']:.1f} videos/s")
    stages = event.get("stages") or {}
    parts += [f"{k} {v:.0f} frames/s" for k, v in stages.items() if isinstance(v, int | float)]
    if stages.get("bottleneck"):
        parts.append(f"waiting for {stages['bottleneck']}")
    if event.get("failed"):
        parts.append(f"{event['failed']} failed")
    return ", ".join(parts)


def show(result: ExtractResult, *, json: bool = False) -> None:
    """The result on stdout; every failed, degraded or skipped item on stderr.

    What the dataset leaves out by its own rules is counted; `--json` lists it.
    """
    document = result.to_dict()
    for warning in (*document["warnings"], *_unknown(document["unknown_words"])):
        terminal.say(f"warning: {warning}")
    for title, items in (
        ("failed", document["failures"]),
        ("degraded", document["degraded"]),
        ("skipped", document["skipped_items"]),
    ):
        for item in items[:SHOWN]:
            terminal.say(f"{title}: {_line(item)}")
        if len(items) > SHOWN:
            terminal.say(f"{title}: … and {len(items) - SHOWN} more (all of them with --json)")
    if count := document.get("left_out"):
        first = _line(document["left_out_items"][0])
        terminal.say(f"{count} left out by the dataset's own rules (all with --json): {first}, …")
    if json:
        terminal.print_json(document)
        return
    terminal.table(
        str(document["store"]),
        ("clips", "done", "failed", "skipped", "seconds", "clips/s"),
        [
            (
                *(str(document[key]) for key in ("clips", "done", "failed", "skipped")),
                f"{document['seconds']:.1f}",
                f"{document['clips_per_second']:.2f}",
            )
        ],
    )


def _unknown(words: Mapping[str, Sequence[str]]) -> list[str]:
    """At most one line: which words of the classes mean nothing to the text encoder."""
    distinct = sorted({word for found in words.values() for word in found})
    if not distinct:
        return []
    more = f" and {len(distinct) - SHOWN} more" if len(distinct) > SHOWN else ""
    return [
        f"the text encoder does not know {', '.join(distinct[:SHOWN])}{more}: text embeddings of "
        f"{len(words)} classes mean little; a full CLIP (--image-encoder) knows any word"
    ]


def _line(item: Any) -> str:
    if isinstance(item, dict):
        message = f" ({item['message']})" if item.get("message") else ""
        views = item.get("views", ())
        which = f", {len(views)} views" if len(views) > 1 else "".join(f", view {v}" for v in views)
        return f"{item.get('clip', item.get('item', '?'))}{which}: {item['reason']}{message}"
    return ": ".join(str(part) for part in item)


def exit_code(result: ExtractResult) -> int:
    """0 done, 3 finished with failures or unusable items, 1 when no clip is ok."""
    if result.done == 0:
        return 1
    return 3 if result.failed or result.skipped else 0


def show_dry_run(request: ExtractRequest, *, json: bool = False) -> None:
    """What the request would do, on stdout; nothing is decoded or written."""
    from msq.extract.plan_run import dry_run

    plan = dry_run(request)
    for item in plan["skipped_items"][:SHOWN]:
        terminal.say(f"skipped: {_line(item)}")
    if plan["left_out"]:
        terminal.say(f"{plan['left_out']} left out by the dataset's own rules (--json lists them)")
    if not plan["enough"]:
        terminal.say("warning: the disk has less free space than the run will write")
    if json:
        terminal.print_json(plan)
        return
    splits = ", ".join(f"{n} {s}" for s, n in plan["splits"].items())
    terminal.table(
        f"{plan['store']}: {plan['dataset']}, {plan['clips']} clips ({splits}), "
        f"{plan['classes']} classes; dry run, nothing is written",
        ("encoder", "size", "shards", "done", "pending"),
        [
            (name, size(e["bytes"]), *(str(e["shards"][k]) for k in ("total", "done", "pending")))
            for name, e in plan["encoders"].items()
        ],
    )
    for name, encoder in plan["encoders"].items():
        frames = encoder["frames"]
        print(
            f"{name}: {encoder['spec']}, stored as {encoder['stored']}; {len(encoder['views'])} "
            f"views asked for, {frames['pending']} of {frames['total']} frames to be encoded"
        )
    for name, text in plan["text"].items():
        print(f"text {name}: {text['spec']}: {', '.join(text['prompts'].values())}")
        for label, words in text["unknown_words"].items():
            terminal.say(f"warning: {name} does not know {', '.join(words)} (class {label})")
    parts = plan["bytes"]
    print(f"clips: {plan['missing']} without a file, {plan['failed']} failed in earlier runs")
    print(
        f"store: {size(parts['total'])} when finished (features {size(parts['features'])}), "
        f"{size(parts['pending'])} of it to be written; {size(plan['free_bytes'])} free"
    )


def size(count: int) -> str:
    """Bytes in the unit that a person would choose, 1000 to the next."""
    value, units = float(count), ("B", "kB", "MB", "GB", "TB")
    for unit in units[:-1]:
        if value < 1000:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} {units[-1]}"


def show_store(path: Path, *, json: bool = False) -> None:
    """What a store holds, how it was made, how complete it is."""
    from msq.extract.encoders.prompts import described
    from msq.extract.store import open_store

    store = open_store(path)
    encoders: dict[str, dict[str, Any]] = {}
    for kind in ("video", "image"):
        for slug in store.encoders(kind):
            views = [
                {"view": str(view), **_counts(store.status(slug, view))}
                for view in store.views(slug)
            ]
            encoders[slug] = {
                "kind": kind,
                "spec": store.spec(slug, kind).line(store.name),
                "stored": store.store_dtype(slug),
                **{word: views[0][word] for word in STATUS},
                "views": views,
            }
    document: dict[str, Any] = {
        "store": str(path),
        "dataset": store.name,
        "task": store.task,
        "clips": len(store),
        "splits": {s: store.splits.count(s) for s in dict.fromkeys(store.splits)},
        "partitions": {
            name: {s or "unused": splits.count(s) for s in dict.fromkeys(splits)}
            for name, splits in store.partitions.items()
        },
        "classes": len(store.classes),
        "encoders": encoders,
        "text": {slug: store.prompts(slug) for slug in store.encoders("text")},
        "failures": store.failures(),
    }
    if json:
        terminal.print_json(document)
        return
    splits = ", ".join(f"{n} {s}" for s, n in document["splits"].items())
    title = f"{path}: {store.name}, {len(store)} clips ({splits}), {len(store.classes)} classes"
    rows = [row for slug in encoders for row in _view_rows(slug, store.views(slug), encoders[slug])]
    terminal.table(title, ("encoder", "views", *STATUS), rows)
    for slug, encoder in encoders.items():
        terminal.say(f"{slug}: {encoder['spec']}, stored as {encoder['stored']}")
    for name, counts in document["partitions"].items():
        terminal.say(f"partition {name}: {', '.join(f'{n} {s}' for s, n in counts.items())}")
    for slug, prompts in document["text"].items():
        shown = (described(store.templates(slug, name)) for name in prompts)
        terminal.say(f"text {slug}: {', '.join(shown)}")


def _counts(status: Any) -> dict[str, int]:
    """Rows of each status."""
    return {word: int((status == code).sum()) for code, word in enumerate(STATUS)}


def _view_rows(
    slug: str, views: Sequence[View], encoder: Mapping[str, Any]
) -> list[tuple[str, ...]]:
    """A line for each kind of view of an encoder, counts added up."""
    from msq.extract.store_views import groups_of

    rows = []
    for first, last, words in groups_of(views):
        counted = encoder["views"][first : last + 1]
        name = words if first == last else f"{words} ({last - first + 1})"
        rows.append((slug, name, *(str(sum(v[word] for v in counted)) for word in STATUS)))
    return rows


def verify_store(path: Path, *, json: bool = False) -> bool:
    """Read every row of every view against its checksum; True when all are sound."""
    from msq.extract.store import open_store
    from msq.extract.store_verify import readable_rows

    store = open_store(path)
    problems = store.verify()
    checked = readable_rows(store)
    for problem in problems:
        terminal.say(problem)
    document = {"store": str(path), "ok": not problems, "checked": checked, "problems": problems}
    if json:
        terminal.print_json(document)
    else:
        verdict = "sound" if not problems else f"{len(problems)} problems"
        terminal.table(str(path), ("rows read", "result"), [(str(checked), verdict)])
    return not problems


def show_encoders(*, json: bool = False) -> None:
    """Name, kind, size, licence and needs of every encoder."""
    from msq.extract.encoders import list_encoders

    encoders = list_encoders()
    if json:
        terminal.print_json(encoders)
        return
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for encoder in encoders:
        groups.setdefault((encoder["kind"], encoder["needs"]), []).append(encoder)
    # No table: names are there to be copied, and a narrow one would break them.
    width = max(len(encoder["name"]) for encoder in encoders)
    for (kind, needs), members in groups.items():
        print(f"{kind}; {needs}")
        for encoder in members:
            weights, megabytes, seen = _encoder_size(encoder)
            print(f"  {encoder['name']:{width}} {weights:>8} {megabytes:>8} {seen:>9}  "
                  f"{encoder['licence']}")  # fmt: skip


def _encoder_size(encoder: Mapping[str, Any]) -> tuple[str, str, str]:
    """Weights, megabytes, frames x pixels; what depends on the checkpoint is left empty."""
    weights, megabytes = encoder["parameters_millions"], encoder["megabytes"]
    frames, pixels = encoder["frames"], encoder["size"]
    return (
        "" if weights is None else f"{weights:.1f} M",
        "" if megabytes is None else f"{megabytes} MB",
        "" if pixels is None else f"{'T' if frames is None else frames} x {pixels}",
    )
