"""Compares this project's numbers with a reference's, from the reference's own weights and inputs.

    python scripts/parity.py stage-one DIR
    python scripts/parity.py visualglm DIR

stage-one: DIR holds `config.json` (sizes), `weights.safetensors` (LAVIS's names) and `rank<r>.safetensors` for each
rank: inputs, the hard negatives drawn, and what the reference computed from them.  Prints one JSON object: the losses
computed, and for every tensor and gradient the largest absolute difference from the one expected.  Runs as many
processes as there are ranks.

The reference's conventions are selected whatever the project's defaults: ITC features keep their gradient on one rank
and are gathered without on several; ITG is the mean over a rank's own tokens; no duplicate masks, no bounds for the
temperature.

visualglm: DIR is a checkpoint of SwissArmyTransformer (0.4.1 or later: query, key and value rows in blocks) with
`io.safetensors` beside it: inputs, and what VisualGLM's own code computed from them.  Prints the loss computed, and for
`projected` and `logits` the largest absolute difference; logits are compared up to each row's last token that is not
padding.  The reference's conventions: <sop> is a label, fp32 frequencies, the mean over the labels of the batch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from data.batch import IGNORED, DialogueBatch, ImageTextBatch
from model.image_text import ImageTextModel
from model.qformer import QFormer
from model.vision.encoder import eva_vit
from model.visual_chat import VisualChatModel
from model.weights import lavis, sat
from model.weights.checkpoint import Config, open_file, read_json
from train.distributed import Ranks
from train.loss.stage_one import (
    ImageGroundedTextGeneration,
    ImageTextContrastive,
    ImageTextMatching,
    compare,
    match_candidates,
)
from train.loss.stage_two import StageTwoLoss


def stage_one(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    world_size = int(config["world_size"])
    missing = [rank for rank in range(world_size) if not (folder / f"rank{rank}.safetensors").is_file()]
    if missing:
        raise ValueError(
            f"{folder}: config.json says {world_size} ranks, but rank {missing} has no rank<r>.safetensors"
        )
    if world_size == 1:
        return {"ranks": [stage_one_rank(folder, config, Ranks.alone())]}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results: Any = context.SimpleQueue()
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # says which of the others it ended
    try:
        torch.multiprocessing.spawn(stage_one_process, (folder, config, port, results), nprocs=world_size)
    except torch.multiprocessing.ProcessRaisedException as failure:
        if results.empty():
            raise
        raise results.get()[1] from failure
    found = dict(results.get() for _ in range(world_size))
    return {"ranks": [found[rank] for rank in range(world_size)]}


def stage_one_process(rank: int, folder: Path, config: dict[str, Any], port: int, results: Any) -> None:
    world = {"RANK": rank, "WORLD_SIZE": config["world_size"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in world.items()})
    torch.set_num_threads(1)
    try:
        results.put((rank, stage_one_rank(folder, config, Ranks.connect(torch.device("cpu")))))
    except ValueError as error:  # its sentence; torch hands on nothing but a traceback's text
        results.put((rank, error))
        raise


def stage_one_rank(folder: Path, config: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """What this rank computes, beside what the reference computed for it."""
    reference = read_tensors(folder / f"rank{ranks.rank}.safetensors")
    model = reference_model(config)
    lavis.load(model, folder / "weights.safetensors")
    batch = reference_batch(config, reference, ranks)
    smoothing = config["label_smoothing"]
    negatives = reference["negative_image_index"], reference["negative_text_index"]

    seen = model.look(batch)
    gather = "full" if ranks.count == 1 else "anchor"
    contrast = compare(model, batch, seen, ranks, itc_gather=gather, mask_duplicates=False)
    itc = ImageTextContrastive(label_smoothing=smoothing["itc"])(contrast)
    itm = ImageTextMatching()(model, batch, seen, contrast, ranks, negatives)
    itg = ImageGroundedTextGeneration(label_smoothing=smoothing["itg"], normalise="rank")(model, batch, seen, ranks)
    (itc.value + itm.value + itg.value).backward()

    with torch.no_grad():
        tensors = {
            "image_embeds": model.ln_vision(seen.encoded_BMW),
            "query_output": seen.query_BQH,
            "sim_i2t": contrast.sim_i2t_BN,
            "sim_t2i": contrast.sim_t2i_BN,
            "itm_logits": match_candidates(model, batch, seen, ranks, *negatives),
        }
    losses = {"loss_itc": itc.value.item(), "loss_itm": itm.value.item(), "loss_itg": itg.value.item()}
    differences = {name: largest_difference(value, reference[f"expected.{name}"]) for name, value in tensors.items()}
    return {**losses, **differences, "grad": gradient_differences(model, reference, ranks)}


def reference_model(config: dict[str, Any]) -> ImageTextModel:
    vision, qformer = config["vision"], config["qformer"]
    if not vision.get("qkv_bias", True):
        raise ValueError("config.json: qkv_bias is false; EVA-ViT has biases of queries and values, as BLIP-2's does")
    encoder = eva_vit(
        image_size=vision["img_size"],
        patch_size=vision["patch_size"],
        width=vision["embed_dim"],
        num_layers=vision["depth"],
        num_heads=vision["num_heads"],
        mlp_width=int(vision["embed_dim"] * vision["mlp_ratio"]),
        layer_norm_eps=vision["layer_norm_eps"],
        frozen=True,
        dtype="float32",
    )
    bridge = QFormer(
        vocab_size=qformer["vocab_size"],
        image_width=vision["embed_dim"],
        hidden_size=qformer["hidden_size"],
        num_layers=qformer["num_hidden_layers"],
        num_heads=qformer["num_attention_heads"],
        intermediate_size=qformer["intermediate_size"],
        max_positions=qformer["max_position_embeddings"],
        num_query_tokens=qformer["num_query_tokens"],
        cross_attention_frequency=qformer["cross_attention_frequency"],
        dropout=0.0,
        layer_norm_eps=qformer["layer_norm_eps"],
        pad_id=config["pad_token_id"],
    )
    return ImageTextModel(
        encoder, bridge, embed_dim=qformer["projection_dim"], temperature_min=None, temperature_max=None
    ).eval()


def reference_batch(config: dict[str, Any], reference: dict[str, Tensor], ranks: Ranks) -> ImageTextBatch:
    size = len(reference["input_ids"])
    row_B = ranks.own_rows(size, torch.device("cpu"))
    return ImageTextBatch(
        image_BCHW=reference["image"],
        text_ids_BL=reference["input_ids"],
        text_mask_BL=reference["attention_mask"].bool(),
        bos_id_B=torch.full((size,), config["bos_token_id"]),
        image_key_B=row_B,
        text_key_B=row_B,
        row_B=row_B,
        language_B=torch.zeros_like(row_B),
        languages=("any",),
        pad_id=config["pad_token_id"],
        step=0,
    )


def gradient_differences(model: ImageTextModel, reference: dict[str, Tensor], ranks: Ranks) -> dict[str, float]:
    """Averaged over the ranks, under LAVIS's names."""
    own = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    ours = lavis.to_lavis(model, {name: ranks.sum(gradient) / ranks.count for name, gradient in own.items()})
    prefix = "expected.grad."
    names = sorted(name.removeprefix(prefix) for name in reference if name.startswith(prefix))
    unknown = [name for name in names if name not in ours]
    if unknown:
        raise ValueError(f"the reference has gradients of tensors this model does not have: {unknown}")
    return {name: largest_difference(ours[name], reference[prefix + name]) for name in names}


