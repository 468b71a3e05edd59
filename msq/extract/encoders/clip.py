"""CLIP's two towers as encoders of images and of text.

Two kinds of output, stored under different names because they are not comparable. `projected` is
the joint space, in which an image and its caption are close (open_clip's `encode_image` and
`encode_text`). `pooler` is what the authors of MSQNet use: the global token before the last
projection, 768 channels for images and 512 for text with ViT-B/16, in two unrelated spaces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from msq.errors import UsageError
from msq.extract.encoders.encoder import Encoder
from msq.extract.encoders.prompts import Prompt, averaged, templates_of
from msq.extract.encoders.spec import EncoderSpec

Tokenizer = Callable[[list[str]], Tensor]
_TEXT_BATCH = 256
_WORD = re.compile(r"[^\W\d_]+")


class ImageEncoder(Encoder):
    """Frames to one vector each, [B, T, D'']; averaging over frames is left to the caller."""

    def __call__(self, video: Tensor) -> Tensor:
        """Encodes a batch.

        Args:
            video: [B, T, 3, h, w], normalised with the spec's mean and std, on any device. Any T
                will do, whatever the spec's: each frame is seen by itself.

        Returns:
            [B, T, D''] float32, not normalised to unit length.

        Raises:
            UsageError: if h and w are not the spec's.
        """
        self._check_video(video, None)
        return self._run(self._vectors, video.to(self.device))

    def _vectors(self, video: Tensor) -> Tensor:
        b, t = video.shape[:2]
        return cast(
            Tensor, cast(Any, self.model).encode_image(video.flatten(0, 1)).unflatten(0, (b, t))
        )


class TextEncoder(Encoder):
    """Class names to vectors [K, D].

    Attributes:
        tokenizer: a list of strings to token ids [K, context length].
        vocabulary: the words that mean something to the model, where it is so small that this
            matters; None for a general one.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: EncoderSpec,
        tokenizer: Tokenizer,
        vocabulary: frozenset[str] | None = None,
    ) -> None:
        super().__init__(model, spec)
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary

    def __call__(self, texts: Sequence[str], prompt: Prompt = "{}") -> Tensor:
        """Encodes names, each put into the prompt in place of `{}`.

        Args:
            texts: K strings.
            prompt: template with one or more `{}`; several templates are averaged as
                `msq.extract.encoders.prompts` says.

        Returns:
            [K, D] float32, not normalised to unit length.

        Raises:
            UsageError: if the prompt has no `{}`, or `texts` is one string instead of several.
        """
        if isinstance(texts, str):
            raise UsageError(f"{self.spec.slug}: expected a list of strings, found one string")
        templates = templates_of(prompt)
        if len(templates) == 1:
            return self._encode([templates[0].replace("{}", text) for text in texts])
        return averaged(
            self._encode([template.replace("{}", text) for text in texts]) for template in templates
        )

    def _encode(self, filled: list[str]) -> Tensor:
        parts = [
            self._run(cast(Any, self.model).encode_text, self.tokenizer(batch).to(self.device))
            for batch in (filled[i : i + _TEXT_BATCH] for i in range(0, len(filled), _TEXT_BATCH))
        ]
        if not parts:
            return torch.empty(0, self.spec.channels, device=self.device)
        return torch.cat(parts)

    def unknown_words(self, text: str) -> list[str]:
        """Words of a text that mean nothing to the model, in order, each once.

        Only encoders with a small vocabulary have any; for them such a word is a row of letters
        never seen in training.
        """
        if self.vocabulary is None:
            return []
        words = (word.lower() for word in _WORD.findall(text))
        return list(dict.fromkeys(w for w in words if w not in self.vocabulary))

    def too_long(self, texts: Sequence[str], prompt: Prompt = "{}") -> list[str]:
        """Those of the texts that do not fit into the model's context, with any template.

        What is beyond it is cut off before the model sees it.
        """
        return [
            text
            for text in texts
            if any(self._is_cut(t.replace("{}", text)) for t in templates_of(prompt))
        ]

    def _is_cut(self, filled: str) -> bool:
        encode = getattr(self.tokenizer, "encode", None)
        context = getattr(self.tokenizer, "context_length", None)
        # A start and an end token stand around the text's own.
        return encode is not None and context is not None and len(encode(filled)) + 2 > context
