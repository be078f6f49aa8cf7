"""ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B: the original folders (remote code) under transformers' GLM names, and back.

The arithmetic is the same, so tensors are renamed, and one is cut: `query_key_value` is q, k, v one below the other
(`modeling_chatglm.py`, `SelfAttention.forward`).  `dense_h_to_4h` is [gate; up] in both (`swiglu`), and both turn the
first half of a head in neighbouring pairs, so no rows are permuted.  `rotary_pos_emb.inv_freq` is computed, not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model.llm.glm import glm_config, tie
from model.weights import writing
from model.weights.checkpoint import Checkpoint, from_tensors, open_folder, read_config
from model.weights.filling import LoadReport, Part, fill
from model.weights.names import check_depth, check_equal, check_whole, positive, whole_number
from model.weights.visualglm import LANGUAGE_MODEL

Family = Literal["chatglm2", "chatglm3", "glm4"]
Layout = Literal["transformers", "original"]
ROTARY_BASE = 10000.0
COMES_ALONG = ("tokenizer.model", "tokenizer.json", "LICENSE*", "MODEL_LICENSE*")
LAYERS = {"original": "transformer.encoder.layers.", "transformers": "model.layers."}
_SIZES: Mapping[Layout, Mapping[str, str]] = {  # ours -> the key of config.json
    "original": {
        "hidden_size": "hidden_size",
        "num_layers": "num_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "multi_query_group_num",
        "head_size": "kv_channels",
        "inner_size": "ffn_hidden_size",
        "vocab_size": "padded_vocab_size",
    },
    "transformers": {
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_size": "head_dim",
        "inner_size": "intermediate_size",
        "vocab_size": "vocab_size",
    },
}
_MUST_BE = {  # of the original config.json: what transformers' GLM computes, and no shape shows
    "rmsnorm": True,
    "post_layer_norm": True,
    "multi_query_attention": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of the original folder: transformers' one below the other, with so many rows each."""

    theirs: str
    ours: tuple[str, ...]
    num_rows: tuple[int, ...] = ()


def sizes(config: Mapping[str, Any], family: Family | None = None) -> dict[str, Any]:
    """Arguments of `model.llm.glm.glm_config` for a `config.json`, original or of transformers.

    Args:
        family: asked for where the original says a rope_ratio: ChatGLM2 divides positions by it, the others multiply
            the base with it.
    Raises:
        ValueError: another model, or one that transformers' GLM does not compute, by name; a key that is missing, or
            whose value cannot be, with the file.
    """
    if config.get("model_type") == "glm":
        return _transformers_sizes(config)
    if not is_original(config):
        raise ValueError(
            f"config.json is of type {config.get('model_type')!r}, and not that of ChatGLM2, ChatGLM3 or GLM-4 "
            f"(no multi_query_group_num)"
        )
    if config.get("quantization_bit"):
        raise ValueError(
            f"config.json is of weights quantised to {config['quantization_bit']} bits: take the full ones"
        )
    for key, expected in _MUST_BE.items():
        if config.get(key, expected) != expected:
            raise ValueError(f"config.json has {key}={config[key]}: transformers' GLM computes with {expected} only")
    ratio = float(config.get("rope_ratio") or 1.0)
    if ratio != 1.0 and family is None:
        raise ValueError(f"config.json has rope_ratio={ratio:g}: chatglm2 or chatglm3 and glm4 mean other things by it")
    interpolates = family == "chatglm2"
    return {
        **{ours: whole_number(config, key) for ours, key in _SIZES["original"].items()},
        "norm_eps": positive(config, "layernorm_epsilon"),
        "qkv_bias": config.get("add_qkv_bias", False),
        "rope_base": ROTARY_BASE * (1.0 if interpolates else ratio),
        "rope_interpolation": ratio if interpolates else 1.0,
        "tied_head": config.get("tie_word_embeddings", False),
    }


def original_config(config: Any) -> dict[str, Any]:
    """`config.json` of the original folder for transformers' `GlmConfig`."""
    rope = config.rope_parameters
    return {
        "model_type": "chatglm",
        "hidden_size": config.hidden_size,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "multi_query_group_num": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "ffn_hidden_size": config.intermediate_size,
        "padded_vocab_size": config.vocab_size,
        "layernorm_epsilon": config.rms_norm_eps,
        "add_qkv_bias": config.attention_bias,
        "rope_ratio": rope.get("factor", rope["rope_theta"] / ROTARY_BASE),
        "tie_word_embeddings": config.tie_word_embeddings,
        "seq_length": config.max_position_embeddings,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": str(config.dtype).removeprefix("torch."),
        "original_rope": True,
        **_MUST_BE,
    }


