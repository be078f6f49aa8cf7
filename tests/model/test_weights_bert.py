"""model/weights/bert.py against transformers' BERT, RoBERTa and XLM-R, on small random checkpoints that they save."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model.weights import initialise
from tests.model.weights_common import QFORMER, captions, small_model

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
XLM_R = {"eps": 1e-5, "pad": 1, "options": {"layer_norm_eps": 1e-5, "pad_id": 1}}


def reference(kind: str, **changes: Any) -> Any:
    """BERT with a causal or a masked language head; XLM-R with `<pad>` 1 and positions from 2."""
    import transformers as t

    torch.manual_seed(7)
    if kind.startswith("XLM"):
        base = {"max_position_embeddings": 18, "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
        config = t.XLMRobertaConfig(**{**SIZES, **base, **changes})
    else:
        config = t.BertConfig(**{**SIZES, "max_position_embeddings": 16, **changes})
    if kind == "BertLMHeadModel":
        config.is_decoder = True
    model = getattr(t, kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def without_token_types(model: Any) -> Any:
    with torch.no_grad():
        model.base_model.embeddings.token_type_embeddings.weight.zero_()
    return model


@pytest.mark.parametrize("token_type", ["drop", "fold"])
@pytest.mark.parametrize(("kind", "options"), [("BertForMaskedLM", {}), ("XLMRobertaForMaskedLM", XLM_R["options"])])
def test_text_alone_and_language_head_are_transformers(
    tmp_path: Path, kind: str, options: dict[str, Any], token_type: str
) -> None:
    theirs = reference(kind)
    theirs.save_pretrained(tmp_path)
    if token_type == "drop":
        theirs = without_token_types(theirs)
    model = small_model(seed=1, **options)
    report = initialise(model, qformer=str(tmp_path), token_type=token_type)
    ids, mask = captions(QFORMER["vocab_size"], pad=options.get("pad_id", 0))
    with torch.no_grad():
        expected = theirs(ids, mask.long(), output_hidden_states=True)
        hidden = model.qformer.read(ids, mask)
        torch.testing.assert_close(hidden[mask], expected.hidden_states[-1][mask], rtol=0, atol=1e-5)
        logits = model.qformer.language_head(hidden[mask])
        torch.testing.assert_close(logits, expected.logits[mask], rtol=0, atol=1e-4)
    assert any("token type" in note for note in report.notes)
    assert {name.split(".")[0] for name in report.new} == {
        "vision", "ln_vision", "vision_proj", "text_proj", "itm_head", "temperature", "qformer"
    }  # fmt: skip
    left = [name for name in report.new if name.startswith("qformer.")]
    assert all("cross_attention" in name or "query_tokens" in name for name in left)


def test_captioning_without_an_image_is_a_causal_bert(tmp_path: Path) -> None:
    """`BertLMHeadModel` as decoder = text rows of `caption` with no queries before them."""
    theirs = without_token_types(reference("BertLMHeadModel"))
    theirs.save_pretrained(tmp_path)
    model = small_model(seed=1)
    initialise(model, qformer=str(tmp_path))
    ids, mask = captions(QFORMER["vocab_size"])
    nothing = torch.zeros(3, 4, 0, 6)
    model.qformer.num_query_tokens = 0
    with torch.no_grad():
        expected = theirs(ids, mask.long()).logits
        hidden = model.qformer.caption([(nothing, nothing)] * 3, ids, mask)
        logits = model.qformer.language_head(hidden)
    torch.testing.assert_close(logits[mask], expected[mask], rtol=0, atol=1e-4)


def test_queries_start_with_the_texts_feed_forward_and_random_cross_attention(tmp_path: Path) -> None:
    theirs = reference("BertForMaskedLM")
    theirs.save_pretrained(tmp_path)
    model, untouched = small_model(seed=1), small_model(seed=1)
    initialise(model, qformer=str(tmp_path))
    for layer, before, bert in zip(
        model.qformer.layers, untouched.qformer.layers, theirs.bert.encoder.layer, strict=True
    ):
        assert torch.equal(layer.query_feed_forward.dense.weight, bert.intermediate.dense.weight)
        assert torch.equal(layer.text_feed_forward.output.norm.bias, bert.output.LayerNorm.bias)
        if layer.cross_attention is not None:
            expected = before.cross_attention.image.key.weight
            assert torch.equal(layer.cross_attention.image.key.weight, expected)
    assert model.qformer.language_head.decoder.weight is model.qformer.embedding.word.weight


def test_words_that_were_added_stay_new(tmp_path: Path) -> None:
    theirs = reference("BertForMaskedLM")
    theirs.save_pretrained(tmp_path)
    model = small_model(seed=1, vocab_size=63)
    before = model.qformer.embedding.word.weight[61:].clone()
    report = initialise(model, qformer=str(tmp_path))
    assert torch.equal(model.qformer.embedding.word.weight[:61], theirs.bert.embeddings.word_embeddings.weight)
    assert torch.equal(model.qformer.embedding.word.weight[61:], before)
    assert torch.equal(
        model.qformer.language_head.decoder.bias, torch.cat([theirs.cls.predictions.bias, torch.zeros(2)])
    )
    assert report.new["qformer.embedding.word.weight rows 61 to 62"] == 48
    assert "qformer.embedding.word rows 61 to 62" in str(report)


def test_oldest_names_and_torch_files(tmp_path: Path) -> None:
    """bert-base-chinese was published as pytorch_model.bin with LayerNorm.gamma and .beta."""
    theirs = reference("BertForMaskedLM")
    old = {}
    for name, tensor in theirs.state_dict().items():
        old[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    old["bert.pooler.dense.weight"] = torch.zeros(24, 24)
    torch.save(old, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    model = small_model(seed=1)
    report = initialise(model, qformer=str(tmp_path))
    assert torch.equal(model.qformer.embedding_norm.weight, theirs.bert.embeddings.LayerNorm.weight)
    assert torch.equal(model.qformer.language_head.norm.bias, theirs.cls.predictions.transform.LayerNorm.bias)
    assert "bert.pooler.dense.weight".removeprefix("bert.") in report.ignored
    assert "loaded" in str(report) and "ignored" in str(report) and "pooler.dense" in str(report)


def test_a_deeper_bert_gives_its_first_layers_a_shallower_one_is_refused(tmp_path: Path) -> None:
    theirs = reference("BertForMaskedLM")
    theirs.save_pretrained(tmp_path)
    model = small_model(seed=1, num_layers=2)
    report = initialise(model, qformer=str(tmp_path))
    assert any("first 2 of its 3" in note for note in report.notes)
    with pytest.raises(ValueError, match="3 layers, the Q-Former 4"):
        initialise(small_model(num_layers=4), qformer=str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"vocab_size": 60}, r"\[60, 24\].*\[61, 24\].*tokenizer"),
        ({}, {"max_positions": 15}, r"position.weight is \[15, 24\].*\[16, 24\]"),
        ({}, {"hidden_size": 32}, r"\[61, 32\].*\[61, 24\]"),
        ({}, {"num_heads": 2}, r"num_attention_heads 4, the model has model.qformer.num_heads 2"),
        ({"layer_norm_eps": 1e-5}, {}, "layer_norm_eps 1e-05, the model has model.qformer.layer_norm_eps 1e-12"),
        ({}, {"pad_id": 1}, "pad_token_id 0, the model has the tokenizer's 1"),
        ({"hidden_act": "relu"}, {}, "'relu'"),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    reference("BertForMaskedLM", **changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        initialise(small_model(**options), qformer=str(tmp_path))


def test_layouts_that_cannot_be_held_are_refused_by_name(tmp_path: Path) -> None:
    for family, reason in (("albert", "factorised"), ("deberta-v2", "disentangled"), ("gpt2", "only BERT, RoBERTa")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
        with pytest.raises(ValueError, match=f"'{family}'.*{reason}"):
            initialise(small_model(), qformer=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "position_embedding_type": "relative_key"}))
    with pytest.raises(ValueError, match="relative_key"):
        initialise(small_model(), qformer=str(tmp_path))
