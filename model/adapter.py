"""What is added to a frozen model so that it can learn: nothing, LoRA, or LoRA on a language model kept in 4 bits.

peft wraps linear maps in place and bitsandbytes stores them; both are imported when an adapter is built.  Adapters are
saved in peft's own layout, with the rows and names of the family's Hugging Face folder (`model/llm/base.py`), so that
`peft` alone can put one on the bare language model.

An adapter is asked three times: `check` before anything is read, `prepare` before the starting weights come, `attach`
once they are there.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from model import low_rank
from model.llm.base import LanguageModel
from model.quantise import quantise_linears, shape_like_quantised
from model.visual_chat import VisualChatModel

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional kernel at every start

NAME = "default"  # peft's name for an adapter without one; it is in no file
PARTS = ("llm", "qformer", "projection", "vision")
ROOTS = {"llm": "llm.network", "qformer": "qformer", "vision": "vision.network"}  # a projection is wrapped as a whole


class Adapter(Protocol):
    def check(self, llm: LanguageModel) -> None:
        """Before anything is read: that there is what it shall go on.  Raises ValueError."""
        ...

    def put_on(self, model: VisualChatModel) -> None:
        """What is trained on top, whether the weights are there or not."""
        ...

    def prepare(self, model: VisualChatModel, *, device: torch.device) -> None:
        """Before the weights come: says how they are to be stored."""
        ...

    def attach(self, model: VisualChatModel, *, device: torch.device) -> None:
        """After the weights came: what is trained on top of them."""
        ...

    def check_zero3(self) -> None:
        """Raises ValueError where ZeRO-3 cannot divide what this adapter makes."""
        ...


class NoAdapter:
    """The language model stays as it is; Q-Former and projection may train."""

    def check(self, llm: LanguageModel) -> None: ...

    def put_on(self, model: VisualChatModel) -> None: ...

    def prepare(self, model: VisualChatModel, *, device: torch.device) -> None: ...

    def attach(self, model: VisualChatModel, *, device: torch.device) -> None:
        refuse_empty(model)

    def check_zero3(self) -> None: ...


@dataclass(frozen=True)
class Lora:
    """Low-rank updates W x + (alpha / rank) B A x (arXiv 2106.09685), through peft.

    Args:
        rank: of every update; None is 8.
        alpha: None is twice the rank.  VisualGLM's own has alpha 1, a tenth of the update at rank 10.
        dropout: on what goes into A.
        target_modules: names of linear maps of the language model; None is all of its blocks (`llm.lora_targets`),
            as QLoRA's paper found it needs (arXiv 2305.14314 section 4).  The output head only if it is named.
        layer_range: [a, b): blocks a to b - 1 of the language model; None is all of them.
        rslora: scale by alpha / sqrt(rank) (arXiv 2312.03732); None is no.
        dora: magnitude and direction apart (arXiv 2402.09353); not under ZeRO-3; None is no.
        parts: where adapters sit: llm, qformer, projection, vision.  What has one is frozen but for it; Q-Former,
            projection and encoder get theirs on every linear map.
        start: folder of an adapter to go on from: `adapter/` of a run, what peft saved, or a converted LoRA of
            VisualGLM's, whose maps have several ranks.  Rank, alpha, rslora, dora, target modules and layers are those
            of the folder, and None here or equal; `parts` names all that have one there, and others begin new.  What
            trained beside it comes along.
    """

    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: Sequence[str] | None = None
    layer_range: Sequence[int] | None = None
    rslora: bool | None = None
    dora: bool | None = None
    parts: Sequence[str] = ("llm",)
    start: str | None = None

    def __post_init__(self) -> None:
        targets, blocks, parts = self.target_modules, self.layer_range, self.parts
        for key, fits, wanted in (
            ("rank", self.rank is None or self.rank >= 1, "it has to be 1 or more"),
            ("alpha", self.alpha is None or 0 < self.alpha < math.inf, "at 0 or below nothing would be learned"),
            ("dropout", 0 <= self.dropout < 1, "it has to be at least 0 and below 1"),
            (
                "target_modules",
                targets is None or _is_list(targets, str),
                "it has to be a list of names: [query_key_value] for instance",
            ),
            (
                "layer_range",
                blocks is None or (_is_list(blocks, int) and len(blocks) == 2),
                "it is two numbers [a, b): blocks a to b - 1",
            ),
            (
                "parts",
                _is_list(parts, str) and parts and all(part in PARTS for part in parts),
                f"it can hold {', '.join(PARTS)}, as a list: [llm] for instance",
            ),
        ):
            if not fits:
                raise ValueError(f"model.adapter.{key} is {getattr(self, key)!r}; {wanted}")

    def check(self, llm: LanguageModel) -> None:
        started = self._started()
        if "llm" in self.parts and "llm" not in started:
            self._llm_config(llm)
        if self.start is not None:
            self._compare(started, llm)
            from model.weights.adapter_folder import check

            check(llm, Path(self.start).expanduser())

    def prepare(self, model: VisualChatModel, *, device: torch.device) -> None: ...

    def attach(self, model: VisualChatModel, *, device: torch.device) -> None:
        refuse_empty(model)
        if self.start is not None:
            self.check(model.llm)
        self.put_on(model)
        if self.start is not None:
            from model.weights.adapter_folder import load

            load(model, Path(self.start).expanduser())

    def put_on(self, model: VisualChatModel) -> None:
        started = self._started()
        for config in started.values():
            config.inference_mode, config.lora_dropout = False, self.dropout
            config.use_dora = config.use_dora and self.dora is not False  # which a rehearsal says
        for part in ("llm", "qformer", "vision", "projection"):  # the order in which they draw
            if part in self.parts:
                put(model, part, started.get(part) or self._part_config(model, part))
        if started:
            from model.weights.adapter_folder import require_fit

            require_fit(model, Path(str(self.start)).expanduser())

    def check_zero3(self) -> None:
        if self.dora or any(config.use_dora for config in self._started().values()):
            raise ValueError("model.adapter.dora reads frozen weights whole: use train.engine.zero_stage 0, 1 or 2")

    def _started(self) -> dict[str, Any]:
        """part -> peft's config of the adapter to go on from"""
        if self.start is None:
            return {}
        from model.weights.adapter_folder import read_configs

        return read_configs(Path(self.start).expanduser())

    def _compare(self, started: Mapping[str, Any], llm: LanguageModel) -> None:
        """What is given has to be what the folder has: with another alpha its update would be another."""
        if not set(started) <= set(self.parts):
            raise ValueError(
                f"model.adapter.parts is {list(self.parts)}; {self.start} has adapters on {', '.join(started)}: "
                f"name them all"
            )
        depth = _depth(llm.network, llm.layers_pattern)
        for part, config in started.items():
            there = {"rank": config.r, "alpha": config.lora_alpha, "rslora": config.use_rslora, "dora": config.use_dora}
            if part == "llm":
                targets = config.target_modules
                there["target_modules"] = targets if isinstance(targets, str) else sorted(targets or ())
                there["layer_range"] = _blocks(config.layers_to_transform, depth)
            own = {key: getattr(self, key) for key in there if getattr(self, key) is not None}
            if "target_modules" in own:
                own["target_modules"] = sorted(own["target_modules"])
            if "layer_range" in own:
                own["layer_range"] = _blocks(range(*own["layer_range"]), depth)
            for key, value in own.items():
                if value != there[key]:
                    raise ValueError(
                        f"model.adapter.{key} is {value}; the adapter on {part} in {self.start} has {there[key]}: "
                        f"the two have to be equal, or model.adapter.{key}=null takes what is there"
                    )

    def _part_config(self, model: VisualChatModel, part: str) -> Any:
        if part == "llm":
            return self._llm_config(model.llm)
        return self._config([part] if part == "projection" else linear_names(model.get_submodule(ROOTS[part])))

    def _llm_config(self, llm: LanguageModel) -> Any:
        maps = [name for name, module in llm.network.named_modules() if is_linear(module)]
        layers, pattern = self._layers(llm), llm.layers_pattern
        if layers is not None:
            maps = [name for name in maps if any(f"{pattern}.{layer}." in name for layer in layers)]
        targets = list(llm.lora_targets if self.target_modules is None else self.target_modules)
        strangers = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in maps)]
        if strangers or not targets:
            names = sorted({name.rsplit(".", 1)[-1] for name in maps})
            nearest = [near for target in strangers for near in difflib.get_close_matches(target, names, n=1)]
            hint = f" (perhaps {', '.join(nearest)})" if nearest else ""
            where = f" in blocks {layers[0]} to {layers[-1]}" if layers else ""
            raise ValueError(
                f"model.adapter.target_modules: no linear map{where} is called {strangers}{hint}; {names} are"
            )
        return self._config(targets, layers_to_transform=layers, layers_pattern=layers and pattern)

    def _layers(self, llm: LanguageModel) -> list[int] | None:
        if self.layer_range is None:
            return None
        first, end = self.layer_range
        depth = _depth(llm.network, llm.layers_pattern)
        if not 0 <= first < end <= depth:
            raise ValueError(
                f"model.adapter.layer_range is [{first}, {end}); the language model has blocks 0 to {depth - 1}: "
                f"[a, b) means a to b - 1, 0 <= a < b <= {depth}"
            )
        return list(range(first, end))

    def _config(self, targets: Sequence[str], **more: Any) -> Any:
        from peft import LoraConfig

        rank = 8 if self.rank is None else self.rank
        return LoraConfig(
            r=rank,
            lora_alpha=2 * rank if self.alpha is None else self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(targets),
            use_rslora=bool(self.rslora),
            use_dora=bool(self.dora),
            bias="none",
            **more,
        )


