"""Image-text retrieval as LAVIS measures it (`blip2_models/blip2_qformer.py`, `tasks/retrieval.py`), for each language.

ITC alone: score = max over queries of the cosine.  Re-ranked by ITM: the best k candidates of each image and of each
text by ITC get  ITM logit of "match" + that cosine (not divided by the temperature);  the others follow in ITC's order.

What differs from LAVIS changes no number: every rank encodes its own share of the images, a pair wanted from both sides
is matched once, by the rank that has its image, and k is never more than the number of candidates.

Shape letters   I = images   T = texts   Q = query tokens   E = shared embedding   L = caption length   M = image tokens
                W = image width   P = image-text pairs
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data.batch import TextCodec
from data.source import Source
from data.transform import Transform
from model.image_text import ImageTextModel
from train.distributed import Ranks
from train.evaluator import Evaluation, evaluating
from train.evaluator.picture import retrieval_examples
from train.evaluator.pool import Pool, own_share, pools_of

DIRECTIONS = ("image_to_text", "text_to_image")
BEHIND = -1e4  # puts candidates that were not re-ranked behind all that were, in their order by ITC


def recall_at(score_XY: Tensor, right_XY: Tensor, k: int) -> float:
    """R@k: share of the rows among whose best k columns is a right one."""
    best_XK = score_XY.topk(min(k, score_XY.shape[1]), dim=1).indices
    return right_XY.gather(1, best_XK).any(dim=1).double().mean().item()


class RetrievalEvaluator:
    """R@k from image to text and from text to image, by ITC and re-ranked by ITM.

    Args:
        source, transform, codec: where the samples come from.
        num_samples: of each language, the first ones; None for all.
        languages: None for all of the source's.
        captions_per_image: None for all of them.
        recall: the k of R@k.
        rerank: candidates that ITM scores for each image and each text; 0 leaves ITM out.
        batch_size: images, texts or pairs in one forward pass.
        examples: images in the picture.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        codec: TextCodec,
        *,
        name: str = "retrieval",
        num_samples: int | None = None,
        languages: Sequence[str] | None = None,
        captions_per_image: int | None = 1,
        max_text_tokens: int = 35,
        recall: Sequence[int] = (1, 5, 10),
        rerank: int = 128,
        batch_size: int = 64,
        examples: int = 6,
    ) -> None:
        if rerank < 0 or batch_size < 1 or min(recall) < 1:
            raise ValueError(
                f"evaluator {name!r}: rerank {rerank} must be 0 or more, batch_size {batch_size} and recall "
                f"{list(recall)} 1 or more"
            )
        self.name, self.recall, self.rerank = name, tuple(recall), rerank
        self.batch_size, self.examples = batch_size, examples
        self.pools = pools_of(
            source,
            languages,
            transform,
            codec,
            num_samples=num_samples,
            captions_per_image=captions_per_image,
            max_text_tokens=max_text_tokens,
        )

    def __call__(self, model: ImageTextModel, *, device: torch.device, ranks: Ranks) -> Evaluation:
        metrics: dict[str, float] = {}
        pictures, lines = {}, []
        for language, pool in self.pools.items():
            with evaluating(model):
                scores = self.scores(model, pool, device, ranks)
            found = self._recalls(pool, scores)
            metrics |= {f"{language}/{key}": value for key, value in found.items()}
            lines += self._lines(language, pool, found)
            if ranks.is_first and self.examples:
                pictures[language] = retrieval_examples(pool, scores[-1][1][0], self.examples)
        return Evaluation(metrics, pictures, tuple(lines))

    def scores(
        self, model: ImageTextModel, pool: Pool, device: torch.device, ranks: Ranks
    ) -> list[tuple[str, tuple[Tensor, Tensor]]]:
        """[("itc", (score_IT, score_TI)), ("itm", ...)], on the host and the same on every rank."""
        mine_I, num_own = own_share(pool.num_images, ranks)
        encoded_IMW, query_IQE = self._encode_images(model, pool, mine_I, device)
        query_IQE = ranks.gather_constant(query_IQE)[: pool.num_images]
        text_TE = self._encode_texts(model, pool, own_share(pool.num_texts, ranks)[0], device)
        text_TE = ranks.gather_constant(text_TE)[: pool.num_texts]
        cosine_IT = torch.cat([_best_cosine(rows, text_TE) for rows in query_IQE.split(self.batch_size)])
        scores = [("itc", (cosine_IT.cpu(), cosine_IT.T.cpu()))]
        if self.rerank:
            from_image_IT, from_text_IT = _best(cosine_IT, self.rerank), _best(cosine_IT.T, self.rerank).T
            wanted_IT = from_image_IT | from_text_IT
            match_IT = self._match(model, pool, wanted_IT, mine_I[:num_own], encoded_IMW, device, ranks)
            cosine_IT, match_IT = cosine_IT.double().cpu(), match_IT.double().cpu()
            reranked = [
                torch.where(kept_IT.cpu(), match_IT + cosine_IT, cosine_IT + BEHIND)
                for kept_IT in (from_image_IT, from_text_IT)
            ]
            scores.append(("itm", (reranked[0], reranked[1].T)))
        return scores

    def _encode_images(
        self, model: ImageTextModel, pool: Pool, mine_I: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """-> the encoder's output (kept on the host, it may be gigabytes), query_IQE; rows of `mine_I`"""
        encoded, query = [], []
        for rows in mine_I.split(self.batch_size):
            features = model.encode_image(pool.image_ICHW[rows].to(device))
            encoded.append(features.encoded_BMW.cpu())
            query.append(features.query_BQE)
        return torch.cat(encoded), torch.cat(query)

    def _encode_texts(self, model: ImageTextModel, pool: Pool, mine_T: Tensor, device: torch.device) -> Tensor:
        return torch.cat(
            [
                model.encode_text(pool.text_ids_TL[rows].to(device), pool.text_mask_TL[rows].to(device))
                for rows in mine_T.split(self.batch_size)
            ]
        )

    def _match(
        self,
        model: ImageTextModel,
        pool: Pool,
        wanted_IT: Tensor,
        own_I: Tensor,
        encoded_IMW: Tensor,
        device: torch.device,
        ranks: Ranks,
    ) -> Tensor:
        """-> the ITM logit of "match" of every wanted pair, 0 elsewhere.  `own_I` may be shorter than the features."""
        match_IT = torch.zeros(wanted_IT.shape, device=device)
        for at in range(0, len(encoded_IMW), self.batch_size):
            memory = model.remember(encoded_IMW[at : at + self.batch_size].to(device))
            rows_I = own_I[at : at + self.batch_size]
            image_P, text_P = wanted_IT[rows_I.to(device)].cpu().nonzero(as_tuple=True)
            # every rank makes as many calls as the busiest one; a rank without pairs left repeats pair 0, 0 in vain
            for first in range(0, ranks.max_ints([len(image_P)])[0], self.batch_size):
                image, text = image_P[first : first + self.batch_size], text_P[first : first + self.batch_size]
                idle = torch.zeros(0 if len(image) else 1, dtype=torch.int64)
                asked_image, asked_text = torch.cat([image, idle]), torch.cat([text, idle])
                logits_P2 = model.match_memories(
                    [memory.select(asked_image.to(device))],
                    pool.text_ids_TL[asked_text].to(device),
                    pool.text_mask_TL[asked_text].to(device),
                )
                match_IT[rows_I[image].to(device), text.to(device)] = logits_P2[: len(image), 1].float()
        return ranks.sum(match_IT)

    def _recalls(self, pool: Pool, scores: list[tuple[str, tuple[Tensor, Tensor]]]) -> dict[str, float]:
        right_IT = pool.is_right()
        found = {"num_images": float(pool.num_images), "num_texts": float(pool.num_texts)}
        for how, both in scores:
            for direction, score, right in zip(DIRECTIONS, both, (right_IT, right_IT.T), strict=True):
                found |= {f"{how}/{direction}/r@{k}": recall_at(score, right, k) for k in self.recall}
        return found

    def _lines(self, language: str, pool: Pool, found: dict[str, float]) -> list[str]:
        cut = f", {pool.num_truncated} captions truncated" if pool.num_truncated else ""
        lines = [f"{self.name} {language}: pool of {pool.num_images} images and {pool.num_texts} texts{cut}"]
        for how in ("itc", "itm"):
            for direction in DIRECTIONS:
                values = [
                    f"R@{k} {found[key]:.1%}" for k in self.recall if (key := f"{how}/{direction}/r@{k}") in found
                ]
                if values:
                    lines.append(f"  {how.upper()} {direction.replace('_', ' ')}: " + "  ".join(values))
        return lines


def _best_cosine(query_IQE: Tensor, text_TE: Tensor) -> Tensor:
    """cosine_IT of the best query"""
    with torch.autocast(query_IQE.device.type, enabled=False):
        return torch.einsum("iqe,te->itq", query_IQE.float(), text_TE.float()).amax(dim=2)


def _best(score_XY: Tensor, k: int) -> Tensor:
    """True at the best k columns of each row, or at all where there are fewer."""
    best_XK = score_XY.topk(min(k, score_XY.shape[1]), dim=1).indices
    return torch.zeros_like(score_XY, dtype=torch.bool).scatter(1, best_XK, True)
