"""The image encoder: frozen under the Q-Former, or small and trained along with it.

The networks are transformers' own (SDPA attention).  This file adds what the Q-Former needs around them: normalised
pixels, all tokens and no pooler, frozen parts that stay in eval mode and in 16 bit, and the sizes the rest is built by.

Shape letters   B = images   C, H, W = image   N = tokens of an image   D = width
                A = heads   E = D / A   X = query, key, value
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LAVIS_LN_EPS = 1e-5  # of ln_vision; transformers' BLIP-2 has 1e-6 there, and its loader says so

_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "dropout", "drop_path_rate")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ImageEncoder(nn.Module):
    """A vision network, the pixel normalisation that belongs to it, and its sizes.

    `frozen` switches gradients off, holds the network in eval mode whatever `train()` asks for, and builds no graph.
    `dtype` is what the weights are made in, for a frozen network; training stores it in the run's precision anyway
    (`train.engine.store_frozen`).  A 16-bit frozen network runs with autocast off: under autocast its LayerNorms would
    return float32 and double the traffic of the residual stream.  One that trains along is always float32.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        image_size: int,
        frozen: bool,
        dtype: str = "float32",
        ln_eps: float = LAVIS_LN_EPS,
        pixel_mean: Sequence[float] = CLIP_MEAN,
        pixel_std: Sequence[float] = CLIP_STD,
        compile_blocks: bool = False,
    ):
        super().__init__()
        if dtype not in _DTYPES:
            raise ValueError(f"vision.dtype is {dtype!r}; it can be {', '.join(_DTYPES)}")
        if not frozen and dtype != "float32":
            raise ValueError(f"vision.dtype={dtype} with vision.frozen=false: an encoder that trains stays in float32")
        self.network = network
        self.image_size = image_size
        self.frozen = frozen
        self.ln_eps = ln_eps
        self.loaded_from: str | None = None  # the folder whose weights it was built with, for the table of weights
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            # not persistent: they come with the config, and a checkpoint of weights has no business changing them
            self.register_buffer(name, torch.tensor(list(values), dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.pixel_mean: Tensor
        self.pixel_std: Tensor

        self._network_options = _options_for(network, image_size)
        self.num_tokens, self.width, self._flops_per_image = self._measure()
        network.to(_DTYPES[dtype])
        if frozen:
            network.requires_grad_(False)
        self.train(self.training)
        if compile_blocks:
            for block in _blocks(network):
                block.compile()

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """uint8 (0-255) or floating point (normalised already) -> features_BND, in the network's dtype."""
        height, width = image_BCHW.shape[-2:]
        if (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"the images are {height} x {width} pixels, the image encoder takes {self.image_size} x "
                f"{self.image_size}: make data.transform.image_size and model.vision agree"
            )
        with self._mode(image_BCHW.device.type):
            return self._features(self.normalise(image_BCHW))

    def normalise(self, image_BCHW: Tensor) -> Tensor:
        """uint8 -> (x / 255 - mean) / std; floating point passes.  Both end in the dtype of the network's weights."""
        if not image_BCHW.is_floating_point():
            # one multiply-add on the pixels; in float32, since 8 bits of bfloat16 do not hold 256 steps after a shift
            scale = 1.0 / (255.0 * self.pixel_std.float())
            shift = -self.pixel_mean.float() / self.pixel_std.float()
            image_BCHW = torch.addcmul(shift, image_BCHW.float(), scale)
        return image_BCHW.to(next(self.network.parameters()).dtype)

    def flops_per_image(self) -> int:
        """Floating-point operations of one forward pass on one image (a multiply-add counts 2): convolutions, matrix
        products and attention, as torch's own counter finds them."""
        return self._flops_per_image

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            self.network.eval()
        return self

    def extra_repr(self) -> str:
        return f"{self.num_tokens} tokens x {self.width}, {self.image_size} px, frozen={self.frozen}"

    def _mode(self, device_type: str) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        if self.frozen:
            stack.enter_context(torch.no_grad())
            if next(self.network.parameters()).dtype != torch.float32 and device_type != "meta":
                stack.enter_context(torch.autocast(device_type, enabled=False))
        return stack

    def _features(self, pixels_BCHW: Tensor) -> Tensor:
        return _tokens(self.network(pixels_BCHW, **self._network_options))

    def _measure(self) -> tuple[int, int, int]:
        """Tokens, width and FLOPs found by running the network's outline on the meta device, so that they hold for any
        family; what does not reach the features (poolers, pooled norms, mask tokens) is taken out on the way."""
        from torch.utils.flop_counter import FlopCounterMode

        outline = {name: torch.empty_like(p, device="meta").requires_grad_() for name, p in _floats(self.network)}
        rest = {name: torch.empty_like(b, device="meta") for name, b in self.network.named_buffers()}
        pixels = torch.empty(
            1, 3, self.image_size, self.image_size, device="meta", dtype=next(iter(outline.values())).dtype
        )
        try:
            with torch.autocast("cpu", enabled=False), torch.enable_grad(), FlopCounterMode(display=False) as counter:
                out = torch.func.functional_call(self.network, {**outline, **rest}, (pixels,), self._network_options)
                tokens = _tokens(out)
        except RuntimeError as error:
            raise ValueError(
                f"{type(self.network).__name__} cannot read images of {self.image_size} px: {error}"
            ) from error
        flops = counter.get_total_flops()
        tokens.sum().backward()
        _remove_unused(self.network, {name for name, p in outline.items() if p.grad is None})
        return tokens.shape[1], tokens.shape[2], flops


def eva_vit(
    *,
    image_size: int = 224,
    patch_size: int = 14,
    width: int = 1408,
    num_layers: int = 39,
    num_heads: int = 16,
    mlp_width: int = 6144,
    layer_norm_eps: float = 1e-6,
    initial_std: float = 0.02,
    initial_positions: Literal["normal", "sincos"] = "normal",
    frozen: bool = True,
    dtype: str = "float32",
    device: str | None = None,
    ln_eps: float = LAVIS_LN_EPS,
    pixel_mean: Sequence[float] = CLIP_MEAN,
    pixel_std: Sequence[float] = CLIP_STD,
    compile_blocks: bool = False,
) -> ImageEncoder:
    """A plain pre-norm ViT with a class token and no final norm; the defaults are BLIP-2's EVA-ViT-g/14 (39 blocks: the
    40th of EVA-CLIP is left out, arXiv 2301.12597 section 3.1; LAVIS `lavis/models/eva_vit.py`).

    transformers' `Blip2VisionModel`, whose `post_layernorm` sits where the model's trainable `ln_vision` does and is
    therefore an identity here.  Weights start random (N(0, initial_std)); `model/weights/` fills them, and a narrow
    encoder from scratch wants about width ** -0.5.  With `initial_positions` sincos the learned position embeddings
    begin as waves over rows and columns (MAE, arXiv 2111.06377; plain ViT baselines, arXiv 2205.01580), so that
    patches know their neighbours from the start.  On the `device` meta nothing is drawn, and memory comes with the
    weights (`model.weights.filling.Home`).
    """
    from transformers import Blip2VisionConfig, Blip2VisionModel

    if image_size % patch_size or width % num_heads:
        units = f"patch_size {patch_size}, and width {width} of num_heads {num_heads}"
        raise ValueError(f"image_size {image_size} must be a multiple of {units}")
    config = Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        image_size=image_size,
        patch_size=patch_size,
        layer_norm_eps=layer_norm_eps,
        attention_dropout=0.0,
        initializer_range=initial_std,  # the library's 1e-10 is meant to be overwritten, and would never train
        qkv_bias=True,
    )
    with contextlib.nullcontext() if device is None else torch.device(device):
        network = Blip2VisionModel._from_config(config, attn_implementation="sdpa")
    network.post_layernorm = nn.Identity()
    for layer in network.encoder.layers:
        layer.self_attn.forward = partial(_attend, layer.self_attn)
    if initial_positions == "sincos":
        with torch.no_grad():
            network.embeddings.position_embedding[:, 1:] = sincos_positions(image_size // patch_size, width)
    return ImageEncoder(
        network,
        image_size=image_size,
        frozen=frozen,
        dtype=dtype,
        ln_eps=ln_eps,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
        compile_blocks=compile_blocks,
    )


def _attend(attention: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    """`Blip2Attention.forward`, which takes query, key and value out of their product one by one: the gradient of each
    is then a tensor of the size of all three, mostly zeros, and three of them are added up."""
    qkv_BNXAE = attention.qkv(hidden_states).unflatten(-1, (3, attention.num_heads, attention.head_dim))
    query, key, value = (x_BNAE.transpose(1, 2) for x_BNAE in qkv_BNXAE.unbind(2))
    context_BANE = F.scaled_dot_product_attention(query, key, value)
    return attention.projection(context_BANE.transpose(1, 2).flatten(2)), None


def sincos_positions(grid: int, width: int, *, longest: float = 100.0) -> Tensor:
    """-> (grid * grid, width): a quarter of the width each for sine and cosine of the row and of the column; wave
    lengths from 2 pi to 2 pi * `longest` patches."""
    if width % 4:
        raise ValueError(f"sincos positions need a width that 4 divides, not {width}")
    rate = longest ** -torch.linspace(0, 1, width // 4)
    wave = torch.arange(grid)[:, None] * rate
    along = torch.cat([wave.sin(), wave.cos()], dim=1)
    rows, columns = along[:, None].expand(-1, grid, -1), along[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


def vision_from_folder(
    folder: str,
    *,
    image_size: int | None = None,
    num_layers: int | None = None,
    load: bool = True,
    frozen: bool = True,
    dtype: str = "float32",
    ln_eps: float = LAVIS_LN_EPS,
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    compile_blocks: bool = False,
) -> ImageEncoder:
    """Any vision encoder that transformers knows (CLIP, Chinese-CLIP, SigLIP, ViT, DINOv2, ...), from a local folder in
    its format: `config.json`, safetensors (read here, unless `load` is false), and `preprocessor_config.json` for mean
    and deviation where they are not given.  Code in the folder is never run.  `num_layers` keeps the first blocks only
    (BLIP-2 leaves out the last of CLIP's).

    Raises:
        ValueError: no such folder, no vision encoder in it, missing weights, or a size the network cannot read.
    """
    path = Path(folder).expanduser()
    config = _vision_config(path, num_layers)
    size = image_size or _size_in(path, config)
    mean, std = _pixel_statistics(path, pixel_mean, pixel_std)
    encoder = ImageEncoder(
        _load(path, config) if load else _auto_model().from_config(config, attn_implementation="sdpa"),
        image_size=size,
        frozen=frozen,
        dtype=dtype,
        ln_eps=ln_eps,
        pixel_mean=mean,
        pixel_std=std,
        compile_blocks=compile_blocks,
    )
    encoder.loaded_from = str(path) if load else None
    return encoder


def image_size_of(node: Mapping[str, Any]) -> int:
    """Pixels of a side that the encoder of a config's node will take; of a folder only its config.json is read."""
    if node.get("image_size"):
        return int(node["image_size"])
    if "folder" not in node:
        return int(inspect.signature(eva_vit).parameters["image_size"].default)
    path = Path(node["folder"]).expanduser()
    return _size_in(path, _vision_config(path, None))


def _size_in(path: Path, config: Any) -> int:
    size = getattr(config, "image_size", None)
    size = size[0] if isinstance(size, list | tuple) else size
    if not size:
        raise ValueError(f"{path}/config.json names no image_size: give model.vision.image_size")
    return int(size)


def _vision_config(path: Path, num_layers: int | None) -> Any:
    """The vision part of the folder's config, without dropout, and with the first `num_layers` blocks only."""
    import transformers

    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} holds no config.json. model.vision.folder is a local folder in transformers' format; "
            f"`python scripts/fetch_weights.py --help` gets one"
        )
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    if config.model_type.startswith("blip_2"):
        raise ValueError(f"{path} is BLIP-2: use model/vision=eva_vit_g and model.weights.init.vision={path}")
    for name in _DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    if num_layers is not None:
        if not 0 < num_layers <= getattr(config, "num_hidden_layers", num_layers):
            raise ValueError(f"num_layers is {num_layers}, {path} has {config.num_hidden_layers} blocks")
        config.num_hidden_layers = num_layers
    return config


def _auto_model() -> Any:
    from transformers import AutoModel

    return AutoModel


def _load(path: Path, config: Any) -> nn.Module:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of every tensor of the text tower; what matters is checked below
    try:
        network, info = _from_pretrained(path, config)
    finally:
        logging.set_verbosity(verbosity)
    missing = [key for key in info["missing_keys"] if "pool" not in key and "head" not in key]
    if missing or info["mismatched_keys"]:
        raise ValueError(
            f"{path} does not fill {type(network).__name__}: {len(missing)} tensors are missing (first: "
            f"{sorted(missing)[:3]}), shapes that differ: {info['mismatched_keys']}"
        )
    return network


def _from_pretrained(path: Path, config: Any) -> tuple[nn.Module, dict[str, Any]]:
    return _auto_model().from_pretrained(
        path,
        config=config,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        attn_implementation="sdpa",
        dtype=torch.float32,
        output_loading_info=True,
    )


def _pixel_statistics(
    path: Path, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Sequence[float], Sequence[float]]:
    import json

    if mean is None or std is None:
        file = path / "preprocessor_config.json"
        found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        mean, std = mean or found.get("image_mean"), std or found.get("image_std")
    if mean is None or std is None:
        raise ValueError(f"{path} says no image_mean and image_std: give model.vision.pixel_mean and pixel_std")
    return mean, std


def _options_for(network: nn.Module, image_size: int) -> dict[str, Any]:
    """Where the network was built for another size and can interpolate its positions, ask it to."""
    built_for = getattr(getattr(network, "config", None), "image_size", image_size)
    known = inspect.signature(network.forward).parameters
    if built_for not in (image_size, [image_size] * 2, (image_size,) * 2) and "interpolate_pos_encoding" in known:
        return {"interpolate_pos_encoding": True}
    return {}


def _tokens(output: Any) -> Tensor:
    features = output.last_hidden_state
    return features.flatten(2).transpose(1, 2) if features.dim() == 4 else features  # a convolutional network's map


def _floats(network: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, parameter) for name, parameter in network.named_parameters() if parameter.is_floating_point()]


def _remove_unused(module: nn.Module, unused: set[str], prefix: str = "") -> None:
    """Parameters without a gradient would fail under ZeRO and DDP, and a pooler costs memory for nothing."""
    for name, child in list(module.named_children()):
        names = {f"{prefix}{name}.{inner}" for inner, _ in child.named_parameters()}
        if names and names <= unused:
            setattr(module, name, nn.Identity())
        elif names & unused:
            _remove_unused(child, unused, f"{prefix}{name}.")
    for name, parameter in module.named_parameters(recurse=False):
        if f"{prefix}{name}" in unused:
            parameter.requires_grad_(False)


def _blocks(network: nn.Module) -> nn.ModuleList:
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"compile_blocks: {type(network).__name__} has no list of blocks to compile")
    return max(lists, key=len)
