"""model/vision/encoder.py against transformers' own networks and against the arithmetic of the paper's encoder."""

from __future__ import annotations

import pytest
import torch

from model.vision.encoder import CLIP_MEAN, CLIP_STD, ImageEncoder, eva_vit, vision_from_folder
from tests.operations import Operations


def small(**options: object) -> ImageEncoder:
    sizes = {"image_size": 32, "patch_size": 8, "width": 32, "num_layers": 2, "num_heads": 4, "mlp_width": 64}
    torch.manual_seed(0)
    return eva_vit(**{**sizes, **options})  # type: ignore[arg-type]


def test_full_size_has_the_papers_parameters_tokens_and_flops() -> None:
    with torch.device("meta"):
        encoder = eva_vit()
    ln_vision = 2 * 1408
    assert sum(p.numel() for p in encoder.parameters()) + ln_vision == 985_952_256
    assert (encoder.num_tokens, encoder.width) == (257, 1408)
    tokens, width, mlp = 257, 1408, 6144
    block = 2 * tokens * (4 * width**2 + 2 * width * mlp) + 4 * tokens**2 * width
    expected = 39 * block + 2 * 256 * width * 3 * 14**2
    assert encoder.flops_per_image() == expected
    assert round(expected / 1e9, 1) == 520.7  # blip2.md 6.1


