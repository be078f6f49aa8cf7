"""A small ChatGLM from nothing, for a CPU: tokenizer and network learn a run's own dialogues, then they are frozen.

A frozen language model is worth a projection's trouble only if it answers from what stands at the image tokens.  So it
learns that here, without a picture: words of the answer are put where the image tokens will be, as many as fit.  Some
rows have none there and learn what answers sound like.

Shape letters   B = rows   L = length   T = tokens to predict
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.batch import IGNORED, Dialogue, DialogueBatch, EncodedDialogue
from model.llm.chatglm import SPECIAL, TEMPLATES, ChatGLM, ChatGLMCodec, chatglm
from model.llm.pieces import train_pieces

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "ice_text.model"


def warm_up(
    *,
    dialogues: Sequence[Dialogue],
    folder: str | Path,
    hidden_size: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    inner_size: int = 512,
    max_pieces: int = 2000,
    num_image_tokens: int = 8,
    steps: int = 600,
    batch_size: int = 32,
    lr: float = 2e-3,
    blind: float = 0.3,
    max_tokens: int = 256,
    seed: int = 0,
) -> Path:
    """Trains and writes a folder in ChatGLM-6B's layout; one that is there already is left as it is.

    Args:
        dialogues: of the training data alone; pictures are counted in them, not needed.
        folder: where it is written.
        max_pieces: of its tokenizer.
        num_image_tokens: of a picture, as many as the Q-Former has queries.
        blind: share of the rows that see none of the answer.
        max_tokens: longer dialogues are cut (`data.batch.DialogueCodec.encode`).
    Raises:
        ValueError: no dialogue.
    """
    folder = Path(folder).expanduser()
    if (folder / CONFIG).is_file():
        return folder
    if not dialogues:
        raise ValueError("there is no dialogue to warm a language model up on")
    writing = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    train_pieces(_texts(dialogues), writing / TOKENIZER, vocab_size=max_pieces, special=_SPECIAL)
    codec = ChatGLMCodec(writing, num_image_tokens=num_image_tokens)
    sizes = {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "inner_size": inner_size,
        "vocab_size": codec.pieces.vocab_size,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        llm = _built(writing, sizes, num_image_tokens, frozen=False, initial_std=hidden_size**-0.5)
        encoded = [codec.encode(dialogue, max_tokens=max_tokens) for dialogue in dialogues]
        loss = _train(llm, codec, encoded, steps=steps, batch_size=batch_size, lr=lr, blind=blind)
    save_file({n: p.detach().contiguous() for n, p in llm.network.named_parameters()}, writing / WEIGHTS)
    (writing / CONFIG).write_text(json.dumps(chatglm_config(sizes, codec, loss), indent=1), "utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    writing.rename(folder)
    return folder


def load(folder: Path, *, frozen: bool = True) -> ChatGLM:
    """What `warm_up` wrote."""
    from model.weights.chatglm_folder import sizes

    folder = folder.expanduser()
    config = json.loads((folder / CONFIG).read_text("utf-8"))
    known = {name: value for name, value in sizes(config).items() if name != "ids"}
    llm = _built(folder, known, config["num_image_tokens"], frozen=frozen, initial_std=None)
    tensors = load_file(folder / WEIGHTS)
    for name, parameter in llm.network.named_parameters():
        parameter.data.copy_(tensors[name])
    llm.loaded_from = str(folder)
    return llm


_SPECIAL = (*SPECIAL.values(), "<img>", "</img>")


def _texts(dialogues: Sequence[Dialogue]) -> list[str]:
    """Every question and answer in its template, a marked picture before it."""
    texts = []
    for dialogue in dialogues:
        ask, reply = TEMPLATES.get(dialogue.language, TEMPLATES["en"])
        texts += [ask.format(turn.question) + reply.format(turn.answer) for turn in dialogue.turns]
    return texts


def _built(
    folder: Path, sizes: Mapping[str, Any], num_image_tokens: int, *, frozen: bool, initial_std: float | None
) -> ChatGLM:
    return chatglm(
        **sizes,
        tokenizer=str(folder),
        num_image_tokens=num_image_tokens,
        rotary_dtype="float32",
        frozen=frozen,
        initial_std=initial_std,
    )


def _train(
    llm: ChatGLM, codec: ChatGLMCodec, encoded: Sequence[EncodedDialogue], *, steps: int, batch_size: int, lr: float,
    blind: float,
) -> float:  # fmt: skip
    """-> mean loss of the last tenth"""
    optimizer = torch.optim.AdamW(llm.network.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    llm.train()
    losses: list[float] = []
    for step in range(steps):
        warm = min(1.0, (step + 1) / max(1, steps // 20))
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        chosen = [encoded[i] for i in torch.randint(len(encoded), (batch_size,)).tolist()]
        loss = _loss(llm, *_hinted(codec, chosen, blind))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llm.network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    llm.eval()
    last = losses[-max(1, steps // 10) :]
    return math.fsum(last) / len(last)


def _loss(llm: ChatGLM, batch: DialogueBatch, hinted_BL: Tensor) -> Tensor:
    """The usual one; `hinted_BL` is what is embedded, the batch's own ids say where what stands."""
    hidden_BLD = llm.hidden(llm.embed(hinted_BL), batch.ids_BL, batch.mask_BL)
    label_BL = batch.labels_BL[:, 1:]
    is_label_BL = label_BL != IGNORED
    return F.cross_entropy(llm.logits(hidden_BLD[:, :-1][is_label_BL]), label_BL[is_label_BL])


def _hinted(codec: ChatGLMCodec, rows: Sequence[EncodedDialogue], blind: float) -> tuple[DialogueBatch, Tensor]:
    """A batch, and its ids with words of the answer, in their order, at the places of the first picture's tokens."""
    empty = torch.zeros(0, dtype=torch.uint8)
    batch = DialogueBatch.collate(
        rows,
        [[empty] * len(row.image_starts) for row in rows],
        pad_id=codec.pad_id,
        image_size=1,
        language_of=["any"] * len(rows),
        languages=("any",),
    )
    hinted_BL = batch.ids_BL.clone()
    for number, row in enumerate(rows):
        if not row.image_starts or torch.rand(()) < blind:
            continue
        special = set(codec.ids.values())
        answer = torch.tensor([i for i in row.labels if i != IGNORED and i not in special])
        kept = torch.randperm(len(answer))[: codec.num_image_tokens].sort().values
        place = torch.randperm(codec.num_image_tokens)[: len(kept)].sort().values
        hinted_BL[number, row.image_starts[0] + place] = answer[kept]
    return batch, hinted_BL


def chatglm_config(sizes: Mapping[str, Any], codec: ChatGLMCodec, loss: float) -> dict[str, Any]:
    """`config.json` in ChatGLM-6B's words."""
    return {
        "model_type": "chatglm",
        "hidden_size": sizes["hidden_size"],
        "num_layers": sizes["num_layers"],
        "num_attention_heads": sizes["num_heads"],
        "inner_hidden_size": sizes["inner_size"],
        "vocab_size": sizes["vocab_size"],
        "layernorm_epsilon": 1e-5,
        **{f"{role}_token_id": number for role, number in codec.ids.items()},
        "num_image_tokens": codec.num_image_tokens,
        "warm_up_loss": round(loss, 4),
    }
