"""The passes of the Q-Former against the joint pass that the paper draws, and against themselves without savings."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import attention_mask
from model.image_text import Temperature
from tests.tiny import CLS, random_batch, tiny_model, tiny_stage


def test_captioning_from_the_cache_is_the_joint_pass_with_the_unilm_mask() -> None:
    model, batch = tiny_model(), random_batch(5)
    qformer, num_queries = model.qformer, model.qformer.num_query_tokens
    image = model.encode_image(batch.image_BCHW)
    found = model.caption(image, batch.text_ids_BL, batch.text_mask_BL)

    length = batch.text_length
    mask_TT = torch.ones(num_queries + length, num_queries + length, dtype=torch.bool).tril()
    mask_TT[:num_queries] = False
    mask_TT[:, :num_queries] = True
    mask_BTT = mask_TT & torch.cat([torch.ones(5, num_queries, dtype=torch.bool), batch.text_mask_BL], 1)[:, None]
    x_BTH = torch.cat([qformer._queries(5), qformer._embed(batch.text_ids_BL)], dim=1)
    joint, _ = qformer._run(x_BTH, num_query_tokens=num_queries, mask=mask_BTT[:, None], memories=[image.memory])
    torch.testing.assert_close(image.query_BQH, joint[:, :num_queries], atol=1e-5, rtol=1e-5)
    expected = joint[:, num_queries:]
    torch.testing.assert_close(found[batch.text_mask_BL], expected[batch.text_mask_BL], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("caption", [True, False])
def test_one_pass_is_what_three_are(caption: bool) -> None:
    model, batch = tiny_model(), random_batch(5)
    image = model.encode_image(batch.image_BCHW)
    seen = model.look(batch, caption=caption)
    torch.testing.assert_close(seen.query_BQE, image.query_BQE, atol=1e-5, rtol=1e-5)
    expected = model.encode_text(batch.text_ids_BL, batch.text_mask_BL)
    torch.testing.assert_close(seen.text_BE, expected, atol=1e-5, rtol=1e-5)
    if not caption:
        assert seen.caption_BLH.shape[1] == 0
        return
    ids_BL = torch.cat([batch.bos_id_B[:, None], batch.text_ids_BL[:, 1:]], dim=1)
    expected = model.caption(image, ids_BL, batch.text_mask_BL)
    real = batch.text_mask_BL
    torch.testing.assert_close(seen.caption_BLH[real], expected[real], atol=1e-5, rtol=1e-5)


def test_masks_by_hand() -> None:
    text = torch.tensor([[True, True, False]])
    assert attention_mask.text_alone(text).int().tolist() == [[[[1, 1, 0]]]]
    assert attention_mask.query_with_text(text, 2).int().tolist() == [[[[1, 1, 1, 1, 0]]]]
    expected = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert attention_mask.text_after_query(text, 2).int().tolist() == [[expected]]
    read = [[0, 0, 0, 0, 0, 1, 1, 0]] * 3
    queries = [[1, 1, 0, 0, 0, 0, 0, 0]] * 2
    apart = [*queries, *([*row, 0, 0, 0] for row in expected), *read]
    assert attention_mask.apart(text, 2, caption=True).int().tolist() == [[apart]]
    apart = [*queries, *read]
    assert attention_mask.apart(text, 2, caption=False).int().tolist() == [[[row[:2] + row[5:] for row in apart]]]


def test_a_mask_as_it_is_added() -> None:
    text = torch.tensor([[True, True, False], [True, False, False]])
    bias = attention_mask.as_bias(attention_mask.text_after_query(text, 2), torch.bfloat16)
    assert bias.shape == (2, 1, 3, 5) and bias.dtype == torch.bfloat16
    assert (bias == 0).int().tolist() == attention_mask.text_after_query(text, 2).int().tolist()
    assert (bias == float("-inf")).equal(bias != 0)
    assert bias.stride()[-2:] == (8, 1), "the fused kernel on GPUs would copy it in every layer"


def test_images_that_share_a_memory_are_read_as_if_each_had_its_own() -> None:
    model, batch = tiny_model(), random_batch(4)
    image = model.encode_image(batch.image_BCHW)
    hard_B = torch.tensor([2, 0, 3, 1])
    ids, mask = batch.text_ids_BL.repeat(3, 1), batch.text_mask_BL.repeat(3, 1)
    ids[4:8] = batch.text_ids_BL.flip(0)
    mask[4:8] = batch.text_mask_BL.flip(0)
    expected = model.match(image.select(torch.cat([torch.arange(4), torch.arange(4), hard_B])), ids, mask)
    hard = image.memory.used(2).select(hard_B)  # whose images are used once again
    found = model.match_memories([image.memory.used(2), hard], ids, mask)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_last_layer_leaves_out_only_what_nobody_asks_for() -> None:
    model, batch = tiny_model(), random_batch(4)
    expected = model.qformer.read(batch.text_ids_BL, batch.text_mask_BL)[:, :1]
    found = model.qformer.read(batch.text_ids_BL, batch.text_mask_BL, keep=1)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_padding_changes_nothing() -> None:
    model, batch = tiny_model(), random_batch(4)
    longer = batch.agreed(step_target_tokens=batch.step_target_tokens, text_length=batch.text_length + 5)
    image = model.encode_image(batch.image_BCHW)
    for run in (
        lambda b: model.encode_text(b.text_ids_BL, b.text_mask_BL),
        lambda b: model.match(image, b.text_ids_BL, b.text_mask_BL),
        lambda b: model.caption(image, b.text_ids_BL, b.text_mask_BL)[:, : batch.text_length][batch.text_mask_BL],
    ):
        torch.testing.assert_close(run(longer), run(batch), atol=1e-5, rtol=1e-5)


def test_a_text_longer_than_the_positions_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="17 tokens .* 16 positions.*max_text_tokens"):
        model.encode_text(torch.full((1, 17), CLS), torch.ones(1, 17, dtype=torch.bool))


def test_greedy_captions_are_the_argmax_of_the_teacher_forced_pass() -> None:
    model, batch = tiny_model(), random_batch(4)
    with torch.no_grad():  # let the image decide what is said
        for attention in model.qformer.looking():
            attention.image.value.weight.mul_(20)
    image = model.encode_image(batch.image_BCHW)
    ids_BL = model.generate(image, batch.bos_id_B, eos_id=-1, pad_id=0, max_new_tokens=6)
    full = torch.cat([batch.bos_id_B[:, None], ids_BL], dim=1)
    hidden = model.caption(image, full, torch.ones_like(full, dtype=torch.bool))
    expected = model.vocabulary_logits(hidden)[:, :-1].argmax(-1)
    assert ids_BL.shape == (4, 6) and torch.equal(ids_BL, expected)
    assert len(set(map(tuple, ids_BL.tolist()))) > 1, "all images say the same: this would not notice a mix-up"
    # the token that caption 0 says third ends captions, and what follows is padding
    eos_id = int(ids_BL[0, 2])
    stopped = model.generate(image, batch.bos_id_B, eos_id=eos_id, pad_id=0, max_new_tokens=6)
    first = ids_BL[0].tolist().index(eos_id)
    assert stopped[0].tolist() == ids_BL[0, : first + 1].tolist() + [0] * (stopped.shape[1] - first - 1)


def test_temperature_is_clamped_and_comes_back_from_its_bound() -> None:
    temperature = Temperature(2.0, 0.001, 0.5)
    assert temperature().item() == 0.5
    (-temperature()).sum().backward()  # descent would raise it further
    assert temperature.value.grad.item() == 0.0
    temperature.value.grad = None
    temperature().sum().backward()  # descent lowers it, back into the range
    assert temperature.value.grad.item() == 1.0
    free = Temperature(2.0, None, None)
    assert free().item() == 2.0


def test_flops_of_a_step_as_torch_counts_them() -> None:
    stage, batch = tiny_stage(num_layers=8), random_batch(6, shortest=9)
    model = stage.model
    # the plain kernel, since the counter does not know the fused one for CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses = stage(batch).losses
        torch.stack(list(losses.values())).sum().backward()
    expected = counter.get_total_flops() / len(batch)
    rest = model.train_flops_per_sample(num_image_tokens=model.vision.num_tokens, text_length=batch.text_length)
    # what the formula leaves out: heads, similarities, and that the first token is no target
    assert model.vision.flops_per_image() + rest == pytest.approx(expected, rel=0.05)
