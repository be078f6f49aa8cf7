"""Image-text retrieval as LAVIS measures it (`blip2_models/blip2_qformer.py`, `tasks/retrieval.py`), for each language.

ITC alone: score = max over queries of the cosine.  Re-ranked by ITM: the best k candidates of each image and of each
text by ITC get  ITM logit of "match" + that cosine (not divided by the temperature);  the others follow in ITC's order.
R@k is the share of images (texts) among whose first k candidates one is right; candidates that score as high as the
right one stand before it, so that a model which finds everything alike finds nothing.

What differs from LAVIS changes no number: every rank encodes its share of images and texts once, a pair wanted from
both sides is matched once, by the rank that has its image and with the keys and values of that image projected once, no
table of all pairs is ever held, and k is never more than the number of candidates.

Shape letters   I = images   T = texts   K = this rank's images   R = rows of a block (images or texts)   C = candidates
                N = best candidates   Q = query tokens   E = shared embedding   L = caption length   M = image tokens
                W = image width   P = image-text pairs
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.batch import TextCodec
from data.source import Source
from data.transform import PairTransform
from model.image_text import ImageTextModel
from train.distributed import Ranks
from train.evaluator import Evaluation, evaluating, everyones, in_step, own_share
from train.evaluator.matching import Matcher, Ranking, ranked, reranked
from train.evaluator.picture import spread, text_beside_images
from train.evaluator.pool import Pool, Pools
from train.evaluator.predictions import Predictions, Row

DIRECTIONS = ("image_to_text", "text_to_image")
SHOWN = 10  # candidates of each row that are kept among the predictions


class RetrievalEvaluator:
    """R@k from image to text and from text to image, by ITC and re-ranked by ITM.

    Args:
        source, transform, codec: where the samples come from.
        num_samples: of each language, the first ones; None for all.
        languages: None for all of the source's.
        captions_per_image: None for all of them.
        same_text_is_right: a caption that reads like one of an image's own is right for it, whoever wrote it; LAVIS
            says no.
        directions: one or both of image_to_text, text_to_image.
        recall: the k of R@k.
        rerank: candidates that ITM scores for each image and each text; 0 leaves ITM out.
        batch_size: images or texts in one forward pass.
        keep_gib: memory of the host in which a rank keeps what the encoder made of its images until they are matched;
            the images that are left over go through the encoder twice.
        examples: images in the picture.
        note: printed under every result, for numbers that could be taken for more than they are.
    """

    def __init__(
        self,
        source: Source,
        transform: PairTransform,
        codec: TextCodec,
        *,
        name: str = "retrieval",
        num_samples: int | None = None,
        languages: Sequence[str] | None = None,
        captions_per_image: int | None = 1,
        same_text_is_right: bool = True,
        directions: Sequence[str] = DIRECTIONS,
        max_text_tokens: int = 35,
        recall: Sequence[int] = (1, 5, 10),
        rerank: int = 128,
        batch_size: int = 64,
        keep_gib: float = 8.0,
        examples: int = 6,
        note: str | None = None,
    ) -> None:
        if rerank < 0 or batch_size < 1 or min(recall) < 1 or not set(directions) <= set(DIRECTIONS) or not directions:
            raise ValueError(
                f"evaluator {name!r}: rerank {rerank} must be 0 or more, batch_size {batch_size} and recall "
                f"{list(recall)} 1 or more, directions {list(directions)} some of {list(DIRECTIONS)}"
            )
        self.recall, self.rerank, self.directions = tuple(recall), rerank, tuple(directions)
        self.same_text_is_right, self.batch_size, self.examples = same_text_is_right, batch_size, examples
        self.name, self.source, self.note = name, source, note
        self.keep_bytes = int(keep_gib * 2**30)
        self.pools = Pools(source, transform, codec, languages, num_samples=num_samples,
                           captions_per_image=captions_per_image, max_text_tokens=max_text_tokens)  # fmt: skip

    def __call__(
        self, model: ImageTextModel, *, device: torch.device, ranks: Ranks, predictions: Predictions | None = None
    ) -> Evaluation:
        predictions = predictions or Predictions(ranks)
        metrics: dict[str, float] = {}
        pictures, lines = {}, []
        for language in self.pools.languages:
            pool = self.pools.of(language, ranks)
            rows = self._rows(model, pool, device, ranks, predictions)
            found = self._metrics(pool, rows)
            metrics |= {f"{language}/{key}": value for key, value in found.items()}
            lines += self._lines(language, pool, found)
            picture = self._picture(pool, rows, ranks)
            if picture is not None:
                pictures[language] = picture
        return Evaluation(metrics, pictures, (*lines, f"    ({self.note})") if self.note else tuple(lines))

    # -------------------------------------------------------------------------------------------------- predictions

    def _rows(
        self, model: ImageTextModel, pool: Pool, device: torch.device, ranks: Ranks, predictions: Predictions
    ) -> dict[str, list[Row]]:
        """direction -> its rows that have a right candidate, from the file where they stand there already"""
        right = self.right(pool)
        parts = {direction: f"{pool.language}/{direction}" for direction in self.directions}
        done = all(
            len(predictions.known(self.name, part)) == sum(map(bool, right[direction]))
            for direction, part in parts.items()
        )
        if not done:
            with evaluating(model):
                rankings = self.rankings(model, pool, right, device, ranks, predictions)
            names = [sample.key or str(index) for index, sample in enumerate(pool.samples)]
            for direction, own in rankings.items():
                made = [_row(pool, names, direction, found, right[direction][found.index]) for found in own]
                predictions.add(self.name, parts[direction], made)
        return {
            direction: [row for _, row in sorted(predictions.known(self.name, part).items())]
            for direction, part in parts.items()
        }

    def right(self, pool: Pool) -> dict[str, list[set[int]]]:
        """direction -> of each row the candidates that are right"""
        of_text: list[set[int]] = [set() for _ in range(pool.num_texts)]
        for image, text in pool.pair_P2.tolist():
            of_text[text].add(image)
        if self.same_text_is_right:
            alike: dict[str, set[int]] = {}
            for caption, images in zip(pool.captions, of_text, strict=True):
                alike.setdefault(caption, set()).update(images)
            of_text = [alike[caption] for caption in pool.captions]
        of_image: list[set[int]] = [set() for _ in range(pool.num_images)]
        for text, images in enumerate(of_text):
            for image in images:
                of_image[image].add(text)
        return {"image_to_text": of_image, "text_to_image": of_text}

    def rankings(
        self,
        model: ImageTextModel,
        pool: Pool,
        right: Mapping[str, list[set[int]]],
        device: torch.device,
        ranks: Ranks,
        predictions: Predictions,
    ) -> dict[str, list[Ranking]]:
        """direction -> this rank's rows"""
        matcher = Matcher(pool, self.batch_size, self.keep_bytes, device, ranks)
        query_IQE = everyones(
            pool.own_K.to(device), matcher.encode(model, predictions, self.name), pool.num_images, ranks
        )
        text_TE = self._encode_texts(model, pool, device, ranks)
        found: dict[str, list[Ranking]] = {}
        for direction in self.directions:
            own = [row for row in own_share(len(right[direction]), ranks) if right[direction][row]]
            number = max(self.rerank, SHOWN, *self.recall)
            found[direction] = [
                row
                for rows, cosine_RC in self._blocks(direction, own, query_IQE, text_TE)
                for row in ranked(rows, cosine_RC, right[direction], number)
            ]
        if self.rerank:
            logits = matcher.match(model, found, self.rerank, predictions, self.name)
            for direction, rows in found.items():
                found[direction] = [
                    reranked(row, right[direction][row.index], logits(direction, row), self.rerank) for row in rows
                ]
        return found

    def _encode_texts(self, model: ImageTextModel, pool: Pool, device: torch.device, ranks: Ranks) -> Tensor:
        own, found = own_share(pool.num_texts, ranks), []
        for rows, meant in in_step(own, self.batch_size, ranks):
            text_ids_RL, text_mask_RL = pool.text_ids_TL[rows].to(device), pool.text_mask_TL[rows].to(device)
            found.append(model.encode_text(text_ids_RL, text_mask_RL)[:meant])
        return everyones(torch.tensor(own, device=device, dtype=torch.int64), torch.cat(found), pool.num_texts, ranks)

    def _blocks(
        self, direction: str, own: Sequence[int], query_IQE: Tensor, text_TE: Tensor
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """-> rows and their cosine_RC with every candidate"""
        for first in range(0, len(own), self.batch_size):
            rows = own[first : first + self.batch_size]
            row_R = torch.tensor(rows, device=text_TE.device)
            if direction == "image_to_text":
                yield rows, _best_cosine(query_IQE[row_R], text_TE, self.batch_size)
            else:
                yield rows, _best_cosine(query_IQE, text_TE[row_R], self.batch_size).T

    # ------------------------------------------------------------------------------------------------------ metrics

    def _metrics(self, pool: Pool, rows: Mapping[str, list[Row]]) -> dict[str, float]:
        """R@k of each direction and their mean, and the mean of those means."""
        found = {"num_images": float(pool.num_images), "num_texts": float(pool.num_texts)}
        for how in ("itc", "itm") if self.rerank else ("itc",):
            means = []
            for direction in self.directions:
                ranks = [row["rank"][how] for row in rows[direction]]
                recalls = {f"r@{k}": sum(rank <= k for rank in ranks) / len(ranks) for k in self.recall}
                means.append(sum(recalls.values()) / len(recalls))
                found |= {f"{how}/{direction}/{key}": value for key, value in recalls.items()}
                found[f"{how}/{direction}/mean"] = means[-1]
            found[f"{how}/mean"] = sum(means) / len(means)
        return found

    def _lines(self, language: str, pool: Pool, found: Mapping[str, float]) -> list[str]:
        cut = f", {pool.num_truncated} captions truncated" if pool.num_truncated else ""
        cut += f", {pool.num_left_out} samples could not be read" if pool.num_left_out else ""
        lines = [f"{self.name} {language}: pool of {pool.num_images} images and {pool.num_texts} texts{cut}"]
        for how in ("itc", "itm"):
            for direction in self.directions:
                keys = {f"R@{k}": f"{how}/{direction}/r@{k}" for k in self.recall}
                keys["mean"] = f"{how}/{direction}/mean"
                values = [f"{short} {found[key]:.1%}" for short, key in keys.items() if key in found]
                if values:
                    lines.append(f"  {how.upper()} {direction.replace('_', ' ')}: " + "  ".join(values))
        return lines

    def _picture(self, pool: Pool, rows: Mapping[str, list[Row]], ranks: Ranks) -> Image.Image | None:
        """Example images with the first captions found for each, right ones in green."""
        if not self.examples or "image_to_text" not in rows:
            return None
        shown = [rows["image_to_text"][place] for place in spread(len(rows["image_to_text"]), self.examples)]
        pictures = pool.pictures([row["index"] for row in shown], ranks)
        if not ranks.is_first:
            return None
        right = self.right(pool)["image_to_text"]
        beside = []
        for row in shown:
            lines = [
                (f"{place}  {pool.captions[text]}", text in right[row["index"]])
                for place, text in enumerate(row["best_index"][:3], start=1)
            ]
            beside.append((pictures[row["index"]], lines))
        return text_beside_images(beside, columns=1)


def _row(pool: Pool, names: Sequence[str], direction: str, found: Ranking, right: set[int]) -> dict[str, Any]:
    """A ranking for the file: `names` of samples for images, captions for texts.

    It tells which of the best are right, as only the pool knows: equal pictures of several samples are one there.
    """
    forward = direction == "image_to_text"
    return {
        "index": found.index,
        "query": names[found.index] if forward else pool.captions[found.index],
        "rank": found.rank,
        "best": [pool.captions[c] if forward else names[c] for c in found.best[:SHOWN]],
        "best_index": found.best[:SHOWN],
        "best_right": [c in right for c in found.best[:SHOWN]],
    }


def _best_cosine(query_IQE: Tensor, text_TE: Tensor, batch_size: int) -> Tensor:
    """cosine_IT of the best query, in blocks: what all queries of all images score is the largest tensor here."""
    with torch.autocast(query_IQE.device.type, enabled=False):
        text_TE = text_TE.float()
        parts = [
            torch.einsum("iqe,te->itq", block.float(), text_TE).amax(dim=2) for block in query_IQE.split(batch_size)
        ]
    return torch.cat(parts)
