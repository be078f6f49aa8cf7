"""GLM-4-9B (chat): ChatGLM3's roles, a byte-level BPE tokenizer, marks of its own around pictures.

Layout: `tokenization_chatglm.py` of glm-4-9b-chat (`build_single_message`; pictures as in glm-4v-9b), labels: GLM-4's
`finetune_demo`.  `tokenizer.json` lies in glm-4-9b-chat-hf and glm-4-9b-hf; the original folder has a tiktoken file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from model.llm.glm import Glm, family, glm
from model.llm.glm_codec import RoleCodec

SPECIAL = {
    "gmask": "[gMASK]",
    "sop": "<sop>",
    "eos": "<|endoftext|>",
    "system": "<|system|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
    "observation": "<|observation|>",
}
IMAGE_MARKS = ("<|begin_of_image|>", "<|end_of_image|>")


class FastPieces:
    """A `tokenizer.json` as `model.llm.glm_codec.TextPieces`: text is text, whatever special token it spells."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(
                f"there is no tokenizer at {path}: take the tokenizer.json of glm-4-9b-chat-hf or glm-4-9b-hf"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is no tokenizer.json, or is damaged ({error})") from error
        self.path = path
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def id_of(self, piece: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(piece)
        return found

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": self._tokenizer.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _tokenizer=Tokenizer.from_str(state["_tokenizer"]))
        self._tokenizer.encode_special_tokens = True  # a switch that the library does not store


class GLM4Codec(RoleCodec):
    """See `RoleCodec`; the last answer ends in <|user|>, as if the next question came.

    Args:
        path: `tokenizer.json`, or the folder that holds it.
        num_image_tokens: positions of one picture.
    Raises:
        ValueError: no such file, or one without GLM-4's special tokens.
    """

    def __init__(self, path: str | Path, *, num_image_tokens: int) -> None:
        file = Path(path).expanduser()
        pieces = FastPieces(file / "tokenizer.json" if file.is_dir() else file)
        special: dict[str, int] = {}
        for role, name in SPECIAL.items():
            found = pieces.id_of(name)
            if found is None:
                raise ValueError(f"{pieces.path} has no token {name}: it is not the tokenizer of GLM-4")
            special[role] = found
        before, after = (pieces.id_of(name) for name in IMAGE_MARKS)
        self.end_id = special["user"]
        super().__init__(
            pieces,
            special,
            pad_id=special["eos"],
            stop_ids=(special["eos"], special["user"], special["observation"]),
            num_image_tokens=num_image_tokens,
            image_marks=None if before is None or after is None else ([before], [after]),
        )


@family(num_layers=40, vocab_size=151552, norm_eps=1.5625e-7)
def glm4(*, rope_ratio: float = 1.0, **rest: Any) -> Glm:
    """GLM-4-9B, or a smaller one of its kind (`configs/model/llm/`); see `model.llm.glm.glm`.

    Args:
        rope_ratio: as in config.json: 1 in glm-4-9b, 500 in glm-4-9b-chat; rope_theta of the -hf folders is 10000 times
            that.
    """
    return glm(GLM4Codec, rope_base=10000.0 * rope_ratio, **rest)
