"""GLM-4-9B (chat): ChatGLM3's roles, a byte-level BPE tokenizer, marks of its own around pictures.

Layout: `tokenization_chatglm.py` of glm-4-9b-chat (`build_single_message`; pictures as in glm-4v-9b), labels: GLM-4's
`finetune_demo`.  `tokenizer.json` lies in glm-4-9b-chat-hf and glm-4-9b-hf; the original folder has a tiktoken file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from model.llm.glm import Glm, glm
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
IMAGE_TEXT = ("<img>", "</img>")  # where the tokenizer has no such tokens


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
        if before is not None and after is not None:
            marks = [before], [after]
        else:
            marks = pieces.encode(IMAGE_TEXT[0]), pieces.encode(IMAGE_TEXT[1])
        self.end_id = special["user"]
        super().__init__(
            pieces,
            special,
            pad_id=special["eos"],
            stop_ids=(special["eos"], special["user"], special["observation"]),
            num_image_tokens=num_image_tokens,
            image_marks=marks,
        )


def glm4(
    *,
    hidden_size: int = 4096,
    num_layers: int = 40,
    num_heads: int = 32,
    num_kv_heads: int = 2,
    head_size: int = 128,
    inner_size: int = 13696,
    vocab_size: int = 151552,
    norm_eps: float = 1.5625e-7,
    qkv_bias: bool = True,
    rope_ratio: float = 1.0,
    tied_head: bool = False,
    tokenizer: str | None = None,
    num_image_tokens: int = 32,
    frozen: bool = True,
    dtype: str = "float32",
    device: str = "cpu",
    initial_std: float | None = 0.02,
    checkpoint_activations: bool = False,
) -> Glm:
    """GLM-4-9B, or a smaller one of its kind (`configs/model/llm/`).

    Args:
        tokenizer: `tokenizer.json` or its folder; without one there is a network, and nobody to talk to.
        rope_ratio: as in config.json: 1 in glm-4-9b, 500 in glm-4-9b-chat; rope_theta of the -hf folders is 10000 times
            that.
        initial_std: see `model.llm.glm.glm`.
    """
    return glm(
        None if tokenizer is None else GLM4Codec(tokenizer, num_image_tokens=num_image_tokens),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        inner_size=inner_size,
        vocab_size=vocab_size,
        norm_eps=norm_eps,
        qkv_bias=qkv_bias,
        rope_base=10000.0 * rope_ratio,
        tied_head=tied_head,
        frozen=frozen,
        dtype=dtype,
        device=device,
        initial_std=initial_std,
        checkpoint_activations=checkpoint_activations,
    )
