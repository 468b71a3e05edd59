"""The network of a text encoder: a transformer of Hugging Face and what follows it.

transformers fills whatever a file lacks with random numbers and goes on; here every name has to
fit, heads for other tasks aside.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msq.errors import UsageError, WeightsError
from msq.extract.encoders.hf_text_files import CONFIG_FILE
from msq.extract.encoders.hf_text_recipe import Dense, TextPooling
from msq.extract.encoders.weights import (
    WeightFiles,
    check_finite,
    load_strictly,
    read_tensors,
    shortened,
)


class SentenceModel(nn.Module):
    """A transformer with what is done to its last hidden states.

    Args:
        transformer: of the library transformers.
        pooling: `pooler`, `mean` or `cls`.
        dense: layers after the pooling.
        unit: scale to unit length at the end.
    """

    def __init__(
        self,
        transformer: nn.Module,
        pooling: TextPooling,
        dense: Sequence[nn.Module] = (),
        unit: bool = False,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.pooling = pooling
        self.dense = nn.Sequential(*dense)
        self.unit = unit
        # Tokenizers may return more than the model reads, such as BERT's for DistilBERT.
        self._reads = set(inspect.signature(transformer.forward).parameters)

    def encode_text(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """One vector per text.

        Args:
            inputs: `input_ids` and `attention_mask` [K, n], and what else the tokenizer gives.

        Returns:
            [K, D].
        """
        out = self.transformer(**{k: v for k, v in inputs.items() if k in self._reads})
        if self.pooling == "pooler":
            vectors = out.pooler_output
        elif self.pooling == "cls":
            vectors = out.last_hidden_state[:, 0]
        else:
            real = inputs["attention_mask"].unsqueeze(-1)
            states = out.last_hidden_state.float()
            vectors = (states * real).sum(1) / real.sum(1).clamp_min(1)
        vectors = self.dense(vectors)
        return F.normalize(vectors, dim=-1) if self.unit else cast(Tensor, vectors)


def load_transformer(files: WeightFiles) -> tuple[nn.Module, bool]:
    """The model in float32, and whether it has a pooled output of its own.

    Where only the weights of the pooled output are missing, it is taken away.

    Raises:
        UsageError: transformers is not installed.
        WeightsError: not a text model, or weights that are not the configuration's, or damaged.
    """
    transformers = import_transformers()
    name = files.id
    try:
        with quiet(transformers):
            config = transformers.AutoConfig.from_pretrained(
                files.folder, local_files_only=True, trust_remote_code=False
            )
            kind = _model_class(transformers, config, name)
            model, found = kind.from_pretrained(
                None,
                config=config,
                state_dict=read_tensors(files.file),
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{name}: transformers {transformers.__version__} cannot build this model: "
            f"{first_line(error)}"
        ) from error
    shapes = [f"{key} (expected {list(own)}, found {list(there)})"
              for key, there, own in sorted(found["mismatched_keys"])]  # fmt: skip
    missing = sorted(found["missing_keys"])
    pooler = [key for key in missing if key.startswith("pooler.")]
    unexpected = _of_the_model(model, kind.base_model_prefix, found["unexpected_keys"])
    for what, names in (
        ("tensors of another shape", shapes),
        ("missing", [key for key in missing if key not in pooler]),
        ("unexpected", unexpected),
    ):
        if names:
            raise WeightsError(
                f"{name}: the weights are not those that {CONFIG_FILE} describes: {what}: "
                f"{shortened(names)}"
            )
    has_pooler = isinstance(getattr(model, "pooler", None), nn.Module) and not pooler
    if pooler:
        model.pooler = None
    check_finite(model, name)
    return cast(nn.Module, model), has_pooler


def _of_the_model(model: nn.Module, prefix: str, names: Iterable[str]) -> list[str]:
    """Those of the names that the model itself should have had.

    What lies outside of it are heads for other tasks; old files also hold running numbers, and a
    pooled output may be there for a model that is used without.
    """
    parts = {child for child, _ in model.named_children()}
    found = []
    for name in sorted(names):
        own = name.removeprefix(f"{prefix}.")
        part, _, leaf = own.partition(".")
        inside = part in parts or own != name
        if inside and part != "pooler" and leaf not in ("position_ids", "token_type_ids"):
            found.append(name)
    return found


def _model_class(transformers: Any, config: Any, name: str) -> Any:
    """The class of the text model that a configuration describes; of T5 the encoder."""
    if hasattr(config, "vision_config") or not hasattr(config, "vocab_size"):
        raise WeightsError(
            f"{name}: expected the {CONFIG_FILE} of a text model, found model_type "
            f"{config.model_type!r}; a CLIP is named as open_clip names it, such as ViT-B-16/openai"
        )
    with torch.device("meta"):  # the class is wanted, and no weights yet
        try:
            return type(transformers.AutoModelForTextEncoding.from_config(config))
        except ValueError:  # not among those with an encoder of their own
            if config.is_encoder_decoder:
                raise
            return type(transformers.AutoModel.from_config(config))


def dense_layer(dense: Dense) -> nn.Module:
    """A dense layer with its weights.

    Raises:
        WeightsError: they are of another shape or damaged.
    """
    linear = nn.Linear(dense.inputs, dense.outputs, bias=dense.bias)
    state = {k.removeprefix("linear."): v for k, v in read_tensors(dense.file).items()}
    load_strictly(linear, state, str(dense.file))
    return nn.Sequential(linear, nn.Tanh()) if dense.activation == "Tanh" else linear


def import_transformers() -> Any:
    """The library transformers, which is an extra.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            "a text encoder of Hugging Face needs the library transformers: "
            "pip install 'msq[text]'; CLIP's text tower does without it"
        ) from error
    return transformers


def first_line(error: Exception) -> str:
    """What an error of transformers says, without the pages that follow."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without bars and reports on stderr: msq says itself what does not fit."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
