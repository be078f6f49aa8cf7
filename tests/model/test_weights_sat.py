"""VisualGLM's checkpoints in and out: SAT's files, Hugging Face's folders, our own of stage one; rows never guessed."""

from __future__ import annotations

import json
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.qformer import QFormer
from model.vision.encoder import eva_vit
from model.visual_chat import VisualChatModel
from model.weights import chatglm_folder, ours, sat, stage_two, visualglm
from model.weights.rows import head_by_head, in_blocks
from tests.model.llm_common import small_chatglm
from tests.model.weights_common import QFORMER, VISION, parity_folder, small_model

IDS = {"bos": 250, "gmask": 251, "mask": 252}
CONFIG: dict[str, Any] = {
    "model_class": "VisualGLMModel",
    "num_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "inner_hidden_size": 48,
    "vocab_size": 256,
    "image_length": 5,
    "bos_token_id": 250,
    "gmask_token_id": 251,
    "mask_token_id": 252,
    "eva_args": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "inner_hidden_size": 64,
        "image_size": [28, 28],
        "patch_size": 14,
        "layernorm_epsilon": 1e-6,
    },
    "qformer_args": {
        "num_layers": 3,
        "hidden_size": 24,
        "num_attention_heads": 4,
        "inner_hidden_size": 48,
        "is_decoder": [True, False, True],
        "cross_attn_hidden_size": 32,
        "layernorm_epsilon": 1e-12,
    },
}


def chat_model(seed: int = 0) -> VisualChatModel:
    torch.manual_seed(seed)
    vision = eva_vit(**VISION)  # type: ignore[arg-type]
    model = VisualChatModel(vision, QFormer(**QFORMER), small_chatglm(None, seed=seed))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that none can be mistaken for another
            parameter.normal_()
    return model.eval()


def equal(a: nn.Module, b: nn.Module) -> bool:
    theirs = dict(b.named_parameters())
    return all(torch.equal(parameter, theirs[name]) for name, parameter in a.named_parameters())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sat.write(chat_model(1), tmp_path / "sat", CONFIG)


# ----------------------------------------------------------------------------------------------------- SAT's folders


def test_the_way_from_sat_and_back_changes_no_byte(tmp_path: Path) -> None:
    theirs = parity_folder("visualglm_sat")
    config = sat.read_config(theirs)
    sizes = sat.sizes(config)
    qformer = QFormer(vocab_size=1, max_positions=1, **sizes["qformer"])
    model = VisualChatModel(eva_vit(**sizes["vision"]), qformer, small_chatglm(None, **sizes["llm"]))
    report = sat.load(model, theirs, qkv_order="blocks")
    assert list(report.ignored) == [sat.INV_FREQ] and not report.new
    assert sum(report.loaded.values()) == sum(p.numel() for p in model.parameters())
    sat.write(model, tmp_path / "again", json.loads((theirs / "model_config.json").read_text()))
    expected = sat.open_folder(theirs)
    found = sat.open_folder(tmp_path / "again")
    assert found.shapes == expected.shapes
    for name in expected.shapes:
        assert found.read(name).numpy().tobytes() == expected.read(name).numpy().tobytes(), name
        assert found.read(name).dtype == expected.read(name).dtype
    assert sat.read_config(tmp_path / "again") == config


@pytest.mark.parametrize("order", ["blocks", "per_head"])
def test_every_weight_comes_back_in_either_order(tmp_path: Path, order: visualglm.QkvOrder) -> None:
    expected = chat_model(1)
    sat.write(expected, tmp_path / "sat", CONFIG, qkv_order=order)
    model = chat_model(2)
    report = sat.load(model, tmp_path / "sat", qkv_order=order)
    assert equal(model, expected) and f"read as {order!r}" in str(report)


def test_the_wrong_order_is_another_model(folder: Path) -> None:
    model = chat_model(2)
    sat.load(model, folder, qkv_order="per_head")
    differing = {n for n, p in model.named_parameters() if not torch.equal(p, chat_model(1).get_parameter(n))}
    assert differing == {n for n, _ in model.named_parameters() if "llm" in n and "query_key_value" in n}


