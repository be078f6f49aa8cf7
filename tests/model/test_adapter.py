"""LoRA and QLoRA: what they sit on, what trains, and 4-bit weights as they arrive."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.adapter import Adapter, Lora, NoAdapter, QLora, refuse_empty
from model.rehearsal import rehearse
from model.visual_chat import VisualChatModel
from model.weights import adapter_folder
from model.weights.checkpoint import from_tensors
from model.weights.filling import Part, fill
from tests.model.llm_common import small_chatglm
from tests.tiny_chat import batch_of, tiny_chat, train_pieces

CPU = torch.device("cpu")
WIDE = {"hidden_size": 64, "inner_size": 128, "initial_std": 0.15}  # on a CPU 4 bits need multiples of 64


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces") / "ice_text.model")


def chat(pieces: Path, **options: Any) -> VisualChatModel:
    return tiny_chat(pieces, **{"llm": WIDE, **options})


def adapted(pieces: Path, adapter: Adapter, **options: Any) -> VisualChatModel:
    model = chat(pieces, **options)
    adapter.prepare(model, device=CPU)
    adapter.attach(model, device=CPU)
    return model


def learnt(model: VisualChatModel) -> dict[str, Tensor]:
    """Every trainable tensor moved a little, as a training leaves them.  -> what a checkpoint would hold"""
    torch.manual_seed(1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return {name: p.detach().clone() for name, p in trained.items()}


def logits(model: VisualChatModel) -> Tensor:
    with torch.no_grad():
        return model.eval().predict(batch_of(model)).logits_TV


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ------------------------------------------------------------------------------------------------ what it adapts


def test_a_new_adapter_changes_nothing_and_sits_on_every_map_of_every_block(pieces: Path) -> None:
    expected = logits(chat(pieces))
    model = adapted(pieces, Lora(rank=3), train_qformer=False, train_projection=False)
    torch.testing.assert_close(logits(model), expected, atol=0, rtol=0)
    places = {name.split(".lora_")[0] for name in trained_names(model)}
    maps = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    assert places == {f"llm.network.transformer.layers.{i}.{name}" for i in range(3) for name in maps}
    config = adapter_folder.adapted(model)["llm"]
    assert (config.r, config.lora_alpha) == (3, 6) and len(trained_names(model)) == 2 * len(places)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_layers_and_maps_that_are_asked_for(pieces: Path) -> None:
    model = adapted(pieces, Lora(layer_range=(1, 2), target_modules=["dense"]), train_qformer=False)
    places = {name.split(".lora_")[0] for name in trained_names(model) if "lora_" in name}
    assert places == {"llm.network.transformer.layers.1.attention.dense"}
    model = adapted(pieces, Lora(target_modules=["lm_head"]))
    assert {n.split(".lora_")[0] for n in trained_names(model) if "lora_" in n} == {"llm.network.lm_head"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj"]}, r"no linear map is called \['q_proj'\]; \['dense', 'dense_4h_to_h'"),
        ({"target_modules": ["query_key_valu"]}, r"called \['query_key_valu'\] \(perhaps query_key_value\); \['dense'"),
        ({"target_modules": ["mlp.dense"]}, r"called \['mlp.dense'\]"),  # each word is one, together they are none
        (
            {"target_modules": ["lm_head"], "layer_range": (0, 2)},
            r"no linear map in blocks 0 to 1 is called \['lm_head'",
        ),
        ({"target_modules": []}, "no linear map is called"),
        ({"layer_range": (0, 4)}, r"\[0, 4\); the language model has blocks 0 to 2"),
        ({"layer_range": (2, 2)}, r"\[2, 2\)"),
        ({"start": "/nowhere/adapter"}, "/nowhere/adapter holds no adapter"),
    ],
)
def test_wrong_places_are_named_before_weights_are_asked_for(
    pieces: Path, options: Mapping[str, Any], expected: str
) -> None:
    llm = small_chatglm(pieces, device="meta", initial_std=None)
    with pytest.raises(ValueError, match=expected):
        Lora(**options).check(llm)
    Lora(target_modules=["attention.dense"], layer_range=(0, 1)).check(llm)
    if "start" not in options:
        Lora(**options, parts=("qformer",)).check(llm)


def test_a_rehearsal_has_the_names_and_sizes_and_leaves_the_model_alone(pieces: Path) -> None:
    everywhere = ("llm", "qformer", "projection", "vision")
    for adapter in (NoAdapter(), Lora(rank=2), Lora(rank=2, parts=everywhere, layer_range=(1, 2)), QLora(rank=2)):
        model = tiny_chat(pieces, llm={"hidden_size": 64, "inner_size": 128})
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        state = torch.get_rng_state()
        outline = rehearse(model, adapter)
        assert torch.equal(torch.get_rng_state(), state), "what is drawn later would be another"
        assert all(parameter.is_meta for parameter in outline.parameters())
        after = dict(model.named_parameters())
        assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
        adapter.attach(model, device=CPU)
        expected = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
        assert {n: p.shape for n, p in outline.named_parameters() if p.requires_grad} == expected


def test_options_that_cannot_be_meant() -> None:
    for options, expected in (
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0}, "alpha is 0"),
        ({"parts": ["llm", "vit"]}, "can hold llm, qformer"),
        ({"alpha": float("nan")}, "model.adapter.alpha is nan"),
        ({"layer_range": [0, 14, 2]}, r"model.adapter.layer_range is \[0, 14, 2\]; it is two numbers \[a, b\)"),
        ({"layer_range": 1}, "model.adapter.layer_range is 1; it is two numbers"),
        ({"layer_range": ["a", "b"]}, r"model.adapter.layer_range is \['a', 'b'\]; it is two numbers"),
        ({"target_modules": "query_key_value"}, "target_modules is 'query_key_value'; it has to be a list of names"),
        ({"target_modules": [1]}, r"model.adapter.target_modules is \[1\]; it has to be a list of names"),
        ({"parts": "llm"}, "model.adapter.parts is 'llm'; it can hold llm, .* as a list"),
        ({"parts": []}, r"model.adapter.parts is \[\]; it can hold"),
        ({"dropout": 1.5}, "model.adapter.dropout is 1.5; it has to be at least 0 and below 1"),
        ({"dropout": float("nan")}, "model.adapter.dropout is nan"),
    ):
        with pytest.raises(ValueError, match=expected):
            Lora(**options)  # type: ignore[arg-type]


def test_adapters_on_every_part_get_gradients_and_nothing_else_does(pieces: Path) -> None:
    model = adapted(pieces, Lora(rank=2, parts=("llm", "qformer", "projection", "vision")))
    learnt(model)
    model.train().predict(batch_of(model)).logits_TV.square().sum().backward()
    assert {name.split(".")[0] for name in trained_names(model)} == {"llm", "qformer", "projection", "vision"}
    for name, parameter in model.named_parameters():
        assert ("lora_" in name) == parameter.requires_grad == (parameter.grad is not None), name
        assert parameter.grad is None or parameter.grad.any(), name


# ----------------------------------------------------------------------------------------------------------- 4 bits


def test_qlora_learns_on_a_cpu_and_nothing_but_adapters_changes(pieces: Path) -> None:
    model = adapted(pieces, QLora(rank=4), train_qformer=False, train_projection=False)
    batch = batch_of(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    packed = [n for n, p in frozen.items() if p.dtype == torch.uint8]
    assert len(packed) == 12 and all("layers" in name and "base_layer.weight" in name for name in packed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(12):
        logits(model)  # evaluating in between must not repack the weights
        found = model.train().predict(batch)
        loss = nn.functional.cross_entropy(found.logits_TV, found.label_T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    for name, before in frozen.items():
        assert torch.equal(model.get_parameter(name), before), name


def test_four_bits_are_near_the_weights_and_are_what_computes(pieces: Path) -> None:
    whole, model = chat(pieces), adapted(pieces, QLora(rank=4))
    name = "transformer.layers.1.mlp.dense_h_to_4h"
    linear: Any = whole.llm.network.get_submodule(name)
    quantised: Any = model.llm.network.get_submodule(name).base_layer
    error = (quantised.whole_weight() - linear.weight).abs().max() / linear.weight.abs().max()
    assert 0.05 < error < 0.17  # half of NF4's widest gap is 0.152
    x = torch.randn(5, 64)
    expected = nn.functional.linear(x, quantised.whole_weight(), linear.bias)
    torch.testing.assert_close(quantised(x), expected, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert quantised(x).dtype == torch.bfloat16
    torch.testing.assert_close(quantised(x), expected, atol=1e-5, rtol=1e-5)


def test_weights_are_quantised_as_they_arrive(pieces: Path) -> None:
    source = chat(pieces)
    tensors = {name: p.detach() for name, p in source.named_parameters()}
    expected = logits(adapted(pieces, QLora(rank=4)))
    model = chat(pieces, llm={**WIDE, "device": "meta", "initial_std": None})
    adapter = QLora(rank=4)
    adapter.prepare(model, device=CPU)
    with pytest.raises(ValueError, match=r"came from no checkpoint \(first: llm.network"):
        refuse_empty(model)
    with pytest.raises(ValueError, match="do not fit"):
        fill(model, from_tensors({"x": torch.zeros(2)}), [Part("llm.network.lm_head.weight", ("x",), "llm")])
    fill(model, from_tensors(tensors), [Part(name, (name,), "everything") for name in tensors])
    kinds = {type(module).__name__ for module in model.llm.network.modules() if isinstance(module, nn.Linear)}
    assert kinds == {"NF4Linear", "Linear"}  # the output head stays whole
    adapter.attach(model, device=CPU)
    torch.testing.assert_close(logits(model), expected, atol=0, rtol=0)


@pytest.mark.gpu
def test_a_gpu_never_holds_the_whole_model(pieces: Path) -> None:
    """And it trains there, under autocast."""
    device = torch.device("cuda", 0)
    large = {"hidden_size": 512, "inner_size": 2048, "num_layers": 6, "num_heads": 8}
    model = chat(pieces, llm=large, train_qformer=False)
    maps = [module for module in model.llm.layers.modules() if isinstance(module, nn.Linear)]  # type: ignore[union-attr, operator]
    whole = sum(module.weight.nbytes for module in maps)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    QLora(rank=4).attach(model, device=device)
    assert torch.cuda.max_memory_allocated() - before < whole / 2
    model.to(device).train()
    with torch.autocast("cuda", torch.bfloat16):
        found = model.predict(batch_of(model).to(device))
    found.logits_TV.float().square().mean().backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert len(gradients) == 24 and all(g is not None and g.any() and g.isfinite().all() for g in gradients)


def test_widths_that_bitsandbytes_reads_wrongly_on_a_cpu_are_refused(pieces: Path) -> None:
    """0.50.2 dequantises rows that are no multiple of 64 with the scales of others."""
    with pytest.raises(ValueError, match="32 inputs cannot be kept in 4 bits on a CPU"):
        adapted(pieces, QLora(), llm={})


def test_no_adapter_leaves_the_model_alone(pieces: Path) -> None:
    expected = trained_names(chat(pieces))
    model = adapted(pieces, NoAdapter())
    assert trained_names(model) == expected and not any("lora_" in name for name, _ in model.named_parameters())
    for adapter, reason in ((QLora(), "4 bits"), (Lora(dora=True), "dora")):
        with pytest.raises(ValueError, match=reason):
            adapter.check_zero3()


@pytest.mark.parametrize(("train_projection", "dropout"), [(True, 0.0), (False, 0.0), (False, 0.5)])
def test_activations_are_recomputed_in_eval_mode_and_below_an_adapter(
    pieces: Path, train_projection: bool, dropout: float
) -> None:
    """A frozen language model is in eval mode, and with LoRA alone nothing that enters it needs a gradient; what an
    adapter drops is dropped again."""
    gradients = []
    for recompute in (False, True):
        llm = {**WIDE, "checkpoint_activations": True, "checkpoint_above": 10 if recompute else 10**6}
        adapter = Lora(rank=2, dropout=dropout)
        model = adapted(pieces, adapter, llm=llm, train_qformer=False, train_projection=train_projection).eval()
        for module in model.modules():
            module.train(isinstance(module, nn.Dropout))
        torch.manual_seed(5)
        learnt(model)
        calls: list[int] = []
        block = model.llm.network.get_submodule("transformer.layers.1.mlp.dense_h_to_4h")
        block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model.predict(batch_of(model)).logits_TV.square().sum().backward()
        assert len(calls) == 1 + recompute
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[1], gradients[0])
