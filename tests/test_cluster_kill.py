"""A hundred SIGKILLs over many workers: the store ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KILLS = int(os.environ.get("MSQ_KILLS", "100"))  # more of them where there is time
BY_DASK = 12


@pytest.mark.slow
def test_a_hundred_kills_at_random_moments_leave_the_bytes_of_an_uninterrupted_run(
    tmp_path: Path,
) -> None:
    command = [sys.executable, str(HERE / "kill_campaign.py"), str(tmp_path)]
    process = subprocess.run(
        [*command, str(KILLS), str(BY_DASK), os.environ.get("MSQ_SEED", "20261101")],
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout)
    assert report["problems"] == [], process.stderr
    assert sum(report["kills"].values()) >= KILLS
    assert report["kills"]["dask"] >= BY_DASK
    assert min(report["kills"].values()) > 0
    assert report["survived"] > 0  # stores that the workers left alive finished
    assert len(report["places"]) > 4  # the signals fell at different places
