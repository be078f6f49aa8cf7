"""What the Q-Former's passes remember: keys and values, of images above all.

Shape letters   B = images   P = image-text pairs   M = image tokens   T = any tokens   H = hidden size   A = heads
                D = H / A   K = all layers' keys and values
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

KeyValue = tuple[Tensor, Tensor]  # key_PATD, value_PATD


@dataclass(frozen=True)
class ImageMemory:
    """The cross-attention keys and values of some images, of all layers that look, as they come from one product.

    `uses` pairs share each image: pair u * B + b looks at image b.  So the true pair and the hard-text pair of ITM read
    the same memory without a copy.
    """

    key_value_BMK: Tensor  # each layer's key, then its value, then the next layer's
    hidden_size: int
    num_heads: int
    uses: int = 1

    def __len__(self) -> int:
        return len(self.key_value_BMK)

    def layers(self) -> list[KeyValue]:
        """(key_BAMD, value_BAMD) of each layer that looks"""
        heads = [split_heads(x_BMH, self.num_heads) for x_BMH in self.key_value_BMK.split(self.hidden_size, dim=-1)]
        return list(zip(heads[0::2], heads[1::2], strict=True))

    def select(self, image_index_P: Tensor) -> ImageMemory:
        """The memory of the images named, one for each pair."""
        return replace(self, key_value_BMK=self.key_value_BMK.index_select(0, image_index_P), uses=1)

    def used(self, times: int) -> ImageMemory:
        return replace(self, uses=times)


def split_heads(x_PTH: Tensor, num_heads: int) -> Tensor:
    """-> x_PATD"""
    return x_PTH.unflatten(-1, (num_heads, -1)).transpose(1, 2)
