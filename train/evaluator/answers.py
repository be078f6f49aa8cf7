"""Questions about pictures, answered greedily: the share that is exactly right, for each language.

Before and after a fine-tuning, on a set that stays the same, it shows what was learned; on questions of another kind,
what was forgotten.

Shape letters   Q = questions   N = new tokens   V = vocabulary
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.batch import Dialogue, DialogueBatch, DialogueCodec
from data.source import BadSample, DialogueSource
from data.transform import PictureTransform
from model.generation import Decoding
from model.visual_chat import VisualChatModel
from train.distributed import Ranks
from train.evaluator import Evaluation, evaluating
from train.evaluator.pool import own_share
from train.evaluator.text_metrics import bleu, majority_share, rouge_l


@dataclass(frozen=True)
class Question:
    """The last question of a dialogue, what came before it, and every answer that is right."""

    dialogue: Dialogue  # its last answer empty
    right: tuple[str, ...]
    index: int  # in the source


class AnswerEvaluator:
    """Answers that equal one of the right ones, but for case, punctuation and white space.

    Args:
        source: dialogues that training never saw; the last answer is asked for.
        num_samples: of each language, evenly from all of them; None: all.
        languages: None: all of the source's.
        closed: answers of closed questions, such as yes and no: their questions are counted apart, beside what always
            giving the most frequent of them would get; all others get BLEU and ROUGE-L.  None: no such measures.
        max_new_tokens: an answer longer than that is cut, and so hardly right.
        max_tokens: of a prompt; longer ones are cut as in training.
        examples: so many answers are printed beside the right one, for each language.
        note: printed under every result, for numbers that could be taken for more than they are.
    """

    def __init__(
        self,
        source: DialogueSource,
        transform: PictureTransform,
        codec: DialogueCodec,
        *,
        name: str = "answers",
        num_samples: int | None = None,
        languages: Sequence[str] | None = None,
        closed: Sequence[str] | None = None,
        max_new_tokens: int = 64,
        max_tokens: int | None = None,
        batch_size: int = 16,
        examples: int = 3,
        note: str | None = None,
    ) -> None:
        if max_new_tokens < 1 or batch_size < 1:
            raise ValueError(
                f"evaluator {name!r}: max_new_tokens {max_new_tokens} and batch_size {batch_size} must be 1 or more"
            )
        self.name, self.source, self.transform, self.codec = name, source, transform, codec
        self.max_new_tokens, self.max_tokens = max_new_tokens, max_tokens
        self.batch_size, self.examples, self.note = batch_size, examples, note
        self.closed = None if closed is None else {plain(answer) for answer in closed}
        chosen = source.languages if languages is None else tuple(languages)
        self.questions = {language: self._questions(language, num_samples) for language in chosen}

    def __call__(self, model: VisualChatModel, *, device: torch.device, ranks: Ranks) -> Evaluation:
        metrics: dict[str, float] = {}
        lines: list[str] = []
        for language, questions in self.questions.items():
            with evaluating(model):
                answers = self.answers(model, questions, device, ranks)
            right = [is_right(answer, question.right) for answer, question in zip(answers, questions, strict=True)]
            share = sum(right) / len(right)
            metrics[f"{language}/exactly_right"] = share
            metrics[f"{language}/num_questions"] = float(len(questions))
            lines.append(f"{self.name} {language}: {share:.1%} of {len(questions)} answers exactly right")
            if self.closed is not None:
                found = closed_and_open(answers, [question.right for question in questions], self.closed)
                metrics |= {f"{language}/{name}": value for name, value in found.items()}
                told = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
                lines.append(f"{self.name} {language}: {told}")
            for question, answer in list(zip(questions, answers, strict=True))[: self.examples]:
                asked = " ".join(question.dialogue.turns[-1].question.split())
                said = " ".join(answer.split())
                lines.append(f"    {asked[:60]} -> {said[:80]!r}   right: {question.right[0][:80]!r}")
        return Evaluation(metrics, {}, (*lines, f"    ({self.note})") if self.note else tuple(lines))

    def answers(
        self, model: VisualChatModel, questions: Sequence[Question], device: torch.device, ranks: Ranks
    ) -> list[str]:
        """One for each question, the same on every rank."""
        mine_Q, _ = own_share(len(questions), ranks)
        found = [self._generate(model, [questions[i] for i in part.tolist()], device, ranks) for part in
                 mine_Q.split(self.batch_size)]  # fmt: skip
        ids_QN = ranks.gather_constant(torch.cat(found))[: len(questions)]
        return [self.codec.decode(ids) for ids in ids_QN.tolist()]

    def _generate(
        self, model: VisualChatModel, questions: Sequence[Question], device: torch.device, ranks: Ranks
    ) -> Tensor:
        """-> ids of exactly `max_new_tokens`, so that ranks can exchange them"""
        languages = tuple(self.questions)
        batch = DialogueBatch.collate(
            [self.codec.encode(question.dialogue, max_tokens=self.max_tokens) for question in questions],
            [self._pictures(question) for question in questions],
            pad_id=self.codec.pad_id,
            image_size=self.transform.image_size,
            language_of=[question.dialogue.language for question in questions],
            languages=languages,
        ).to(device)
        # ZeRO-3 wants the same calls on every rank
        decoding = Decoding(max_new_tokens=self.max_new_tokens)
        ids_QN = model.generate(batch, decoding, never_early=ranks.count > 1)
        return F.pad(ids_QN, (0, self.max_new_tokens - ids_QN.shape[1]), value=self.codec.stop_ids[0])

    def _pictures(self, question: Question) -> list[Tensor]:
        language = question.dialogue.language
        rng = np.random.default_rng(0)  # evaluation draws nothing; a training transform here is at least repeatable
        try:
            sample = self.source.read(language, question.index)
            return [self.transform.picture(image, rng) for image in sample.images]
        except BadSample as bad:
            where = self.source.where(language, question.index)
            raise ValueError(f"evaluator {self.name!r}: {where} cannot be used ({bad})") from bad

    def _questions(self, language: str, num_samples: int | None) -> list[Question]:
        available = self.source.num_samples(language)
        wanted = available if num_samples is None else num_samples
        if not 0 < wanted <= available:
            raise ValueError(
                f"evaluator {self.name!r} asks for {wanted} samples of {language!r}; source {self.source.name!r} has "
                f"{available}"
            )
        found = []
        for number in range(wanted):
            index = number * available // wanted
            first, *others = self.source.dialogues(language, index)
            right = tuple(dict.fromkeys(d.turns[-1].answer for d in (first, *others)))
            asked = replace(first, turns=(*first.turns[:-1], replace(first.turns[-1], answer="")))
            found.append(Question(asked, right, index))
        return found


def closed_and_open(
    answers: Sequence[str], references: Sequence[tuple[str, ...]], closed: set[str]
) -> dict[str, float]:
    """Accuracy on closed questions and the most frequent answer's; BLEU and ROUGE-L on the others."""
    pairs = list(zip(answers, references, strict=True))
    shut = [(answer, right) for answer, right in pairs if plain(right[0]) in closed]
    free = [(answer, right) for answer, right in pairs if plain(right[0]) not in closed]
    found: dict[str, float] = {"closed/num_questions": float(len(shut)), "open/num_questions": float(len(free))}
    if shut:
        found["closed/right"] = sum(is_right(answer, right) for answer, right in shut) / len(shut)
        found["closed/majority"] = majority_share([plain(right[0]) for _, right in shut])
    if free:
        said, expected = [answer for answer, _ in free], [right for _, right in free]
        found["open/exactly_right"] = sum(is_right(answer, right) for answer, right in free) / len(free)
        found["open/bleu_1"], found["open/bleu_4"] = bleu(said, expected, longest=1), bleu(said, expected)
        found["open/rouge_l"] = rouge_l(said, expected)
    return found


def is_right(answer: str, right: Sequence[str]) -> bool:
    return plain(answer) in {plain(text) for text in right}


def plain(text: str) -> str:
    """Letters and digits alone, full-width ones made half-width: what two spellings of one answer share."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())
