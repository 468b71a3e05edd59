"""The dropout of G heads that are computed at once (`msq.head.stack_model`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from msq.head.masks import LayerMasks, Masks, Part, Site

Shape = Callable[[int], tuple[int, ...]]  # of a mask of one head, from its number of classes


class StackedMasks:
    """The dropout of one step: each head's is what it would draw alone.

    Args:
        masks: of each head, all with one probability of dropping.
        classes: of each head.
    """

    def __init__(self, masks: Sequence[Masks], classes: Sequence[int]) -> None:
        self.masks, self.classes, self.scale = list(masks), list(classes), masks[0].scale

    def drop(self, part: Part, layer: int, site: Site, x: Tensor, shape: Shape) -> Tensor:
        """`x` [G, ...] with what is dropped set to zero and the rest scaled up.

        Args:
            part: of the head.
            layer: of the part.
            site: of the layer.
            x: [G, ...], of which `shape` of the most classes is a view without G.
            shape: of a head's mask, from its number of classes.
        """
        room = shape(max(self.classes))
        kept = x.new_zeros((len(self.masks), *room))
        for own, one, count in zip(kept, self.masks, self.classes, strict=True):
            made = LayerMasks(one, part, layer).kept(site, shape(count), x.dtype)
            own[tuple(slice(size) for size in made.shape)] = made
        return x * kept.view(x.shape) * self.scale


def row_shape(part: Part, clips: int, rows: int, width: int) -> Shape:
    """Shape of a mask of rows: [B, S, width] in the encoder, [B, own K, width] in the decoder."""
    if part is Part.decoder:
        return lambda count: (clips, count, width)
    return lambda count: (clips, rows // clips, width)
