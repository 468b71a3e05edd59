"""`hf-hub:` names and tags at which there is nothing, against a hub on this machine.

The client is the real one; the hub answers as the real one does: a status and `X-Error-Code`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from msq.cli import main
from msq.errors import WeightsError, WeightsNotFound
from msq.extract.encoders import load_clip, load_text_encoder, load_video_encoder
from msq.extract.encoders.hub_files import HubRepository

TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"
ANSWERS = {  # repository: status, header, its value
    "missing": (404, "X-Error-Code", "RepoNotFound"),
    "gated": (403, "X-Error-Code", "GatedRepo"),
    "disabled": (403, "X-Error-Message", "Access to this resource is disabled."),
    "dated": (404, "X-Error-Code", "RevisionNotFound"),
    "empty": (404, "X-Error-Code", "EntryNotFound"),
    "broken": (501, "X-Error-Message", "not today"),
}
LOADERS: dict[str, Any] = {
    "video": lambda name: load_video_encoder(weights=name),
    "image": lambda name: load_clip(name),
    "text": lambda name: load_text_encoder(name),
    "timm": lambda name: load_video_encoder(f"timm/vit_tiny_patch16_224/{name}"),
}


class Answers(BaseHTTPRequestHandler):
    """A repository's name decides what is answered."""

    def do_HEAD(self) -> None:
        status, header, value = ANSWERS[self.path.split("/")[2]]
        self.send_response(status)
        self.send_header(header, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


@pytest.fixture
def hub(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The client asks the hub here, and its cache is empty."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", server)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server + TEMPLATE)
    return server


def run(*arguments: Any) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/missing", "no such repository, or a private one: check the name, or log in"),
        ("org/gated", "a gated repository: ask for access on its page, and log in"),
        ("org/disabled", "access to this repository is disabled"),
        ("org/dated@v9", "the repository has no such revision"),
        ("not a name", "no name of a repository (expected org/name)"),
    ],
)
def test_a_name_at_which_there_is_nothing_is_not_found(
    hub: str, kind: str, name: str, said: str
) -> None:
    with pytest.raises(WeightsNotFound) as error:
        LOADERS[kind](f"hf-hub:{name}")
    assert f"hf-hub:{name}: could not be fetched: {said}" in str(error.value)
    assert "Without network, copy the repository's files to a folder and give local-dir:PATH" in (
        str(error.value)
    )
    assert error.value.exit_code == 2


@pytest.mark.parametrize("kind", ["video", "image", "text"])
def test_a_repository_without_weights_is_not_found(hub: str, kind: str) -> None:
    with pytest.raises(WeightsNotFound, match=r"the repository has none of .*safetensors"):
        LOADERS[kind]("hf-hub:org/empty")


@pytest.mark.parametrize("kind", ["video", "image", "text"])
def test_with_the_network_switched_off_the_error_says_so_and_where_was_looked(
    hub: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsNotFound) as error:
        LOADERS[kind]("hf-hub:org/name")
    for words in ("hf-hub:org/name", "HF_HUB_OFFLINE is set", str(tmp_path / "cache"), "HF_HOME",
                  "Unset HF_HUB_OFFLINE", "local-dir:PATH"):  # fmt: skip
        assert words in str(error.value)


@pytest.mark.parametrize("kind", ["video", "image", "text"])
def test_a_hub_that_fails_is_another_matter(hub: str, kind: str) -> None:
    with pytest.raises(WeightsError, match=r"Server error .501 .*set HF_HOME.*local-dir:") as error:
        LOADERS[kind]("hf-hub:org/broken")
    assert not isinstance(error.value, WeightsNotFound)
    assert error.value.exit_code == 1


@pytest.mark.parametrize("kind", ["video", "image", "text"])
def test_a_connection_that_breaks_midway_is_no_traceback(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The HTTP library's own errors are no OSError."""
    client = errors.HfHubHTTPError.__bases__[0]

    def fetch(*_: Any, **__: Any) -> str:
        raise client("peer closed connection without sending complete message body")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    with pytest.raises(WeightsError, match="peer closed connection") as error:
        LOADERS[kind]("hf-hub:org/name")
    assert error.value.exit_code == 1


def test_without_a_route_the_cause_is_told_and_the_client_is_asked_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def fetch(repo: str, name: str, *, revision: Any, local_files_only: bool) -> str:
        asked.append(local_files_only)
        error = errors.LocalEntryNotFoundError("An error happened, check your connection")
        raise error from OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    repository = HubRepository("org/name", "weights hf-hub:org/name")
    assert repository.fetch_any(["a.bin", "b.bin"]) is None
    assert asked == [False, True]
    found = repository.without(["a.bin", "b.bin"])
    assert "could not be fetched: a.bin: no route to host. Without network, set HF_HOME" in (
        str(found)
    )
    assert found.exit_code == 1


@pytest.mark.parametrize(
    ("name", "flag"),
    [("timm/vit_tiny_patch16_224", "--video-encoder"), ("ViT-B-32/openai", "--image-encoder")],
)
def test_a_librarys_tag_that_is_not_in_the_cache_is_not_found_offline(
    hub: str, name: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    manifest = tmp_path / "m.csv"
    manifest.write_text("path,labels,split\na.mp4,x,train\n")
    given = ("extract", "--manifest", manifest, "--out", tmp_path / "s.zarr", flag, name)
    assert run(*given, "--device", "cpu", "-q") == 2
    found = capsys.readouterr().err
    assert "HF_HUB_OFFLINE is set" in found
    assert name.removeprefix("timm/") in found


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--video-encoder", "--image-encoder", "--text-encoder"])
def test_the_variable_of_the_environment_makes_exit_code_2(flag: str, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("path,labels,split\na.mp4,x,train\n")
    done = subprocess.run(
        [sys.executable, "-m", "msq", "extract", "--manifest", "m.csv", "--device", "cpu", "-q",
         flag, "hf-hub:org/name"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"),
             "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "hf-hub:org/name: could not be fetched: HF_HUB_OFFLINE is set" in done.stderr
    assert "Traceback" not in done.stderr
