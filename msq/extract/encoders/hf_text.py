"""BERT and other text models of Hugging Face as encoders of class names.

The transformer and its tokenizer are those of the library transformers (`pip install 'msq[text]'`);
what is made of its last hidden states h_1 … h_n of a text is one of

    pooler   the model's own pooled output (BERT: tanh(W h_1 + b))
    mean     the mean of h_i over the text's tokens; padding does not count
    cls      h_1

A folder that sentence-transformers wrote says which (Reimers and Gurevych, arXiv 1908.10084), and
whether dense layers and scaling to unit length follow; for others it is `pooler` where the model
has one, else `mean`. No code of a repository is run, and no pickled object is loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from typing import Any, Final, cast

import torch
from torch import nn

from msq.errors import UsageError, WeightsError
from msq.extract.encoders.clip import TextEncoder, Tokenizer
from msq.extract.encoders.hf_text_files import CONFIG_FILE
from msq.extract.encoders.hf_text_model import (
    SentenceModel,
    dense_layer,
    first_line,
    import_transformers,
    load_transformer,
    quiet,
)
from msq.extract.encoders.hf_text_recipe import POOLINGS, Recipe, TextPooling, read_recipe
from msq.extract.encoders.spec import EncoderSpec, Precision, slugify
from msq.extract.encoders.weights import WeightFiles, sha256_file

_ARCHITECTURE: Final = "hf"  # the first word of every architecture that this file describes
# Settings that say nothing of what comes out.
_SILENT = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version",
           "use_cache"}  # fmt: skip
# Texts by which two tokenizers are told apart: case, accents, marks, digits, an unknown script.
_PROBES = ("A Dog's naïve ÉLAN, re-running 12.5 km!", "opening_a-door (slowly)", "走 🐕")
_TOKENIZERS_OWN_MAXIMUM = 10**6  # beyond this, transformers means "no limit"
_WORD = re.compile(r"[^\W\d_]+")


class HuggingFaceText(TextEncoder):
    """A text encoder with a tokenizer of the library transformers.

    Attributes:
        max_tokens: how many the model reads of a text, special ones included; None: all.
    """

    def __init__(
        self,
        model: SentenceModel,
        spec: EncoderSpec,
        tokenizer: Any,
        max_tokens: int | None,
        lower: bool = False,
    ) -> None:
        def tokenize(texts: list[str]) -> Any:
            return tokenizer(
                [text.lower() for text in texts] if lower else texts,
                padding=True,
                truncation=max_tokens is not None,
                max_length=max_tokens,
                return_tensors="pt",
            )

        super().__init__(model, spec, cast(Tokenizer, tokenize))
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer
        self._lower = lower

    def unknown_words(self, text: str) -> list[str]:
        """Words that the tokenizer has no piece for, in order, each once.

        Tokenizers of general models spell out a word that they do not know; only characters they
        never saw are left.
        """
        unknown = self._tokenizer.unk_token_id
        if unknown is None:
            return []
        words: dict[str, str] = {}
        for word in _WORD.findall(text):
            words.setdefault(word.lower(), word)
        return [word for word in words.values() if unknown in self._ids(word, special=False)]

    def _is_cut(self, filled: str) -> bool:
        return self.max_tokens is not None and len(self._ids(filled)) > self.max_tokens

    def _ids(self, text: str, special: bool = True) -> list[int]:
        text = text.lower() if self._lower else text
        return cast(
            list[int],
            self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"],
        )


def load_hf_text(
    files: WeightFiles,
    *,
    pooling: TextPooling | None = None,
    precision: Precision = "fp32",
    device: str | torch.device = "cpu",
) -> HuggingFaceText:
    """Loads a text model and its tokenizer from a folder in Hugging Face's layout.

    Args:
        files: from `find_text_model`.
        pooling: takes the place of the folder's own steps after the transformer.
        precision: `fp32`, `bf16` or `fp16`, of the forward pass.
        device: where the model goes.

    Raises:
        UsageError: transformers is not installed, or the pooling is one that the model lacks.
        WeightsError: configuration, weights and tokenizer do not belong together, or are damaged.
    """
    recipe = read_recipe(files, pooling)
    transformer, has_pooler = load_transformer(files)
    recipe = _settled(recipe, has_pooler, files)
    tokenizer = _load_tokenizer(files)
    limit = _limit(recipe.max_tokens, tokenizer, transformer)
    chosen = cast(TextPooling, recipe.pooling)
    config = cast(Any, transformer).config
    model = SentenceModel(transformer, chosen, [dense_layer(d) for d in recipe.dense], recipe.unit)
    spec = EncoderSpec(
        slug=slugify(files.name),
        kind="text",
        architecture=_describe(files, config, recipe, tokenizer, limit),
        weights=files.id,
        sha256=sha256_file(files.file),
        frames=0,
        size=0,
        mean=(),
        std=(),
        pooling="",
        precision=precision,
        sampling="",
        resize="",
        output=recipe.output(chosen),
        tokens=0,
        channels=recipe.dense[-1].outputs if recipe.dense else int(config.hidden_size),
    )
    return HuggingFaceText(model.eval(), spec, tokenizer, limit, recipe.lower).to(device)


def _settled(recipe: Recipe, has_pooler: bool, files: WeightFiles) -> Recipe:
    """The recipe with a pooling that the model has."""
    if recipe.pooling == "pooler" and not has_pooler:
        raise UsageError(
            f"{files.id}: pooling 'pooler' needs a pooled output, and there are no weights for "
            f"one; use one of {', '.join(p for p in POOLINGS if p != 'pooler')}"
        )
    default: TextPooling = "pooler" if has_pooler else "mean"
    return recipe if recipe.pooling is not None else replace(recipe, pooling=default)


def _load_tokenizer(files: WeightFiles) -> Any:
    transformers = import_transformers()
    try:
        with quiet(transformers):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                files.folder, local_files_only=True, trust_remote_code=False, padding_side="right"
            )
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise WeightsError(f"{files.id}: no tokenizer: {first_line(error)}") from error
    if tokenizer.pad_token is None:
        raise WeightsError(
            f"{files.id}: the tokenizer has no padding token, so that texts of several lengths "
            "cannot be encoded together; msq takes encoders such as BERT, no language models"
        )
    return tokenizer


def _limit(recipe: int | None, tokenizer: Any, transformer: nn.Module) -> int | None:
    """How many tokens the model reads: the least of what folder, tokenizer and model say."""
    own = tokenizer.model_max_length
    limits = [recipe, own if own < _TOKENIZERS_OWN_MAXIMUM else None]
    for path, module in transformer.named_modules():
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # Models with a padding position (RoBERTa, MPNet) count from the one after it.
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - skipped)
    return min((n for n in limits if n is not None), default=None)


def _describe(
    files: WeightFiles, config: Any, recipe: Recipe, tokenizer: Any, limit: int | None
) -> str:
    """The architecture in words; the last one is a hash of what else changes outputs.

    These are the configuration, the dense layers, the limit, and the tokenizer by what it does:
    the same one can be saved in several files.
    """
    settings = {k: v for k, v in (files.read_json(CONFIG_FILE) or {}).items() if k not in _SILENT}
    behaviour = [
        settings,
        limit,
        recipe.lower,
        [[d.inputs, d.outputs, d.activation, sha256_file(d.file)] for d in recipe.dense],
        sorted(tokenizer.get_vocab().items()),
        [tokenizer(probe)["input_ids"] for probe in _PROBES],
    ]
    digest = hashlib.sha256(json.dumps(behaviour, sort_keys=True).encode()).hexdigest()
    words = [config.model_type]
    for letter, field in (("d", "num_hidden_layers"), ("w", "hidden_size"),
                          ("h", "num_attention_heads")):  # fmt: skip
        words += [f"{letter}{value}"] if isinstance(value := getattr(config, field, 0), int) else []
    return f"{_ARCHITECTURE} {' '.join(words)} cfg {digest[:8]}"


def is_text_model(architecture: str) -> bool:
    """Whether a spec's architecture is that of a text model of Hugging Face; else it is a CLIP."""
    return architecture.startswith(f"{_ARCHITECTURE} ")
