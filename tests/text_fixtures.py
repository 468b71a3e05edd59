"""Text models with random weights and a small vocabulary, written as they lie on the hub.

Load this file by its path (`runpy.run_path`), as `tests/encoder_fixtures.py` says:
tests are no package.
"""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import torch
import transformers

_fixtures = runpy.run_path(str(Path(__file__).with_name("encoder_fixtures.py")))

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "bird", "walk", "the",
              "sea", "over", "fly", "##ing", "run", "##n", "feed", "##s", "sit", "open",
              "door"]  # fmt: skip
SMALL: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SMALL),
    "mpnet": lambda: transformers.MPNetConfig(**SMALL),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=len(VOCABULARY), dim=24, n_layers=2, n_heads=4, hidden_dim=48,
        max_position_embeddings=20,
    ),
    "roberta": lambda: transformers.RobertaConfig(**SMALL, pad_token_id=0),
    "t5": lambda: transformers.T5Config(
        vocab_size=len(VOCABULARY), d_model=24, d_kv=6, d_ff=48, num_layers=2, num_heads=4,
        pad_token_id=0,
    ),
}  # fmt: skip
CLASSES = {
    "bert": "BertModel",
    "mpnet": "MPNetModel",
    "distilbert": "DistilBertModel",
    "roberta": "RobertaModel",
    "t5": "T5EncoderModel",
}


def write_text_folder(folder: Path, kind: str = "bert", seed: int = 0, **tokenizer: Any) -> Any:
    """Writes a model with random weights and a tokenizer as they lie on the hub; returns it."""
    torch.manual_seed(seed)
    model = getattr(transformers, CLASSES[kind])(CONFIGS[kind]()).eval()
    _fixtures["randomise"](model, seed, std=0.2)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | tokenizer))
    return model


def write_modules(folder: Path, *steps: str, **pooling: bool) -> None:
    """Writes the files of sentence-transformers; `steps` follow the transformer."""
    listed = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    ]
    for number, step in enumerate(steps, start=1):
        path = f"{number}_{step}"
        (folder / path).mkdir(exist_ok=True)
        listed.append({"idx": number, "name": str(number), "path": path,
                       "type": f"sentence_transformers.models.{step}"})  # fmt: skip
    modes = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": False,
             "pooling_mode_max_tokens": False}  # fmt: skip
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 24, **modes, **pooling})
    )
    (folder / "modules.json").write_text(json.dumps(listed))
