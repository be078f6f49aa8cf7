"""A language model built without memory: its weights go one by one to where they live, and come out as they were."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model.assemble import EVA, assemble, image_encoder, language_model
from model.build import build
from model.image_text import ImageTextModel
from model.llm.warm_up import chatglm_config
from model.qformer import QFormer
from model.visual_chat import VisualChatModel
from model.weights import adapter_folder, initialise, lavis, writing
from model.weights.checkpoint import from_tensors
from model.weights.filling import Home, Part, fill, send_home
from tests.model.glm_common import train_sentencepieces
from tests.model.llm_common import codec_of, small_chatglm
from tests.model.weights_common import QFORMER, VISION, small_model
from tests.ranks import run_ranks
from tests.tiny_chat import batch_of, train_pieces
from tests.tiny_run import chatglm_nodes, glm_nodes

CPU = torch.device("cpu")
NO_ADAPTER = {"_target_": "model.adapter.NoAdapter"}


@pytest.fixture(scope="module", params=["chatglm", "chatglm3"])
def nodes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "chatglm":
        return chatglm_nodes(train_pieces(folder / "ice_text.model"), folder / "base")
    return glm_nodes(train_sentencepieces(folder / "tokenizer.model"), folder / "base")


def assembled(nodes: dict[str, Any], llm: Any, home: Home | None = None) -> tuple[VisualChatModel, Tensor, Tensor]:
    """-> the model, its logits, and the next random number"""
    torch.manual_seed(4)
    model, _ = assemble(nodes, llm, device=CPU, home=home)
    following = torch.rand(3)
    with torch.no_grad():
        return model, model.eval().predict(batch_of(model)).logits_TV, following


def test_the_same_numbers_as_with_memory_from_the_start(nodes: dict[str, Any]) -> None:
    """What is computed and in no file included (angles), and everything that is drawn afterwards."""
    built_whole, expected, drawn = assembled(nodes, build(nodes["llm"]))
    llm: Any = language_model(nodes)
    assert {parameter.device.type for parameter in llm.parameters()} == {"meta"}
    model, found, then = assembled(nodes, llm)
    assert torch.equal(found, expected) and torch.equal(then, drawn)
    for kind in ("named_parameters", "named_buffers"):
        for (name, tensor), (_, other) in zip(getattr(model, kind)(), getattr(built_whole, kind)(), strict=True):
            assert torch.equal(tensor, other) and tensor.dtype == other.dtype, name
            assert tensor.requires_grad == other.requires_grad, name


def test_where_no_file_brings_weights_they_are_drawn(nodes: dict[str, Any]) -> None:
    alone = {**nodes, "llm": {**nodes["llm"], "initial_std": 0.1}, "weights": {**nodes["weights"], "llm": None}}
    llm: Any = language_model(alone)
    assert {parameter.device.type for parameter in llm.parameters()} == {"cpu"}


def test_weights_land_where_they_live(nodes: dict[str, Any]) -> None:
    """There is one CPU, so the other device is "meta": what arrives there has left the host."""
    llm: Any = language_model({**nodes, "adapter": NO_ADAPTER})
    seen: list[tuple[torch.device, torch.dtype]] = []
    home = Home(CPU, torch.float32, keep=lambda parameter: seen.append((parameter.device, parameter.dtype)))
    model, *_ = assembled({**nodes, "adapter": NO_ADAPTER}, llm, home)
    assert seen == [(CPU, torch.float32)] * len(list(model.llm.parameters())), "built in bfloat16, stored in float32"
    linear = nn.Linear(3, 2, device="meta")
    send_home(linear, Home(torch.device("meta")))
    tensors = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    fill(linear, from_tensors(tensors), [Part(name, (name,), "all") for name in tensors])
    assert linear.weight.is_meta and not hasattr(linear.weight, "home"), "it is there"


@pytest.mark.gpu
def test_weights_arrive_on_a_gpu_and_adapters_with_them(nodes: dict[str, Any]) -> None:
    whole, *_ = assembled(nodes, build(nodes["llm"]))
    llm: Any = language_model(nodes)
    torch.manual_seed(4)
    model, _ = assemble(nodes, llm, device=torch.device("cuda", 0))
    assert {parameter.device.type for parameter in model.llm.parameters()} == {"cuda"}
    for name, expected in whole.named_parameters():
        assert torch.equal(model.get_parameter(name).cpu(), expected), name


def test_what_is_divided_arrives_anew() -> None:
    """A second source of the same weights: this rank's part cannot be copied to."""

    def keep(parameter: nn.Parameter) -> None:
        kept.append(parameter.detach().clone())
        parameter.data = parameter.data.new_empty(0)

    kept: list[Tensor] = []
    linear = nn.Linear(3, 2, bias=False, device="meta").requires_grad_(False)
    send_home(linear, Home(keep=keep))
    for value in (1.0, 2.0):
        fill(linear, from_tensors({"w": torch.full((2, 3), value)}), [Part("weight", ("w",), "all")])
        assert linear.weight.numel() == 0
    assert [float(tensor.unique()) for tensor in kept] == [1.0, 2.0]


def test_rows_that_come_apart() -> None:
    """LAVIS has no bias of the keys: what lies between is 0."""
    linear = nn.Linear(1, 6, device="meta")
    send_home(linear, Home())
    parts = [Part("bias", (name,), name, target_rows=rows) for name, rows in (("q", (0, 2)), ("v", (4, 6)))]
    fill(linear, from_tensors({"q": torch.ones(2), "v": torch.full((2,), 3.0)}), parts)
    assert linear.bias.tolist() == [1, 1, 0, 0, 3, 3]


