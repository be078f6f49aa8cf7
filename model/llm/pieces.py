"""ChatGLM's sentencepiece models (`ice_text.model`, `tokenizer.model`), read without code from their folders.

The Hugging Face tokenizers of these families are remote code, and that of ChatGLM-6B breaks with transformers 4.34 and
later.  What they do around sentencepiece is little: line breaks and white space become pieces of their own.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

_MAX_BLANKS = 80  # `<|blank_2|>` to `<|blank_80|>` (SPTokenizer.max_blank_length)


class Pieces:
    """Text <-> ids of one sentencepiece model.

    Args:
        offset: what is added to sentencepiece's ids (`num_image_tokens` of the oldest ChatGLM-6B: 20000; now 0).
        line_break: the piece that stands for "\\n", and `<|tab|>`, `<|blank_n|>` for white space; None where the model
            takes text as it is.
        special: names that only the codec may write; in somebody's text they are spelt out instead.
    """

    def __init__(self, path: Path, *, special: Iterable[str], offset: int = 0, line_break: str | None = "<n>") -> None:
        from sentencepiece import SentencePieceProcessor

        if not path.is_file():
            raise ValueError(
                f"there is no sentencepiece model at {path}, which model.llm.tokenizer names: ice_text.model of "
                f"ChatGLM-6B and VisualGLM-6B, tokenizer.model of ChatGLM2 and ChatGLM3; scripts/fetch_weights.py "
                f"fetches them with the weights"
            )
        try:
            self._model: Any = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is no sentencepiece model, or is damaged ({error})") from error
        self.path, self.offset, self.line_break = path, offset, line_break
        self.vocab_size = int(self._model.vocab_size()) + offset
        # a break after the first character keeps a name in the text from becoming the token
        breaks = [f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in sorted(special)]
        self._special = re.compile("|".join(breaks) or "(?!)")  # an empty pattern would break everywhere

    def id_of(self, piece: str) -> int | None:
        """None where the model has no such piece."""
        found = int(self._model.piece_to_id(piece))
        return None if found == self._model.unk_id() and piece != "<unk>" else found + self.offset

    def encode(self, text: str) -> list[int]:
        if self.line_break is not None:
            text = text.replace("\n", self.line_break).replace("\t", "<|tab|>")
            text = re.sub(f" {{2,{_MAX_BLANKS}}}", lambda blanks: f"<|blank_{len(blanks[0])}|>", text)
        return [i + self.offset for part in self._special.split(text) for i in self._model.encode(part)]

    def decode(self, ids: Sequence[int]) -> str:
        """Ids that this model does not have are left out."""
        known = [i - self.offset for i in ids if self.offset <= i < self.vocab_size]
        text: str = self._model.decode(known)
        if self.line_break is not None:
            text = text.replace(self.line_break, "\n").replace("<|tab|>", "\t")
            text = re.sub(r"<\|blank_(\d+)\|>", lambda blanks: " " * int(blanks[1]), text)
        return text


def train_pieces(
    texts: Iterable[str],
    path: Path,
    *,
    vocab_size: int,
    special: Iterable[str],
    model_type: Literal["unigram", "bpe"] = "unigram",
) -> Path:
    """A small `ice_text.model` from texts, for models that are trained from nothing.

    <unk> is 0 and <pad> 3, as in ChatGLM-6B; `special` and the pieces for white space follow.  Fewer pieces than
    `vocab_size` are made where the texts do not give so many.  The same texts make the same file.  Where they are few
    and alike, "unigram" keeps whole Chinese sentences as pieces and cuts English words; "bpe" has words in both.
    """
    from sentencepiece import SentencePieceTrainer

    white = ["<n>", "<|tab|>", *(f"<|blank_{length}|>" for length in range(2, 9))]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(text.replace("\n", "<n>") for text in texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type=model_type,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",  # full-width marks stay what they are
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        user_defined_symbols=[*white, *(name for name in special if name not in ("<unk>", "<pad>"))],
        num_threads=1,
        minloglevel=2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path
