"""A small ChatGLM from nothing, for a CPU: tokenizer and network learn a run's own dialogues, then they are frozen.

A frozen language model is worth a projection's trouble only if it answers from what stands at the image tokens.  So it
learns that here, without a picture: words of a description of the picture, in any language, or of the answer where
there is none, are put where the image tokens will be.  Some rows have nothing there and learn what answers sound like.

Shape letters   B = rows   L = length   T = tokens to predict   W = words of hints   P = places they take   D = width
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from data.batch import IGNORED, Dialogue, DialogueBatch, EncodedDialogue
from model.llm.chatglm import SPECIAL, TEMPLATES, ChatGLM, ChatGLMCodec, chatglm
from model.llm.pieces import train_pieces

Hint = Literal["some", "pooled"]
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "ice_text.model"


def warm_up(
    *,
    dialogues: Sequence[Dialogue],
    descriptions: Sequence[Sequence[str]] | None = None,
    folder: str | Path,
    hidden_size: int = 128,
    num_layers: int = 4,
    num_heads: int = 4,
    inner_size: int = 512,
    max_pieces: int = 2000,
    pieces: Literal["unigram", "bpe"] = "unigram",
    num_image_tokens: int = 8,
    steps: int = 600,
    batch_size: int = 32,
    lr: float = 2e-3,
    muon_lr: float | None = None,
    hint: Hint = "some",
    blind: float = 0.3,
    max_tokens: int = 256,
    seed: int = 0,
) -> Path:
    """Trains and writes a folder in ChatGLM-6B's layout; one that is there already is left as it is.

    Args:
        dialogues: of the training data alone; pictures are counted in them, not needed.
        descriptions: for each dialogue, what its picture shows, in any words and languages; none: its answer.
        folder: where it is written.
        max_pieces, pieces: of its tokenizer, see `train_pieces`.
        num_image_tokens: of a picture, as many as the Q-Former has queries.
        lr, muon_lr: AdamW's; Muon's for the matrices of the blocks (null: AdamW too), which takes half the steps.
        hint: "some": a word at each place, as many as fit.  "pooled": all words, in 2 parts or more, at most as many as
            there are places (drawn anew each time: how words are spread over places must not matter to who reads them),
            each part's embeddings averaged; nearer to what a projection says, and the description is whole.
        blind: share of the rows that see no hint.
        max_tokens: longer dialogues are cut (`data.batch.DialogueCodec.encode`).
    Raises:
        ValueError: no dialogue, or not a description for each.
    """
    folder = Path(folder).expanduser()
    if (folder / CONFIG).is_file():
        return folder
    if not dialogues:
        raise ValueError("there is no dialogue to warm a language model up on")
    if descriptions is not None and len(descriptions) != len(dialogues):
        raise ValueError(f"{len(descriptions)} descriptions for {len(dialogues)} dialogues")
    writing = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    train_pieces(_texts(dialogues), writing / TOKENIZER, vocab_size=max_pieces, special=_SPECIAL, model_type=pieces)
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
        hints = Hints(codec, encoded, descriptions, kind=hint, blind=blind)
        optimizers = _optimizers(llm, lr=lr, muon_lr=muon_lr)
        loss = _train(llm, optimizers, encoded, hints, steps=steps, batch_size=batch_size)
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


def _optimizers(llm: ChatGLM, *, lr: float, muon_lr: float | None) -> list[torch.optim.Optimizer]:
    named = dict(llm.network.named_parameters())
    of_muon = [n for n, p in named.items() if muon_lr is not None and p.ndim == 2 and ".layers." in n]
    others = [parameter for name, parameter in named.items() if name not in of_muon]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]
    if muon_lr is not None:
        matrices = [named[name] for name in of_muon]
        found.append(torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return found


def _train(
    llm: ChatGLM,
    optimizers: Sequence[torch.optim.Optimizer],
    encoded: Sequence[EncodedDialogue],
    hints: Hints,
    *,
    steps: int,
    batch_size: int,
) -> float:
    """-> mean loss of the last tenth"""
    peaks = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    llm.train()
    losses: list[float] = []
    for step in tqdm(range(steps), desc="warm-up", unit=" steps", delay=2, leave=False):
        warm = min(1.0, (step + 1) / max(1, steps // 20))
        for group, peak in peaks:
            group["lr"] = peak * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        chosen = torch.randint(len(encoded), (batch_size,)).tolist()
        batch = _collated([encoded[i] for i in chosen], hints.codec.pad_id)
        loss = _loss(llm, batch, hints.put(llm, batch, chosen))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llm.network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    llm.eval()
    last = losses[-max(1, steps // 10) :]
    return math.fsum(last) / len(last)


def _loss(llm: ChatGLM, batch: DialogueBatch, embedded_BLD: Tensor) -> Tensor:
    hidden_BLD = llm.hidden(embedded_BLD, batch.ids_BL, batch.mask_BL)
    label_BL = batch.labels_BL[:, 1:]
    is_label_BL = label_BL != IGNORED
    return F.cross_entropy(llm.logits(hidden_BLD[:, :-1][is_label_BL]), label_BL[is_label_BL])


def _collated(rows: Sequence[EncodedDialogue], pad_id: int) -> DialogueBatch:
    empty = torch.zeros(0, dtype=torch.uint8)
    return DialogueBatch.collate(
        rows,
        [[empty] * len(row.image_starts) for row in rows],
        pad_id=pad_id,
        image_size=1,
        language_of=["any"] * len(rows),
        languages=("any",),
    )


class Hints:
    """What stands at the places of a dialogue's first picture; see `warm_up`."""

    def __init__(
        self,
        codec: ChatGLMCodec,
        encoded: Sequence[EncodedDialogue],
        descriptions: Sequence[Sequence[str]] | None,
        *,
        kind: Hint,
        blind: float,
    ) -> None:
        self.codec, self.encoded, self.descriptions = codec, encoded, descriptions
        self.kind, self.blind = kind, blind

    def put(self, llm: ChatGLM, batch: DialogueBatch, numbers: Sequence[int]) -> Tensor:
        """-> embedded_BLD of a batch of the dialogues `numbers`, with their hints"""
        embedded_BLD = llm.embed(batch.ids_BL)
        words: list[int] = []  # of all hints, one after the other
        part_W: list[int] = []  # in whose part they are
        place_P: list[tuple[int, int]] = []  # row and position of each part
        for row, number in enumerate(numbers):
            starts = self.encoded[number].image_starts
            if not starts or torch.rand(()) < self.blind:
                continue
            parts = self._parts(self._words(number))
            places = torch.randperm(self.codec.num_image_tokens)[: len(parts)].sort().values.tolist()
            for part, place in zip(parts, places, strict=True):
                part_W += [len(place_P)] * len(part)
                words += part
                place_P.append((row, starts[0] + place))
        if not words:
            return embedded_BLD
        index_W, (row_P, position_P) = torch.tensor(part_W), torch.tensor(place_P).T
        word_WD = llm.embed(torch.tensor(words)) / index_W.bincount()[index_W][:, None]
        mean_PD = embedded_BLD.new_zeros(len(place_P), llm.width).index_add(0, index_W, word_WD)
        return embedded_BLD.index_put((row_P, position_P), mean_PD)

    def _words(self, number: int) -> list[int]:
        if self.descriptions is not None and len(self.descriptions[number]):
            texts = self.descriptions[number]
            return self.codec.pieces.encode(texts[int(torch.randint(len(texts), ()))])
        special = set(self.codec.ids.values())
        return [i for i in self.encoded[number].labels if i != IGNORED and i not in special]

    def _parts(self, words: list[int]) -> list[list[int]]:
        """As many as there are places, or words."""
        if self.kind == "some":
            kept = torch.randperm(len(words))[: self.codec.num_image_tokens].sort().values.tolist()
            return [[words[i]] for i in kept]
        places = self.codec.num_image_tokens
        number = min(int(torch.randint(min(2, places), places + 1, ())), len(words))
        cuts = [round(i * len(words) / number) for i in range(number + 1)]
        return [words[start:end] for start, end in itertools.pairwise(cuts)]


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
