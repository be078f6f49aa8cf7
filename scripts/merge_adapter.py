"""Merges a LoRA into the weights it was trained on, so that nothing but a model is left to load.

    python scripts/merge_adapter.py outputs/RUN/adapter weights/chatglm-6b weights/merged --qkv-order per_head

ADAPTER is the folder `adapter/` of a run, or any LoRA that peft saved; BASE the Hugging Face folder of the language
model or of VisualGLM-6B, unquantised, also where the adapter was trained on 4 bits.  OUT gets every tensor of BASE in
bfloat16, one shard in memory at a time.  An original folder of ChatGLM2, ChatGLM3 or GLM-4 becomes one of transformers'
GLM, which adapters trained here are for.  Projection and Q-Former that trained along replace those of VisualGLM; beside
a language model alone they are kept as `trained.safetensors`, with the run's `config.yaml`, so that chat can load OUT.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.weights import glm, merging, writing
from model.weights.adapter_folder import ABOUT, TRAINED
from model.weights.visualglm import RECORD, recorded_order

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "same": None}
COMES_ALONG = (
    "config.json",
    "generation_config.json",
    "ice_text.model",
    "tokenizer*",
    "vocab*",
    "LICENSE*",
    "MODEL_LICENSE*",
)


def merge(args: argparse.Namespace) -> str:
    checkpoint = merging.merged(args.base, args.adapter, qkv_order=args.qkv_order, dtype=DTYPES[args.dtype])
    metadata = {"base": str(args.base), "adapter": str(args.adapter)}
    max_bytes = int(args.max_shard_gb * 1024**3)
    config = merging.renamed(args.base, args.adapter)
    first_dtype = writing.write_folder(checkpoint, args.out, max_shard_bytes=max_bytes, metadata=metadata)
    if config is not None:
        config.dtype = first_dtype
        config.save_pretrained(args.out)
    writing.copy_files(args.base, args.out, COMES_ALONG if config is None else glm.COMES_ALONG)
    order = args.qkv_order or recorded_order(args.base)
    if order is not None:
        metadata["qkv_order"] = order
    writing.write_json(args.out / RECORD, metadata)
    if merging.left_over(args.base, args.adapter):
        shutil.copyfile(args.adapter / TRAINED, args.out / TRAINED)
        shutil.copyfile(args.adapter / ABOUT, args.out / ABOUT)
        writing.copy_files(args.adapter.resolve().parent, args.out, ["config.yaml"])  # of the run: encoder and Q-Former
        return f"{args.out}; projection and Q-Former, which {args.base} has no place for, in {args.out / TRAINED}"
    return str(args.out)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("adapter", "base", "out"):
        made.add_argument(name, type=Path, metavar=name.upper())
    made.add_argument("--qkv-order", choices=["blocks", "per_head"], help="of BASE, where nothing recorded it")
    made.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of what is written")
    made.add_argument("--max-shard-gb", type=float, default=2.0, help="size of a file of weights, and of the memory")
    return made


def main() -> None:
    args = parser().parse_args()
    try:
        print(f"merged: {merge(args)}")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