def visualglm(folder: Path) -> dict[str, Any]:
    """What this code computes from VisualGLM's own checkpoint, beside what VisualGLM computed."""
    config = sat.read_config(folder)
    path = folder / "io.safetensors"
    if not path.is_file():
        raise ValueError(f"{folder} holds no io.safetensors: expected a folder as shared/parity/README.md describes")
    reference = read_tensors(path)
    model = visualglm_model(config)
    sat.load(model, folder, qkv_order="blocks")
    batch = visualglm_batch(reference, config["pad_token_id"])
    batch = batch.agreed(step_target_tokens=batch.num_target_tokens, text_length=batch.text_length)
    with torch.no_grad():
        losses, _ = StageTwoLoss()(model, batch, Ranks.alone())
        projected = model.projection(model.look(batch.image_GCHW))
        logits = model.llm.logits(model.hidden(batch))
    compared = batch.mask_BL
    return {
        "loss": losses["lm"].item(),
        "projected": largest_difference(projected, reference["expected.projected"]),
        "logits": largest_difference(logits[compared], reference["expected.logits"][compared]),
    }


def visualglm_model(config: dict[str, Any]) -> VisualChatModel:
    from model.llm.chatglm import chatglm

    sizes = sat.sizes(config)
    qformer = QFormer(vocab_size=1, max_positions=1, dropout=0.0, **sizes["qformer"])  # its text branch leaves at once
    llm = chatglm(rotary_dtype="float32", initial_std=None, **sizes["llm"])
    return VisualChatModel(eva_vit(**sizes["vision"]), qformer, llm).eval()


def visualglm_batch(reference: dict[str, Tensor], pad_id: int) -> DialogueBatch:
    """One picture a row, where `pre_image` says; all that follows a row's last token is padding (so are, by their id,
    the places of image tokens)."""
    ids_BL, labels_BL = reference["input_ids"], reference["labels"]
    position_L = torch.arange(ids_BL.shape[1])
    is_token_BL = (ids_BL != pad_id) | (labels_BL != IGNORED)
    last_B1 = torch.where(is_token_BL, position_L, 0).amax(dim=1, keepdim=True)
    row_B = torch.arange(len(ids_BL))
    return DialogueBatch(
        image_GCHW=reference["image"],
        image_row_G=row_B,
        image_start_G=reference["pre_image"].expand(len(row_B)).long(),
        ids_BL=ids_BL,
        labels_BL=labels_BL,
        mask_BL=position_L <= last_B1,
        row_B=row_B,
        language_B=torch.zeros_like(row_B),
        languages=("any",),
    )


def largest_difference(found: Tensor, expected: Tensor) -> float:
    if found.numel() != expected.numel():
        raise ValueError(f"{tuple(found.shape)} computed, {tuple(expected.shape)} expected")
    return (found.detach().double().view(expected.shape) - expected.double()).abs().max().item()


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no config.json: expected a folder as shared/parity/README.md describes")
    return read_json(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All of a file.  ValueError where it cannot be read, and later for a name that is asked for and not in it."""
    file = open_file(path)
    return Config({name: file.read(name) for name in file.shapes}, str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["stage-one", "visualglm"])
    parser.add_argument("folder", type=Path, metavar="DIR")
    args = parser.parse_args()
    try:
        compare_with = {"stage-one": stage_one, "visualglm": visualglm}[args.what]
        print(json.dumps(compare_with(args.folder)))
    except (ValueError, OSError) as error:
        raise SystemExit(f"parity: {error}.  Where a file is damaged or missing, copy {args.folder} again") from error


if __name__ == "__main__":
    main()
