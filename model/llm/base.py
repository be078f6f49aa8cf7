"""What stage two, chat and evaluation ask of a language model, whatever its family.

A family is one file: it builds the network (ordinary `nn.Linear` inside, so that peft and bitsandbytes see them),
brings the codec with its prompt template and special ids, and draws masks and positions from the ids itself.  Rows are
padded on the right; image tokens are positions like any other, whose embeddings the caller has replaced.

Shape letters   B = rows   L = length   T = any number of positions   D = the model's width   V = vocabulary
                S = rows that are selected
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import DialogueCodec


class LanguageModel(nn.Module):
    """Base class of the families; the methods that raise NotImplementedError are what a family writes.

    Attributes that a family sets:
        width: D.
        vocab_size: V.
        codec: prompt template, special ids and label masking; None for a network without a tokenizer (parity).
        network: the module that peft wraps in place.  Its parameters have the names and the rows of the family's
            Hugging Face layout wherever an adapter can sit, so that one saved here fits there and the other way round.
        lora_targets: names of all linear layers of a block, the default of LoRA and QLoRA; never the output head.
        layers_pattern: the name in front of a block's number, for peft's `layers_to_transform`.
        checkpoint_activations: recompute each block in the backward pass instead of keeping its activations,
        checkpoint_above: for micro-batches of more tokens than this, padding included.
        loaded_from: the folder whose weights it was built with, for the table of weights.
        layer_devices, home_device: where blocks sit on several devices (`model/spread.py`), the device of each, and
            that of everything else.
    """

    width: int
    vocab_size: int
    codec: DialogueCodec | None
    network: nn.Module
    lora_targets: tuple[str, ...]
    layers_pattern: str = "layers"
    checkpoint_activations: bool = False
    checkpoint_above: int = 0
    loaded_from: str | None = None
    layer_devices: Sequence[torch.device] | None = None
    home_device: torch.device | None = None

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        raise NotImplementedError

    def recomputes(self, num_tokens: int) -> bool:
        """Whether blocks are recomputed for a micro-batch of so many tokens."""
        return self.checkpoint_activations and num_tokens > self.checkpoint_above

    @property
    def draws(self) -> bool:
        """Whether a block draws random numbers now (an adapter's dropout)."""
        return any(
            isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in self.layers.modules()
        )

    def embed(self, ids_BL: Tensor) -> Tensor:
        """-> embedded_BLD, as the network's first block takes them"""
        raise NotImplementedError

    def hidden(self, embedded_BLD: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """All positions at once, no cache.  -> hidden_BLD after the final norm; what stands at padding is undefined.

        Args:
            ids_BL: the ids that were embedded, placeholders at image tokens: masks and positions follow from them.
            mask_BL: bool, True on real tokens; padding is on the right.
        """
        raise NotImplementedError

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """The output head, for those positions only that anybody asks about.  -> logits_TV"""
        raise NotImplementedError

    def prefill(self, embedded_BLD: Tensor, ids_BL: Tensor, mask_BL: Tensor, *, room: int) -> tuple[Tensor, Any]:
        """`hidden` of prompts, kept for `extend`.  -> hidden_BD at each row's last real token, and a cache.

        Args:
            room: how many tokens will be added at most.
        """
        raise NotImplementedError

    def extend(self, ids_B: Tensor, cache: Any) -> Tensor:
        """One token more for every row.  -> hidden_BD of it; `cache` is changed in place."""
        raise NotImplementedError

    def on_layer_device(self, index: int, *tensors: Any) -> tuple[Any, ...]:
        """Tensors that block `index` is about to read (None stays None), on its device."""
        if self.layer_devices is None:
            return tensors
        device = self.layer_devices[index]
        return tuple(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in tensors)

    def at_home(self, tensor: Tensor) -> Tensor:
        """Back from the last block, where embeddings and output head are."""
        return tensor if self.home_device is None else tensor.to(self.home_device)

    def select(self, cache: Any, row_S: Tensor) -> None:
        """Makes a cache hold these of its rows, in this order; a row may be taken several times, or not at all."""
        raise NotImplementedError
