"""`msq bench`: how fast is it here, and is it right."""

from __future__ import annotations

from typing import Annotated

import typer

from msq.cli_options import Device, Json, OnlyCases, Quick, Quiet, Rounds

bench_app = typer.Typer(help="How fast is it here, and is it right.", no_args_is_help=True)


@bench_app.command("head", epilog="Example: msq bench head --case K=157 --rounds 5")
def bench_head(
    quick: Quick = False,
    rounds: Rounds = None,
    case: OnlyCases = "",
    compile: Annotated[
        bool, typer.Option("--compile", help="torch.compile too; takes minutes on a CPU.")
    ] = False,
    emulated: Annotated[
        bool, typer.Option("--emulated", help="bf16 also where the processor only emulates it.")
    ] = False,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time the training step beside PyTorch's; only where they agree (exit code 4 if not)."""
    from msq.report import benchmarks

    found = benchmarks.run(
        "head",
        quick=quick,
        rounds=rounds,
        device=device,
        compile=compile,
        emulated=emulated,
        only=case,
        quiet=quiet,
    )
    raise typer.Exit(benchmarks.show(found, json=json))


@bench_app.command("stack", epilog="Example: msq bench stack --case K=20 --rounds 5")
def bench_stack(
    quick: Quick = False,
    rounds: Rounds = None,
    case: OnlyCases = "",
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time several heads trained at once beside one after another (exit code 4 if not equal)."""
    from msq.report import benchmarks

    found = benchmarks.run(
        "stack", quick=quick, rounds=rounds, device=device, only=case, quiet=quiet
    )
    raise typer.Exit(benchmarks.show(found, json=json))


@bench_app.command("store", epilog="Example: msq bench store --json")
def bench_store(
    quick: Quick = False,
    rounds: Rounds = None,
    case: OnlyCases = "",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time feeding from a store beside the least there is to do (exit code 4 on wrong bytes)."""
    from msq.report import benchmarks

    found = benchmarks.run("store", quick=quick, rounds=rounds, only=case, quiet=quiet)
    raise typer.Exit(benchmarks.show(found, json=json))


@bench_app.command("extract", epilog="Example: msq bench extract --case pipeline")
def bench_extract(
    quick: Quick = False,
    rounds: Rounds = None,
    case: OnlyCases = "",
    device: Device = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time stage one beside its parts alone (exit code 4 where the features differ)."""
    from msq.report import benchmarks

    found = benchmarks.run(
        "extract", quick=quick, rounds=rounds, only=case, device=device, quiet=quiet
    )
    raise typer.Exit(benchmarks.show(found, json=json))


@bench_app.command("decode", epilog="Example: msq bench decode --rounds 5")
def bench_decode(
    quick: Quick = False,
    rounds: Rounds = None,
    case: OnlyCases = "",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time decoding a few frames beside decoding all (exit code 4 where the frames differ)."""
    from msq.report import benchmarks

    found = benchmarks.run("decode", quick=quick, rounds=rounds, only=case, quiet=quiet)
    raise typer.Exit(benchmarks.show(found, json=json))