@dataclass(frozen=True)
class QLora(Lora):
    """LoRA on a language model whose blocks are stored in 4 bits, NF4 (arXiv 2305.14314); on CUDA and on a CPU.

    Each map is quantised as its weights arrive from a checkpoint, or one after the other where they are there already:
    the GPU never holds more than one of them in 16 bits.  Encoder, Q-Former, projection,
    embeddings and output head stay as they are.

    Args:
        double_quantisation: the scales in 8 bits (0.37 bits less for each weight).
    """

    double_quantisation: bool = True

    def prepare(self, model: VisualChatModel, *, device: torch.device) -> None:
        shape_like_quantised(
            model.llm.network, model.llm.lora_targets, device=device, double_quantisation=self.double_quantisation
        )

    def check_zero3(self) -> None:
        raise ValueError(
            "model.adapter=qlora does not go with ZeRO-3, which divides weights but not the scales of their 4 bits: "
            "use train.engine.zero_stage 0, 1 or 2"
        )

    def attach(self, model: VisualChatModel, *, device: torch.device) -> None:
        quantise_linears(
            model.llm.network, model.llm.lora_targets, device=device, double_quantisation=self.double_quantisation
        )
        super().attach(model, device=device)


def put(model: VisualChatModel, part: str, config: Any) -> None:
    """An adapter on one part of the model, which is frozen but for it."""
    if part == "projection":  # peft replaces children, so it needs a parent
        parent = nn.ModuleDict({"projection": model.projection})
        inject(parent, config)
        model.projection = parent["projection"]  # type: ignore[assignment]
        model.adapted_projection = parent.peft_config
        return
    inject(model.get_submodule(ROOTS[part]), config)
    if part == "qformer":
        model.ln_vision.requires_grad_(False)
    if part == "vision":
        model.vision.frozen = False  # or it would build no graph


