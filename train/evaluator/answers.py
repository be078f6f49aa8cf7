"""Questions about pictures, answered: the share that is right, for each language, and how near the others come.

Before and after a fine-tuning, on a set that stays the same, it shows what was learned; on questions of another kind,
what was forgotten.  Reports and captions are answers too: to "Describe the picture."

exact_match        the answer is one of the right ones, character by character (white space around it aside)
normalised_match   ... but for case, punctuation, white space, and full-width or half-width letters
vqa_accuracy       the VQA challenge's, where several people answered each question (`vqa_accuracy.py`)
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.batch import Dialogue, DialogueBatch, DialogueCodec, Turn
from data.source import BadSample, DialogueSource
from data.transform import PictureTransform
from model.generation import Decoding
from model.visual_chat import VisualChatModel
from train.distributed import Ranks
from train.evaluator import Evaluation, evaluating, in_step, own_share
from train.evaluator.predictions import Predictions, Row
from train.evaluator.text_metrics import majority_share, text_scores, told
from train.evaluator.vqa_accuracy import NEEDED, vqa_accuracy


@dataclass(frozen=True)
class Question:
    """The last question of a dialogue, what came before it, and every answer that is right."""

    dialogue: Dialogue  # its last answer empty
    right: tuple[str, ...]
    annotated: tuple[str, ...]  # what each annotator said to this very question, equals included
    index: int  # in the source

    @property
    def asked(self) -> str:
        return self.dialogue.turns[-1].question


class AnswerEvaluator:
    """Answers beside the right ones.

    Args:
        source: dialogues that training never saw; the last answer is asked for.
        num_samples: of each language, evenly from all of them; None: all.
        languages: None: all of the source's.
        closed: answers of closed questions, such as yes and no: questions that most annotators answer so are counted
            apart, beside what always giving the most frequent answer would get; all others are open, and get BLEU,
            ROUGE-L and CIDEr.  None: no such measures.
        vqa: VQA accuracy too, from all annotators of a question.
        max_new_tokens: an answer longer than that is cut, and so hardly right.
        decoding: how answers are generated; None: the most likely token each time, `max_new_tokens` at most.
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
        vqa: bool = False,
        max_new_tokens: int = 64,
        decoding: Decoding | None = None,
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
        self.decoding, self.max_tokens = decoding or Decoding(max_new_tokens=max_new_tokens), max_tokens
        self.batch_size, self.examples, self.note, self.vqa = batch_size, examples, note, vqa
        self.closed = None if closed is None else {plain(answer) for answer in closed}
        chosen = source.languages if languages is None else tuple(languages)
        self.unreadable: Counter[str] = Counter()  # by language, texts that could not even be read
        self.questions = {language: self._questions(language, num_samples) for language in chosen}

    def __call__(
        self, model: VisualChatModel, *, device: torch.device, ranks: Ranks, predictions: Predictions | None = None
    ) -> Evaluation:
        predictions = predictions or Predictions(ranks)
        metrics: dict[str, float] = {}
        lines: list[str] = []
        for language, questions in self.questions.items():
            with evaluating(model):
                rows = self.answers(model, language, device, ranks, predictions)
            asked = [question for question in questions if "answer" in rows[question.index]]
            if not asked:
                raise ValueError(
                    f"evaluator {self.name!r}: none of {len(questions)} questions in {language} can be read"
                )
            answers = [str(rows[question.index]["answer"]) for question in asked]
            found = self._measures(answers, asked, language)
            metrics |= {f"{language}/{key}": value for key, value in found.items()}
            left_out = len(questions) - len(asked) + self.unreadable[language]
            lines += self._lines(language, found, left_out)
            for question, answer in list(zip(asked, answers, strict=True))[: self.examples]:
                words, said = " ".join(question.asked.split()), " ".join(answer.split())
                lines.append(f"    {words[:60]} -> {said[:80]!r}   right: {question.right[0][:80]!r}")
            few = sum(len(question.annotated) <= NEEDED for question in asked)
            if self.vqa and few:
                lines.append(
                    f"    ({few} questions have {NEEDED} annotators or fewer: by the challenge's formula no answer to "
                    f"them is right in full)"
                )
        return Evaluation(metrics, {}, (*lines, f"    ({self.note})") if self.note else tuple(lines))

    # -------------------------------------------------------------------------------------------------- predictions

    def answers(
        self, model: VisualChatModel, language: str, device: torch.device, ranks: Ranks, predictions: Predictions
    ) -> dict[int, Row]:
        """Index in the source -> prediction, the same on every rank; those made before are not made again."""
        questions = self.questions[language]
        known = predictions.known(self.name, language)
        left = [question for question in questions if question.index not in known]
        with predictions.progress(f"{self.name} {language}", len(questions), len(known)) as progress:
            for places, meant in in_step(own_share(len(left), ranks), self.batch_size, ranks):
                batch = [left[place] for place in places] if left else questions[:1]
                made = self._predict(model, batch, device, predictions.lockstep)[:meant]
                progress.advance(predictions.add(self.name, language, made))
        return predictions.known(self.name, language)

    def _predict(
        self, model: VisualChatModel, questions: Sequence[Question], device: torch.device, lockstep: bool
    ) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        readable: list[tuple[Question, list[Tensor]]] = []
        for question in questions:
            language = question.dialogue.language
            row = {
                "index": question.index,
                "where": self.source.where(language, question.index),
                "question": question.asked,
                "right": list(question.right),
            }
            rows.append(row)
            try:
                readable.append((question, self._pictures(question)))
            except BadSample as bad:
                row["left_out"] = str(bad)
        said = iter(self._generate(model, readable, device, lockstep))
        return [row if "left_out" in row else {**row, "answer": next(said)} for row in rows]

    def _generate(
        self,
        model: VisualChatModel,
        asked: Sequence[tuple[Question, list[Tensor]]],
        device: torch.device,
        lockstep: bool,
    ) -> list[str]:
        """One answer for each; without a question something is asked all the same, for the ranks beside this one."""
        languages = tuple(self.questions)
        dialogues = [question.dialogue for question, _ in asked] or [Dialogue((Turn("?"),), languages[0])]
        batch = DialogueBatch.collate(
            [self.codec.encode(dialogue, max_tokens=self.max_tokens) for dialogue in dialogues],
            [pictures for _, pictures in asked] or [[]],
            pad_id=self.codec.pad_id,
            image_size=self.transform.image_size,
            language_of=[dialogue.language for dialogue in dialogues],
            languages=languages,
        ).to(device)
        # what is drawn belongs to the question, whoever answers it
        decoding = [replace(self.decoding, seed=question.index) for question, _ in asked] or self.decoding
        ids_QN = model.generate(batch, decoding, never_early=lockstep)
        return [self.codec.decode(ids) for ids in ids_QN.tolist()][: len(asked)]

    def _pictures(self, question: Question) -> list[Tensor]:
        """Raises BadSample."""
        rng = np.random.default_rng(0)  # evaluation draws nothing; a training transform here is at least repeatable
        sample = self.source.read(question.dialogue.language, question.index)
        return [self.transform.picture(image, rng) for image in sample.images]

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
            try:
                candidates = self.source.dialogues(language, index)
            except BadSample:
                self.unreadable[language] += 1
                continue
            first = candidates[0]
            right = tuple(dict.fromkeys(candidate.turns[-1].answer for candidate in candidates))
            question = first.turns[-1].question
            annotated = tuple(d.turns[-1].answer for d in candidates if d.turns[-1].question == question)
            asked = replace(first, turns=(*first.turns[:-1], replace(first.turns[-1], answer="")))
            found.append(Question(asked, right, annotated, index))
        if not found:
            raise ValueError(f"evaluator {self.name!r}: none of {wanted} samples of {language!r} could be read")
        return found

    # ------------------------------------------------------------------------------------------------------ metrics

    def _measures(self, answers: Sequence[str], asked: Sequence[Question], language: str) -> dict[str, float]:
        found = matches(answers, asked, vqa=self.vqa)
        found["num_questions"] = float(len(asked))
        if self.closed is None:
            return found
        parts: dict[str, list[int]] = {"closed": [], "open": []}
        for place, question in enumerate(asked):
            parts["closed" if plain(most_frequent(question.annotated)) in self.closed else "open"].append(place)
        for part, places in parts.items():
            found[f"{part}/num_questions"] = float(len(places))
            if not places:
                continue
            said, questions = [answers[place] for place in places], [asked[place] for place in places]
            measured = matches(said, questions, vqa=self.vqa)
            if part == "closed":
                measured["majority"] = majority_share([plain(most_frequent(it.annotated)) for it in questions])
            else:
                measured |= text_scores(said, [question.right for question in questions], language)
            found |= {f"{part}/{key}": value for key, value in measured.items()}
        return found

    def _lines(self, language: str, found: Mapping[str, float], left_out: int) -> list[str]:
        head = f"{self.name} {language}: {int(found['num_questions'])} questions, {_shares(found)}"
        lines = [head + (f"; {left_out} could not be read" if left_out else "")]
        for part in ("closed", "open"):
            own = {key.removeprefix(f"{part}/"): found[key] for key in found if key.startswith(f"{part}/")}
            if own.get("num_questions"):
                lines.append(f"  {part}: {int(own['num_questions'])}, {_shares(own)}")
                lines += [f"    {line}" for line in told({key: own[key] for key in own if "/" in key})]
        return lines


