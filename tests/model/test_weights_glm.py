"""The original folders of ChatGLM2, ChatGLM3 and GLM-4: published arithmetic, written anew here, and both layouts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.llm.glm import glm_config
from model.weights import glm, stage_two
from model.weights.checkpoint import Checkpoint, from_tensors, open_folder
from tests.model.glm_common import small_glm, visual_chat

CONFIG = {  # as in chatglm2-6b/config.json, smaller
    "model_type": "chatglm",
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": 48,
    "hidden_size": 32,
    "kv_channels": 16,
    "layernorm_epsilon": 1e-05,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "num_attention_heads": 4,
    "num_layers": 3,
    "padded_vocab_size": 600,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 32768,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VARIANTS: dict[str, tuple[glm.Family, dict[str, Any], dict[str, Any]]] = {  # config.json, and arguments of the family
    "chatglm2": ("chatglm2", {}, {}),
    "chatglm2-32k": ("chatglm2", {"rope_ratio": 4}, {"rope_interpolation": 4.0}),
    "chatglm3": ("chatglm3", {"layernorm_epsilon": 0.01}, {"norm_eps": 0.01}),
    "chatglm3-32k": ("chatglm3", {"rope_ratio": 50}, {"rope_ratio": 50.0}),
    "glm-4-9b-chat": (
        "glm4",
        {"rope_ratio": 500, "layernorm_epsilon": 1.5625e-7, "eos_token_id": [7, 8, 9], "pad_token_id": 7},
        {"rope_ratio": 500.0, "norm_eps": 1.5625e-7},
    ),
    "no bias": ("glm4", {"add_qkv_bias": False}, {"qkv_bias": False, "norm_eps": 1e-5}),
    "tied head": ("chatglm3", {"tie_word_embeddings": True}, {"tied_head": True}),
}


def original_weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the names and in the shapes that the original folders have."""
    generator = torch.Generator().manual_seed(seed)
    width, inner, vocab = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    attention = config["num_attention_heads"] * config["kv_channels"]
    joint = attention + 2 * config["multi_query_group_num"] * config["kv_channels"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": (vocab, width)}
    for index in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{index}."
        shapes[f"{layer}input_layernorm.weight"] = (width,)
        shapes[f"{layer}self_attention.query_key_value.weight"] = (joint, width)
        if config["add_qkv_bias"]:
            shapes[f"{layer}self_attention.query_key_value.bias"] = (joint,)
        shapes[f"{layer}self_attention.dense.weight"] = (width, attention)
        shapes[f"{layer}post_attention_layernorm.weight"] = (width,)
        shapes[f"{layer}mlp.dense_h_to_4h.weight"] = (2 * inner, width)
        shapes[f"{layer}mlp.dense_4h_to_h.weight"] = (width, inner)
    shapes["transformer.encoder.final_layernorm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        shapes["transformer.output_layer.weight"] = (vocab, width)
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors["transformer.rotary_pos_emb.inv_freq"] = torch.rand(config["kv_channels"] // 4, generator=generator)
    return tensors


def published_logits(tensors: dict[str, Tensor], config: dict[str, Any], family: str, ids_L: list[int]) -> Tensor:
    """One text through the published arithmetic (`modeling_chatglm.py`), in fp64.  -> logits_LV"""
    weight = {name: tensor.double() for name, tensor in tensors.items()}
    heads, groups, size = (config[key] for key in ("num_attention_heads", "multi_query_group_num", "kv_channels"))
    length = len(ids_L)

    def norm(x_LD: Tensor, name: str) -> Tensor:
        return x_LD / (x_LD.pow(2).mean(-1, keepdim=True) + config["layernorm_epsilon"]).sqrt() * weight[name]

    ratio = config.get("rope_ratio", 1)
    base = 10000.0 if family == "chatglm2" else 10000.0 * ratio
    place_L = torch.arange(length).double() / (ratio if family == "chatglm2" else 1)
    num_pairs = size // 4  # the first half of a head turns, two neighbours at a time
    angle_LR = torch.outer(place_L, base ** (-torch.arange(num_pairs).double() / num_pairs))

    def turn(x_LE: Tensor) -> Tensor:
        half = x_LE.shape[-1] // 2
        pairs_LR = torch.view_as_complex(x_LE[:, :half].reshape(length, num_pairs, 2))
        turned_LR = pairs_LR * torch.polar(torch.ones_like(angle_LR), angle_LR)
        return torch.cat([torch.view_as_real(turned_LR).reshape(length, half), x_LE[:, half:]], dim=1)

    hidden_LD = weight["transformer.embedding.word_embeddings.weight"][ids_L]
    future_LL = torch.ones(length, length, dtype=torch.bool).triu(1)
    for index in range(config["num_layers"]):
        layer = f"transformer.encoder.layers.{index}."
        x_LD = norm(hidden_LD, f"{layer}input_layernorm.weight")
        joint = f"{layer}self_attention.query_key_value."
        mixed = x_LD @ weight[f"{joint}weight"].T + weight.get(f"{joint}bias", torch.zeros(1))
        query, key, value = mixed.split([heads * size, groups * size, groups * size], dim=-1)
        context = []
        for head in range(heads):
            group = slice((head * groups // heads) * size, (head * groups // heads + 1) * size)
            query_LE, key_LE = turn(query[:, head * size : (head + 1) * size]), turn(key[:, group])
            score_LL = (query_LE @ key_LE.T / size**0.5).masked_fill(future_LL, -torch.inf)
            context.append(score_LL.softmax(dim=-1) @ value[:, group])
        hidden_LD = hidden_LD + torch.cat(context, dim=-1) @ weight[f"{layer}self_attention.dense.weight"].T
        x_LD = norm(hidden_LD, f"{layer}post_attention_layernorm.weight")
        first, second = (x_LD @ weight[f"{layer}mlp.dense_h_to_4h.weight"].T).chunk(2, dim=-1)
        gated = first * first.sigmoid() * second
        hidden_LD = hidden_LD + gated @ weight[f"{layer}mlp.dense_4h_to_h.weight"].T
    hidden_LD = norm(hidden_LD, "transformer.encoder.final_layernorm.weight")
    tied = config["tie_word_embeddings"]
    head_VD = weight["transformer.embedding.word_embeddings.weight" if tied else "transformer.output_layer.weight"]
    return hidden_LD @ head_VD.T


def write_original(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], *, kind: str = "bin") -> Path:
    """A folder as published: `.bin` shards with an index (ChatGLM2, ChatGLM3), or safetensors (GLM-4)."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "modeling_chatglm.py").write_text("raise SystemExit('nobody runs this')")
    if kind == "safetensors":
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_the_published_arithmetic(variant: str, tmp_path: Path) -> None:
    family, change, arguments = VARIANTS[variant]
    config = {**CONFIG, **change}
    tensors = original_weights(config)
    folder = write_original(tmp_path / "in", config, tensors, kind="safetensors" if family == "glm4" else "bin")
    ids = torch.randint(600, (23,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = published_logits(tensors, config, family, ids)

    llm = small_glm(family, seed=5, **arguments)
    report = glm.load(llm.network, folder)
    ids_1L = torch.tensor([ids])
    with torch.no_grad():
        found = llm.logits(llm.hidden(llm.embed(ids_1L), ids_1L, torch.ones_like(ids_1L, dtype=torch.bool)))[0]
    assert expected.abs().max() > 1 and (found - expected).abs().max() < 1e-5
    assert not report.new and list(report.ignored) == ["transformer.rotary_pos_emb.inv_freq"]

    from transformers import GlmForCausalLM

    glm.convert(folder, tmp_path / "out", family=family)
    network = GlmForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert (network(input_ids=ids_1L).logits[0] - expected).abs().max() < 1e-5
    assert network.config.eos_token_id == config["eos_token_id"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_is_equal_byte_for_byte(variant: str, tmp_path: Path) -> None:
    family, change, arguments = VARIANTS[variant]
    config = {**CONFIG, **change}
    tensors = {name: tensor.half() for name, tensor in original_weights(config).items()}
    folder = write_original(tmp_path / "in", config, tensors)
    there = glm.convert(folder, tmp_path / "there", family=family)
    back = glm.convert(there, tmp_path / "back", family=family, layout="original")
    found = load_file(back / "model.safetensors")
    expected = {name: tensor for name, tensor in tensors.items() if not name.endswith("inv_freq")}
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == torch.float16 and torch.equal(found[name], expected[name]) for name in expected)
    sizes = glm.sizes(json.loads((back / "config.json").read_text()), family)
    assert sizes == glm.sizes(config, family) == glm.sizes(json.loads((there / "config.json").read_text()))
    again = glm.load(small_glm(family, **arguments).network, back)
    assert not again.new and not again.ignored


def test_shards_are_small_and_nothing_but_weights_and_tokenizer_comes_along(tmp_path: Path) -> None:
    tensors = original_weights(CONFIG)
    folder = write_original(tmp_path / "in", CONFIG, tensors)
    largest = 4 * 600 * 32
    out = glm.convert(folder, tmp_path / "out", family="chatglm2", max_shard_bytes=largest)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2 and all(sum(t.nbytes for t in load_file(file).values()) <= largest for file in shards)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    checkpoint = open_folder(out)
    expected = sum(t.nbytes for name, t in tensors.items() if "inv_freq" not in name)
    assert index["metadata"]["total_size"] == sum(4 * torch.Size(s).numel() for s in checkpoint.shapes.values())
    assert index["metadata"]["total_size"] == expected
    names = {file.name for file in out.iterdir()} - {file.name for file in shards}
    assert names == {"config.json", "model.safetensors.index.json", "tokenizer.model"}
    with pytest.raises(ValueError, match="is not empty: nothing was written"):
        glm.convert(folder, out, family="chatglm2")


def test_renaming_reads_nothing() -> None:
    tensors = original_weights(CONFIG)
    shapes = from_tensors(tensors).shapes
    read: list[str] = []

    def note(name: str) -> Tensor:
        read.append(name)
        return tensors[name]

    config = glm_config(**glm.sizes(CONFIG))
    there = glm.to_transformers(Checkpoint("somewhere", shapes, note), config)
    glm.to_original(there, config)
    assert read == [] and "model.layers.0.self_attn.q_proj.weight" in there.shapes
    there.read("model.layers.2.self_attn.v_proj.bias")
    assert read == ["transformer.encoder.layers.2.self_attention.query_key_value.bias"]


def test_stage_twos_model_is_filled_under_its_own_names(tmp_path: Path) -> None:
    tensors = original_weights(CONFIG)
    model = visual_chat(small_glm("chatglm2"))
    report = stage_two.initialise(model, llm=str(write_original(tmp_path / "in", CONFIG, tensors)))
    expected = tensors["transformer.output_layer.weight"]
    assert torch.equal(model.llm.network.get_parameter("lm_head.weight"), expected)
    own = {name for name, _ in model.llm.named_parameters(prefix="llm")}
    assert report.loaded.keys() == own and {"projection.weight", "projection.bias"} <= report.new.keys()


def test_from_the_command_line(tmp_path: Path) -> None:
    folder = write_original(tmp_path / "in", {**CONFIG, "rope_ratio": 4}, original_weights(CONFIG))
    script = Path(__file__).resolve().parents[2] / "scripts" / "convert_weights.py"

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), "glm", str(folder), str(tmp_path / "out"), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert "required: --family" in run("--to", "transformers").stderr, "what a rope_ratio means is not guessed"
    done = run("--to", "transformers", "--family", "chatglm2")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["rope_parameters"] == {
        "rope_type": "linear",
        "factor": 4.0,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    }
    assert "is not empty" in run("--to", "original", "--family", "chatglm2").stderr


@pytest.mark.parametrize("tied", [False, True])
def test_memory_comes_with_the_weights(tmp_path: Path, tied: bool) -> None:
    config = {**CONFIG, "tie_word_embeddings": tied}
    folder = write_original(tmp_path / "in", config, original_weights(config))
    here, later = (
        small_glm("chatglm2", tied_head=tied),
        small_glm("chatglm2", tied_head=tied, device="meta", initial_std=None),
    )
    for llm in (here, later):
        glm.load(llm.network, folder)
    expected, found = here.network.state_dict(), later.to("cpu").network.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert (
        later.network.get_parameter("lm_head.weight") is later.network.get_parameter("model.embed_tokens.weight")
    ) == tied


def test_quantised_as_the_weights_arrive(tmp_path: Path) -> None:
    from model.quantise import quantise_linears, shape_like_quantised

    config = {**CONFIG, "hidden_size": 64, "ffn_hidden_size": 64}
    folder = write_original(tmp_path / "in", config, original_weights(config))
    llms = []
    for device in ("cpu", "meta"):
        llm = small_glm("chatglm2", hidden_size=64, inner_size=64, device=device, initial_std=None)
        shape_like_quantised(llm.network, llm.lora_targets, device=torch.device("cpu"))
        glm.load(llm.network, folder)
        quantise_linears(llm.network, llm.lora_targets, device=torch.device("cpu"))
        llms.append(llm)
    ids_1L = torch.arange(9)[None]
    with torch.no_grad():
        expected, found = (llm.hidden(llm.embed(ids_1L), ids_1L, ids_1L >= 0) for llm in llms)
    assert found.isfinite().all() and torch.equal(found, expected)
    assert sum(type(module).__name__ == "NF4Linear" for module in llms[1].layers.modules()) == 3 * 6


def refused(tmp_path: Path, config: dict[str, Any], tensors: dict[str, Tensor], **arguments: Any) -> str:
    folder = write_original(tmp_path / "in", config, tensors)
    with pytest.raises(ValueError) as caught:
        glm.load(small_glm("chatglm3", **arguments).network, folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_attention_heads": 8, "kv_channels": 8, "multi_query_group_num": 4}, "num_heads 8, the model has"),
        ({"layernorm_epsilon": 1e-6}, "norm_eps 1e-06, the model has model.llm.norm_eps 1e-05"),
        ({"rope_ratio": 50}, "a rotary base of 500000.0, the model has model.llm (by its rope_ratio) 10000.0"),
        ({"add_bias_linear": True}, "add_bias_linear=True"),
        ({"rmsnorm": False}, "rmsnorm=False"),
        ({"quantization_bit": 4}, "quantised to 4 bits"),
        ({"model_type": "llama"}, "of type 'llama'"),
        ({"multi_query_group_num": None, "model_type": "glm4"}, "of type 'glm4'"),
        ({"num_layers": "3"}, "in/config.json has num_layers '3': expected a whole number"),
        ({"multi_query_group_num": 0}, "in/config.json has multi_query_group_num 0: expected a whole number"),
        ({"layernorm_epsilon": None}, "in/config.json has layernorm_epsilon None: expected a number above 0"),
    ],
)
def test_what_no_shape_shows_is_compared(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    assert expected in refused(tmp_path, {**CONFIG, **change}, original_weights(CONFIG))


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    tensors = original_weights(CONFIG)
    joint = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
    for number, (damaged, expected) in enumerate(
        [
            ({**tensors, joint: tensors[joint][:-16]}, "q, k and v of this model have 64 + 32 + 32 rows"),
            ({name: t for name, t in tensors.items() if "layers.1.mlp" not in name}, "gate_up_proj"),
            (original_weights({**CONFIG, "num_layers": 4}), "has 4 layers in its language model, the model has 3"),
            (original_weights({**CONFIG, "padded_vocab_size": 599}), "[599, 32]"),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        assert expected in refused(tmp_path / str(number), CONFIG, damaged)


def test_configurations_of_transformers_older_and_newer() -> None:
    """The -hf folders keep rope_theta and partial_rotary_factor beside the sizes; later versions in rope_parameters."""
    newer = glm_config(**glm.sizes({**CONFIG, "rope_ratio": 500}, "glm4")).to_dict()
    older = {key: value for key, value in newer.items() if key != "rope_parameters"}
    older |= {"rope_theta": 5_000_000.0, "partial_rotary_factor": 0.5}
    assert glm.sizes(older) == glm.sizes(newer) and glm.sizes(older)["rope_base"] == 5_000_000.0
    with pytest.raises(ValueError, match="on 1 of a head, not on half"):
        glm.sizes({**older, "partial_rotary_factor": 1.0})


def test_a_ratio_means_two_things() -> None:
    with pytest.raises(ValueError, match="rope_ratio=4"):
        glm.sizes({**CONFIG, "rope_ratio": 4})


# ------------------------------------------------------------------------------------- what a conversion does not write

MLP, JOINT_BIAS = "mlp.dense_h_to_4h.weight", "self_attention.query_key_value.bias"
WORDS, HEAD = "transformer.embedding.word_embeddings.weight", "transformer.output_layer.weight"
PROMPT = "transformer.prefix_encoder.embedding.weight"  # P-tuning
LAYER = "transformer.encoder.layers.1."


@pytest.mark.parametrize(
    ("said", "changed", "expected"),
    [
        ({}, {f"{LAYER}{MLP}": torch.zeros(5, 7)}, [f"{LAYER}{MLP} is [5, 7], not [96, 32]"]),
        ({}, {WORDS: torch.zeros(5, 7)}, [f"1 of another shape ({WORDS} is [5, 7], not [600, 32])"]),
        ({}, {PROMPT: torch.zeros(5, 7)}, [f"1 unexpected ({PROMPT})"]),
        ({"tie_word_embeddings": True}, {}, [f"1 unexpected ({HEAD})"]),
        (
            {"add_qkv_bias": False},
            {},
            [f"3 unexpected (transformer.encoder.layers.0.{JOINT_BIAS}"],
        ),
        ({"num_layers": 2}, {}, ["7 unexpected (transformer.encoder.layers.2.input_layernorm.weight"]),
        ({"num_layers": 4}, {}, ["7 missing (transformer.encoder.layers.3.input_layernorm.weight"]),
        ({"multi_query_group_num": 1}, {}, ["query_key_value.weight is [128, 32], not [96, 32]"]),
        ({}, {f"{LAYER}{JOINT_BIAS}": None, HEAD: None}, [f"2 missing ({LAYER}{JOINT_BIAS}, {HEAD})"]),
    ],
)
def test_what_is_no_part_of_the_model_is_named(
    tmp_path: Path, said: dict[str, Any], changed: dict[str, Any], expected: list[str]
) -> None:
    tensors = {name: t for name, t in {**original_weights(CONFIG), **changed}.items() if t is not None}
    folder = write_original(tmp_path / "in", {**CONFIG, **said}, tensors)
    with pytest.raises(ValueError) as caught:
        glm.convert(folder, tmp_path / "out", family="chatglm2")
    found = str(caught.value)
    assert str(folder) in found and all(words in found for words in expected), found
    assert not (tmp_path / "out").exists()


def test_transformers_folders_are_held_to_their_config_too(tmp_path: Path) -> None:
    folder = write_original(tmp_path / "in", CONFIG, original_weights(CONFIG))
    there = glm.convert(folder, tmp_path / "there", family="glm4")
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(ValueError, match=r"layers.0.mlp.gate_up_proj.weight is \[96, 32\], not \[80, 32\]"):
        glm.convert(there, tmp_path / "back", family="glm4", layout="original")


def test_a_copy_of_tied_words_stays_behind(tmp_path: Path) -> None:
    """torch saves a shared tensor under both of its names."""
    tensors = original_weights({**CONFIG, "tie_word_embeddings": True})
    config = {**CONFIG, "tie_word_embeddings": True}
    folder = write_original(tmp_path / "in", config, {**tensors, HEAD: tensors[WORDS].clone()})
    out = glm.convert(folder, tmp_path / "out", family="chatglm2")
    assert "lm_head.weight" not in open_folder(out).shapes


@pytest.mark.parametrize("key", ["ffn_hidden_size", "padded_vocab_size", "num_attention_heads"])
def test_a_config_without_a_size_is_named(tmp_path: Path, key: str) -> None:
    config = {name: value for name, value in CONFIG.items() if name != key}
    folder = write_original(tmp_path / "in", config, original_weights(CONFIG))
    with pytest.raises(ValueError, match=rf"in/config.json has no {key}"):
        glm.convert(folder, tmp_path / "out", family="chatglm2")
