"""A language model's blocks over several devices, for models that one GPU cannot hold: `--device-map auto`.

A token passes the devices one after the other; only its hidden state travels.  Everything else, the image encoder and
the Q-Former included, sits on the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from model.visual_chat import VisualChatModel

FREE = 0.9  # of a GPU's free memory; the rest is for the cache and what passes through


def spread(model: VisualChatModel, room: Sequence[tuple[torch.device, float]]) -> VisualChatModel:
    """Moves the model, the devices filled alike.

    Args:
        room: devices and how many bytes each has.
    Raises:
        ValueError: no device, or one block that fits nowhere.
    """
    layers = model.llm.layers
    sizes = [size_of(layer) for layer in layers]
    places = plan(sizes, room, first=size_of(model) - sum(sizes))
    blocks = list(layers)
    for index in range(len(blocks)):  # so that they do not all pass through the first device
        layers[index] = nn.Identity()
    model.to(room[0][0])
    for index, (block, device) in enumerate(zip(blocks, places, strict=True)):
        layers[index] = block.to(device)
    model.llm.layer_devices, model.llm.home_device = places, room[0][0]
    return model


def plan(sizes: Sequence[int], room: Sequence[tuple[torch.device, float]], *, first: int = 0) -> list[torch.device]:
    """The device of each block: neighbours together, every device filled to the same share of its room.

    Args:
        sizes: bytes of the blocks.
        first: bytes that the first device holds besides.
    Raises:
        ValueError: no device, or more bytes than they have.
    """
    if not room:
        raise ValueError("device_map=auto: torch sees no GPU to spread the model over")
    needed, total = first + sum(sizes), sum(space for _, space in room)
    if needed > total:
        raise ValueError(
            f"the model needs {needed / 1e9:.1f} GB, {len(room)} device(s) have {total / 1e9:.1f} GB free: quantize to "
            f"8 or 4 bits, or use more GPUs"
        )
    places: list[torch.device] = []
    share = needed / total
    number, filled = 0, float(first)
    for size in sizes:
        # the next device, once this one would be further above its share with the block than below it without
        while number + 1 < len(room) and filled + size / 2 > share * room[number][1]:
            number, filled = number + 1, 0.0
        filled += size
        places.append(room[number][0])
    return places


def gpus() -> list[tuple[torch.device, float]]:
    return [
        (torch.device("cuda", number), FREE * torch.cuda.mem_get_info(number)[0])
        for number in range(torch.cuda.device_count())
    ]


def size_of(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())
