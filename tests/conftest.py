"""Fixtures shared by all tests. Tests are no package: what they share comes through here."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings

# As `msq` itself does: pools of spinning threads crawl on a machine that has other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# As `make test` does: processes that are compared to the bit have as many threads as this one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A launcher's or Slurm's place is that of these tests, and not of the commands that they try.
PLACE = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
# What makes typer and rich write colours into a text, or break its lines elsewhere.
LOOKS = {"GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS", "CLICOLOR_FORCE", "COLUMNS", "LINES",
         "TERMINAL_WIDTH"}  # fmt: skip
for name in [*os.environ]:
    if name in PLACE | LOOKS or name.startswith("SLURM_"):
        del os.environ[name]
# Servers of these tests are here, whatever proxy leads elsewhere.
for name in ("no_proxy", "NO_PROXY"):
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
settings.register_profile("msq", deadline=None)  # a loaded machine is no failure
settings.load_profile("msq")
# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).parents[1]
# Triton decides at its import whether kernels run in its interpreter: those tests have a process
# of their own, see `make test`.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


# A few long tests each: begun first, so that no process is left alone with one of them at the end.
LONGEST = {
    "test_real_end_to_end.py",
    "test_kernel_compile.py",
    "test_cluster_kill.py",
    "test_fuzz_video.py",
    "test_examples.py",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the order is the same in every process."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def _load(name: str) -> ModuleType:
    """A module beside this file, without putting its folder on the import path."""
    file = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"msq_tests_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave the user's cache folder alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Small media files by name, see `tests/media.py`."""
    return _load("media").Media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real clips and annotations beside the repository; absent on most machines."""
    folder = Path(os.environ.get("MSQ_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("no folder of real clips: set MSQ_SHARED to one")
    return folder
