"""The head in plain PyTorch: the readable specification that faster versions must equal.

Written from the equations of arXiv 2307.10763 (Sections 3.1 to 3.3), with these choices:

* the fusion `Q_0 = W_que [Q_l, Q_v]` is computed as `W_l Q_l[k] + W_v Q_v`, which is equal and
  needs B + K products in place of B x K;
* `Q_l` = start (a buffer: text embeddings, or random vectors) + a learned offset that starts at
  zero, so that other classes can take the place of the trained ones;
* the decoder is the standard one (post-norm, ReLU, final LayerNorm); position codes go to queries
  and keys only (the tildes of Eq. 4 and 5), a fixed sin/cos code for the tokens.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msq.config import HeadConfig
from msq.errors import UsageError

LAYER_NORM_EPS = 1e-5


class Attention(nn.Module):
    """Multi-head attention with separate projections.

    Args:
        width: D.
        heads: H, a divisor of D.
        dropout: of the attention probabilities, in training.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, want_map: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `query` [B, K, D] to `key` and `value` [B, S, D].

        Returns:
            [B, K, D], and the probabilities before dropout [B, H, K, S] (None unless `want_map`).
        """
        q, k, v = self._split(self.q(query)), self._split(self.k(key)), self._split(self.v(value))
        p = self.dropout if self.training else 0.0
        weights = None
        if want_map:
            weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
            mixed = F.dropout(weights, p) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return self.out(mixed.transpose(1, 2).flatten(2)), weights

    def _split(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, H, S, D / H]."""
        b, s, d = x.shape
        return x.view(b, s, self.heads, d // self.heads).transpose(1, 2)


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward (Eq. 4 to 6), each with residual and norm.

    Args:
        width: D.
        heads: H.
        ffn: hidden width of the feed-forward part.
        dropout: of attention probabilities, of the hidden layer and of each residual branch.
    """

    def __init__(self, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = Attention(width, heads, dropout)
        self.cross_attention = Attention(width, heads, dropout)
        self.expand = nn.Linear(width, ffn)
        self.contract = nn.Linear(ffn, width)
        self.norm_self = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.norm_cross = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.norm_ffn = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        memory_key: Tensor,
        query_position: Tensor | None,
        want_maps: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One layer: queries `x` [B, K, D] read the tokens `memory` [B, S, D].

        Args:
            x: queries.
            memory: tokens, used as values.
            memory_key: tokens with their position code, used as keys.
            query_position: [K, D] added to query and key, or None.
            want_maps: also return the attention probabilities.

        Returns:
            [B, K, D], self-attention [B, H, K, K] or None, cross-attention [B, H, K, S] or None.
        """
        placed = x if query_position is None else x + query_position
        y, self_map = self.self_attention(placed, placed, x, want_maps)
        x = self.norm_self(x + self.dropout(y))
        placed = x if query_position is None else x + query_position
        y, cross_map = self.cross_attention(placed, memory_key, memory, want_maps)
        x = self.norm_cross(x + self.dropout(y))
        y = self.contract(self.dropout(F.relu(self.expand(x))))
        return self.norm_ffn(x + self.dropout(y)), self_map, cross_map


class MSQNet(nn.Module):
    """Query fusion, decoder and classifier over encoder outputs.

    Args:
        config: shape and switches.
        classes: K, the classes it is trained on.
        token_width: D' of the video encoder's tokens.
        image_width: D'' of the image feature; needed for `multimodal` queries.
        text: [K, D_text] embeddings of the class names; needed for `text` and `multimodal`
            queries, for the `text` classifier, and for the default width.
        seed: of the start.

    Raises:
        UsageError: something the configuration needs is missing, or H does not divide D.
    """

    start: Tensor
    text: Tensor | None

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
        if text is None and (not vanilla or config.classifier == "text"):
            raise UsageError(
                f"queries={config.queries!r} with classifier={config.classifier!r} needs text "
                f"embeddings of the {classes} classes, found none; extract with a text encoder, "
                "or use queries='vanilla' with classifier 'per-class' or 'shared'"
            )
        if text is not None and text.shape[0] != classes:
            raise UsageError(f"text: expected {classes} rows, one per class, found {len(text)}")
        if config.queries == "multimodal" and image_width is None:
            raise UsageError(
                "queries='multimodal' needs image features, found none; extract with an image "
                "encoder, or use queries='text'"
            )
        width = config.width or (token_width if text is None else text.shape[1])
        if width % config.heads:
            fits = [h for h in range(1, min(width, 64) + 1) if width % h == 0]
            raise UsageError(f"head.heads: expected a divisor of width {width} {fits}, "
                             f"found {config.heads}")  # fmt: skip
        self.config, self.width, self.classes, self.seed = config, width, classes, seed

        uses_text = text is not None and (not vanilla or config.classifier == "text")
        self.register_buffer("text", text.detach().float().clone() if uses_text else None)  # type: ignore[union-attr]
        if vanilla:
            self.register_buffer("start", _random_rows(classes, width, seed))
        start_width = self.start.shape[1] if vanilla else self.text.shape[1]  # type: ignore[union-attr]

        self.memory = nn.Linear(token_width, width, bias=False)  # W_out
        self.fuse_label = nn.Linear(start_width, width, bias=False)  # W_l
        self.fuse_image = (
            nn.Linear(image_width, width, bias=False)  # W_v
            if config.queries == "multimodal" and image_width is not None
            else None
        )
        self.offset = nn.Parameter(torch.empty(classes, start_width))
        self.query_position = (
            nn.Parameter(torch.empty(classes, width)) if config.query_position else None
        )
        ffn = config.ffn or 4 * width
        self.layers = nn.ModuleList(
            DecoderLayer(width, config.heads, ffn, config.dropout) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.classifier = _classifier(config.classifier, classes, width, text)
        initialise(self, seed)

    def forward(
        self,
        tokens: Tensor,
        image: Tensor | None = None,
        *,
        text: Tensor | None = None,
        trained: Tensor | None = None,
        intermediates: bool = False,
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

        Returns:
            "logits": [B, K], before sigmoid or softmax; [B, K'] with other classes.
            With `intermediates` also
            "memory": [B, S, D], the projected tokens F;
            "queries": [L + 1, B, K, D], Q_0 and the output of each layer, before the final norm;
            "self_attention": [L, B, H, K, K] probabilities, rows sum to one;
            "cross_attention": [L, B, H, K, S] likewise.

        Raises:
            UsageError: `image` or `text` is needed and missing, or a `per-class` classifier is
                asked for a class it was not trained on.
        """
        label, position, weight, bias = self._classes(text, trained)
        x = self.fuse_label(label).expand(tokens.shape[0], -1, -1)  # A[k]
        if self.fuse_image is not None:
            if image is None:
                raise UsageError("queries='multimodal' needs `image` [B, D''], found None")
            x = x + self.fuse_image(image)[:, None]  # + c[b]
        memory = self.memory(tokens)
        memory_key = memory
        if self.config.memory_position == "sincos":
            memory_key = memory + _code(memory.shape[1], self.width, memory.device, memory.dtype)

        queries, self_maps, cross_maps = [x], [], []
        for layer in self.layers:
            x, self_map, cross_map = layer(x, memory, memory_key, position, intermediates)
            queries.append(x)
            self_maps.append(self_map)
            cross_maps.append(cross_map)
        logits = (self.norm(x) * weight).sum(-1) + bias  # Eq. 7
        if not intermediates:
            return {"logits": logits}
        return {
            "logits": logits,
            "memory": memory,
            "queries": torch.stack(queries),
            "self_attention": torch.stack(self_maps),
            "cross_attention": torch.stack(cross_maps),
        }

    def _classes(
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
            fresh = _random_rows(trained.shape[0], self.start.shape[1], self.seed + 1)
            start = torch.where(known > 0, self.start[row], fresh.to(self.offset))
        else:
            assert text is not None
            start = text
        position = None if self.query_position is None else self.query_position[row] * known
        return start + self.offset[row] * known, position, *self.classifier(text, trained)


class PerClass(nn.Module):
    """Eq. 7: a weight vector and a bias for each trained class."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, width))
        self.bias = nn.Parameter(torch.empty(classes))

    def forward(self, text: Tensor | None, trained: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weight [K, D] and bias [K]; `trained` [K'] picks rows, and must not hold -1."""
        if trained is None:
            return self.weight, self.bias
        if bool((trained < 0).any()):
            raise UsageError(
                f"{int((trained < 0).sum())} of the {len(trained)} classes were never trained, and "
                "classifier 'per-class' has no weights for them; train with --classifier shared "
                "or --classifier text"
            )
        return self.weight[trained], self.bias[trained]


class Shared(nn.Module):
    """One weight vector and one bias for all classes: only the query tells them apart."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, width))
        self.bias = nn.Parameter(torch.empty(1))

    def forward(self, text: Tensor | None, trained: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weight [1, D] and bias [1], whatever the classes are."""
        return self.weight, self.bias


class FromText(nn.Module):
    """The weight vector of a class is an affine function of its text embedding; one bias."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.generate = nn.Linear(text_width, width)
        self.bias = nn.Parameter(torch.empty(1))

    def forward(self, text: Tensor | None, trained: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weight [K, D] from `text` [K, D_text], and bias [1]."""
        assert text is not None  # the constructor of MSQNet and its forward saw to it
        return self.generate(text), self.bias


def _classifier(kind: str, classes: int, width: int, text: Tensor | None) -> nn.Module:
    if kind == "per-class":
        return PerClass(classes, width)
    if kind == "shared":
        return Shared(width)
    assert text is not None
    return FromText(text.shape[1], width)


def sincos(tokens: int, width: int) -> Tensor:
    """The fixed position code [S, D]: sines in the even channels, cosines in the odd ones.

    The wavelengths run from 2 pi to 10000 * 2 pi, as in the first Transformer.
    """
    place = torch.arange(tokens, dtype=torch.float64)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10000.0) / width))
    code = torch.zeros(tokens, width, dtype=torch.float64)
    code[:, 0::2] = torch.sin(place * rate)
    code[:, 1::2] = torch.cos(place * rate)[:, : width // 2]
    return code


@functools.lru_cache(maxsize=32)
def _code(tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`sincos` where it is needed, made once; an ordinary tensor whatever mode asks first."""
    with torch.inference_mode(False):
        return sincos(tokens, width).to(device, dtype)


def _random_rows(rows: int, width: int, seed: int) -> Tensor:
    """Seeded standard normal [rows, width], made on the CPU so that every device gets the same."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def initialise(
    model: MSQNet, seed: int, *, image: Tensor | None = None, prior: Tensor | None = None
) -> None:
    """Set every parameter.

    | parameter | start |
    |---|---|
    | W_out, q, k, v, out, contract | normal, std 1 / sqrt(inputs) |
    | expand (before ReLU) | normal, std sqrt(2 / inputs) |
    | W_l, W_v | fitted to their inputs: queries of unit size |
    | classifier weight | normal, std 1 / sqrt(D) |
    | classifier generator | fitted to its inputs: weights of size 1 / sqrt(D) |
    | classifier bias | log-odds of the class (their mean where one bias serves all), else 0 |
    | label offset, query position, other biases | 0 |
    | LayerNorm | 1 and 0 |

    Fitted to inputs x: normal, std (size / sqrt(inputs)) / rms(x - mean(x)), then blind to the
    direction of mean(x). CLIP's embeddings share a large common part; without this the queries of
    all classes would start nearly equal.

    Args:
        model: the head.
        seed: of the draws, made in the order of `named_parameters`.
        image: [n, D''] image features of the training clips.
        prior: [K] log-odds of the classes in the training set.
    """
    generator = torch.Generator().manual_seed(seed)
    start = model.start if model.config.queries == "vanilla" else model.text
    fitted = {
        "fuse_label.weight": (start, 1.0),
        "fuse_image.weight": (image, 1.0),
        "classifier.generate.weight": (model.text, 1 / math.sqrt(model.width)),
    }
    for name, parameter in model.named_parameters():
        if not name.endswith("weight"):
            parameter.zero_()  # biases, label offset, query position
        elif parameter.ndim == 1:
            parameter.fill_(1.0)  # LayerNorm
        else:
            weight = torch.randn(parameter.shape, generator=generator) / math.sqrt(
                parameter.shape[1] / (2 if ".expand." in name else 1)
            )
            inputs, size = fitted.get(name, (None, 1.0))
            parameter.copy_(weight if inputs is None else size * _fitted(weight, inputs))
    if prior is not None:
        bias = model.get_parameter("classifier.bias")
        bias.copy_(prior if bias.shape == prior.shape else prior.mean().expand_as(bias))


def _fitted(weight: Tensor, inputs: Tensor) -> Tensor:
    """`weight` [D, n] made blind to the mean of `inputs` [N, n] and scaled by their spread."""
    inputs = inputs.detach().float().cpu()
    mean = inputs.mean(0)
    # Rows that are all equal (or a single one) have no spread: keep their mean then.
    if float((inputs - mean).square().mean()) <= 1e-6 * float(inputs.square().mean()):
        return weight / max(float(inputs.square().mean().sqrt()), 1e-6)
    direction = F.normalize(mean, dim=0)
    blind = weight - torch.outer(weight @ direction, direction)
    return blind / float((inputs - mean).square().mean().sqrt())