def matches(answers: Sequence[str], asked: Sequence[Question], *, vqa: bool) -> dict[str, float]:
    """Shares of the answers that are right, by every way of comparing."""
    pairs = list(zip(answers, asked, strict=True))
    found = {
        "exact_match": sum(answer.strip() in {text.strip() for text in q.right} for answer, q in pairs) / len(pairs),
        "normalised_match": sum(is_right(answer, question.right) for answer, question in pairs) / len(pairs),
    }
    if vqa:
        found["vqa_accuracy"] = sum(vqa_accuracy(answer, question.annotated) for answer, question in pairs) / len(pairs)
    return found


def is_right(answer: str, right: Sequence[str]) -> bool:
    return plain(answer) in {plain(text) for text in right}


def plain(text: str) -> str:
    """What two spellings of one answer share: no case, white space or punctuation, full-width letters made half-width.

    What makes another answer of it stays: marks inside or before a number (3.5, 1/2, 10:30, -5), signs (+, <, %, C++),
    marks on letters.  Where nothing is left, the text itself.
    """
    narrow = unicodedata.normalize("NFKC", text).casefold().translate(_MINUS)
    narrow = _THOUSANDS.sub("", narrow)
    return "".join(narrow[i] for i in range(len(narrow)) if _counts(narrow, i)) or narrow.strip()


_MINUS = str.maketrans("\u2212\u2013", "--")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def _counts(text: str, i: int) -> bool:
    """Whether character `i` makes an answer what it is."""
    before, after = text[max(0, i - 1) : i], text[i + 1 : i + 2]
    if text[i] == "-":  # a minus, or a range; a hyphen after a letter is punctuation
        return after.isdigit() and not before.isalpha()
    if text[i] in ".,:/":
        return before.isdigit() and after.isdigit()
    kind = unicodedata.category(text[i])
    return kind[0] in "LNM" or text[i] in "%#&*@" or (kind in ("Sm", "Sc", "So") and text[i] not in "~|")


def most_frequent(answers: Sequence[str]) -> str:
    """The first of them where several are."""
    return Counter(answers).most_common(1)[0][0]


def _shares(found: Mapping[str, float]) -> str:
    told_as = {
        "exact_match": "exact",
        "normalised_match": "normalised",
        "vqa_accuracy": "VQA accuracy",
        "majority": "always the most frequent answer",
    }
    return ", ".join(f"{words} {found[key]:.1%}" for key, words in told_as.items() if key in found)
