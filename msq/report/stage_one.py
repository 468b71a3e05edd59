"""Stage one as a person sees it: what is made, the live bar, the list of what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msq.report import terminal

if TYPE_CHECKING:
    from msq.extract.pipeline import ExtractResult
    from msq.extract.request import ExtractRequest

SHOWN = 20


def run(request: ExtractRequest, *, quiet: bool = False) -> ExtractResult:
    """Run the request with progress on stderr, after a line on where it runs."""
    if not quiet:
        terminal.say(f"extracting on {place(request)}")
    hint = "" if quiet else precision_hint(request)
    if hint:
        terminal.say(hint)
    with terminal.progress("extracting", quiet=quiet) as update:
        return request.run(lambda event: update(event["done"], event["total"], note(event)))


def place(request: ExtractRequest) -> str:
    """The device and the precision of an extraction, or the workers that it is handed to.

    Of processes that a launcher started, each has a device of its own; this one knows its own.
    """
    from msq.extract import cluster
    from msq.extract.devices import resolve_device
    from msq.head.device import in_words

    if request.devices is not None:
        return f"{request.devices} (--devices), {request.precision}"
    if request.scheduler is not None:  # this process has nothing to do on a device then
        return f"the workers of {request.scheduler}, {request.precision}"
    spot = cluster.place()
    if spot is None:
        return in_words(resolve_device(request.device), request.precision)
    here = in_words(
        resolve_device(cluster.own_device(request.device, spot.local_rank)), request.precision
    )
    own = request.device in ("auto", "cuda")
    each = "the device of its local rank" if own else request.device
    return f"{spot.world} processes, each on {each}; rank {spot.rank}: {here}"


def precision_hint(request: ExtractRequest) -> str:
    """What to know about `--precision` on this processor; empty on a GPU and for small encoders.

    The precision is part of a store's spec, so nothing chooses it but the user.
    """
    from msq.extract.dask_cluster import LOCAL
    from msq.extract.decode_pool import multiplies_bf16
    from msq.extract.devices import resolve_device
    from msq.extract.extract_options import EMBEDDED
    from msq.extract.request import NONE

    if request.scheduler not in (None, LOCAL):
        return ""  # processors and devices are those of its workers
    fast = multiplies_bf16()
    large = {request.video_encoder, request.image_encoder} - {EMBEDDED, NONE}
    if fast is None or not large or resolve_device(request.device) != "cpu":
        return ""
    if fast and request.precision == "fp32":
        return (
            "hint: this processor multiplies bfloat16 in hardware: --precision bf16 is likely "
            "faster for large encoders (it is part of the store's spec; try it with --limit 8)"
        )
    if not fast and request.precision == "bf16":
        return (
            "hint: this processor has no bfloat16 products (AVX512-BF16, AMX): --precision fp32 is "
            "likely several times faster here"
        )
    return ""


def note(event: dict[str, Any]) -> str:
    """A progress event in a few words: videos/s, time left, frames/s per stage, the bottleneck."""
    parts = []
    if event.get("clips_per_second"):
        parts.append(f"{event['clips_per_second']:.1f} videos/s")
    if event.get("seconds_left"):
        parts.append(f"{duration(event['seconds_left'])} left")
    stages = event.get("stages") or {}
    parts += [f"{k} {v:.0f} frames/s" for k, v in stages.items() if isinstance(v, int | float)]
    if stages.get("bottleneck"):
        parts.append(f"waiting for {stages['bottleneck']}")
    if event.get("failed"):
        parts.append(f"{event['failed']} failed")
    if event.get("smaller_batch"):
        parts.append(f"out of memory, batches of {event['smaller_batch']}")
    return ", ".join(parts)


def show(result: ExtractResult, *, json: bool = False) -> None:
    """The result on stdout; every failed, degraded, skipped or mended item on stderr.

    What the dataset leaves out by its own rules is counted; `--json` lists it.
    """
    document = result.to_dict()
    for line in remarks(document):
        terminal.say(line)
    if count := document.get("left_out"):
        first = item_line(document["left_out_items"][0])
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


def remarks(document: Mapping[str, Any]) -> list[str]:
    """What went wrong and what else to know of an extraction, a line each; at most 20 of a kind."""
    warned = (*document["warnings"], *_unknown(document["unknown_words"]))
    return [
        *(f"warning: {warning}" for warning in warned),
        *_first("failed", document["failures"]),
        *_first("degraded", document["degraded"]),
        *_first("skipped", document["skipped_items"]),
        *_first("kept", document["kept_items"]),
    ]


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


def _first(title: str, items: Sequence[Any]) -> list[str]:
    """The first items in a line each, and how many more there are."""
    lines = [f"{title}: {item_line(item)}" for item in items[:SHOWN]]
    if len(items) > SHOWN:
        lines.append(f"{title}: … and {len(items) - SHOWN} more (all of them with --json)")
    return lines


def item_line(item: Any) -> str:
    """One failed, degraded, skipped or mended item in a line."""
    if isinstance(item, dict):
        views = item.get("views", ())
        which = f", {len(views)} views" if len(views) > 1 else "".join(f", view {v}" for v in views)
        said = item["change"] if "change" in item else item["reason"]
        message = item.get("message")  # the decoder's own words, which the reason may hold already
        more = f" ({message})" if message and message not in said else ""
        return f"{item.get('clip', item.get('item', '?'))}{which}: {said}{more}"
    return ": ".join(str(part) for part in item)


def exit_code(result: ExtractResult) -> int:
    """0 done, 3 finished with failures or unusable items, 1 when no clip is ok."""
    if result.done == 0:
        return 1
    return 3 if result.failed or result.skipped else 0


def show_dry_run(request: ExtractRequest, *, json: bool = False) -> None:
    """What the request would do, on stdout; a few clips are decoded, and nothing is written."""
    from msq.extract.plan_run import dry_run

    plan = dry_run(request)
    for title in ("skipped", "kept"):
        for line in _first(title, plan[f"{title}_items"]):
            terminal.say(line)
    if plan["enough"] is False:
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
    if plan["left_out"]:
        print(f"{plan['left_out']} left out by the dataset's own rules (--json lists them)")
    print(f"clips: {plan['missing']} without a file, {plan['failed']} failed in earlier runs")
    print(
        f"store: {size(parts['total'])} when finished (features {size(parts['features'])}"
        + (f", of each frame {size(parts['image_frames'])}" if parts["image_frames"] else "")
        + "), "
        + f"{size(parts['pending'])} of it to be written"
        + ("" if plan["free_bytes"] is None else f"; {size(plan['free_bytes'])} free")
    )
    print(_expected(plan["expected"]))


def _expected(found: Mapping[str, Any]) -> str:
    """The expected time in words, and what it comes from."""
    if found["seconds"] is None or not found["sampled"]:
        return f"time: {'none' if found['seconds'] == 0 else 'not known'}, {found['reason']}"
    encoding = " + ".join(
        f"{seconds:.2g} s {slug}"
        for slug, seconds in found["encode_seconds"].items()
        if seconds is not None
    )
    return (
        f"time: about {duration(found['seconds'])} for {found['clips']} clips with "
        f"{found['workers']} decode processes (measured on {found['sampled']} of them: decoding "
        f"{found['decode_seconds']:.2g} s a clip, encoding {encoding} a clip and view)"
    )


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would choose."""
    for name, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {name}"
    return f"{seconds:.1f} s"


def size(count: int) -> str:
    """Bytes in the unit that a person would choose, 1000 to the next."""
    value, units = float(count), ("B", "kB", "MB", "GB", "TB")
    for unit in units[:-1]:
        if value < 1000:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} {units[-1]}"


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