def test_features_are_those_before_transformers_post_layernorm() -> None:
    from transformers import Blip2VisionModel

    encoder = small()
    reference = Blip2VisionModel._from_config(encoder.network.config, attn_implementation="eager").eval()
    reference.load_state_dict(encoder.network.state_dict(), strict=False)
    pixels = torch.randn(3, 3, 32, 32)
    seen: list[torch.Tensor] = []
    reference.post_layernorm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    reference(pixels)
    expected = seen[0]
    features = encoder(pixels)
    assert features.shape == (3, encoder.num_tokens, encoder.width) == (3, 17, 32)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_gradients_of_attention_are_transformers_without_a_tensor_of_zeros_for_each_part() -> None:
    encoder = small(frozen=False, num_layers=1)
    attention = encoder.network.encoder.layers[0].self_attn
    x, weight = torch.randn(3, 17, 32), torch.randn(3, 17, 32)
    results = []
    for forward in (attention, lambda x: type(attention).forward(attention, x)):
        with Operations() as asked:
            results.append(torch.autograd.grad((forward(x)[0] * weight).sum(), list(attention.parameters())))
        results[-1] += (asked.number_of("select_backward"),)
    found, expected = results
    assert (found[-1], expected[-1]) == (0, 3)
    for gradient, library in zip(found[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(gradient, library)


def test_uint8_is_normalised_and_floats_are_taken_as_they_are() -> None:
    encoder = small()
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    expected = (image / 255 - mean) / std
    torch.testing.assert_close(encoder.normalise(image), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder(image), encoder(expected), rtol=0, atol=1e-4)
    assert "pixel_mean" in dict(encoder.named_buffers()) and "pixel_mean" not in encoder.state_dict()


def test_attention_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, calls = small(), []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: (calls.append(k), fused(*a, **k))[1]
    )
    encoder(torch.randn(1, 3, 32, 32))
    assert len(calls) == 2
    assert all(call.get("attn_mask") is None and not call.get("is_causal") for call in calls)


def test_frozen_stays_in_eval_and_builds_no_graph() -> None:
    encoder = small().train()
    assert not any(module.training for module in encoder.network.modules())
    assert not encoder(torch.randn(1, 3, 32, 32)).requires_grad
    assert not any(p.requires_grad for p in encoder.parameters())


def test_training_along_reaches_every_parameter() -> None:
    encoder = small(frozen=False).train()
    encoder(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert all(p.grad is not None for p in encoder.parameters())
    assert encoder.network.training
    # weights from scratch must start where training can begin, not at the library's 1e-10
    assert 0.01 < encoder.network.encoder.layers[0].mlp.fc1.weight.std() < 0.03


def test_16_bit_frozen_network_ignores_autocast() -> None:
    encoder = small(dtype="bfloat16")
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    dtypes, autocast = [], []
    for layer in encoder.network.encoder.layers:
        layer.register_forward_hook(lambda _m, _i, out: dtypes.append(out.dtype))
        layer.layer_norm1.register_forward_hook(lambda _m, _i, out: dtypes.append(out.dtype))
        # a GPU's autocast would make these norms return float32; a CPU's would not, so ask whether it is on
        layer.layer_norm1.register_forward_hook(lambda *_: autocast.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(image)
    assert autocast == [False, False]
    assert set(dtypes) == {torch.bfloat16} and features.dtype == torch.bfloat16
    expected = small()(image)
    assert (features.float() - expected).abs().max() < 0.03 * expected.abs().max()


def test_wrong_sizes_and_dtypes_are_named() -> None:
    with pytest.raises(ValueError, match=r"32 x 48 pixels.*32 x 32"):
        small()(torch.zeros(1, 3, 32, 48))
    with pytest.raises(ValueError, match="multiple of patch_size 7"):
        small(patch_size=7)
    with pytest.raises(ValueError, match="int8"):
        small(dtype="int8")
    with pytest.raises(ValueError, match="stays in float32"):
        small(dtype="bfloat16", frozen=False)


def saved(tmp_path, family: str):  # noqa: ANN001, ANN201
    """A small random checkpoint of one family, as transformers writes it; with the features its own class computes."""
    import json

    import transformers as t

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    pixels = {"image_size": 32, "patch_size": 8}
    model: torch.nn.Module
    if family == "clip":
        text = {**sizes, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 2}
        model = t.CLIPModel(t.CLIPConfig(text_config=text, vision_config={**sizes, **pixels}))
        network = model.vision_model
    elif family == "siglip":
        text = {**sizes, "vocab_size": 50, "max_position_embeddings": 8}
        model = t.SiglipModel(t.SiglipConfig(text_config=text, vision_config={**sizes, **pixels}))
        network = model.vision_model
    elif family == "vit":
        model = network = t.ViTModel(t.ViTConfig(**sizes, **pixels))
    else:
        del sizes["intermediate_size"]
        model = network = t.Dinov2Model(t.Dinov2Config(**sizes, **pixels, drop_path_rate=0.2))
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return network.eval()


@pytest.mark.parametrize("family", ["clip", "siglip", "vit", "dinov2"])
def test_other_families_give_their_own_features_without_pooler(tmp_path, family: str) -> None:  # noqa: ANN001
    network = saved(tmp_path, family)
    encoder = vision_from_folder(str(tmp_path), frozen=False).train()
    pixels = torch.randn(2, 3, 32, 32)
    expected = network(pixels).last_hidden_state
    torch.testing.assert_close(encoder(pixels), expected, rtol=0, atol=1e-5)
    assert encoder.num_tokens == expected.shape[1] and encoder.width == 32
    assert torch.equal(encoder.pixel_mean.flatten(), torch.full((3,), 0.5))
    encoder(pixels).square().mean().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)
    assert not any("pool" in name or "head." in name for name, _ in encoder.named_parameters())


def test_a_folder_that_does_not_fit_is_refused(tmp_path) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match="fetch_weights"):
        vision_from_folder(str(tmp_path / "absent"))
    saved(tmp_path, "clip")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="pixel_mean"):
        vision_from_folder(str(tmp_path))
    with pytest.raises(ValueError, match="4 px"):
        vision_from_folder(str(tmp_path), image_size=4, pixel_mean=CLIP_MEAN, pixel_std=CLIP_STD)


def test_another_size_interpolates_positions_as_transformers_does(tmp_path) -> None:  # noqa: ANN001
    network = saved(tmp_path, "clip")
    pixels = torch.randn(1, 3, 48, 48)
    expected = network(pixels, interpolate_pos_encoding=True).last_hidden_state
    features = vision_from_folder(str(tmp_path), image_size=48)(pixels)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_the_first_blocks_alone(tmp_path) -> None:  # noqa: ANN001
    network = saved(tmp_path, "clip")
    pixels = torch.randn(1, 3, 32, 32)
    expected = network(pixels, output_hidden_states=True).hidden_states[1]
    encoder = vision_from_folder(str(tmp_path), num_layers=1)
    torch.testing.assert_close(encoder(pixels), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="3.*2 blocks"):
        vision_from_folder(str(tmp_path), num_layers=3)
