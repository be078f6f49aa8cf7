r"""ChatGLM2-6B: `[Round n]\n\n问：question\n\n答：answer`, sentencepiece, special tokens after its pieces.

Layout: `tokenization_chatglm.py` of its folder (`build_prompt`, `get_prefix_tokens`), labels: `ptuning/main.py` of
ChatGLM2-6B.  There is one template for both languages, the one it was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.batch import EncodedDialogue, Turn
from model.llm.glm import Glm, family, glm
from model.llm.glm_codec import GlmCodec
from model.llm.pieces import Pieces

ASK, REPLY = "[Round {}]\n\n问：", "\n\n答："
SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")  # in the order of their ids


class ChatGLM2Codec(GlmCodec):
    r"""[gMASK] sop `[Round 1]\n\n问：` pictures `question\n\n答：answer\n\n[Round 2] ... 答：` answer </s>

    Earlier answers have no end of their own in this layout, so one sample trains one answer, the last.

    Args:
        path: `tokenizer.model`, or the folder that holds it.
        num_image_tokens: positions of one picture.
    Raises:
        ValueError: no such file, or one without `</s>` or `<unk>`.
    """

    trains_every_turn = False

    def __init__(self, path: str | Path, *, num_image_tokens: int) -> None:
        pieces = sentencepieces(path)
        special = special_ids(pieces)
        super().__init__(
            pieces,
            special,
            pad_id=required(pieces, "<unk>"),
            stop_ids=(special["eos"],),
            num_image_tokens=num_image_tokens,
        )

    def _lay_out(self, turns: tuple[Turn, ...]) -> EncodedDialogue:
        layout, text = self._begin(), ""
        for number, turn in enumerate(turns, start=1):
            text += ASK.format(number)
            if turn.num_images:
                layout.add(self.pieces.encode(text))
                self._show(layout, turn.num_images)
                text = ""
            text += turn.question + REPLY
            if number < len(turns):
                text += turn.answer + "\n\n"
        layout.add(self.pieces.encode(text))
        if turns[-1].answer:
            layout.add([*self.pieces.encode(turns[-1].answer), self.special["eos"]], learn=True)
        return layout.done()


@family(num_layers=28, vocab_size=65024, norm_eps=1e-5)
def chatglm2(*, rope_interpolation: float = 1.0, **rest: Any) -> Glm:
    """ChatGLM2-6B, or a smaller one of its kind (`configs/model/llm/`); see `model.llm.glm.glm`.

    Args:
        rope_interpolation: `rope_ratio` of the config.json of ChatGLM2-6B-32k.
    """
    return glm(ChatGLM2Codec, rope_interpolation=rope_interpolation, **rest)


def sentencepieces(path: str | Path) -> Pieces:
    """`tokenizer.model` as ChatGLM2 and ChatGLM3 read it: no pieces of their own for white space.

    No text can spell a special token: sentencepiece does not know them.
    """
    file = Path(path).expanduser()
    return Pieces(file / "tokenizer.model" if file.is_dir() else file, special=(), line_break=None)


def special_ids(pieces: Pieces, roles: Sequence[str] = ()) -> dict[str, int]:
    """Ids by role: ChatGLM2's, and what `roles` (`<|user|>`, ...) adds in ChatGLM3."""
    ids = {name: pieces.vocab_size + index for index, name in enumerate((*SPECIAL, *roles))}
    eos = required(pieces, "</s>")
    first = {"gmask": ids["[gMASK]"], "sop": ids["sop"], "eop": ids["eop"], "eos": eos}
    return {**first, **{role.strip("<|>"): ids[role] for role in roles}}


def required(pieces: Pieces, name: str) -> int:
    found = pieces.id_of(name)
    if found is None:
        raise ValueError(f"{pieces.path} has no piece {name}: it is not the tokenizer of ChatGLM2 or ChatGLM3")
    return found