def test_rows_by_the_published_formula() -> None:
    """V#200: `w.view(32, 3, 128, 4096).transpose(0, 1).reshape(12288, 4096)` goes from Hugging Face to SAT."""
    weight = torch.randn(2 * 3 * 5, 7)
    expected = weight.view(2, 3, 5, 7).transpose(0, 1).reshape(30, 7)
    assert torch.equal(in_blocks(weight, 2), expected) and torch.equal(head_by_head(expected, 2), weight)
    assert torch.equal(head_by_head(in_blocks(weight[:, 0], 2), 2), weight[:, 0])


def test_the_order_is_never_guessed(folder: Path) -> None:
    with pytest.raises(ValueError, match="does not say in which order.*--qkv-order"):
        sat.load(chat_model(), folder, qkv_order=None)
    with pytest.raises(ValueError, match="can be blocks .* or per_head"):
        sat.load(chat_model(), folder, qkv_order="heads")  # type: ignore[arg-type]
    known = chat_model(1).llm.network.get_parameter(visualglm.FIRST_QKV).detach()
    model = chat_model(2)
    sat.load(model, folder, qkv_order=None, reference=known)
    assert equal(model, chat_model(1))
    with pytest.raises(ValueError, match="in order 'blocks', as the reference shows, not 'per_head'"):
        sat.load(model, folder, qkv_order="per_head", reference=known)
    with pytest.raises(ValueError, match="reference's in neither order"):
        sat.load(model, folder, qkv_order=None, reference=known + 1)


def test_random_states_beside_the_weights_are_read_and_programs_are_not(folder: Path, tmp_path: Path) -> None:
    """What `model_io.py:195-230` saves; numpy 1 pickled the same state under another module's name."""
    file = folder / "1" / "mp_rank_00_model_states.pt"
    states = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),  # noqa: NPY002 - what SAT calls
        "torch_rng_state": torch.get_rng_state(),
        "client_lr_scheduler": {"start_lr": 1e-4, "num_iters": 300},
    }
    weights = torch.load(file, weights_only=True)
    torch.save({**weights, **states}, file)
    model = chat_model(2)
    sat.load(model, folder, qkv_order="blocks")
    assert equal(model, chat_model(1))

    rename(file, b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert sat.read_module(file).keys() == weights["module"].keys()

    mark = tmp_path / "a program was here"
    pickle.loads(pickle.dumps(Program(mark)))  # free unpickling runs it
    assert mark.exists()
    mark.unlink()
    for harmful in (Program(mark), np.array([Program(mark)], dtype=object)):
        torch.save({**weights, "np_rng_state": harmful}, file)
        with pytest.raises(ValueError, match="holds more than weights and random states"):
            sat.read_module(file)
    assert not mark.exists()


class Program:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def rename(file: Path, old: bytes, new: bytes) -> None:
    """In the pickle of a torch file."""
    with zipfile.ZipFile(file) as source:
        entries = {info.filename: source.read(info) for info in source.infolist()}
    assert any(old in data for name, data in entries.items() if name.endswith("data.pkl"))
    with zipfile.ZipFile(file, "w") as target:
        for name, data in entries.items():
            target.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)


def test_old_checkpoints_are_read(folder: Path) -> None:
    """No pad_token_id, no defaults spelt out, and the table of positions that nobody used."""
    config = json.loads((folder / "model_config.json").read_text())
    assert "pad_token_id" not in config and "layernorm_epsilon" not in config
    assert sat.sizes(sat.read_config(folder))["llm"]["ids"] == {**IDS, "pad": 3}
    file = folder / "1" / "mp_rank_00_model_states.pt"
    weights = torch.load(file, weights_only=True)
    weights["module"]["transformer.position_embeddings.weight"] = torch.zeros(9, 32)
    torch.save(weights, file)
    model = chat_model(2)
    report = sat.load(model, folder, qkv_order="blocks")
    assert equal(model, chat_model(1))
    assert "transformer.position_embeddings.weight" in report.ignored and "not part of this model" not in str(report)


