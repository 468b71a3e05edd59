"""The head in plain PyTorch: the readable specification that faster versions must equal.

Written from the equations of arXiv 2307.10763 (Sections 3.1 to 3.3), with these choices:

* the fusion `Q_0 = W_que [Q_l, Q_v]` is computed as `W_l Q_l[k] + W_v Q_v`, which is equal and
  needs B + K products in place of B x K;
* `Q_l` = start (a buffer: text embeddings, or random vectors) + a learned offset that starts at
  zero, so that other classes can take the place of the trained ones;
* the decoder is the standard one (post-norm, ReLU, final LayerNorm); position codes go to queries
  and keys only (the tildes of Eq. 4 and 5), a fixed sin/cos code for the tokens.

The switches `encoder_layers`, `memory_position`, `label_projection` and `start` turn it into what
the authors' code computes; `msq.head.official` reads and writes their parameter names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from msq.config import HeadConfig
from msq.errors import UsageError
from msq.head.classifiers import make_classifier
from msq.head.layers import LAYER_NORM_EPS, DecoderLayer, EncoderLayer
from msq.head.masks import Masks, Part, Site
from msq.head.position_code import MOST_CODED_TOKENS, position_code
from msq.head.start import initialise, random_rows


class MSQNet(nn.Module):
    """Query fusion, decoder (after an encoder of the tokens, if any) and classifier.

    Built by hand it has no clips to be fitted to: the biases of its classifier start at 0, not at
    the log-odds of the classes, and `fuse_image` is not scaled to the image features (`head.start`
    `fitted`; `torch` needs neither). `msq.head.build_head` takes both from the training clips, as
    `msq train-head` does.

    Args:
        config: shape and switches.
        classes: K, the classes it is trained on.
        token_width: D' of the video encoder's tokens.
        image_width: D'' of the image feature; needed for `multimodal` queries.
        text: [K, D_text] embeddings of the class names; needed for `text` and `multimodal`
            queries, for the `text` classifier, and for the default width.
        seed: of the start.

    Attributes:
        ignored_keys: what `from_official` found and left aside: the encoders' own weights.

    Raises:
        UsageError: something the configuration needs is missing, or H does not divide D.
    """

    start: Tensor
    text: Tensor | None
    ignored_keys: tuple[str, ...] = ()

    def __init__(
        self,
        config: HeadConfig,
        *,
        classes: int,
        token_width: int,
        image_width: int | None = None,
        text: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        vanilla = config.queries == "vanilla"
        width = _checked_width(config, classes, token_width, image_width, text)
        self.config, self.width, self.classes, self.seed = config, width, classes, seed

        uses_text = text is not None and (not vanilla or config.classifier == "text")
        self.register_buffer("text", text.detach().float().clone() if uses_text else None)  # type: ignore[union-attr]
        if vanilla:
            self.register_buffer("start", random_rows(classes, width, seed))
        start_width = self.start.shape[1] if vanilla else self.text.shape[1]  # type: ignore[union-attr]
        fused = config.queries == "multimodal"
        projected = fused or config.label_projection == "always"
        if not projected and start_width != width:
            raise UsageError(
                f"head.label_projection='fused' with queries={config.queries!r} takes the text "
                f"embeddings as queries: expected embeddings of width {width}, found {start_width}"
            )

        self.memory = nn.Linear(token_width, width, bias=False)  # W_out
        self.fuse_label = nn.Linear(start_width, width, bias=False) if projected else None  # W_l
        self.fuse_image = (
            nn.Linear(image_width, width, bias=False)  # W_v
            if fused and image_width is not None
            else None
        )
        self.offset = nn.Parameter(torch.empty(classes, start_width))
        self.query_position = (
            nn.Parameter(torch.empty(classes, width)) if config.query_position else None
        )
        shape = (width, config.heads, config.ffn or 4 * width, config.dropout)
        self.memory_dropout = nn.Dropout(config.dropout)
        self.encoder = nn.ModuleList(EncoderLayer(*shape) for _ in range(config.encoder_layers))
        self.encoder_norm = (
            nn.LayerNorm(width, eps=LAYER_NORM_EPS) if config.encoder_layers else None
        )
        self.layers = nn.ModuleList(DecoderLayer(*shape) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.classifier = make_classifier(config.classifier, classes, width, text)
        initialise(self, seed)

    @classmethod
    def from_official(
        cls, state_dict: Mapping[str, Any], *, heads: int = 8, dropout: float = 0.1
    ) -> MSQNet:
        """A head with weights saved from the authors' classes, in evaluation mode.

        Shapes decide K, the widths and the number of layers; see `msq.head.official` for the
        names. It takes band-pooled tokens and CLIP's poolers, as theirs does.

        Args:
            state_dict: of their model; the encoders' weights in it are left aside, by name in
                `ignored_keys`.
            heads: H, which no shape tells; theirs is 8.
            dropout: in further training; theirs is 0.1.

        Raises:
            WeightsError: missing or unexpected keys, other shapes, values that are not finite.
        """
        from msq.head.official import from_official  # which imports this module

        return from_official(state_dict, heads=heads, dropout=dropout)

    def forward(
        self,
        tokens: Tensor,
        image: Tensor | None = None,
        *,
        text: Tensor | None = None,
        trained: Tensor | None = None,
        intermediates: bool = False,
        masks: Masks | None = None,
    ) -> dict[str, Tensor]:
        """Score every class for every clip.

        With neither `text` nor `trained` the classes are those the head was trained on. Otherwise
        K' classes take their place: offsets (and learned positions) are zero for those never
        trained, and with `vanilla` queries these start from fresh seeded random vectors.

        Args:
            tokens: [B, S, D'] from the video encoder.
            image: [B, D''] image feature averaged over frames; read by `multimodal` queries only.
            text: [K', D_text] embeddings of other classes, by the same text encoder and prompt.
            trained: [K'] for each of them its index among the trained classes, -1 for none;
                None means that none was trained.
            intermediates: also return what lies between.
            masks: of dropout, in either mode; without them torch draws its own in training.

        Returns:
            "logits": [B, K], before sigmoid or softmax; [B, K'] with other classes.
            With `intermediates` also
            "memory": [B, S, D], the tokens F as the decoder reads them;
            "queries": [L + 1, B, K, D], Q_0 and the output of each layer, before the final norm;
            "self_attention": [L, B, H, K, K] probabilities, rows sum to one;
            "cross_attention": [L, B, H, K, S] likewise;
            "encoder_attention": [layers, B, H, S, S] likewise, where there is an encoder.

        Raises:
            UsageError: `image` or `text` is needed and missing, or a `per-class` classifier is
                asked for a class it was not trained on, or more tokens than are coded.
        """
        label, position, weight, bias = self.class_parts(text, trained)
        if self.fuse_label is not None:
            label = self.fuse_label(label)  # A[k]
        x = label.expand(tokens.shape[0], -1, -1)
        if self.fuse_image is not None:
            if image is None:
                raise UsageError("queries='multimodal' needs `image` [B, D''], found None")
            x = x + self.fuse_image(image)[:, None]  # + c[b]
        memory, memory_key, encoder_maps = self._memory(tokens, intermediates, masks)

        queries, self_maps, cross_maps = [x], [], []
        for i, layer in enumerate(self.layers):
            drop = None if masks is None else masks.at(Part.decoder, i)
            x, self_map, cross_map = layer(x, memory, memory_key, position, intermediates, drop)
            queries.append(x)
            self_maps.append(self_map)
            cross_maps.append(cross_map)
        logits = (self.norm(x) * weight).sum(-1) + bias  # Eq. 7
        if not intermediates:
            return {"logits": logits}
        found = {
            "logits": logits,
            "memory": memory,
            "queries": torch.stack(queries),
            "self_attention": torch.stack(self_maps),
            "cross_attention": torch.stack(cross_maps),
        }
        if encoder_maps:
            found["encoder_attention"] = torch.stack(encoder_maps)
        return found

    def _memory(
        self, tokens: Tensor, want_maps: bool, masks: Masks | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """What the decoder reads [B, S, D], the same as keys, and the encoder's attention."""
        self.require_coded(tokens.shape[1])
        memory = self.memory(tokens)
        kind, maps = self.config.memory_position, []
        code = None
        if kind != "none":
            code = position_code(memory.shape[1], self.width, memory.device, memory.dtype)
        if kind == "sincos-input":
            memory = memory + code
            if masks is None:
                memory = self.memory_dropout(memory)
            else:
                memory = masks.at(Part.input).drop(Site.self_residual, memory)
        for i, layer in enumerate(self.encoder):
            drop = None if masks is None else masks.at(Part.encoder, i)
            memory, weights = layer(memory, want_maps, drop)
            if weights is not None:
                maps.append(weights)
        if self.encoder_norm is not None:
            memory = self.encoder_norm(memory)
        return memory, memory + code if kind == "sincos" else memory, maps

    def require_coded(self, tokens: int) -> None:
        """Refuse more tokens than the authors' position code is long.

        Raises:
            UsageError: with `memory_position` `sincos-input` only.
        """
        if self.config.memory_position == "sincos-input" and tokens > MOST_CODED_TOKENS:
            raise UsageError(
                f"head.memory_position='sincos-input': expected at most {MOST_CODED_TOKENS} "
                f"tokens, found {tokens}; extract with --pooling band"
            )

    def class_parts(
        self, text: Tensor | None, trained: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Label embedding [K, D_l], position [K, D], classifier weight [K, D] and bias [K]."""
        vanilla = self.config.queries == "vanilla"
        if text is None and trained is None:
            start = self.start if vanilla else self.text
            assert start is not None  # the constructor saw to it
            return start + self.offset, self.query_position, *self.classifier(self.text)
        if text is None and self.text is not None:
            raise UsageError("other classes need `text` [K', D_text], found None")
        if text is not None:
            text = text.to(self.offset)
        if trained is None:
            assert text is not None
            trained = torch.full((text.shape[0],), -1)
        trained = trained.to(self.offset.device)
        known = (trained >= 0)[:, None].to(self.offset)
        row = trained.clamp(min=0)
        if vanilla:
            fresh = random_rows(trained.shape[0], self.start.shape[1], self.seed + 1)
            start = torch.where(known > 0, self.start[row], fresh.to(self.offset))
        else:
            assert text is not None
            start = text
        position = None if self.query_position is None else self.query_position[row] * known
        return start + self.offset[row] * known, position, *self.classifier(text, trained)


def _checked_width(
    config: HeadConfig, classes: int, tokens: int, image: int | None, text: Tensor | None
) -> int:
    """The width D of a head, once all is there that it needs.

    Raises:
        UsageError: see `MSQNet`.
    """
    if text is None and (config.queries != "vanilla" or config.classifier == "text"):
        raise UsageError(
            f"queries={config.queries!r} with classifier={config.classifier!r} needs text "
            f"embeddings of the {classes} classes, found none; extract with a text encoder, "
            "or use queries='vanilla' with classifier 'per-class' or 'shared'"
        )
    if text is not None and text.shape[0] != classes:
        raise UsageError(f"text: expected {classes} rows, one per class, found {len(text)}")
    if config.queries == "multimodal" and image is None:
        raise UsageError(
            "queries='multimodal' needs image features, found none; extract with an image "
            "encoder, or use queries='text'"
        )
    width = config.width or (tokens if text is None else text.shape[1])
    if width % config.heads:
        fits = [h for h in range(1, min(width, 64) + 1) if width % h == 0]
        raise UsageError(f"head.heads: expected a divisor of width {width} {fits}, "
                         f"found {config.heads}")  # fmt: skip
    return width
