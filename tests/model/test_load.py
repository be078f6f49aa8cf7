"""A model from every kind of folder says what the model said that was written there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.adapter import Lora
from model.load import load
from model.visual_chat import VisualChatModel
from model.weights import adapter_folder, sat, visualglm_convert
from tests.model.llm_common import codec_of
from tests.tiny_chat import batch_of, tiny_chat, train_pieces
from tests.tiny_run import SIZES, chatglm_nodes, write_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces") / "ice_text.model")


def chat(pieces: Path, seed: int = 0) -> VisualChatModel:
    return tiny_chat(pieces, seed=seed, llm={**SIZES, "initial_std": 0.15})


def logits(model: VisualChatModel) -> Tensor:
    with torch.no_grad():
        return model.predict(batch_of(model)).logits_TV.float()


def trained(model: VisualChatModel, *, rank: int = 4) -> dict[str, Tensor]:
    """With a LoRA, and everything that learns moved.  -> what a checkpoint has of it"""
    Lora(rank=rank).attach(model, device=CPU)
    torch.manual_seed(1)
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in found.values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return {name: parameter.detach() for name, parameter in found.items()}


# ------------------------------------------------------------------------------------------------------------ VisualGLM


@pytest.fixture(scope="module")
def sat_folder(pieces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = chat(pieces, seed=3)
    ids = codec_of(model.llm).ids  # type: ignore[arg-type]
    config: dict[str, Any] = {
        "model_class": "VisualGLMModel",
        "num_layers": 3,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "inner_hidden_size": 128,
        "vocab_size": 256,
        "image_length": 5,
        **{f"{role}_token_id": ids[role] for role in ("bos", "gmask", "mask", "pad")},
        "eva_args": {
            "num_layers": 2,
            "hidden_size": 24,
            "num_attention_heads": 2,
            "inner_hidden_size": 48,
            "image_size": [28, 28],
            "patch_size": 14,
            "layernorm_epsilon": 1e-6,
        },
        "qformer_args": {
            "num_layers": 3,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "inner_hidden_size": 48,
            "is_decoder": [True, False, True],
            "cross_attn_hidden_size": 24,
            "layernorm_epsilon": 1e-12,
        },
    }
    return sat.write(model, tmp_path_factory.mktemp("visualglm") / "sat", config)


@pytest.fixture(scope="module")
def hf_folder(sat_folder: Path, pieces: Path) -> Path:
    folder = sat_folder.with_name("huggingface")
    visualglm_convert.convert(sat_folder, folder, to="huggingface", qkv_order="blocks")
    shutil.copyfile(pieces, folder / "ice_text.model")
    return folder


def test_visualglm_in_either_layout(pieces: Path, sat_folder: Path, hf_folder: Path) -> None:
    expected = logits(chat(pieces, seed=3))
    found = load(sat_folder, tokenizer=pieces, qkv_order="blocks", device="cpu")
    assert not found.training and not any(parameter.requires_grad for parameter in found.parameters())
    torch.testing.assert_close(logits(found), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(load(hf_folder, device="cpu")), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_on_top(pieces: Path, hf_folder: Path, tmp_path: Path) -> None:
    model = chat(pieces, seed=3)
    adapter_folder.save(model, trained(model), tmp_path / "adapter")
    expected = logits(model)
    torch.testing.assert_close(logits(load(hf_folder, tmp_path / "adapter")), expected, atol=1e-4, rtol=1e-4)
    for name in ("queqiao.json", "trained.safetensors"):  # what peft alone writes
        (tmp_path / "adapter" / name).unlink()
    for name, parameter in chat(pieces, seed=3).named_parameters():
        if not name.startswith("llm."):
            model.get_parameter(name).data.copy_(parameter)
    expected = logits(model)
    torch.testing.assert_close(logits(load(hf_folder, tmp_path / "adapter")), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("bits", "worst"), [(8, 0.03), (4, 0.4)])
def test_fewer_bits_for_the_language_model_alone(
    pieces: Path, hf_folder: Path, tmp_path: Path, bits: int, worst: float
) -> None:
    """VisualGLM's terminal quantised encoder and Q-Former too, its web page did not (`cli_demo.py:41`)."""
    model = chat(pieces, seed=3)
    adapter_folder.save(model, trained(model), tmp_path / "adapter")
    expected = logits(model)
    found = load(hf_folder, tmp_path / "adapter", quantize=bits)
    kinds = {name.split(".")[0] for name, p in found.named_parameters() if not p.is_floating_point()}
    assert kinds == {"llm"} and found.llm.network.get_parameter("lm_head.weight").is_floating_point()
    blocks = found.llm.network.get_submodule("transformer.layers")
    in_few = sum(p.nbytes for n, p in blocks.named_parameters() if not p.is_floating_point())
    weights = 3 * (4 * 64 * 64 + 2 * 64 * 128)
    assert in_few == weights * bits // 8
    error = (logits(found) - expected).abs().mean() / expected.abs().mean()
    assert 1e-4 < error < worst


