r"""ChatGLM2-6B: `[Round n]\n\n问：question\n\n答：answer`, sentencepiece, special tokens after its pieces.

Layout: `tokenization_chatglm.py` of its folder (`build_prompt`, `get_prefix_tokens`), labels: `ptuning/main.py` of
ChatGLM2-6B.  There is one template for both languages, the one it was trained on.
"""

from __future__ import annotations

from pathlib import Path

from data.batch import EncodedDialogue, Turn
from model.llm.glm import Glm, glm
from model.llm.glm_codec import GlmCodec, appended
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
        ids = appended(pieces, SPECIAL)
        eos = required(pieces, "</s>")
        super().__init__(
            pieces,
            {"gmask": ids["[gMASK]"], "sop": ids["sop"], "eop": ids["eop"], "eos": eos},
            pad_id=required(pieces, "<unk>"),
            stop_ids=(eos,),
            num_image_tokens=num_image_tokens,
            image_marks=(pieces.encode("<img>"), pieces.encode("</img>")),
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


def chatglm2(
    *,
    hidden_size: int = 4096,
    num_layers: int = 28,
    num_heads: int = 32,
    num_kv_heads: int = 2,
    head_size: int = 128,
    inner_size: int = 13696,
    vocab_size: int = 65024,
    norm_eps: float = 1e-5,
    qkv_bias: bool = True,
    rope_interpolation: float = 1.0,
    tied_head: bool = False,
    tokenizer: str | None = None,
    num_image_tokens: int = 32,
    frozen: bool = True,
    dtype: str = "float32",
    device: str = "cpu",
    initial_std: float | None = 0.02,
    checkpoint_activations: bool = False,
) -> Glm:
    """ChatGLM2-6B, or a smaller one of its kind (`configs/model/llm/`).

    Args:
        tokenizer: `tokenizer.model` or its folder; without one there is a network, and nobody to talk to.
        rope_interpolation: `rope_ratio` of the config.json of ChatGLM2-6B-32k.
        initial_std: see `model.llm.glm.glm`.
    """
    return glm(
        None if tokenizer is None else ChatGLM2Codec(tokenizer, num_image_tokens=num_image_tokens),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        inner_size=inner_size,
        vocab_size=vocab_size,
        norm_eps=norm_eps,
        qkv_bias=qkv_bias,
        rope_interpolation=rope_interpolation,
        tied_head=tied_head,
        frozen=frozen,
        dtype=dtype,
        device=device,
        initial_std=initial_std,
        checkpoint_activations=checkpoint_activations,
    )


def sentencepieces(path: str | Path) -> Pieces:
    """`tokenizer.model` as ChatGLM2 and ChatGLM3 read it: no pieces of their own for white space.

    No text can spell a special token: sentencepiece does not know them.
    """
    file = Path(path).expanduser()
    return Pieces(file / "tokenizer.model" if file.is_dir() else file, special=(), line_break=None)


def required(pieces: Pieces, name: str) -> int:
    found = pieces.id_of(name)
    if found is None:
        raise ValueError(f"{pieces.path} has no piece {name}: it is not the tokenizer of ChatGLM2 or ChatGLM3")
    return found
