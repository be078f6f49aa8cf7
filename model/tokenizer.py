"""Captions -> token ids, from any fast tokenizer folder, with the token that starts a generated caption.

`data/` sees this through the `TextCodec` protocol.  Only the `tokenizers` library is needed where the folder has a
`tokenizer.json`; an older folder (`vocab.txt`, `sentencepiece.bpe.model`) is converted by transformers on the way in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

# CLS, SEP, PAD, UNK as the two families of encoders call them, tried where the folder does not say
_USUAL = {"cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"), "pad": ("[PAD]", "<pad>"), "unk": ("[UNK]", "<unk>")}

# Scripts that are written without spaces, and the full-width punctuation that goes with them
_CJK = "\u3000-\u303f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
_SPACE_BETWEEN_CJK = re.compile(f"(?<=[{_CJK}]) +(?=[{_CJK}])")


class CaptionTokenizer:
    """A `data.batch.TextCodec` over a tokenizer folder; picklable, so that data loader workers can hold one.

    `bos` says what starts a generated caption in place of [CLS]: "shared" adds one token `[DEC]`, as LAVIS does
    (`blip2_models/blip2.py`, `init_tokenizer`); "per_language" adds one for each language (`[DEC_zh]`, `[DEC_en]`), so
    that a caption can be asked for in a language.  A token that the folder has already keeps its id.

    Raises:
        ValueError: no tokenizer in `folder`, or one without classification, separation, padding or unknown token.
    """

    def __init__(self, folder: str, *, bos: str = "shared", languages: Sequence[str] = ("zh", "en")):
        if bos not in ("shared", "per_language"):
            raise ValueError(f"model.tokenizer.bos is {bos!r}; it can be shared or per_language")
        path = Path(folder).expanduser()
        self.folder = str(path)
        self._tokenizer = _read(path)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        ids = _special_ids(self._tokenizer, path)
        self.cls_id, self.eos_id, self.pad_id, self.unk_id = ids["cls"], ids["sep"], ids["pad"], ids["unk"]
        names = {language: "[DEC]" if bos == "shared" else f"[DEC_{language}]" for language in languages}
        self._shared_bos = bos == "shared"
        added = list(dict.fromkeys(["[DEC]"] if self._shared_bos else names.values()))
        self._tokenizer.add_special_tokens([AddedToken(name, special=True) for name in added])
        self._bos_ids = {language: self._id(name) for language, name in names.items()}
        self._dec_id = self._id(added[0]) if added else None
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._protect_special_tokens()

    def encode(self, text: str) -> list[int]:
        """[CLS] w1 .. wn [SEP], never truncated.  `[SEP]` written in a caption is text, not a token."""
        return [self.cls_id, *self._tokenizer.encode(text, add_special_tokens=False).ids, self.eos_id]

    def bos_id(self, language: str) -> int:
        """The id at position 0 when a caption in `language` is generated."""
        if self._shared_bos and self._dec_id is not None:
            return self._dec_id
        if language not in self._bos_ids:
            raise ValueError(
                f"no token starts captions in {language!r}: the tokenizer was made for {', '.join(self._bos_ids)} "
                f"(model.tokenizer.languages)"
            )
        return self._bos_ids[language]

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens.  WordPiece puts a space at every Chinese character; those between two are taken
        out, others stay, so compare `decode(encode(text))` with a decoded caption, not `text` itself."""
        text = self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)
        return _SPACE_BETWEEN_CJK.sub("", text)

    def __len__(self) -> int:
        return self.vocab_size

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": self._tokenizer.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer = Tokenizer.from_str(state["_tokenizer"])
        self._protect_special_tokens()  # a switch that the library does not store

    def _protect_special_tokens(self) -> None:
        self._tokenizer.encode_special_tokens = True

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        assert found is not None, token
        return found


def own_wordpiece(
    *, texts: Iterable[str] | None, folder: str | Path, vocab_size: int, bos: str = "shared"
) -> CaptionTokenizer:
    """The tokenizer in `folder`; where there is none yet, one is trained on `texts` (`train_wordpiece`).

    Raises:
        ValueError: there is none, and no texts are given.
    """
    if texts is not None and not (Path(folder) / "tokenizer.json").exists():
        train_wordpiece(texts, vocab_size, folder)
    return CaptionTokenizer(str(folder), bos=bos)


def train_wordpiece(texts: Iterable[str], vocab_size: int, folder: str | Path, *, lowercase: bool = True) -> Path:
    """Train a small WordPiece tokenizer (Chinese by character, as BERT's) and save a folder that this module and
    transformers' `AutoTokenizer` read.  The same texts give the same file.

    Args:
        texts: captions; held in memory.
        vocab_size: upper limit, the five special tokens included (single characters are always all kept).
    Returns:
        The folder.
    """
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    texts = list(texts)
    if not texts:
        raise ValueError("train_wordpiece: there is no text to train on")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer = normalizers.BertNormalizer(handle_chinese_chars=True, lowercase=lowercase)
    splitter = pre_tokenizers.BertPreTokenizer()
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}

    def dressed(model: models.WordPiece) -> Tokenizer:
        tokenizer = Tokenizer(model)
        tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoders.WordPiece()
        return tokenizer

    # The library numbers the inside characters ("##a") in the order of a hash table, which changes from run to run and
    # decides ties between merges.  As special tokens they have a fixed order; the saved tokenizer takes them as words.
    inside = sorted({f"##{character}" for word in words for character in word[1:]})
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special + inside, show_progress=False)
    trained = dressed(models.WordPiece(unk_token="[UNK]"))
    trained.train_from_iterator(texts, trainer)

    tokenizer = dressed(models.WordPiece(trained.get_vocab(), unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.add_special_tokens(special)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=1), "utf-8")
    return path


def _read(path: Path) -> Tokenizer:
    if (path / "tokenizer.json").is_file():
        return Tokenizer.from_file(str(path / "tokenizer.json"))
    vocabularies = ("vocab.txt", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model", "vocab.json")
    if not any((path / name).is_file() for name in vocabularies):
        raise ValueError(
            f"{path} holds no tokenizer (tokenizer.json, or one of {', '.join(vocabularies)}). "
            f"`python scripts/fetch_weights.py --help` gets one, scripts/demo.sh trains its own"
        )
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False, use_fast=True)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{path} has no fast tokenizer ({type(loaded).__name__}); only those are supported")
    return Tokenizer.from_str(backend.to_str())


def _special_ids(tokenizer: Tokenizer, path: Path) -> dict[str, int]:
    """Ids of the four tokens, by the names that the folder gives them, else by the usual names."""
    told: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / file).is_file():
            told.update(json.loads((path / file).read_text("utf-8")))
    ids: dict[str, int] = {}
    for role, usual in _USUAL.items():
        name = told.get(f"{role}_token")
        name = name.get("content") if isinstance(name, dict) else name
        tried = [n for n in (name, *usual) if n]
        found = next((i for i in map(tokenizer.token_to_id, tried) if i is not None), None)
        if found is None:
            raise ValueError(
                f"{path}: the tokenizer has no {role} token (tried {', '.join(tried)}). A Q-Former needs an encoder's "
                f"tokenizer, such as BERT's or XLM-R's"
            )
        ids[role] = found
    return ids
