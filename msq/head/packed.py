"""The packed head: what `msq.head.model` says, in fewer and larger operations.

* q, k and v of a self-attention are one matrix product; the keys and values of all decoder layers
  are one, since all read the same tokens.
* Q_0[b, k] = A[k] + c[b] is projected in its parts: K + B rows in place of B K. What c adds to the
  keys shifts every score of a row alike, so softmax cancels it and it is not computed.
* Learned positions and the position code of the tokens are projected apart and added.
* Cross-attention takes the absorbed form where a recorded table says that it is faster
  (`msq.head.absorbed`).
* The blocks have backward passes of their own (`msq.head.packed_blocks`).

It has no parameters: it reads those of an `MSQNet`, and gives them their gradients;
`msq.head.packed_parameters` says which of them lie side by side. The blocks of its layers are in
`msq.head.packed_layers`.

In bf16 the rows between the blocks and both sides of every large matrix product are bf16. In
float32 stay: the parameters and their gradients as the optimiser sees them, the optimiser, the
fusion of the queries and the projection of the tokens, LayerNorm and softmax inside, the
classifier, and the loss. Sums in matrix products are float32.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional as F

from msq.errors import UsageError
from msq.head.flat import FlatParameters
from msq.head.masks import Masks, Part, Site
from msq.head.model import MSQNet
from msq.head.packed_kernels import KernelBlocks
from msq.head.packed_layers import PackedLayers
from msq.head.packed_parameters import PackedParameters
from msq.head.position_code import position_code


class PackedHead:
    """A head that computes what `model` does, from the parameters of `model`.

    Args:
        model: the plain head.
        precision: `fp32` (the dtype of the parameters) or `bf16`.
        flat: the parameters in one buffer, made with `flat_parameters`; gradients then go there.
            Without it the parameters are joined at each call, and have their own gradients.
        frozen: join them once, for inference only.
        absorb: use the absorbed cross-attention; None asks the table.
        kernels: names of the operations that run a Triton kernel (`msq.head.kernel_choice`);
            `absorbed_cross` means the absorbed form, `cross_attention` the other one.
        triton: False runs the references of those operations in place of their kernels, for tests.
    """

    def __init__(
        self,
        model: MSQNet,
        *,
        precision: str = "fp32",
        flat: FlatParameters | None = None,
        frozen: bool = False,
        absorb: bool | None = None,
        kernels: Collection[str] = (),
        triton: bool = True,
    ) -> None:
        self.model = model
        self.parameters = PackedParameters(model, precision, flat, frozen)
        self.blocks = KernelBlocks(kernels, model.config.heads, triton=triton)
        self.layers = PackedLayers(self.parameters, self.blocks, absorb)

    def __call__(
        self,
        tokens: Tensor,
        image: Tensor | None = None,
        *,
        text: Tensor | None = None,
        trained: Tensor | None = None,
        masks: Masks | None = None,
    ) -> dict[str, Tensor]:
        """Score every class for every clip: arguments, result and errors of `MSQNet.forward`.

        There are no `intermediates`, and `masks` None means no dropout, whatever the mode.

        Args:
            tokens: [B, S, D'].
            image: [B, D''].
            text: [K', D_text].
            trained: [K'].
            masks: of dropout.

        Returns:
            "logits": [B, K], or [B, K'].
        """
        self.parameters.begin()
        model, layers, clips = self.model, self.layers, len(tokens)
        label, position, weight, bias = self.parameters.of_classes(text, trained)
        if model.fuse_label is not None:
            label = model.fuse_label(label)  # A[k]
        fused = None
        if model.fuse_image is not None:
            if image is None:
                raise UsageError("queries='multimodal' needs `image` [B, D''], found None")
            fused = model.fuse_image(image)  # c[b]
        memory = self._keys_and_values(tokens, masks)
        cross = layers.cross_form(len(label), tokens)
        x: Tensor | None = None
        for i in range(model.config.layers):
            name, drop = f"layers.{i}", None if masks is None else masks.at(Part.decoder, i)
            if x is None:
                x = layers.first_self_block(label, fused, position, clips, drop)
            else:
                x = layers.self_block(x, clips, name, position, drop)
            x = cross(x, memory[i], name, position, drop)
            x = layers.ffn_block(x, name, drop)
        assert x is not None  # there is at least one layer
        return {"logits": self._classify(x, clips, weight, bias)}

    def _keys_and_values(self, tokens: Tensor, masks: Masks | None) -> list[tuple[Tensor, ...]]:
        """For every decoder layer its k and v, each [B, S, H, d].

        For the operation that takes them side by side they are one tensor [B, S, 2 D].
        """
        model, (clips, length, _) = self.model, tokens.shape
        model.require_coded(length)
        kind, count, width = model.config.memory_position, model.config.layers, model.width
        low, layers, memory = self.parameters.dtype, self.layers, model.memory(tokens)
        code = None
        if kind != "none":
            code = position_code(length, width, memory.device, memory.dtype)
        if kind == "sincos-input":
            memory = memory + code
            if masks is not None:
                memory = masks.at(Part.input).drop(Site.self_residual, memory)
        rows = memory.reshape(clips * length, width).to(low)
        for i in range(model.config.encoder_layers):
            name, drop = f"encoder.{i}", None if masks is None else masks.at(Part.encoder, i)
            rows = layers.ffn_block(layers.self_block(rows, clips, name, None, drop), name, drop)
        if model.encoder_norm is not None:
            rows = model.encoder_norm(rows.to(memory.dtype)).to(low)
        weight, bias = self.parameters.linear("layers.cross_attention.kv")
        made = F.linear(rows, weight, bias).view(clips, length, 2 * count, width)
        if kind == "sincos" and code is not None:
            added = F.linear(code.to(low), weight).view(length, count, 2, width)
            only_keys = torch.stack([added[:, :, 0], torch.zeros_like(added[:, :, 0])], dim=2)
            made = made + only_keys.view(length, 2 * count, width)
        if "cross_attention" in self.blocks and "absorbed_cross" not in self.blocks:
            return [(kv,) for kv in made.view(clips, length, count, 2 * width).unbind(2)]
        parts = made.view(clips, length, 2 * count, self.blocks.heads, -1).unbind(2)
        return list(zip(parts[0::2], parts[1::2], strict=True))

    def _classify(self, x: Tensor, clips: int, weight: Tensor, bias: Tensor) -> Tensor:
        """Eq. 7 on rows [B K, D]."""
        normed: Tensor = self.model.norm(x.to(self.model.norm.weight.dtype))
        if len(weight) == 1:
            scores = (normed @ weight[0]).view(clips, -1)
        else:
            by_class = normed.view(clips, len(weight), -1).transpose(0, 1)  # [K, B, D]
            scores = torch.bmm(by_class, weight[:, :, None])[:, :, 0].t()
        return scores + bias
