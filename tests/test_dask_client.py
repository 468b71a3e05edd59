"""The machine that starts a run on dask need not see the store that its workers fill."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from msq.extract import dask_cluster
from msq.extract.claims import Holder, claims_folder
from msq.extract.extract_result import ExtractResult
from msq.extract.request import ExtractRequest
from msq.report.stage_one import precision_hint


def finished(monkeypatch: pytest.MonkeyPatch, store: Path) -> ExtractResult:
    """A run on dask whose workers, elsewhere, have filled a store."""
    result = ExtractResult(str(store), 2, 2, 0, 0, 1.0, 2.0, {}, [], [], [], {}, [])
    answers = {"_look": {"store": str(store), "missing": [], "done": 2, "clips": 2},
               "_result": result.to_dict()}  # fmt: skip
    monkeypatch.setattr(dask_cluster, "_client", lambda request: nullcontext())
    monkeypatch.setattr(dask_cluster, "_errand", lambda request, client: "")
    monkeypatch.setattr(dask_cluster, "_ask", lambda client, work, errand: answers[work.__name__])
    return dask_cluster.run_on_dask(ExtractRequest(manifest=Path("x.csv"), scheduler="tcp://x"))


def test_a_client_of_dask_makes_no_folder_where_only_workers_see_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert finished(monkeypatch, tmp_path / "mount" / "s.zarr").done == 2
    assert list(tmp_path.iterdir()) == []


def test_a_client_of_dask_that_may_not_write_has_the_result_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims_folder(tmp_path / "s.zarr").mkdir()

    def refused(*_: Any) -> Holder:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(dask_cluster, "Holder", refused)
    assert finished(monkeypatch, tmp_path / "s.zarr").done == 2


def test_a_client_of_dask_clears_away_what_killed_workers_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = claims_folder(tmp_path / "s.zarr")
    claims.mkdir()
    (claims / "shard-00000001.0").write_text("{}")
    finished(monkeypatch, tmp_path / "s.zarr")
    assert not claims.exists()


def test_the_device_of_workers_elsewhere_is_not_looked_for_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    request = ExtractRequest(
        manifest=Path("x.csv"), video_encoder="local-dir:x", device="cuda:1", scheduler="tcp://x"
    )
    assert precision_hint(request) == ""
