"""Dialogues about pictures as image-text pairs for stage one, where a field has questions and reports but no captions.

The turning round of `dialogue_shards.py`.  Splits, checks and licences stay those of the dialogues, so a patient who is
held out there is held out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data.source import BadSample, DialogueSource, RawSample


class DialogueCaptions:
    """
    Args:
        dialogues: with one picture each; another number is a bad sample.
        question: a caption is "question answer", for answers that say nothing alone ("no"); False: the answer.
        name: how logs and errors call it.
    """

    def __init__(self, dialogues: DialogueSource, *, question: bool = True, name: str = "dialogue_captions"):
        self.dialogues, self.question, self.name = dialogues, question, name
        self.languages = dialogues.languages

    def num_samples(self, language: str) -> int:
        return self.dialogues.num_samples(language)

    def read(self, language: str, index: int) -> RawSample:
        """Every turn of every candidate is a caption.  Raises BadSample."""
        sample = self.dialogues.read(language, index)
        if len(sample.images) != 1:
            detail = f"{len(sample.images)} pictures; a caption belongs to one"
            raise BadSample("not one picture", shard=sample.shard, key=sample.key, detail=detail)
        turns = [turn for dialogue in sample.dialogues for turn in dialogue.turns]
        captions = [f"{turn.question} {turn.answer}".strip() if self.question else turn.answer for turn in turns]
        return RawSample(sample.images[0], tuple(dict.fromkeys(captions)), sample.key, sample.shard)

    def fingerprint(self) -> Mapping[str, Any]:
        return {**self.dialogues.fingerprint(), "question": self.question}
