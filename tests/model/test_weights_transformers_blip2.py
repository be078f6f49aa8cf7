"""model/weights/transformers_blip2.py against transformers' own BLIP-2, on small random checkpoints that it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.weights import initialise
from tests.model.weights_common import QFORMER, VISION, captions, small_model


def configuration(**changes: Any) -> Any:
    import transformers as t

    vision = {
        "hidden_size": VISION["width"],
        "intermediate_size": VISION["mlp_width"],
        "num_hidden_layers": VISION["num_layers"],
        "num_attention_heads": VISION["num_heads"],
        "image_size": VISION["image_size"],
        "patch_size": VISION["patch_size"],
        "initializer_range": 0.2,
    }
    qformer = {
        "vocab_size": QFORMER["vocab_size"],
        "hidden_size": QFORMER["hidden_size"],
        "num_hidden_layers": QFORMER["num_layers"],
        "num_attention_heads": QFORMER["num_heads"],
        "intermediate_size": QFORMER["intermediate_size"],
        "max_position_embeddings": QFORMER["max_positions"],
        "initializer_range": 0.2,
        "use_qformer_text_input": True,
    }
    text = t.OPTConfig(
        vocab_size=40, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16
    )
    return t.Blip2Config(
        vision_config={**vision, **changes.get("vision", {})},
        qformer_config={**qformer, **changes.get("qformer", {})},
        text_config=text.to_dict(),
        num_query_tokens=QFORMER["num_query_tokens"],
        image_text_hidden_size=12,
        initializer_range=0.2,
    )


def reference(kind: str = "Blip2ForImageTextRetrieval", **changes: Any) -> Any:
    import transformers as t

    torch.manual_seed(5)
    model = getattr(t, kind)(configuration(**changes)).eval()
    with torch.no_grad():  # zeros and ones would hide a norm or a bias that went astray
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name == "query_tokens":
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("shard_size", ["5GB", "40KB"])
def test_hidden_states_and_scores_are_transformers(tmp_path: Path, shard_size: str) -> None:
    theirs = reference()
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "40KB")
    model = small_model(seed=1)
    report = initialise(model, all=str(tmp_path))
    assert model.ln_vision.eps == 1e-6
    assert {name.split(".")[1] for name in report.new} == {"language_head", "value"} and not report.ignored

    pixels = torch.randn(3, 3, 28, 28)
    ids, mask = captions(QFORMER["vocab_size"])
    with torch.no_grad():
        itc = theirs(pixels, ids, mask.long())
        itm = theirs(pixels, ids, mask.long(), use_image_text_matching_head=True)
        image, text_BE = model.encode_image(pixels), model.encode_text(ids, mask)
        scores = torch.einsum("bqe,ne->bnq", image.query_BQE, text_BE).amax(-1)
        pairs = (
            (model.ln_vision(image.encoded_BMW), itc.vision_model_output.last_hidden_state),
            (image.query_BQE, itc.image_embeds),
            (text_BE, itc.text_embeds),
            (model.qformer.read(ids, mask)[mask], itc.text_model_output.last_hidden_state[mask]),
            (scores, itc.logits_per_image),
            (model.match(image, ids, mask), itm.logits_per_image),
        )
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["Blip2Model", "Blip2ForConditionalGeneration"])
def test_stage_two_folders_bring_encoder_and_queries(tmp_path: Path, kind: str) -> None:
    theirs = reference(kind, qformer={"use_qformer_text_input": False})
    theirs.save_pretrained(tmp_path)
    model = small_model(seed=1)
    report = initialise(model, all=str(tmp_path))
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        hidden = theirs.vision_model(pixels).last_hidden_state
        expected = theirs.qformer(theirs.query_tokens.expand(2, -1, -1), encoder_hidden_states=hidden)
        found = model.encode_image(pixels)
    torch.testing.assert_close(found.query_BQH, expected.last_hidden_state, rtol=0, atol=1e-5)
    assert any("language model of stage two" in note for note in report.notes)
    assert all(name.startswith("language") for name in report.ignored)
    assert "qformer.embedding.word.weight" in report.new and "itm_head.weight" in report.new


def test_a_part_alone_leaves_the_rest(tmp_path: Path) -> None:
    theirs = reference()
    theirs.save_pretrained(tmp_path)
    model, untouched = small_model(seed=1), small_model(seed=1)
    report = initialise(model, vision=str(tmp_path))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, untouched.get_parameter(n))}
    assert changed and all(name.startswith("vision.") for name in changed)
    assert not any(name.startswith("vision.") for name in report.new)
    report = initialise(model, qformer=str(tmp_path))
    assert torch.equal(model.itm_head.weight, theirs.itm_head.weight)
    assert all(name.startswith("vision.") for name in report.new if not name.startswith(("qformer.lang", "temp")))


def test_what_no_shape_shows_is_compared(tmp_path: Path) -> None:
    reference(vision={"num_attention_heads": 2}).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="num_attention_heads 2, the model has the encoder's 4"):
        initialise(small_model(), all=str(tmp_path / "a"))
    reference(qformer={"num_attention_heads": 2}).save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match=r"num_attention_heads 2, the model has qformer.num_heads 4"):
        initialise(small_model(), all=str(tmp_path / "b"))
    with pytest.raises(ValueError, match=r"layers \[0, 2\].*\[0, 1, 2\]"):
        reference().save_pretrained(tmp_path / "c")
        initialise(small_model(cross_attention_frequency=1), all=str(tmp_path / "c"))


def test_a_missing_shard_and_a_wrong_folder_are_named(tmp_path: Path) -> None:
    reference().save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name}.*missing"):
        initialise(small_model(), all=str(tmp_path))
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"{shard.name}.*cut short"):
        initialise(small_model(), all=str(tmp_path))
    with pytest.raises(ValueError, match="there is nothing at"):
        initialise(small_model(), all=str(tmp_path / "absent"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert', not BLIP-2.*model.weights.qformer"):
        initialise(small_model(), all=str(tmp_path))