def entries(config: Any) -> Iterator[Entry]:
    """The table for transformers' `GlmConfig`."""
    yield Entry("transformer.embedding.word_embeddings.weight", ("model.embed_tokens.weight",))
    num_rows = (config.num_attention_heads * config.head_dim, *[config.num_key_value_heads * config.head_dim] * 2)
    for index in range(config.num_hidden_layers):
        theirs, ours = f"{LAYERS['original']}{index}.", f"{LAYERS['transformers']}{index}."
        yield Entry(f"{theirs}input_layernorm.weight", (f"{ours}input_layernorm.weight",))
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            joint = tuple(f"{ours}self_attn.{name}_proj.{kind}" for name in ("q", "k", "v"))
            yield Entry(f"{theirs}self_attention.query_key_value.{kind}", joint, num_rows)
        yield Entry(f"{theirs}self_attention.dense.weight", (f"{ours}self_attn.o_proj.weight",))
        yield Entry(f"{theirs}post_attention_layernorm.weight", (f"{ours}post_attention_layernorm.weight",))
        yield Entry(f"{theirs}mlp.dense_h_to_4h.weight", (f"{ours}mlp.gate_up_proj.weight",))
        yield Entry(f"{theirs}mlp.dense_4h_to_h.weight", (f"{ours}mlp.down_proj.weight",))
    yield Entry("transformer.encoder.final_layernorm.weight", ("model.norm.weight",))
    if not config.tie_word_embeddings:
        yield Entry("transformer.output_layer.weight", ("lm_head.weight",))


def to_transformers(checkpoint: Checkpoint, config: Any) -> Checkpoint:
    """The same tensors under transformers' names, cut when they are read; a checkpoint that has those stays as it is.

    Raises:
        ValueError: layers that `config` does not have, or a joint tensor of other rows.
    """
    if _layout_of(checkpoint) == "transformers":
        check_depth(checkpoint, LAYERS["transformers"], config.num_hidden_layers, "language model")
        return checkpoint
    check_depth(checkpoint, LAYERS["original"], config.num_hidden_layers, "language model")
    shapes = dict(checkpoint.shapes)
    reads: dict[str, Callable[[], Tensor]] = {}
    for entry in entries(config):
        shape = shapes.pop(entry.theirs, None)
        if shape is None:
            continue
        if entry.num_rows and shape[0] != sum(entry.num_rows):
            raise ValueError(
                f"{entry.theirs} is {list(shape)} in {checkpoint.path}; q, k and v of this model have "
                f"{' + '.join(map(str, entry.num_rows))} rows: is the number of heads or of their groups another?"
            )
        start = 0
        for name, count in zip(entry.ours, entry.num_rows or shape[:1], strict=True):
            shapes[name] = (count, *shape[1:])
            reads[name] = _rows(checkpoint, entry.theirs, start, start + count)
            start += count
    return Checkpoint(checkpoint.path, shapes, lambda name: reads[name]() if name in reads else checkpoint.read(name))


def to_original(checkpoint: Checkpoint, config: Any) -> Checkpoint:
    """The way back, of a checkpoint that has every tensor of the model.

    Raises:
        ValueError: tensors are missing.
    """
    table = {entry.theirs: entry for entry in entries(config)}
    missing = [name for entry in table.values() for name in entry.ours if name not in checkpoint.shapes]
    if missing:
        raise ValueError(f"{checkpoint.path} lacks {len(missing)} tensors of a GLM (first: {missing[0]})")

    def shape(entry: Entry) -> tuple[int, ...]:
        parts = [checkpoint.shapes[name] for name in entry.ours]
        return (sum(part[0] for part in parts), *parts[0][1:])

    return Checkpoint(
        checkpoint.path,
        {name: shape(entry) for name, entry in table.items()},
        lambda name: torch.cat([checkpoint.read(part) for part in table[name].ours]),
    )


def load(model: nn.Module, folder: Path, *, prefix: str = "") -> LoadReport:
    """Fills a `GlmForCausalLM` from a folder of either layout, tensor by tensor.

    Args:
        prefix: the network's name in `model`, with a dot at the end ("llm.network." in stage two's model).
    Raises:
        ValueError: another model, another size, numbers that no shape shows, or a tensor that is missing.
    """
    network: Any = model.get_submodule(prefix.rstrip("."))
    config = network.config
    _check(str(folder), read_config(folder), config)
    checkpoint = to_transformers(open_folder(folder), config)
    names = [prefix + name for name, _ in network.named_parameters()]
    parts = [Part(name, (name,), LANGUAGE_MODEL) for name in names]
    report = fill(model, checkpoint.with_prefix(prefix), parts, must=(LANGUAGE_MODEL,))
    tie(network)  # a head on the meta device has not seen the words arrive
    left = [name.removeprefix(prefix) for name in report.ignored if not name.endswith("inv_freq")]
    if left:
        report.notes.append(f"not part of this model: {', '.join(sorted(left)[:5])}{' ...' if len(left) > 5 else ''}")
    return report