def test_one_precision_but_not_for_means_and_angles(hf_folder: Path) -> None:
    model = load(hf_folder, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.get_buffer("vision.pixel_mean").dtype == torch.float32
    expected, found = logits(load(hf_folder)), logits(model)
    assert (found - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_what_is_wrong_with_a_folder_is_said(pieces: Path, sat_folder: Path, hf_folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"model_type": "bert"}')
    for arguments, expected in (
        ((tmp_path / "none",), "there is no folder"),
        ((tmp_path,), "holds no model that is known here: a run of finetune.py has config.yaml"),
        ((adapter,), "is an adapter: give the model it belongs to"),
        ((bare,), "of type 'bert' and not ChatGLM-6B's"),
        ((sat_folder,), "holds no ice_text.model.*--tokenizer"),
        ((hf_folder, bare), "holds no adapter"),
    ):
        with pytest.raises(ValueError, match=expected):
            load(*arguments, device="cpu")
    with pytest.raises(ValueError, match="does not say in which order.*--qkv-order"):
        load(sat_folder, tokenizer=pieces)
    for options, expected in (
        ({"quantize": 5}, "it can be 4, 8 or none"),
        ({"dtype": "fp8"}, "dtype is 'fp8'"),
        ({"device": "cuda:99"}, "torch sees"),
        ({"device": "gpu"}, "it can be auto, cpu"),
        ({"device_map": "balanced"}, "it can be auto"),
    ):
        with pytest.raises(ValueError, match=expected):
            load(hf_folder, **options)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------- a run of finetune.py


def run_folder(pieces: Path, place: Path, *, warmed: bool = False) -> tuple[Path, Tensor]:
    """-> the run, logits of its model"""
    nodes = chatglm_nodes(pieces, place / ("run/llm" if warmed else "chatglm"), warmed=warmed)
    return place / "run", logits(write_run(place / "run", nodes))


@pytest.mark.parametrize("warmed", [False, True])
def test_a_run_is_rebuilt(pieces: Path, tmp_path: Path, warmed: bool) -> None:
    run, expected = run_folder(pieces, tmp_path, warmed=warmed)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    torch.testing.assert_close(logits(load(run)), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(torch.get_rng_state(), before)
    run.rename(tmp_path / "moved")
    torch.testing.assert_close(logits(load(tmp_path / "moved")), expected, atol=1e-5, rtol=1e-5)


def test_a_run_in_four_bits(pieces: Path, tmp_path: Path) -> None:
    run, expected = run_folder(pieces, tmp_path)
    error = (logits(load(run, quantize="4")) - expected).abs().mean() / expected.abs().mean()
    assert 1e-3 < error < 0.4


def test_another_adapter_takes_the_place_of_the_runs_own(pieces: Path, tmp_path: Path) -> None:
    run, expected = run_folder(pieces, tmp_path)
    other = tmp_path / "other"
    shutil.copytree(run / "adapter", other)
    tensors = {name: 2 * t for name, t in load_file(other / "adapter_model.safetensors").items()}
    save_file(tensors, other / "adapter_model.safetensors", {"format": "pt"})
    torch.testing.assert_close(logits(load(run, run / "adapter")), expected, atol=1e-5, rtol=1e-5)
    changed = load(run, other)
    name = "transformer.layers.1.mlp.dense_4h_to_h.lora_B.default.weight"
    twice = 2 * load_file(run / "checkpoints/step_2/weights.safetensors")[f"model.llm.network.{name}"]
    assert torch.equal(changed.llm.network.get_parameter(name), twice)
    assert (logits(changed) - expected).abs().max() > 0.1


def test_a_run_that_went_on_from_an_adapter_does_without_it(pieces: Path, tmp_path: Path) -> None:
    run, expected = run_folder(pieces, tmp_path)
    config = OmegaConf.load(run / "config.yaml")
    OmegaConf.update(config, "model.adapter.start", str(tmp_path / "gone"), force_add=True)
    OmegaConf.save(config, run / "config.yaml")
    torch.testing.assert_close(logits(load(run)), expected, atol=1e-5, rtol=1e-5)
    shutil.rmtree(run / "adapter")  # of a run that did not come to its end
    with pytest.raises(ValueError, match="gone holds no adapter"):
        load(run)


def test_a_merged_language_model_with_the_runs_config(pieces: Path, tmp_path: Path) -> None:
    from scripts.merge_adapter import merge, parser

    run, expected = run_folder(pieces, tmp_path)
    merged = tmp_path / "merged"
    merge(parser().parse_args([str(run / "adapter"), str(tmp_path / "chatglm"), str(merged), "--qkv-order", "per_head",
                               "--dtype", "float32"]))  # fmt: skip
    shutil.rmtree(run / "checkpoints")
    torch.testing.assert_close(logits(load(merged)), expected, atol=2e-4, rtol=1e-4)


def test_a_run_that_cannot_be_rebuilt_says_why(pieces: Path, tmp_path: Path) -> None:
    run, _ = run_folder(pieces, tmp_path)
    config = OmegaConf.load(run / "config.yaml")

    def changed(**nodes: Any) -> None:
        new = OmegaConf.create(OmegaConf.to_container(config))
        for name, value in nodes.items():
            OmegaConf.update(new, name.replace("__", "."), value, force_add=True)
        OmegaConf.save(new, run / "config.yaml")

    changed(run__seed=8)
    with pytest.raises(ValueError, match="frozen weights are not those.*drawn at random"):
        load(run)
    changed(model__weights__stage_one=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="not there any more .*gone.*in no checkpoint"):
        load(run)
    changed(model__weights__llm=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="model.weights.llm: there is nothing at"):
        load(run)
    changed(model__vision___target_="os.system")
    with pytest.raises(ValueError, match="only things in data, model, train, serve are built"):
        load(run)
    OmegaConf.save(OmegaConf.create({"run": {"dir": "x", "seed": 0}, "model": {"image_text": {}}}), run / "config.yaml")
    with pytest.raises(ValueError, match="run of stage one.*no language model"):
        load(run)
