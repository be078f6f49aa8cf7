"""model/weights/lavis.py: LAVIS's own numbers come out of LAVIS's weights, read from a .pth as LAVIS writes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model.weights import initialise, lavis
from tests.model.weights_common import parity_folder, parity_model, small_model


def as_pth(tensors: dict[str, torch.Tensor], path: Path, *, wrapped: bool) -> Path:
    """`runner_base.py` saves the weights under "model"; the published files differ in that."""
    torch.save({"model": tensors, "optimizer": {"state": {}}, "epoch": 3} if wrapped else tensors, path)
    return path


@pytest.mark.parametrize("name", ["stage_one_1rank", "stage_one_2ranks"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_the_references_tensors_come_out(name: str, wrapped: bool, tmp_path: Path) -> None:
    folder = parity_folder(name)
    weights, data = load_file(folder / "weights.safetensors"), load_file(folder / "rank0.safetensors")
    model = parity_model(folder)
    report = initialise(model, all=str(as_pth(weights, tmp_path / "x.pth", wrapped=wrapped)))
    assert not report.new
    assert set(report.ignored) == {"Qformer.bert.embeddings.position_ids", "Qformer.cls.predictions.decoder.weight"}
    assert model.ln_vision.eps == 1e-5 and any("1e-05" in note for note in report.notes)
    with torch.no_grad():
        image = model.encode_image(data["image"])
        text_BE = model.encode_text(data["input_ids"], data["attention_mask"].bool())
        logits_B2 = model.match(image, data["input_ids"], data["attention_mask"].bool())
    similarity = torch.einsum("bqe,ne->bnq", image.query_BQE, text_BE).amax(-1) / model.temperature()
    batch = len(text_BE)
    for found, expected in (
        (model.ln_vision(image.encoded_BMW), data["expected.image_embeds"]),
        (image.query_BQH, data["expected.query_output"]),
        (similarity, data["expected.sim_i2t"][:, :batch]),
        (logits_B2, data["expected.itm_logits"][:batch]),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_there_and_back_again() -> None:
    model, other = small_model(seed=1), small_model(seed=2)
    with torch.no_grad():
        for layer in (*model.vision.network.encoder.layers, *other.vision.network.encoder.layers):
            layer.self_attn.qkv.bias.normal_()
        for layer in model.vision.network.encoder.layers:
            layer.self_attn.qkv.bias[32:64] = 0  # LAVIS has no bias on the keys
    tensors = lavis.to_lavis(model, dict(model.named_parameters()))
    assert tensors["temp"].shape == () and tensors["visual_encoder.blocks.1.attn.v_bias"].shape == (32,)
    report = lavis.load_tensors(other, tensors)
    assert not report.new
    for name, expected in model.named_parameters():
        assert torch.equal(other.get_parameter(name), expected), name


def test_every_name_of_the_reference_is_known_and_comes_back() -> None:
    folder = parity_folder("stage_one_1rank")
    weights = load_file(folder / "weights.safetensors")
    model = parity_model(folder)
    lavis.load_tensors(model, weights)
    back = lavis.to_lavis(model, dict(model.named_parameters()))
    assert set(back) == set(weights) - {"Qformer.bert.embeddings.position_ids"}
    for name, tensor in back.items():
        assert tensor.shape == weights[name].shape and torch.equal(tensor, weights[name]), name


def test_only_the_encoder_from_eva_clips_own_file(tmp_path: Path) -> None:
    """40 blocks and no prefix there; BLIP-2 takes 39."""
    model, source = small_model(seed=1), small_model(seed=2)
    tensors = {
        name.removeprefix("visual_encoder."): tensor
        for name, tensor in lavis.to_lavis(source, dict(source.named_parameters())).items()
        if name.startswith("visual_encoder.")
    }
    tensors |= {k.replace("blocks.1", "blocks.2"): v for k, v in tensors.items() if "blocks.1" in k}
    before = model.qformer.layers[0].self_attention.query.weight.clone()
    report = initialise(model, vision=str(as_pth(tensors, tmp_path / "eva_vit_g.pth", wrapped=False)))
    expected = source.vision.network.encoder.layers[1].mlp.fc1.weight
    assert torch.equal(model.vision.network.encoder.layers[1].mlp.fc1.weight, expected)
    assert torch.equal(model.qformer.layers[0].self_attention.query.weight, before)
    assert any("block 2" in note for note in report.notes)
    assert not any(name.startswith("vision.") for name in report.new)
    assert not any("RANDOM" in note for note in report.notes)


def test_stage_two_files_have_no_text_branch(tmp_path: Path) -> None:
    source = small_model(seed=2)
    tensors = lavis.to_lavis(source, dict(source.named_parameters()))
    text = ("embeddings.word", "embeddings.position", "intermediate.", ".output.dense", ".output.Layer", "cls.")
    tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if "visual_encoder" not in name
        and not (name.startswith("Qformer") and any(t in name for t in text) and "attention" not in name)
        and name not in ("temp", "itm_head.weight", "itm_head.bias")
    }
    tensors["opt_proj.weight"] = torch.zeros(3, 24)
    model = small_model(seed=1)
    report = initialise(model, all=str(as_pth(tensors, tmp_path / "x.pth", wrapped=True)))
    assert list(report.ignored) == ["opt_proj.weight"]
    assert "qformer.layers.0.text_feed_forward.dense.weight" in report.new and "itm_head.weight" in report.new
    assert "qformer.layers.0.query_feed_forward.dense.weight" in report.loaded
    assert any("FROZEN AND RANDOM" in note for note in report.notes)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    source = small_model(seed=2)
    tensors = lavis.to_lavis(source, dict(source.named_parameters()))
    path = as_pth(tensors, tmp_path / "x.pth", wrapped=False)
    with pytest.raises(ValueError, match=r"query_tokens.tokens is \[1, 6, 24\].*query_tokens is \[1, 5, 24\]"):
        lavis.load(small_model(num_query_tokens=6), path)
    with pytest.raises(ValueError, match="3 layers in its Q-Former, the model has 2"):
        lavis.load(small_model(num_layers=2), path)
    with pytest.raises(ValueError, match=r"tensors are missing.*number of layers"):
        lavis.load(small_model(num_layers=4), path)
    del tensors["Qformer.bert.encoder.layer.1.attention.self.key.weight"]
    with pytest.raises(ValueError, match="1 of its tensors are missing .first: Qformer.bert.encoder.layer.1.attention"):
        lavis.load_tensors(small_model(), tensors)
    with pytest.raises(ValueError, match="nothing of this model"):
        lavis.load_tensors(small_model(), {"something": torch.zeros(1)})


def test_more_words_than_the_checkpoint_keeps_them_new() -> None:
    source, model = small_model(seed=2), small_model(seed=1, vocab_size=63)
    before = model.qformer.embedding.word.weight[61:].clone()
    report = lavis.load_tensors(model, lavis.to_lavis(source, dict(source.named_parameters())))
    assert torch.equal(model.qformer.embedding.word.weight[:61], source.qformer.embedding.word.weight)
    assert torch.equal(model.qformer.embedding.word.weight[61:], before)
    assert report.new["qformer.embedding.word.weight rows 61 to 62"] == 2 * 24
    assert "qformer.embedding.word rows 61 to 62" in str(report)
    with pytest.raises(ValueError, match=r"\[60, 24\].*\[61, 24\]"):
        smaller = small_model(vocab_size=60)
        lavis.load_tensors(smaller, lavis.to_lavis(source, dict(source.named_parameters())))


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this would have been a program",)


def test_a_file_that_is_a_program_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"model": {"temp": torch.zeros(())}, "config": Payload()}, path)
    with pytest.raises(ValueError, match="more than tensors"):
        lavis.load(small_model(), path)
    assert "program" not in capsys.readouterr().out
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="no named tensors"):
        lavis.load(small_model(), path)
    path.write_bytes(b"cut")
    with pytest.raises(ValueError, match="evil.pth"):
        lavis.load(small_model(), path)