def test_half_precision_stays(tmp_path: Path) -> None:
    model = chat_model(1).half()
    sat.write(model, tmp_path / "half", CONFIG)
    stored = sat.open_folder(tmp_path / "half")
    assert {stored.read(name).dtype for name in stored.shapes} == {torch.float16}
    again = chat_model(2).half()
    sat.load(again, tmp_path / "half", qkv_order="blocks")
    assert equal(again, model)


def change(folder: Path, **changes: Tensor | None) -> None:
    file = folder / "1" / "mp_rank_00_model_states.pt"
    weights = torch.load(file, weights_only=True)
    for name, tensor in changes.items():
        if tensor is None:
            del weights["module"][name]
        else:
            weights["module"][name] = tensor
    torch.save(weights, file)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mixins.eva.model.glm_proj.bias": None}, r"projection does not fit.*missing.*projection.bias"),
        ({"transformer.layers.2.mlp.dense_4h_to_h.weight": None}, "language model does not fit"),
        ({"transformer.layers.3.mlp.dense_4h_to_h.weight": torch.zeros(2, 2)}, "layers that this model does not"),
        (
            {"transformer.word_embeddings.weight": torch.zeros(99, 32)},
            r"word_embeddings.weight is \[256, 32\] in the model.*\[99, 32\]",
        ),
        ({"transformer.layers.0.attention.dense.matrix_A.0": torch.zeros(2, 2)}, "LoRA that is not merged"),
    ],
)
def test_what_does_not_fit_is_named(folder: Path, changes: dict[str, Any], expected: str) -> None:
    change(folder, **changes)
    with pytest.raises(ValueError, match=expected):
        sat.load(chat_model(2), folder, qkv_order="blocks")