def convert(
    source: Path,
    target: Path,
    *,
    family: Family,
    layout: Layout = "transformers",
    max_shard_bytes: int = writing.MAX_SHARD_BYTES,
) -> Path:
    """Writes the folder `source`, of either layout, as `target` in the layout asked for, in safetensors.

    One shard is in memory at a time.  Numbers keep their precision.  The tokenizer and the licence come along, code
    does not; a transformers folder is one that `GlmForCausalLM.from_pretrained` reads.

    Raises:
        ValueError: a target that is not empty, another model, or tensors that are missing, unexpected or of another
            shape than the config says, by name.
    """
    config = full_config(read_config(source), family)
    checkpoint = whole(open_folder(source), config)
    if layout == "original":
        checkpoint = to_original(checkpoint, config)
    metadata = {"source": str(source), "family": family}
    config.dtype = writing.write_folder(checkpoint, target, max_shard_bytes=max_shard_bytes, metadata=metadata)
    if layout == "transformers":
        config.save_pretrained(target)
    else:
        writing.write_json(target / "config.json", original_config(config))
    writing.copy_files(source, target, COMES_ALONG)
    return target


def whole(stored: Checkpoint, config: Any) -> Checkpoint:
    """A whole model, of either layout, under transformers' names; what is computed from the config stays behind.

    Raises:
        ValueError: tensors that are missing, unexpected or of another shape than the config says, by name.
    """
    _check_whole(stored, config)
    checkpoint = to_transformers(stored, config)
    wanted = [name for entry in entries(config) for name in entry.ours]
    return Checkpoint(checkpoint.path, {name: checkpoint.shapes[name] for name in wanted}, checkpoint.read)


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is of the original folder of one of these families."""
    return config.get("model_type") == "chatglm" and "multi_query_group_num" in config


def _layout_of(checkpoint: Checkpoint) -> Layout:
    theirs = any(name.startswith(LAYERS["transformers"]) for name in checkpoint.shapes)
    return "transformers" if theirs else "original"


def _check_whole(checkpoint: Checkpoint, config: Any) -> None:
    """Against the names and shapes of transformers' own network, built without memory."""
    from transformers import GlmForCausalLM

    with torch.device("meta"):
        network = GlmForCausalLM(config)
    expected = from_tensors({name: parameter.detach() for name, parameter in network.named_parameters()})
    words, head = "model.embed_tokens.weight", "lm_head.weight"
    if _layout_of(checkpoint) == "original":
        expected = to_original(expected, config)
        words, head = "transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight"
    # torch saves a shared tensor under both of its names
    is_copy = config.tie_word_embeddings and {words, head} <= checkpoint.shapes.keys()
    is_copy = is_copy and torch.equal(checkpoint.read(words), checkpoint.read(head))
    check_whole(
        checkpoint, expected.shapes, computed=lambda name: name.endswith("inv_freq") or (is_copy and name == head)
    )


def _check(path: str, theirs: Mapping[str, Any], config: Any) -> None:
    """Everything that no shape shows."""
    ours, rope = config.to_dict(), config.rope_parameters
    found = sizes(theirs, "chatglm2" if "factor" in rope else "chatglm3")
    for key, name, mine in (
        ("num_heads", "num_attention_heads", "num_heads"),
        ("num_kv_heads", "num_key_value_heads", "num_kv_heads"),
        ("head_size", "head_dim", "head_size"),
        ("norm_eps", "rms_norm_eps", "norm_eps"),
        ("qkv_bias", "attention_bias", "qkv_bias"),
        ("tied_head", "tie_word_embeddings", "tied_head"),
    ):
        check_equal(path, found[key], ours[name], key, f"model.llm.{mine}")
    check_equal(path, found["rope_base"], rope["rope_theta"], "a rotary base of", "model.llm (by its rope_ratio)")
    interpolation = rope.get("factor", 1.0)
    check_equal(path, found["rope_interpolation"], interpolation, "rope_interpolation", "model.llm.rope_interpolation")


def full_config(theirs: Mapping[str, Any], family: Family | None = None) -> Any:
    """transformers' configuration of the model in a folder, with what only generating needs; see `sizes`."""
    config = glm_config(**sizes(theirs, family))
    config.architectures, config.use_cache = ["GlmForCausalLM"], True
    config.max_position_embeddings = theirs.get("seq_length", theirs.get("max_position_embeddings", 0))
    config.eos_token_id, config.pad_token_id = theirs.get("eos_token_id"), theirs.get("pad_token_id")
    return config


def _transformers_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or {}
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
    kind = rope.get("rope_type", "default")
    if partial != 0.5 or kind not in ("default", "linear"):
        raise ValueError(f"config.json has rotary positions of type {kind!r} on {partial:g} of a head, not on half")
    return {
        **{ours: whole_number(config, key) for ours, key in _SIZES["transformers"].items()},
        "norm_eps": positive(config, "rms_norm_eps"),
        "qkv_bias": config.get("attention_bias", True),
        "rope_base": rope.get("rope_theta", config.get("rope_theta", ROTARY_BASE)),
        "rope_interpolation": rope.get("factor", 1.0),
        "tied_head": config.get("tie_word_embeddings", False),
    }


def _rows(checkpoint: Checkpoint, name: str, start: int, end: int) -> Callable[[], Tensor]:
    return lambda: checkpoint.read(name)[start:end]
