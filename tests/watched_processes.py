"""Waiting for processes that are to be killed: for what they do, not for a time.

Load it by its path, as `fakes.py`.
"""

from __future__ import annotations

import random
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE = 900.0  # seconds: no test is about them, they only end a wait that would never end
# Outside it no outgoing connection takes a port between the moment it is found free and its use.
_OF_CONNECTIONS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def until(true: Callable[[], bool], process: subprocess.Popen[Any] | None = None) -> bool:
    """Wait for something; False where the process that should bring it about ended before."""
    end = time.monotonic() + PATIENCE
    while not true():
        if process is not None and process.poll() is not None:
            return true()
        assert time.monotonic() < end, f"still not true after {PATIENCE:g} s"
        time.sleep(0.001)
    return True


def writes(process: subprocess.Popen[Any], store: Path) -> bool:
    """Whether a process has its file among those who write a store."""
    return any(Path(f"{store}.claims").glob(f"process-*-{process.pid}-*"))


def free_ports(count: int = 1) -> int:
    """The first of so many ports in a row at which nobody listens."""
    try:
        above = int(_OF_CONNECTIONS.read_text().split()[0])
    except (OSError, ValueError):
        above = 32_768
    above = above if above > 20_000 else 32_768
    for first in random.SystemRandom().sample(range(10_000, above - count), 1000):
        listening = [socket.socket() for _ in range(count)]
        try:
            for place, one in enumerate(listening):
                one.bind(("localhost", first + place))
        except OSError:
            continue
        finally:
            for one in listening:
                one.close()
        return first
    raise AssertionError("no free ports")
