"""Image-text shards as dialogues for stage two's alignment: a question from a list, answered by the caption.

Their texts lie in the tars, so they are not scanned at the start; a caption that teaches nothing is a bad sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.batch import Dialogue, Turn
from data.caption import clean_plain
from data.source import RawDialogue, RawSample, Source


class DialogueShards:
    """
    Args:
        shards: a source of image-text pairs, such as `data.source.shards.ShardSource`.
        prompts: language -> questions.  Candidates pair them with the sample's captions in turn, as many as the longer
            list; one is drawn by (seed, step, row).
        name: how logs and errors call it.
    Raises:
        ValueError: a language of the shards without a prompt.
    """

    scans = False

    def __init__(self, shards: Source, prompts: Mapping[str, Sequence[str]], *, name: str = "dialogue_shards"):
        self.shards, self.name = shards, name
        self.prompts = {language: tuple(questions) for language, questions in prompts.items()}
        self.languages = shards.languages
        missing = [language for language in self.languages if not self.prompts.get(language)]
        if missing:
            raise ValueError(f"{name}: the shards have captions in {missing}, prompts has {sorted(self.prompts)}")

    def num_samples(self, language: str) -> int:
        return self.shards.num_samples(language)

    def dialogues(self, language: str, index: int) -> tuple[Dialogue, ...]:
        return self._dialogues(language, self.shards.read(language, index))

    def where(self, language: str, index: int) -> str:
        return f"{self.shards.name}, {language} sample {index}"

    def read(self, language: str, index: int) -> RawDialogue:
        sample = self.shards.read(language, index)
        return RawDialogue(self._dialogues(language, sample), (sample.image,), sample.key, sample.shard)

    def fingerprint(self) -> Mapping[str, Any]:
        prompts = {language: list(questions) for language, questions in sorted(self.prompts.items())}
        return {**self.shards.fingerprint(), "prompts": prompts}

    def _dialogues(self, language: str, sample: RawSample) -> tuple[Dialogue, ...]:
        questions, captions = self.prompts[language], sample.captions
        return tuple(
            Dialogue((Turn(questions[n % len(questions)], clean_plain(captions[n % len(captions)]), 1),), language)
            for n in range(max(len(questions), len(captions)))
        )
