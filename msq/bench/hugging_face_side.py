"""transformers' TimeSformer in the place of ours, for comparisons."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from msq.extract.encoders.timesformer import TimeSformer
from msq.extract.encoders.timesformer_names import from_msq

if TYPE_CHECKING:
    from transformers import TimesformerModel


class HuggingFace(nn.Module):
    """transformers' TimeSformer with the weights of ours, called as ours is.

    Args:
        ours: whose weights are copied.
        fused: torch's fused attention in place of the products and softmax of that model.
    """

    def __init__(self, ours: nn.Module, fused: bool) -> None:
        from transformers import TimesformerConfig as TheirConfig
        from transformers import TimesformerModel

        super().__init__()
        assert isinstance(ours, TimeSformer)
        c = ours.config
        self.model: TimesformerModel = TimesformerModel(TheirConfig(
            image_size=c.image_size[0], patch_size=c.patch_size, num_frames=c.frames,
            hidden_size=c.width, num_hidden_layers=c.depth, num_attention_heads=c.heads,
            intermediate_size=c.mlp_width, layer_norm_eps=1e-6, drop_path_rate=0,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ))  # fmt: skip
        state = from_msq(ours.state_dict(), "huggingface")
        self.model.load_state_dict({k.removeprefix("timesformer."): v for k, v in state.items()})
        for module in self.model.modules() if fused else ():
            if hasattr(module, "qkv"):
                module.forward = types.MethodType(_fused_attention, module)

    def forward(self, video: Tensor) -> Tensor:
        """[B, T, 3, h, w] to all tokens [B, 1 + N T, D']."""
        tokens: Tensor = self.model(video).last_hidden_state
        return tokens


def _fused_attention(
    module: Any, hidden_states: Tensor, output_attentions: bool = False
) -> tuple[Tensor]:
    m, s, d = hidden_states.shape
    qkv = module.qkv(hidden_states).view(m, s, 3, module.num_heads, d // module.num_heads)
    mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
    return (mixed.transpose(1, 2).reshape(m, s, d),)


def named(
    model: nn.Module, values: Mapping[str, Any] | Iterable[tuple[str, Any]]
) -> dict[str, Tensor]:
    """Gradients by Hugging Face's names, whichever model they are of."""
    of = dict(values)
    if isinstance(model, HuggingFace):
        return {name.removeprefix("model."): value for name, value in of.items()}
    renamed = from_msq(of, "huggingface")
    return {name.removeprefix("timesformer."): value for name, value in renamed.items()}