def inject(root: nn.Module, config: Any) -> None:
    """peft's layers around the linear maps that `config` names; everything else of `root` is frozen."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, root, adapter_name=NAME)
    found = [parameter for name, parameter in root.named_parameters() if parameter.requires_grad]
    assert found, f"no adapter was put anywhere: {config.target_modules}"
    for parameter in found:  # peft takes the dtype of the frozen weight; what trains is fp32 (train/engine.py)
        parameter.data = parameter.data.float()
    low_rank.shorten(root, NAME)


def is_linear(module: nn.Module) -> bool:
    """4-bit ones included, which are a subclass."""
    return isinstance(module, nn.Linear)


def linear_names(root: nn.Module) -> list[str]:
    """The last words of the names of all linear maps."""
    return sorted({name.rsplit(".", 1)[-1] for name, module in root.named_modules() if is_linear(module)})


def refuse_empty(model: nn.Module) -> None:
    """Weights on the meta device that no checkpoint filled."""
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise ValueError(
            f"{len(empty)} tensors were built without memory and came from no checkpoint (first: {empty[0]}): name one "
            f"in model.weights, or build the part with device=cpu"
        )


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(x, kind) for x in value)


def _blocks(layers: Sequence[int] | int | None, depth: int) -> str:
    """peft's `layers_to_transform` in words."""
    numbers = range(depth) if layers is None else [layers] if isinstance(layers, int) else layers
    return f"blocks {', '.join(map(str, sorted(numbers)))}"


def _depth(network: nn.Module, pattern: str) -> int:
    """How many blocks there are."""
    numbers = set()
    for name, _ in network.named_modules():
        words = name.split(".")
        if pattern in words[:-1] and words[words.index(pattern) + 1].isdigit():
            numbers.add(int(words[words.index(pattern) + 1]))
    return max(numbers, default=-1) + 1
