"""Text models in Hugging Face's layout: their files, in a folder or on the hub.

A folder holds `config.json`, the weights and a tokenizer. One that sentence-transformers wrote also
has `modules.json`, which lists the steps from text to vector: the transformer, the pooling, dense
layers, scaling to unit length.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from msq.errors import WeightsError
from msq.extract.encoders.weights import FOLDER_PREFIX, HUB_PREFIX, WeightFiles, find_weights

CONFIG_FILE = "config.json"
CLIP_CONFIG_FILE = "open_clip_config.json"
MODULES_FILE = "modules.json"
LENGTH_FILE = "sentence_bert_config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# Any one of these makes a tokenizer; the first says it all where it is there.
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model",
                   "sentencepiece.bpe.model")  # fmt: skip
_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                       "merges.txt")  # fmt: skip
# Without these another vector would come out of the same weights.
_DECISIVE = (MODULES_FILE, LENGTH_FILE, "tokenizer_config.json")
_log = logging.getLogger(__name__)


def find_text_model(name: str) -> WeightFiles | None:
    """Finds a text model's files; None where the name means a CLIP.

    A CLIP is what has an `open_clip_config.json`, or no `config.json` at all.

    Args:
        name: `hf-hub:org/name[@revision]`, `local-dir:PATH` or a folder.

    Raises:
        WeightsError: nothing there, or nothing that is a text model.
    """
    if name.startswith(HUB_PREFIX):
        return _from_hub(name)
    folder = Path(name.removeprefix(FOLDER_PREFIX)).expanduser()
    if (folder / CLIP_CONFIG_FILE).is_file() or not (folder / CONFIG_FILE).is_file():
        return None
    files = find_weights(name, weight_files=WEIGHT_FILES)
    _need_tokenizer(files)
    return files


def _need_tokenizer(files: WeightFiles) -> None:
    if not any((files.folder / name).is_file() for name in TOKENIZER_FILES):
        raise WeightsError(
            f"{files.id}: expected a tokenizer beside {CONFIG_FILE} (one of "
            f"{', '.join(TOKENIZER_FILES)}), found none; is this a text model?"
        )


def _from_hub(name: str) -> WeightFiles | None:
    repository = _Repository(name)
    if repository.fetch(CLIP_CONFIG_FILE) is not None:
        return None
    if repository.fetch(CONFIG_FILE) is None:
        if repository.unreachable is None:
            return None
        raise WeightsError(_message(name, repository.unreachable))
    modules = repository.fetch(MODULES_FILE)
    if modules is not None:
        repository.fetch(LENGTH_FILE)
        for step in read_steps(modules):
            for filename in (CONFIG_FILE, *WEIGHT_FILES) if step["path"] else ():
                repository.fetch(f"{step['path']}/{filename}")
    for filename in (*TOKENIZER_FILES, *_TOKENIZER_SETTINGS):
        repository.fetch(filename)
    if doubtful := [filename for filename in _DECISIVE if filename in repository.unknown]:
        _log.warning(
            "%s: without network, no %s in the cache; if the repository has it, its settings are "
            "not used",
            name,
            ", ".join(doubtful),
        )
    for filename in WEIGHT_FILES:
        if (file := repository.fetch(filename)) is not None:
            hub_name = name.removeprefix(HUB_PREFIX).partition("@")[0]
            files = WeightFiles(file, file.parent, name, hub_name.rsplit("/", 1)[-1])
            _need_tokenizer(files)
            return files
    reason = repository.unreachable or f"found none of {', '.join(WEIGHT_FILES)}"
    raise WeightsError(_message(name, reason))


class _Repository:
    """Files of a repository on the hub, one by one.

    Attributes:
        unreachable: why a file could be neither fetched nor found in the cache, if that happened.
        unknown: files of which it cannot be said without network whether they exist.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._repo, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
        self._revision = revision or None
        self.unreachable: str | None = None
        self.unknown: list[str] = []

    def fetch(self, filename: str) -> Path | None:
        """The file on this machine, or None."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            # Each try without a network takes the client half a minute: once is enough.
            only_cache = self.unreachable is not None
            return Path(
                hf_hub_download(
                    self._repo, filename, revision=self._revision, local_files_only=only_cache
                )
            )
        except LocalEntryNotFoundError as error:  # no network, and not in the cache
            self.unreachable = self.unreachable or f"{filename}: {error}"
            if not self._known_absent(filename):
                self.unknown.append(filename)
            return None
        except EntryNotFoundError:  # not in the repository
            return None
        except (OSError, HFValidationError) as error:
            raise WeightsError(_message(self._name, str(error))) from error

    def _known_absent(self, filename: str) -> bool:
        """Whether the cache remembers that the repository does not have the file."""
        from huggingface_hub import try_to_load_from_cache

        found: object = try_to_load_from_cache(self._repo, filename, revision=self._revision)
        return found is not None and not isinstance(found, str)


def _message(name: str, reason: str) -> str:
    return (
        f"text encoder {name}: could not be fetched: {reason.strip().splitlines()[0].rstrip('.')}. "
        f"Without network, copy the repository's files to a folder and give {FOLDER_PREFIX}PATH"
    )


def read_steps(path: Path) -> list[dict[str, str]]:
    """`path` and `type` of each module, in order.

    Raises:
        WeightsError: the file is not such a list, or a path leads out of its folder.
    """
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        steps = [{"path": str(step["path"]), "type": str(step["type"])} for step in listed]
        for step in steps:
            if ".." in Path(step["path"]).parts or Path(step["path"]).is_absolute():
                raise ValueError(f"path {step['path']!r}")
        return steps
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{path}: expected a list of modules, each with 'path' and 'type'; found {error!r}"
        ) from error
