"""A run of finetune.py as it leaves its folder, small enough for any test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from model.assemble import assemble
from model.build import build
from model.llm.warm_up import chatglm_config
from model.llm.warm_up import load as load_warm
from model.visual_chat import VisualChatModel
from model.weights import adapter_folder, ours, writing
from model.weights.checkpoint import from_tensors
from tests.data.shard_files import jpeg
from tests.model.glm_common import small_glm
from tests.model.llm_common import codec_of, small_chatglm

# A program's own start, for `python -c`: its file and its arguments follow.
WITHOUT = """
import importlib.util, runpy, sys

HIDDEN = ('deepspeed', 'triton', 'sat', 'SwissArmyTransformer', 'wandb', 'webdataset')

class Hiding:
    '''A machine where training's libraries are not installed.'''
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split('.')[0] in HIDDEN else self.finder.find_spec(name, path, target)
    def __getattr__(self, name): return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
assert all(importlib.util.find_spec(name) is None for name in HIDDEN)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
assert not [name for name in sys.modules if name.split('.')[0] in HIDDEN], 'imported all the same'
print('and nothing was missed')
"""

SIZES = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "inner_size": 128, "vocab_size": 256}
GLM_SIZES = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_size": 16, "inner_size": 64,
             "vocab_size": 600}  # fmt: skip
SEED = 7


def chatglm_nodes(pieces: Path, base: Path, *, warmed: bool = False) -> dict[str, Any]:
    """A config's `model` around a ChatGLM, which is written to `base` as its own folder or as one warmed up."""
    llm = small_chatglm(pieces, seed=5, **SIZES, initial_std=0.15)
    tensors = {name: p.detach() for name, p in llm.network.named_parameters()}
    writing.write_folder(from_tensors(tensors), base, metadata={})
    writing.write_json(base / "config.json", chatglm_config(SIZES, codec_of(llm), 0.0))
    shutil.copyfile(pieces, base / "ice_text.model")
    if warmed:
        return _nodes({"_target_": "model.llm.warm_up.warm_up", "_partial_": True, "folder": str(base)}, None)
    node = {"_target_": "model.llm.chatglm.chatglm", **SIZES, "tokenizer": str(base), "rotary_dtype": "float32"}
    return _nodes(_large(node), base)


def glm_nodes(tokenizer: Path, base: Path, *, endless: bool = False) -> dict[str, Any]:
    """The same around a ChatGLM3; an endless one, asked for the likeliest token, never ends an answer."""
    llm: Any = small_glm("chatglm3", tokenizer, seed=5, **GLM_SIZES)
    if endless:
        with torch.no_grad():
            llm.network.lm_head.weight[list(llm.codec.stop_ids)] = 0.0
    llm.network.save_pretrained(base)
    shutil.copyfile(tokenizer, base / "tokenizer.model")
    return _nodes(_large({"_target_": "model.llm.chatglm3.chatglm3", **GLM_SIZES, "tokenizer": str(base)}), base)


def _large(node: dict[str, Any]) -> dict[str, Any]:
    """As the configs of real models are."""
    return {**node, "num_image_tokens": 5, "dtype": "bfloat16", "initial_std": None}


def _nodes(llm: dict[str, Any], base: Path | None) -> dict[str, Any]:
    return {
        "vision": {
            "_target_": "model.vision.encoder.eva_vit",
            "image_size": 28,
            "patch_size": 14,
            "width": 24,
            "num_layers": 2,
            "num_heads": 2,
            "mlp_width": 48,
            "initial_std": 0.3,
        },
        "qformer": {
            "_target_": "model.qformer.QFormer",
            "hidden_size": 32,
            "num_layers": 3,
            "num_heads": 4,
            "intermediate_size": 48,
            "max_positions": 4,
            "num_query_tokens": 5,
            "dropout": 0.1,
            "initial_std": 0.2,
        },
        "llm": llm,
        "visual_chat": {"_target_": "model.visual_chat.VisualChatModel"},
        "adapter": {"_target_": "model.adapter.Lora", "rank": 4},
        "weights": {
            "_target_": "model.weights.stage_two.initialise",
            "_partial_": True,
            "stage_one": None,
            "llm": None if base is None else str(base),
            "qkv_order": "per_head",
        },
    }


def write_run(run: Path, nodes: dict[str, Any]) -> VisualChatModel:
    """With an encoder whose weights were drawn when the run began, and everything that learns moved.  -> its model"""
    run.mkdir(exist_ok=True)
    OmegaConf.save(OmegaConf.create({"run": {"dir": str(run), "seed": SEED}, "model": nodes}), run / "config.yaml")
    torch.manual_seed(SEED)
    is_warm = nodes["llm"].get("_partial_")
    llm = load_warm(Path(nodes["llm"]["folder"])) if is_warm else build({**nodes["llm"], "dtype": "float32"})
    model, _ = assemble(nodes, llm, device=torch.device("cpu"))
    frozen = ours.frozen_fingerprint(model, "model")
    torch.manual_seed(1)
    learnt = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in learnt.values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    tensors = {name: parameter.detach() for name, parameter in learnt.items()}
    step = run / "checkpoints/step_2"
    step.mkdir(parents=True)
    save_file({f"model.{name}": tensor for name, tensor in tensors.items()}, step / "weights.safetensors")
    (step / "state.json").write_text(json.dumps({"step": 2, "frozen": frozen}))
    (run / "checkpoints/latest").symlink_to("step_2")
    adapter_folder.save(model, tensors, run / "adapter")
    return model.eval()


def vqa_arguments(folder: Path) -> list[str]:
    """Of evaluate.py: three questions about three pictures, written to `folder`, with several answers each."""
    questions = [{"question_id": n, "image_id": n, "question": "What is in the picture?"} for n in range(3)]
    said = [{"question_id": n, "answers": [{"answer": word} for word in ("yes", "blue", "blue")]} for n in range(3)]
    (folder / "questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "answers.json").write_text(json.dumps({"annotations": said}))
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
    return [
        "train/evaluator=vqa_v2", "data.transform.image_size=28", "train.evaluator.vqa.batch_size=2",
        f"train.evaluator.vqa.source.path={folder}/questions.json", "train.evaluator.vqa.max_new_tokens=6",
        f"train.evaluator.vqa.source.annotations={folder}/answers.json",
        f"train.evaluator.vqa.source.image_root={folder}", "train.evaluator.vqa.source.image_file='{:d}.jpg'",
    ]  # fmt: skip
