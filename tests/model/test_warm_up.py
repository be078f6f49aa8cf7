"""What stands in for a picture while a small language model is warmed up, by hand."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.batch import Dialogue, Turn
from model.llm.chatglm import ChatGLM
from model.llm.pieces import Pieces, train_pieces
from model.llm.warm_up import Hints, _collated, _optimizers, load, warm_up

SIZES: dict[str, Any] = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "inner_size": 32, "num_image_tokens": 4}
DIALOGUES = [
    Dialogue((Turn("What is there?", "a red star and a blue moon and a green heart", 1),), "en"),
    Dialogue((Turn("有什么？", "一个红色的五角星", 1),), "zh"),
    Dialogue((Turn("Say it in other words: red", "red"),), "en"),
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> ChatGLM:
    folder = tmp_path_factory.mktemp("warm") / "llm"
    return load(warm_up(dialogues=DIALOGUES, folder=folder, **SIZES, steps=1, batch_size=2, pieces="bpe", muon_lr=1e-3))


def put(
    llm: ChatGLM, descriptions: list[tuple[str, ...]] | None = None, seed: int = 0, **options: Any
) -> tuple[Tensor, Tensor]:
    """-> with hints, without; both embedded_BLD"""
    codec = llm.codec
    encoded = [codec.encode(dialogue) for dialogue in DIALOGUES]  # type: ignore[union-attr]
    hints = Hints(codec, encoded, descriptions, **{"kind": "pooled", "blind": 0.0, **options})  # type: ignore[arg-type]
    batch = _collated(encoded, codec.pad_id)  # type: ignore[union-attr]
    torch.manual_seed(seed)
    return hints.put(llm, batch, range(len(encoded))), llm.embed(batch.ids_BL)


def test_all_words_of_a_description_are_averaged_over_the_places(llm: ChatGLM) -> None:
    description = "a green heart and a red star and a blue moon"
    words = llm.codec.pieces.encode(description)  # type: ignore[union-attr]
    (start,) = llm.codec.encode(DIALOGUES[0]).image_starts  # type: ignore[union-attr]
    numbers = set()
    for seed in range(20):
        found, bare = put(llm, [(description,), (), ()], seed)
        changed = (found != bare).any(dim=2)
        places = changed[0].nonzero()[:, 0]
        assert start <= places.min() and places.max() < start + 4, "anywhere in the picture's places"
        cuts = [round(i * len(words) / len(places)) for i in range(len(places) + 1)]
        parts = [words[a:b] for a, b in itertools.pairwise(cuts)]
        expected = torch.stack([llm.embed(torch.tensor(part)).mean(dim=0) for part in parts])
        torch.testing.assert_close(found[0, places], expected)
        assert 0 < changed[1].sum() <= 4 and not changed[2].any(), "no picture, no hint; no description, its answer"
        numbers.add(len(places))
    assert numbers == {2, 3, 4}, "spread over more or fewer places"


def test_some_words_stand_as_they_are_and_in_their_order(llm: ChatGLM) -> None:
    found, bare = put(llm, kind="some")
    encoded = llm.codec.encode(DIALOGUES[0])  # type: ignore[union-attr]
    special = set(llm.codec.ids.values())  # type: ignore[union-attr]
    answer = [i for i in encoded.labels if i >= 0 and i not in special]
    places = found[0, encoded.image_starts[0] : encoded.image_starts[0] + 4]
    known = torch.tensor(sorted(set(answer)))
    words = known[torch.cdist(places, llm.embed(known)).argmin(dim=1)]
    assert torch.equal(places, llm.embed(words)) and (found != bare).any()
    following = iter(answer)
    assert all(word in following for word in words.tolist()), "in the order of the answer"
    blind, bare = put(llm, kind="some", blind=1.0)
    assert torch.equal(blind, bare)


def test_muon_has_the_matrices_of_the_blocks_and_every_weight_is_trained_once(llm: ChatGLM) -> None:
    named = {id(p): name for name, p in llm.network.named_parameters()}
    adamw, muon = (
        [named[id(p)] for group in optimizer.param_groups for p in group["params"]]
        for optimizer in _optimizers(llm, lr=1e-3, muon_lr=1e-2)
    )
    assert len(muon) == 4 and all(".layers." in name and name.endswith(".weight") for name in muon)
    assert sorted(adamw + muon) == sorted(named.values())
    (alone,) = _optimizers(llm, lr=1e-3, muon_lr=None)
    assert len(alone.param_groups[0]["params"]) == len(named)


def test_a_description_for_each_dialogue(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 descriptions for 3 dialogues"):
        warm_up(dialogues=DIALOGUES, descriptions=[(), ()], folder=tmp_path / "llm", **SIZES)


def test_bpe_keeps_words_where_unigram_keeps_sentences(tmp_path: Path) -> None:
    colours, shapes = ("红色", "黄色", "蓝色", "绿色"), ("圆形", "月牙", "爱心", "五角星")
    texts = [f"一个{c}的{s}在左边" for c in colours for s in shapes] * 20
    texts += [f"a {c} {s} on the left" for c in ("red", "yellow", "blue") for s in ("circle", "moon", "heart")] * 20
    file = train_pieces(texts, tmp_path / "ice_text.model", vocab_size=120, special=["[gMASK]"], model_type="bpe")
    pieces = Pieces(file, special=["[gMASK]"])
    assert len(pieces.encode("a yellow circle on the left")) == 6
    assert pieces.decode(pieces.encode("一个黄色的月牙在左边")) == "一个黄色的月牙在左边"
