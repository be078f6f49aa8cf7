"""Stage two's model: pictures at their places, logits at the labels, and answers token by token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.batch import IGNORED, Dialogue, DialogueBatch, EncodedDialogue, Turn
from model.generation import Decoding
from model.llm.sat_network import build
from model.qformer import QFormer
from model.vision.encoder import eva_vit
from model.visual_chat import VisualChatModel, query_branch
from tests.model.llm_common import codec_of, small_chatglm
from tests.tiny import tiny_model
from tests.tiny_chat import SAMPLES, batch_of, pictures, rows_of, tiny_chat, train_pieces


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_pieces(tmp_path_factory.mktemp("pieces") / "ice_text.model")


@pytest.fixture(scope="module")
def model(pieces: Path) -> VisualChatModel:
    return tiny_chat(pieces)


def by_hand(model: VisualChatModel, batch: DialogueBatch, row: int) -> Tensor:
    """The row alone, its embeddings put together piece by piece as VisualGLM does.  -> (L, D)"""
    ids_L = batch.ids_BL[row, : int(batch.mask_BL[row].sum())]
    parts, place = [], 0
    for picture in range(len(batch.image_row_G)):
        if batch.image_row_G[picture] == row:
            start = int(batch.image_start_G[picture])
            parts += [model.llm.embed(ids_L[None, place:start])[0]]
            parts += [model.projection(model.look(batch.image_GCHW[picture : picture + 1]))[0]]
            place = start + 5
    return torch.cat([*parts, model.llm.embed(ids_L[None, place:])[0]])


def test_pictures_stand_at_their_places(model: VisualChatModel) -> None:
    batch = batch_of(model)
    embedded_BLD = model.embed(batch)
    assert len(batch.image_row_G) == 7 and int(batch.mask_BL[2].sum()) < batch.text_length
    for row in range(len(batch)):
        expected = by_hand(model, batch, row)
        torch.testing.assert_close(embedded_BLD[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)


def test_logits_are_those_of_each_row_alone_where_it_has_labels(model: VisualChatModel) -> None:
    batch = batch_of(model)
    found = model.predict(batch)
    expected_logits, expected_labels, expected_rows = [], [], []
    for row in range(len(batch)):
        embedded = by_hand(model, batch, row)[None]
        length = embedded.shape[1]
        ids = batch.ids_BL[row : row + 1, :length]
        logits = model.llm.logits(model.llm.hidden(embedded, ids, torch.ones_like(ids, dtype=torch.bool)))[0]
        for position in range(1, length):
            label = int(batch.labels_BL[row, position])
            if label != IGNORED:
                expected_logits.append(logits[position - 1])
                expected_labels.append(label)
                expected_rows.append(row)
    assert found.label_T.tolist() == expected_labels and found.row_T.tolist() == expected_rows
    torch.testing.assert_close(found.logits_TV, torch.stack(expected_logits), atol=1e-4, rtol=1e-4)


def test_rows_are_told_apart_where_labels_come_early(model: VisualChatModel) -> None:
    batch = batch_of(model, [Dialogue((Turn("Q", "a"),), "en")] * 60)
    per_row = int((batch.labels_BL[0] != IGNORED).sum())
    assert batch.text_length < 20
    assert model.predict(batch).row_T.tolist() == [row for row in range(60) for _ in range(per_row)]


def test_what_a_row_says_depends_on_its_own_picture_alone(model: VisualChatModel) -> None:
    batch = batch_of(model)
    before = model.predict(batch)
    changed = batch.image_GCHW.clone()
    changed[1] = 255 - changed[1]  # the first picture of row 2
    after = model.predict(replace(batch, image_GCHW=changed))
    moved_T = (after.logits_TV - before.logits_TV).abs().amax(dim=1) > 1e-4
    assert set(before.row_T[moved_T].tolist()) == {2} and moved_T[before.row_T == 2].all()


def test_a_batch_without_a_picture_still_runs_the_vision_path(pieces: Path) -> None:
    model = tiny_chat(pieces, llm={"frozen": False}).train()
    calls = []
    model.vision.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[attr-defined]
    batch = batch_of(model, [SAMPLES[1], SAMPLES[4]])
    assert batch.image_GCHW.shape == (0, 3, 28, 28)
    found = model.predict(batch)
    expected = model.llm.hidden(model.llm.embed(batch.ids_BL), batch.ids_BL, batch.mask_BL)
    torch.testing.assert_close(model.hidden(batch), expected)
    found.logits_TV.square().sum().backward()
    assert len(calls) == 2
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    assert {n for n, g in gradients.items() if g is not None and g.any()} == {n for n in gradients if "llm." in n}


def test_greedy_answers_equal_the_loop_without_a_cache(model: VisualChatModel) -> None:
    asked = [Dialogue((*s.turns[:-1], replace(s.turns[-1], answer="")), s.language) for s in SAMPLES]
    batch = batch_of(model, asked)
    found = model.generate(batch, Decoding(max_new_tokens=12))
    assert found.shape == (len(SAMPLES), 12)
    codec = codec_of(model.llm)  # type: ignore[arg-type]
    for row in range(len(batch)):
        embedded = by_hand(model, batch, row)[None]
        ids = batch.ids_BL[row : row + 1, : embedded.shape[1]]
        expected: list[int] = []
        while len(expected) < 12 and codec.stop_ids[0] not in expected:
            logits = model.llm.logits(model.llm.hidden(embedded, ids, torch.ones_like(ids, dtype=torch.bool))[:, -1])
            expected.append(int(logits.argmax()))
            ids = torch.cat([ids, torch.tensor([[expected[-1]]])], dim=1)
            embedded = torch.cat([embedded, model.llm.embed(ids[:, -1:])], dim=1)
        expected += [codec.pad_id] * (12 - len(expected))
        assert found[row].tolist() == expected
    assert len({tuple(row) for row in found.tolist()}) > 3, "the answers ought to differ"


def test_who_trains(pieces: Path) -> None:
    parts = [
        ({}, {"qformer", "ln_vision", "projection"}),
        ({"train_qformer": False}, {"projection"}),
        ({"train_projection": False}, {"qformer", "ln_vision"}),
    ]
    for options, expected in parts:
        model = tiny_chat(pieces, **options)
        assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == expected


def test_the_query_branch_sees_as_the_whole_qformer_did() -> None:
    whole = tiny_model()
    image = torch.stack(pictures(2))
    expected = whole.encode_image(image).query_BQH
    qformer = query_branch(query_branch(whole.qformer))
    assert not [name for name, _ in qformer.named_parameters() if "text" in name or "head" in name or "word" in name]
    torch.testing.assert_close(qformer.see(whole.remember(whole.vision(image)))[0], expected)


def test_visualglm_at_full_size_has_its_number_of_parameters() -> None:
    with torch.device("meta"):
        vision, qformer = eva_vit(), QFormer(vocab_size=100, image_width=1408)
    network = build(hidden_size=4096, num_layers=28, num_heads=32, inner_size=16384, vocab_size=130528, device="meta")
    llm = small_chatglm(None, num_image_tokens=32)
    llm.network, llm.width = network, 4096
    model = VisualChatModel(vision, qformer, llm)
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_802_193_408


def test_parts_that_do_not_belong_together(pieces: Path) -> None:
    model = tiny_chat(pieces)
    other = QFormer(vocab_size=5, image_width=25, hidden_size=32, num_layers=1, num_heads=4, num_query_tokens=5)
    with pytest.raises(ValueError, match="encoder is 24 wide, the Q-Former looks at images 25 wide"):
        VisualChatModel(model.vision, other, model.llm)
    other = QFormer(vocab_size=5, image_width=24, hidden_size=32, num_layers=1, num_heads=4, num_query_tokens=6)
    with pytest.raises(ValueError, match="5 positions for a picture, the Q-Former 6 query tokens"):
        VisualChatModel(model.vision, other, model.llm)
    sample = EncodedDialogue((1, 2, 3), (IGNORED, 2, 3), (0,))
    with pytest.raises(ValueError, match="row 0 has 0 pictures, its text 1 places"):
        DialogueBatch.collate([sample], [[]], pad_id=0, image_size=28, language_of=["zh"], languages=("zh",))


def test_rows_cut_out_of_a_batch_say_the_same(model: VisualChatModel) -> None:
    """The helper of these tests, and padding: a shorter batch changes nothing."""
    batch = batch_of(model)
    whole = model.predict(batch)
    share = model.predict(rows_of(batch, [6, 2]))
    expected = torch.cat([whole.logits_TV[whole.row_T == row] for row in (6, 2)])
    torch.testing.assert_close(share.logits_TV, expected, atol=1e-4, rtol=1e-4)


def test_a_turn_holds_pictures_by_number() -> None:
    assert Dialogue((Turn("a", "b", 2), Turn("c", "", 1)), "zh").num_images == 3


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_half_precision_answers_and_learns(pieces: Path, stored: torch.dtype) -> None:
    """As training runs it: what is frozen stored in 16 bit or not, autocast around."""
    exact = tiny_chat(pieces)
    batch = batch_of(exact)
    expected = exact.predict(batch).logits_TV
    model = tiny_chat(pieces).train()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(stored)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.predict(batch)
        answers = model.generate(batch, Decoding(max_new_tokens=4))
    assert found.logits_TV.dtype == torch.bfloat16 and answers.shape[1] <= 4
    assert (found.logits_TV.float() - expected).abs().mean() < 0.1 * expected.abs().mean()
    found.logits_TV.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
