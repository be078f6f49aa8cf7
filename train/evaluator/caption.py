"""Greedy captions by ITG, and the share that is exactly right, for each language.

Shape letters   I = images   L = caption length
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import TextCodec
from data.source import RawSample, Source
from data.transform import Transform
from model.image_text import ImageTextModel
from train.distributed import Ranks
from train.evaluator import Evaluation, evaluating
from train.evaluator.picture import caption_examples
from train.evaluator.pool import Pool, own_share, pools_of


class Judge(Protocol):
    def __call__(self, caption: str, sample: RawSample, language: str) -> bool:
        """Whether a caption is exactly right for a sample."""
        ...


class CaptionCodec(TextCodec, Protocol):
    eos_id: int


class CaptionEvaluator:
    """Captions that are exactly right, by the judge that belongs to the data.

    Args: as `RetrievalEvaluator`, and
        judge: decides; `data.source.synthetic.SceneJudge` for scenes.
        max_new_tokens: a caption longer than that is cut, and so hardly right.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        codec: CaptionCodec,
        judge: Judge,
        *,
        name: str = "caption",
        num_samples: int | None = None,
        languages: Sequence[str] | None = None,
        max_new_tokens: int = 40,
        batch_size: int = 64,
        examples: int = 12,
    ) -> None:
        if max_new_tokens < 1 or batch_size < 1:
            raise ValueError(
                f"evaluator {name!r}: max_new_tokens {max_new_tokens} and batch_size {batch_size} must be 1 or more"
            )
        self.name, self.codec, self.judge = name, codec, judge
        self.max_new_tokens, self.batch_size, self.examples = max_new_tokens, batch_size, examples
        self.pools = pools_of(
            source,
            languages,
            transform,
            codec,
            num_samples=num_samples,
            captions_per_image=1,
            max_text_tokens=max_new_tokens,
        )

    def __call__(self, model: ImageTextModel, *, device: torch.device, ranks: Ranks) -> Evaluation:
        metrics: dict[str, float] = {}
        pictures, lines = {}, []
        for language, pool in self.pools.items():
            with evaluating(model):
                captions = self.captions(model, pool, device, ranks)
            right = [
                self.judge(caption, sample, language) for caption, sample in zip(captions, pool.samples, strict=True)
            ]
            share = sum(right) / len(right)
            metrics[f"{language}/exactly_right"] = share
            metrics[f"{language}/num_images"] = float(pool.num_images)
            lines.append(f"{self.name} {language}: {share:.1%} of {pool.num_images} captions exactly right")
            if ranks.is_first and self.examples:
                pictures[language] = caption_examples(pool, captions, right, self.examples)
        return Evaluation(metrics, pictures, tuple(lines))

    def captions(self, model: ImageTextModel, pool: Pool, device: torch.device, ranks: Ranks) -> list[str]:
        """One for each image, the same on every rank."""
        mine_I, _ = own_share(pool.num_images, ranks)
        # ZeRO-3 wants the same calls on every rank: among several, nobody stops early, and the cut comes after
        eos_id = self.codec.eos_id if ranks.count == 1 else -1
        generated = [self._generate(model, pool, rows_I, device, eos_id) for rows_I in mine_I.split(self.batch_size)]
        ids_IL = ranks.gather_constant(torch.cat(generated))[: pool.num_images]
        return [self.codec.decode(before_end(ids, self.codec.eos_id)) for ids in ids_IL.tolist()]

    def _generate(self, model: ImageTextModel, pool: Pool, rows_I: Tensor, device: torch.device, eos_id: int) -> Tensor:
        """-> ids_IL of exactly `max_new_tokens`, so that ranks can exchange them"""
        features = model.encode_image(pool.image_ICHW[rows_I].to(device))
        bos_I = torch.full((len(rows_I),), self.codec.bos_id(pool.language), device=device)
        ids_IL = model.generate(
            features,
            bos_I,
            eos_id=eos_id,
            pad_id=self.codec.pad_id,
            max_new_tokens=self.max_new_tokens,
        )
        return F.pad(ids_IL, (0, self.max_new_tokens - ids_IL.shape[1]), value=self.codec.pad_id)


def before_end(ids: Sequence[int], eos_id: int) -> list[int]:
    ids = list(ids)
    return ids[: ids.index(eos_id)] if eos_id in ids else ids