def test_folders_that_are_none(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no model_config.json"):
        sat.read_config(tmp_path)
    with pytest.raises(ValueError, match="is not empty"):
        sat.write(chat_model(), folder, CONFIG)
    for changed, expected in (
        ({"model_parallel_size": 2}, "merge the parts with SAT first"),
        ({"eva_args": None, "model_class": "ChatGLMModel"}, "of ChatGLMModel, not of VisualGLM"),
    ):
        config = {key: value for key, value in {**CONFIG, **changed}.items() if value is not None}
        (folder / "model_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=expected):
            sat.read_config(folder)
    (folder / "latest").unlink()
    with pytest.raises(ValueError, match="no file `latest`"):
        sat.open_folder(folder)
    uneven = {**CONFIG, "pad_token_id": 3, "layernorm_epsilon": 1e-5}
    uneven["qformer_args"] = {**CONFIG["qformer_args"], "is_decoder": [True, True, False]}
    with pytest.raises(ValueError, match=r"cross-attention in layers \[0, 1\]"):
        sat.sizes(uneven)


# ------------------------------------------------------------------------------------------ Hugging Face's folders

HF_CONFIG = {
    "model_type": "chatglm",
    "hidden_size": 32,
    "num_layers": 3,
    "num_attention_heads": 4,
    "inner_hidden_size": 48,
    "vocab_size": 256,
    "bos_token_id": 250,
    "gmask_token_id": 251,
    "mask_token_id": 252,
}


def test_visualglm_in_hugging_faces_layout_comes_back(tmp_path: Path) -> None:
    expected = chat_model(1)
    chatglm_folder.write(expected, tmp_path / "hf", HF_CONFIG)
    names = load_file(tmp_path / "hf" / "model.safetensors").keys()
    assert "image_encoder.vit.mixins.cls.ln_vision.weight" in names and "lm_head.weight" in names
    model = chat_model(2)
    chatglm_folder.load(model, tmp_path / "hf", qkv_order="per_head")
    assert equal(model, expected)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_chatglm_alone_from_shards(tmp_path: Path, form: str) -> None:
    expected = chat_model(1)
    state = {name: tensor.detach().clone() for name, tensor in expected.llm.network.named_parameters()}
    state["transformer.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(2)
    shards = [dict(list(state.items())[i::2]) for i in (0, 1)]
    stem, single = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    files = [f"{stem}-0000{number}-of-00002.{single}" for number in (1, 2)]
    for file, shard in zip(files, shards, strict=True):
        save_file(shard, tmp_path / file) if form == "safetensors" else torch.save(shard, tmp_path / file)
    index = {"weight_map": {n: file for file, shard in zip(files, shards, strict=True) for n in shard}}
    (tmp_path / f"{stem}.{single}.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    model, before = chat_model(2), chat_model(2)
    with pytest.raises(ValueError, match="--qkv-order"):
        chatglm_folder.load(model, tmp_path, qkv_order=None)
    report = chatglm_folder.load(model, tmp_path, qkv_order="per_head")
    assert equal(model.llm, expected.llm) and equal(model.qformer, before.qformer)
    assert sum(report.loaded.values()) == sum(p.numel() for p in model.llm.parameters())
    (tmp_path / files[1]).unlink()
    with pytest.raises(ValueError, match="00002-of-00002.* is missing"):
        chatglm_folder.load(model, tmp_path, qkv_order="per_head")


def test_sizes_from_config_json() -> None:
    sizes = chatglm_folder.sizes(HF_CONFIG)
    model = small_chatglm(None, **{**sizes, "num_image_tokens": 5})
    assert sizes["ids"] == IDS and equal(model, small_chatglm(None))
    with pytest.raises(ValueError, match="of type 'llama' and not ChatGLM-6B's"):
        chatglm_folder.sizes({"model_type": "llama"})


# ----------------------------------------------------------------------------------------- from stage one's model


def test_stage_one_hands_its_qformer_on(tmp_path: Path) -> None:
    first = small_model(seed=5)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    trained = {f"model.{n}": p.detach().clone() for n, p in first.named_parameters() if p.requires_grad}
    step = tmp_path / "run" / "checkpoints" / "step_7"
    step.mkdir(parents=True)
    save_file(trained, step / "weights.safetensors")
    (step.parent / "latest").symlink_to("step_7")
    image = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    expected = first.encode_image(image).query_BQH
    for path in (tmp_path / "run", step, step / "weights.safetensors"):
        model = chat_model(2)
        model.vision.load_state_dict(first.vision.state_dict())  # type: ignore[attr-defined]
        report = ours.load(model, path)
        torch.testing.assert_close(model.look(image), expected)
        assert "vision_proj" in str(report) and not any("qformer" in name for name in report.new)
    with pytest.raises(ValueError, match="no checkpoint of this project and no run"):
        ours.load(model, tmp_path)
    del trained["model.qformer.layers.1.query_feed_forward.dense.bias"]
    save_file(trained, step / "weights.safetensors")
    with pytest.raises(ValueError, match="1 of its tensors are missing"):
        ours.load(model, step)


def test_starting_weights_one_after_the_other(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    other = chat_model(3)
    save_file({n: p.detach() for n, p in other.llm.network.named_parameters()}, tmp_path / "llm" / "model.safetensors")
    (tmp_path / "llm" / "config.json").write_text(json.dumps(HF_CONFIG))
    model = chat_model(2)
    report = stage_two.initialise(model, visualglm=str(folder), qkv_order="blocks")
    assert equal(model, chat_model(1)) and not report.new and "RANDOM" not in str(report)
    model = chat_model(2)
    report = stage_two.initialise(model, llm=str(tmp_path / "llm"), qkv_order="per_head")
    assert equal(model.llm, other.llm) and "IMAGE ENCODER IS FROZEN AND RANDOM" in str(report)
    with pytest.raises(ValueError, match="model.weights.stage_one: there is nothing at"):
        stage_two.initialise(model, stage_one=str(tmp_path / "nothing"))


def test_tensors_are_read_when_they_are_asked_for(folder: Path) -> None:
    model = chat_model(1)
    asked: list[str] = []
    stored = sat.open_folder(folder)
    watched = type(stored)(stored.path, stored.shapes, lambda name: asked.append(name) or stored.read(name))  # type: ignore[func-returns-value]
    named = visualglm.in_our_names(watched, sat.table(model), model, "blocks")
    assert asked == [] and named.shapes.keys() >= dict(model.named_parameters()).keys()
    name = "llm.network.transformer.layers.1.attention.query_key_value.weight"
    assert torch.equal(named.read(name), model.get_parameter(name)) and len(asked) == 1
