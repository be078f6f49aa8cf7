"""ITC, ITM and ITG against closed forms and against torch's own cross-entropy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tiny import random_batch, tiny_model, tiny_stage
from train.distributed import Ranks
from train.loss.draw import keyed_uniform
from train.loss.stage_one import (
    ImageGroundedTextGeneration,
    ImageTextContrastive,
    StageOneLoss,
    compare,
    draw_hard_negative,
    image_text_contrastive,
    query_text_similarity,
)


def similarity(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) * 3


def test_similarity_is_the_best_of_the_query_views() -> None:
    generator = torch.Generator().manual_seed(2)
    query_XQE, text_YE = torch.randn(4, 3, 6, generator=generator), torch.randn(5, 6, generator=generator)
    expected = torch.stack([torch.stack([(query @ text).max() for text in text_YE]) for query in query_XQE])
    torch.testing.assert_close(query_text_similarity(query_XQE, text_YE), expected)


def test_contrastive_is_cross_entropy_with_label_smoothing() -> None:
    sim_BN, own_B = similarity(4, 8), torch.tensor([2, 3, 4, 5])
    none = torch.zeros_like(sim_BN, dtype=torch.bool)
    expected = F.cross_entropy(sim_BN, own_B, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(image_text_contrastive(sim_BN, own_B, none, label_smoothing=0.1), expected)


def test_a_barred_column_is_as_if_it_were_not_there() -> None:
    sim_BN, own_B = similarity(2, 6).requires_grad_(), torch.tensor([0, 1])
    barred = torch.tensor([[False, True, False, True, False, False], [False] * 6])
    found_B = image_text_contrastive(sim_BN, own_B, barred, label_smoothing=0.1)
    kept = sim_BN[0, ~barred[0]]
    expected = torch.stack(
        [
            F.cross_entropy(kept, torch.tensor(0), label_smoothing=0.1),
            F.cross_entropy(sim_BN[1], torch.tensor(1), label_smoothing=0.1),
        ]
    )
    torch.testing.assert_close(found_B, expected)
    (found_gradient,) = torch.autograd.grad(found_B.sum(), sim_BN)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), sim_BN)
    torch.testing.assert_close(found_gradient, expected_gradient)


@pytest.mark.parametrize("floor", [0.0, 1e-4])
def test_hard_negatives_follow_the_softmax_of_the_similarities(floor: float) -> None:
    num_draws, sim_N = 200_000, similarity(1, 7)[0]
    not_negative_N = torch.tensor([False, True, False, False, True, False, False])
    # its own pair, as a trained model sees it: what the softmax leaves for the others is no more than a floor
    sim_N[1] += 6
    # LAVIS as of the paper: softmax over all, its own pair too, + 1e-4, and then its own becomes 0
    weight_N = (sim_N.softmax(0) + floor).masked_fill(not_negative_N, 0)
    # evenly spaced numbers instead of random ones: each column's share is exact to one draw
    grid = (torch.arange(num_draws, dtype=torch.float64) + 0.5) / num_draws
    drawn = draw_hard_negative(sim_N.expand(num_draws, -1), not_negative_N.expand(num_draws, -1), grid, floor=floor)
    found = drawn.bincount(minlength=7) / num_draws
    torch.testing.assert_close(found, weight_N / weight_N.sum(), atol=2 / num_draws, rtol=0)


def test_no_objective_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="itc, itm and itg are all null"):
        StageOneLoss()
    StageOneLoss(itg=ImageGroundedTextGeneration())


def test_the_ends_of_the_uniform_draw_real_negatives() -> None:
    sim = torch.tensor([[9.0, 0.0, 0.0, 9.0]])
    for uniform in (0.0, 1 - 2**-53, 1.0):
        uniform_B = torch.tensor([uniform], dtype=torch.float64)
        index = draw_hard_negative(sim, torch.tensor([[True, False, False, True]]), uniform_B)
        assert index.item() in (1, 2)


def test_keyed_numbers_are_even_and_depend_on_every_part_of_the_key() -> None:
    row_B = torch.arange(100_000)
    draws = [keyed_uniform(row_B, *key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0))]
    for draw in draws:
        share = torch.histc(draw, bins=10, min=0, max=1) / len(row_B)
        assert (share - 0.1).abs().max() < 0.005 and 0 <= draw.min() and draw.max() < 1
    correlation = torch.corrcoef(torch.stack(draws)).fill_diagonal_(0)
    assert correlation.abs().max() < 0.015
    torch.testing.assert_close(keyed_uniform(row_B[500:600], 0, 1, 0), draws[2][500:600], rtol=0, atol=0)


def test_keyed_numbers_match_splitmix64_in_python_integers() -> None:
    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    state = mix((mix((0x9E3779B97F4A7C15 + 5) % 2**64) + 0x9E3779B97F4A7C15 + 6) % 2**64)
    expected = [(mix((row * 0x9E3779B97F4A7C15 + state) % 2**64) >> 11) / 2**53 for row in range(50)]
    assert keyed_uniform(torch.arange(50), 5, 6).tolist() == expected


def test_generation_loss_is_lavis_shifted_cross_entropy() -> None:
    model, batch = tiny_model(), random_batch(6)
    seen = model.look(batch)
    ids_BL = batch.text_ids_BL.clone()
    ids_BL[:, 0] = batch.bos_id_B
    image = model.encode_image(batch.image_BCHW)
    logits_BLV = model.vocabulary_logits(model.caption(image, ids_BL, batch.text_mask_BL))
    labels_BL = ids_BL.masked_fill(~batch.text_mask_BL, -100)
    expected = F.cross_entropy(
        logits_BLV[:, :-1].flatten(0, 1), labels_BL[:, 1:].flatten(), ignore_index=-100, label_smoothing=0.1
    )
    for normalise in ("global", "rank"):
        loss = ImageGroundedTextGeneration(normalise=normalise)(model, batch, seen, Ranks.alone())
        torch.testing.assert_close(loss.value, expected)
    torch.testing.assert_close(loss.sum_B.sum() / loss.count_B.sum(), expected)


def test_a_batch_of_nothing_but_duplicates_has_no_negatives() -> None:
    batch = random_batch(6, image_key_B=torch.zeros(6, dtype=torch.int64))
    stage = tiny_stage()
    output = stage(batch)
    assert output.losses["itc"].item() == 0.0 and output.losses["itm"].item() == 0.0
    torch.stack(list(output.losses.values())).sum().backward()
    gradients = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients["model.itm_head.weight"].abs().max() == 0.0
    assert gradients["model.qformer.language_head.dense.weight"].abs().max() > 0.0
    assert output.report["num_with_duplicate"][0] == 6 and output.report["num_without_negative"][0] == 6


def test_without_duplicate_masks_the_losses_are_lavis() -> None:
    batch = random_batch(6, image_key_B=torch.zeros(6, dtype=torch.int64))
    model = tiny_model()
    seen = model.look(batch)
    contrast = compare(model, batch, seen, Ranks.alone(), itc_gather="full", mask_duplicates=False)
    target = torch.arange(6)
    expected = (
        F.cross_entropy(contrast.sim_i2t_BN, target, label_smoothing=0.1)
        + F.cross_entropy(contrast.sim_t2i_BN, target, label_smoothing=0.1)
    ) / 2
    torch.testing.assert_close(ImageTextContrastive()(contrast).value, expected)
    assert contrast.has_negative_B.all() and contrast.num_with_negatives == 6


def test_the_anchor_gather_gives_the_same_loss_and_less_gradient() -> None:
    losses, gradients = [], []
    for gather in ("full", "anchor"):
        stage = tiny_stage(losses=StageOneLoss(itc=ImageTextContrastive(gather=gather)))
        value = stage(random_batch(6)).losses["itc"]
        value.backward()
        losses.append(value.detach())
        gradients.append(stage.model.text_proj.weight.grad)
    torch.testing.assert_close(losses[0], losses[1])
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()


def test_reports_by_language_add_up_to_the_losses() -> None:
    batch = random_batch(6)
    output = tiny_stage()(batch)
    for name in ("itc", "itm", "itg"):
        parts = [torch.stack(output.report[f"{name}/{language}"]) for language in batch.languages]
        total, count = torch.stack(parts).sum(0)
        torch.testing.assert_close(total / count, output.losses[name].detach())
    assert [output.report[f"num_samples/{language}"][0].item() for language in batch.languages] == [3, 3]


def test_weights_scale_and_a_missing_loss_is_not_computed() -> None:
    batch = random_batch(6)
    plain = tiny_stage(losses=StageOneLoss(itc=ImageTextContrastive()))(batch).losses
    double = tiny_stage(losses=StageOneLoss(itc=ImageTextContrastive(weight=2.0)))(batch).losses
    assert plain.keys() == {"itc"}
    torch.testing.assert_close(double["itc"], 2 * plain["itc"])


def test_no_caption_is_read_where_none_is_learned() -> None:
    stage, lengths = tiny_stage(losses=StageOneLoss(itc=ImageTextContrastive())), []
    stage.model.qformer.layers[0].register_forward_pre_hook(lambda _, x: lengths.append(x[0].shape[1]))
    batch = random_batch(4)
    stage(batch)
    assert lengths == [stage.model.qformer.num_query_tokens + batch.text_length]


def test_another_step_draws_other_negatives() -> None:
    stage, batch = tiny_stage(), random_batch(8)
    contrast = compare(
        stage.model, batch, stage.model.look(batch), Ranks.alone(), itc_gather="full", mask_duplicates=True
    )
    # all alike, so that the draw alone decides
    flat = replace(contrast, sim_i2t_BN=contrast.sim_i2t_BN * 0, sim_t2i_BN=contrast.sim_t2i_BN * 0)
    itm = stage.objectives.itm
    first, again = itm.draw(batch, flat), itm.draw(batch, flat)
    other = itm.draw(replace(batch, step=batch.step + 1), flat)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], itm.draw(replace(batch, micro_step=1), flat)[0])


def test_hard_images_come_from_the_texts_similarities_and_hard_texts_from_the_images() -> None:
    stage, batch = tiny_stage(), random_batch(6)
    contrast = compare(
        stage.model, batch, stage.model.look(batch), Ranks.alone(), itc_gather="full", mask_duplicates=True
    )
    row = torch.arange(6)
    image_of_text, text_of_image = (row + 1) % 6, (row + 2) % 6
    peaked = replace(
        contrast,
        sim_t2i_BN=F.one_hot(image_of_text, 6) * 100.0,
        sim_i2t_BN=F.one_hot(text_of_image, 6) * 100.0,
    )
    hard_image_B, hard_text_B = stage.objectives.itm.draw(batch, peaked)
    assert hard_image_B.tolist() == image_of_text.tolist() and hard_text_B.tolist() == text_of_image.tolist()


def test_similarities_are_fp32_whatever_autocast_says() -> None:
    generator = torch.Generator().manual_seed(3)
    query_XQE = F.normalize(torch.randn(4, 3, 64, generator=generator), dim=-1)
    text_YE = F.normalize(torch.randn(5, 64, generator=generator), dim=-1)
    expected = (query_XQE.flatten(0, 1) @ text_YE.T).view(4, 3, 5).amax(dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(query_text_similarity(query_XQE, text_YE), expected, rtol=0, atol=0)
    halved = query_text_similarity(query_XQE.bfloat16(), text_YE.bfloat16())
    expected = query_text_similarity(query_XQE.bfloat16().float(), text_YE.bfloat16().float())
    torch.testing.assert_close(halved, expected, rtol=0, atol=0)


def test_duplicates_are_counted_by_their_rows() -> None:
    key_B = torch.tensor([7, 1, 2, 7, 3, 4])  # rows 0 and 3 show one image
    report = tiny_stage()(random_batch(6, image_key_B=key_B)).report
    assert report["num_with_duplicate"][0] == 2 and report["num_without_negative"][0] == 0
