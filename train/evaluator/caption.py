"""Greedy captions by ITG, for each language: BLEU-4, ROUGE-L and CIDEr against all captions of an image, and the share
that is exactly right where somebody can tell.

Shape letters   I = images   K = this rank's images   L = caption length
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from data.batch import TextCodec
from data.source import RawSample, Source
from data.transform import PairTransform
from model.image_text import ImageTextModel
from train.distributed import Ranks
from train.evaluator import Evaluation, evaluating, in_step
from train.evaluator.picture import caption_examples, spread
from train.evaluator.pool import Pool, Pools
from train.evaluator.predictions import Predictions
from train.evaluator.text_metrics import text_scores, told


class Judge(Protocol):
    def __call__(self, caption: str, sample: RawSample, language: str) -> bool:
        """Whether a caption is exactly right for a sample."""
        ...


class CaptionCodec(TextCodec, Protocol):
    eos_id: int


class CaptionEvaluator:
    """Captions beside the ones that people wrote.

    Args: as `RetrievalEvaluator`, and
        judge: decides what is exactly right; `data.source.synthetic.SceneJudge` for scenes, None where nobody can.
        max_new_tokens: a caption longer than that is cut, and so hardly right.
    """

    def __init__(
        self,
        source: Source,
        transform: PairTransform,
        codec: CaptionCodec,
        judge: Judge | None = None,
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
        self.name, self.source, self.codec, self.judge = name, source, codec, judge
        self.max_new_tokens, self.batch_size, self.examples = max_new_tokens, batch_size, examples
        self.pools = Pools(source, transform, codec, languages, num_samples=num_samples, captions_per_image=None,
                           max_text_tokens=max_new_tokens)  # fmt: skip

    def __call__(
        self, model: ImageTextModel, *, device: torch.device, ranks: Ranks, predictions: Predictions | None = None
    ) -> Evaluation:
        predictions = predictions or Predictions(ranks)
        metrics: dict[str, float] = {}
        pictures, lines = {}, []
        for language in self.pools.languages:
            pool = self.pools.of(language, ranks)
            with evaluating(model):
                captions = self.captions(model, pool, device, ranks, predictions)
            measured = [image for image, texts in enumerate(pool.references) if texts]  # a shop has pictures without
            references = [pool.references[image] for image in measured]
            found = text_scores([captions[image] for image in measured], references, language)
            head = f"{self.name} {language}: {len(measured)} captions"
            right: list[bool | None] = [None] * len(captions)
            if self.judge is not None:
                right = [self.judge(said, it, language) for said, it in zip(captions, pool.samples, strict=True)]
                found["exactly_right"] = sum(map(bool, right)) / len(right)
                head += f", {found['exactly_right']:.1%} exactly right"
            found["num_images"] = float(len(measured))
            metrics |= {f"{language}/{key}": value for key, value in found.items()}
            left_out = f", {pool.num_left_out} samples could not be read" if pool.num_left_out else ""
            lines += [head + left_out, *(f"  {line}" for line in told(found))]
            shown = pool.pictures([measured[place] for place in spread(len(measured), self.examples)], ranks)
            if shown and ranks.is_first:
                pictures[language] = caption_examples(shown, captions, right, pool.references)
        return Evaluation(metrics, pictures, tuple(lines))

    def captions(
        self, model: ImageTextModel, pool: Pool, device: torch.device, ranks: Ranks, predictions: Predictions
    ) -> list[str]:
        """One for each image, the same on every rank; those that were made before are not made again."""
        known = predictions.known(self.name, pool.language)
        own = [k for k, image in enumerate(pool.own_K.tolist()) if image not in known]
        with predictions.progress(f"{self.name} {pool.language}", pool.num_images, len(known)) as progress:
            for rows, meant in in_step(own, self.batch_size, ranks):
                said = self._generate(model, pool, rows, device, predictions.lockstep)[:meant]
                made = [self._prediction(pool, k, text) for k, text in zip(rows, said, strict=False)]
                progress.advance(predictions.add(self.name, pool.language, made))
        known = predictions.known(self.name, pool.language)
        return [str(known[image]["caption"]) for image in range(pool.num_images)]

    def _prediction(self, pool: Pool, k: int, caption: str) -> dict[str, Any]:
        image = int(pool.own_K[k])
        sample = pool.samples[image]
        place = {"shard": sample.shard, "key": sample.key}
        return {"index": image, **place, "caption": caption, "references": list(pool.references[image])}

    def _generate(
        self, model: ImageTextModel, pool: Pool, rows: Sequence[int], device: torch.device, lockstep: bool
    ) -> list[str]:
        image_BCHW = pool.image_KCHW[[k for k in rows if k < len(pool.own_K)]]
        if not len(image_BCHW):  # a rank without images, among others that have some
            image_BCHW = image_BCHW.new_zeros(1, *image_BCHW.shape[1:])
        features = model.encode_image(image_BCHW.to(device))
        bos_B = torch.full((len(image_BCHW),), self.codec.bos_id(pool.language), device=device)
        ids_BL: Tensor = model.generate(
            features,
            bos_B,
            eos_id=-1 if lockstep else self.codec.eos_id,  # in lockstep nobody stops early, and the cut comes after
            pad_id=self.codec.pad_id,
            max_new_tokens=self.max_new_tokens,
        )
        return [self.codec.decode(before_end(ids, self.codec.eos_id)) for ids in ids_BL.tolist()]


def before_end(ids: Sequence[int], eos_id: int) -> list[int]:
    ids = list(ids)
    return ids[: ids.index(eos_id)] if eos_id in ids else ids
