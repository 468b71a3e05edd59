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
from msq.extract.encoders.hub_files import HubRepository
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
        WeightsNotFound: nothing there.
        WeightsError: nothing that is a text model, or the network failed.
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
    repository = HubRepository(name.removeprefix(HUB_PREFIX), f"text encoder {name}")
    if repository.fetch(CLIP_CONFIG_FILE) is not None:
        return None
    if repository.fetch(CONFIG_FILE) is None:
        if repository.unreachable is None:
            return None
        raise repository.unreachable
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
    file = repository.fetch_any(WEIGHT_FILES)
    if file is None:
        raise repository.without(WEIGHT_FILES)
    files = WeightFiles(file, file.parent, name, repository.name)
    _need_tokenizer(files)
    return files


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
