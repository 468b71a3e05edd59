"""Stage one as a person sees it: what is made, the live bar, the list of what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msq.report import terminal

if TYPE_CHECKING:
    from msq.extract.pipeline import ExtractResult
    from msq.extract.request import ExtractRequest

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
    """The result on stdout; every failed, degraded or skipped item on stderr."""
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
        return f"{item.get('clip', item.get('item', '?'))}: {item['reason']}{message}"
    return ": ".join(str(part) for part in item)


def exit_code(result: ExtractResult) -> int:
    """0 done, 3 finished with failures or skipped items, 1 when no clip is ok."""
    if result.done == 0:
        return 1
    return 3 if result.failed or result.skipped else 0


def show_dry_run(request: ExtractRequest, *, json: bool = False) -> None:
    """What the request would do, on stdout; nothing is decoded or written."""
    from msq.extract.plan_run import dry_run

    plan = dry_run(request)
    for item in plan["skipped_items"][:SHOWN]:
        terminal.say(f"skipped: {_line(item)}")
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
        print(f"{name}: {encoder['spec']}, stored as {encoder['stored']}")
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
    from msq.extract.store import open_store

    store = open_store(path)
    encoders: dict[str, dict[str, Any]] = {}
    for kind in ("video", "image"):
        for slug in store.encoders(kind):
            status = store.status(slug)
            encoders[slug] = {
                "kind": kind,
                "spec": store.spec(slug, kind).line(store.name),
                "stored": store.store_dtype(slug),
                **{word: int((status == code).sum()) for code, word in enumerate(STATUS)},
            }
    document: dict[str, Any] = {
        "store": str(path),
        "dataset": store.name,
        "task": store.task,
        "clips": len(store),
        "splits": {s: store.splits.count(s) for s in dict.fromkeys(store.splits)},
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
    rows = [(slug, *(str(e[word]) for word in STATUS)) for slug, e in encoders.items()]
    terminal.table(title, ("encoder", *STATUS), rows)
    for slug, encoder in encoders.items():
        terminal.say(f"{slug}: {encoder['spec']}, stored as {encoder['stored']}")
    for slug, prompts in document["text"].items():
        terminal.say(f"text {slug}: {', '.join(prompts.values())}")


def verify_store(path: Path, *, json: bool = False) -> bool:
    """Read every row that is recorded as done against its checksum; True when all are sound."""
    from msq.extract.store import open_store

    store = open_store(path)
    problems = store.verify()
    checked = sum(
        len(store.ok_rows([slug])) for kind in ("video", "image") for slug in store.encoders(kind)
    )
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
    """Name, kind, needs and licence of every encoder."""
    from msq.extract.encoders import list_encoders

    encoders = list_encoders()
    if json:
        terminal.print_json(encoders)
        return
    header = tuple(encoders[0])
    terminal.table("encoders", header, [tuple(str(e[key]) for key in header) for e in encoders])
