"""What a script ran on, in one line; timing itself lies in `msq.bench.runner`."""

from __future__ import annotations

from msq.bench import machine as found


def machine(device: str) -> str:
    """Processor or GPU, threads, versions, commit and date."""
    return found.line(found.machine(device))
