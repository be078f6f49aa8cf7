"""A Q-Former from a BERT-like folder: BERT in any language, RoBERTa, XLM-R.

As LAVIS does it (`blip2_models/blip2_qformer.py:75-79`, `Qformer.py:51-109`): self-attention, text feed-forward, words,
positions and the language head are copied, the feed-forward of the queries starts as a copy of the text's,
cross-attention and query tokens start random, and token types are dropped.

What differs between the families: BERT's positions begin at row 0, RoBERTa's and XLM-R's at pad_token_id + 1; their
norms have eps 1e-12 and 1e-5.  Layouts that a Q-Former cannot hold are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.weights import names
from model.weights.checkpoint import Checkpoint, examining, open_folder, read_config
from model.weights.filling import LoadReport, Part, fill
from model.weights.names import LANGUAGE_HEAD

_BERT, _ROBERTA = ("bert",), ("roberta", "xlm-roberta", "camembert")
_CANNOT = {
    "albert": "its layers share one set of weights and its embeddings are factorised",
    "deberta": "its attention is relative and disentangled",
    "deberta-v2": "its attention is relative and disentangled",
    "distilbert": "it names its layers otherwise; take the BERT it was distilled from",
    "electra": "its embeddings may be narrower than its layers",
    "ernie": "it adds task-type embeddings",
    "mpnet": "its attention has relative positions",
    "modernbert": "its norms come first and its positions are rotary",
    "roformer": "its positions are rotary",
    "nezha": "its positions are relative",
    "xlm-roberta-xl": "its norms come first",
}
ATTENTION, FEED_FORWARD, WORDS = "text encoder (attention)", "text encoder (feed-forward)", "text embeddings"


def load(model: nn.Module, path: Path, *, token_type: str = "drop") -> LoadReport:
    """Fill the Q-Former of `model` from a folder in transformers' format.

    Args:
        token_type: BERT adds a token-type vector to every token, which a Q-Former does not.  "drop" leaves it out, as
            LAVIS; "fold" adds row 0 into the positions, so that text alone gives BERT's own hidden states.
    Raises:
        ValueError: a layout that does not fit, by name; other sizes, with both shapes; another tokenizer.
    """
    if token_type not in ("drop", "fold"):
        raise ValueError(f"model.weights.token_type is {token_type!r}; it can be drop or fold")
    config = read_config(path)
    first_position = _check(model, config, str(path))
    checkpoint = open_folder(path).without_prefix("bert.", "roberta.")
    theirs = names.check_depth(checkpoint, "encoder.layer.", 0, "encoder")
    ours = len(names.qformer_layers(model))
    if theirs < ours:
        raise ValueError(f"{path} has {theirs} layers, the Q-Former {ours}: set model.qformer.num_layers={theirs}")
    _check_words(model, checkpoint, str(path))
    report = fill(model, checkpoint, parts(model, checkpoint, first_position), must=(ATTENTION, FEED_FORWARD, WORDS))
    if theirs > ours:
        report.notes.append(f"the first {ours} of its {theirs} layers were taken")
    _token_types(model, checkpoint, token_type, report)
    report.notes.append("the queries' feed-forward starts as a copy of the text's")
    return report


def parts(model: nn.Module, checkpoint: Checkpoint, first_position: int) -> Iterator[Part]:
    """BERT's and RoBERTa's names for what a Q-Former takes from them."""
    embeddings = "embeddings."
    yield Part("qformer.embedding.word.weight", (f"{embeddings}word_embeddings.weight",), WORDS, grow=True)
    position = f"{embeddings}position_embeddings.weight"
    rows = (
        (first_position, checkpoint.shapes[position][0]) if first_position and position in checkpoint.shapes else None
    )
    yield Part("qformer.embedding.position.weight", (position,), WORDS, source_rows=rows)
    yield from names.linear("qformer.embedding_norm", f"{embeddings}LayerNorm", WORDS)
    for index in range(len(names.qformer_layers(model))):
        to, of = f"qformer.layers.{index}.", f"encoder.layer.{index}."
        yield from names.attention(f"{to}self_attention", f"{of}attention", ATTENTION)
        for mine in ("text_feed_forward", "query_feed_forward"):
            yield from names.feed_forward(to + mine, of, FEED_FORWARD)
    head = "qformer.language_head."
    for mine, of_bert, of_roberta in (
        ("dense.weight", ("transform.dense.weight",), "dense.weight"),
        ("dense.bias", ("transform.dense.bias",), "dense.bias"),
        ("norm.weight", ("transform.LayerNorm.weight", "transform.LayerNorm.gamma"), "layer_norm.weight"),
        ("norm.bias", ("transform.LayerNorm.bias", "transform.LayerNorm.beta"), "layer_norm.bias"),
        ("decoder.bias", ("bias", "decoder.bias"), "bias"),
    ):
        sources = (*(f"cls.predictions.{name}" for name in of_bert), f"lm_head.{of_roberta}")
        if mine == "decoder.bias":
            sources += ("lm_head.decoder.bias",)
        yield Part(head + mine, sources, LANGUAGE_HEAD, grow=mine == "decoder.bias")


def _check(model: nn.Module, config: dict[str, Any], path: str) -> int:
    """Everything that no shape shows.  -> the row of the position table where texts begin"""
    family = config.get("model_type", "bert")
    if family not in _BERT + _ROBERTA:
        reason = _CANNOT.get(family, "only BERT, RoBERTa and XLM-R layouts are known")
        raise ValueError(f"{path} is of type {family!r}, which no Q-Former can start from: {reason}")
    kind = config.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise ValueError(f"{path} has positions of type {kind!r}; a Q-Former has absolute ones")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{path} computes with {config['hidden_act']!r}; a Q-Former has the exact GELU")
    qformer = model.get_submodule("qformer")
    heads, eps = config.get("num_attention_heads", 12), config.get("layer_norm_eps", 1e-12)
    pad = config.get("pad_token_id", 1 if family in _ROBERTA else 0)
    here = getattr(qformer, "num_heads"), qformer.get_submodule("embedding_norm").eps  # noqa: B009
    names.check_equal(path, heads, here[0], "num_attention_heads", "model.qformer.num_heads")
    names.check_equal(path, eps, here[1], "layer_norm_eps", "model.qformer.layer_norm_eps")
    names.check_equal(path, pad, qformer.get_submodule("embedding.word").padding_idx, "pad_token_id", "the tokenizer's")
    return pad + 1 if family in _ROBERTA else 0


def _check_words(model: nn.Module, checkpoint: Checkpoint, path: str) -> None:
    """A vocabulary smaller than the checkpoint's belongs to another tokenizer: cut to size, it would load as noise."""
    word = "embeddings.word_embeddings.weight"
    ours = model.get_parameter("qformer.embedding.word.weight")
    theirs = checkpoint.shapes.get(word)
    if theirs is not None and theirs[0] > len(ours):
        raise ValueError(
            f"qformer.embedding.word.weight is {list(ours.shape)} in the model, {word} is {list(theirs)} in {path}: "
            f"the tokenizer is another one than the checkpoint's; set model.tokenizer.folder={path}"
        )


@torch.no_grad()
def _token_types(model: nn.Module, checkpoint: Checkpoint, token_type: str, report: LoadReport) -> None:
    name = "embeddings.token_type_embeddings.weight"
    if name not in checkpoint.shapes:
        return
    if token_type == "fold":
        with examining():
            types = checkpoint.read(name)
        model.get_parameter("qformer.embedding.position.weight").add_(types[0])
        report.ignored.pop(name)
        report.notes.append("token type 0 was folded into the positions")
    else:
        report.notes.append("token types were dropped, as LAVIS does (model.weights.token_type=fold keeps type 0)")
