"""The honest opponent: the head as a careful PyTorch user would write it for torch.compile.

Packed q, k and v, the keys and values of all layers in one product, the first layer factorised over
labels and clips, `scaled_dot_product_attention`, torch's own dropout. No custom backward pass, no
mask bits, no kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msq.head.model import MSQNet
from msq.head.packed_parameters import pack


class CleanDecoder(nn.Module):
    """Computes what a head without encoder and positions does, from a copy of its parameters.

    Args:
        head: with multi-modal queries and a `per-class` classifier.
    """

    text: Tensor

    def __init__(self, head: MSQNet) -> None:
        super().__init__()
        c = head.config
        self.layers, self.heads, self.width, self.p = c.layers, c.heads, head.width, c.dropout
        packed = pack(dict(head.named_parameters()), c.layers)
        # Parameter names may not hold dots.
        self.weights = nn.ParameterDict(
            {name.replace(".", "_"): tensor.detach().clone() for name, tensor in packed.items()}
        )
        assert head.text is not None
        self.register_buffer("text", head.text.clone())

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        """Logits [B, K] of tokens [B, S, D'] and image [B, D'']."""
        clips = len(tokens)
        label = F.linear(self.text + self.weights["offset"], self.weights["fuse_label_weight"])
        clip = F.linear(image, self.weights["fuse_image_weight"])
        memory = F.linear(tokens, self.weights["memory_weight"])
        kv = self._linear("layers_cross_attention_kv", memory)
        kv = kv.view(clips, -1, 2 * self.layers, self.heads, self.width // self.heads)
        keys_values = kv.permute(2, 0, 3, 1, 4).unbind(0)
        x, qkv = label + clip[:, None], self._first(label, clip)
        for i in range(self.layers):
            name = f"layers_{i}"
            if i:
                qkv = self._linear(f"{name}_self_attention_qkv", x)
            q, k, v = self._split(qkv, 3)
            x = self._close(x, self._attend(q, k, v), name, "self")
            (q,) = self._split(self._linear(f"{name}_cross_attention_q", x), 1)
            x = self._close(x, self._attend(q, *keys_values[2 * i : 2 * i + 2]), name, "cross")
            hidden = self._drop(F.relu(self._linear(f"{name}_expand", x)))
            y = self._linear(f"{name}_contract", hidden)
            x = self._norm(f"{name}_norm_ffn", x + self._drop(y))
        x = self._norm("norm", x)
        bias = self.weights["classifier_bias"]
        scores: Tensor = (x * self.weights["classifier_weight"]).sum(-1) + bias
        return scores

    def _first(self, label: Tensor, clip: Tensor) -> Tensor:
        """q, k and v [B, K, 3 D] of A[k] + c[b]; what c adds to the keys softmax cancels."""
        own = self._linear("layers_0_self_attention_qkv", label)
        weight = self.weights["layers_0_self_attention_qkv_weight"]
        query = F.linear(clip, weight[: self.width])
        value = F.linear(clip, weight[2 * self.width :])
        packed: Tensor = own + torch.cat([query, torch.zeros_like(query), value], dim=1)[:, None]
        return packed

    def _close(self, x: Tensor, mixed: Tensor, name: str, which: str) -> Tensor:
        """Output projection, dropout, residual and norm."""
        y = self._linear(f"{name}_{which}_attention_out", mixed)
        return self._norm(f"{name}_norm_{which}", x + self._drop(y))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = self.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return mixed.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[B, K, parts D] -> parts of [B, H, K, d]."""
        b, k, _ = x.shape
        return x.view(b, k, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}_weight"], self.weights[f"{name}_bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}_weight"], self.weights[f"{name}_bias"]
        return F.layer_norm(x, (self.width,), weight, bias)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)