# ------------------------------------------------------------------------------------------------- the image encoder


def encoder_file(kind: str, source: ImageTextModel, folder: Path) -> Path:
    """LAVIS's file, without a bias of the keys, or a checkpoint of this project."""
    tensors = dict(source.named_parameters())
    if kind == "lavis":
        torch.save({"model": lavis.to_lavis(source, tensors)}, folder / "blip2.pth")
        return folder / "blip2.pth"
    save_file({f"model.{name}": tensor.detach() for name, tensor in tensors.items()}, folder / "weights.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["lavis", "ours"])
def test_a_frozen_encoder_from_a_file(kind: str, tmp_path: Path) -> None:
    source = small_model(seed=1)
    for layer in source.vision.network.encoder.layers:
        layer.self_attn.qkv.bias.data.normal_()
        layer.self_attn.qkv.bias.data[32:64] = 0
    path = encoder_file(kind, source, tmp_path)
    nodes = {"vision": {"_target_": EVA, **VISION}, "weights": {"vision": str(path)}}
    encoder: Any = image_encoder(nodes)
    assert {parameter.device.type for parameter in encoder.parameters()} == {"meta"}
    assert not any(buffer.is_meta for buffer in encoder.buffers())
    model = ImageTextModel(encoder, QFormer(**QFORMER), embed_dim=12)  # type: ignore[arg-type]
    initialise(model, vision=str(path))
    for name, expected in source.vision.named_parameters():
        assert torch.equal(encoder.get_parameter(name), expected), name
    image = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    assert torch.equal(encoder(image), source.vision(image))


@pytest.mark.parametrize(
    "change",
    [
        {"vision": {"_target_": EVA, **VISION, "frozen": False}},
        {"weights": {"vision": None, "all": "a file that may have no encoder"}},
        {"adapter": {"parts": ["llm", "vision"]}},
    ],
)
def test_an_encoder_that_needs_memory_has_it(change: dict[str, Any]) -> None:
    nodes = {"vision": {"_target_": EVA, **VISION}, "weights": {"vision": "x"}, **change}
    assert {parameter.device.type for parameter in image_encoder(nodes).parameters()} == {"cpu"}  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------- host memory

LARGE = {"hidden_size": 512, "num_layers": 4, "num_heads": 4, "inner_size": 2048, "vocab_size": 8000}
SHARD, SLACK = 20e6, 8e6


def memory() -> dict[str, float]:
    """Bytes of this process: its own (RssAnon), and pages of files (RssFile)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: 1024.0 * int(line.split()[1]) for line in lines if line.startswith("Rss")}


def arriving(nodes: dict[str, Any]) -> tuple[dict[bool, list[dict[str, float]]], int]:
    """-> memory each time that a weight has arrived, where weights leave the host and where not; the model's bytes"""
    told: dict[bool, list[dict[str, float]]] = {True: [], False: []}

    def keep(parameter: nn.Parameter, leaves: bool) -> None:
        told[leaves].append(memory())
        if leaves:  # as on a GPU: the host has it no more
            parameter.data = parameter.data.new_empty(0)

    size = 0
    for leaves in told:
        llm: Any = language_model(nodes)
        size = sum(parameter.nbytes for parameter in llm.parameters())
        assemble(nodes, llm, device=CPU, home=Home(keep=partial(keep, leaves=leaves)))
    return told, size


def test_a_host_holds_one_shard_and_what_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "500000")  # what is freed goes back at once, as larger tensors' memory
    pieces = train_pieces(tmp_path / "ice_text.model")
    nodes = {**chatglm_nodes(pieces, tmp_path / "small"), "adapter": NO_ADAPTER}
    llm = small_chatglm(pieces, **LARGE)
    tensors = {name: parameter.detach() for name, parameter in llm.network.named_parameters()}
    base = tmp_path / "base"
    writing.write_folder(from_tensors(tensors), base, metadata={}, max_shard_bytes=int(SHARD))
    writing.write_json(base / "config.json", chatglm_config(LARGE, codec_of(llm), 0.0))
    nodes["llm"] |= {**LARGE, "dtype": "float32"}
    nodes["weights"] |= {"llm": str(base)}
    largest = max(tensor.nbytes for tensor in tensors.values())
    (told, size) = run_ranks(1, arriving, nodes)[0]
    assert size > 80e6
    for leaves, stays in ((True, 0), (False, size)):
        first, *later = told[leaves]
        assert len(later) == len(tensors) - 1
        assert max(m["RssAnon"] for m in later) - first["RssAnon"] < stays + largest + SLACK
        assert max(m["RssFile"] for m in later) - first["RssFile"] < 2 * SHARD + SLACK


# ---------------------------------------------------------------------------------------------- what it was built on


def test_an_adapter_of_another_base_is_pointed_out(
    nodes: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = nodes["weights"]["llm"]
    model, *_ = assembled(nodes, language_model(nodes))
    assert model.llm.loaded_from == base
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for told, warns in ((base, False), (str(tmp_path / "another"), True)):
        folder = adapter_folder.save(model, trained, tmp_path / f"adapter-{warns}", base_model=told)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assembled({**nodes, "adapter": {**nodes["adapter"], "start": str(folder)}}, language_model(nodes))
        found = [record.getMessage() for record in caplog.records]
        assert [f"was trained on {told} and is put on {base}" in line for line in found] == [True] * warns
