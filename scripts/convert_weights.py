"""Converts weights between the layouts that people have.

    python scripts/convert_weights.py visualglm SOURCE TARGET --to huggingface --qkv-order blocks
    python scripts/convert_weights.py visualglm SOURCE TARGET --to sat --qkv-order per_head
    python scripts/convert_weights.py adapter SOURCE TARGET --base weights/visualglm-6b
    python scripts/convert_weights.py glm SOURCE TARGET --family chatglm3 --to transformers

visualglm: VisualGLM-6B from SwissArmyTransformer's folder to Hugging Face's layout (safetensors) and back.  No file
says in which order the rows of query_key_value are; the wrong one loads without an error and answers nonsense.
--qkv-order says it: `blocks` for SAT 0.4.1 and later, `per_head` for Hugging Face and SAT before 0.4.1.  Or --reference
names a Hugging Face folder of ChatGLM-6B whose weights the source's language model has, to compare with.  What is
written records its order.  --leave-lora takes the base of a checkpoint that holds a LoRA.

adapter: the LoRA in a checkpoint of VisualGLM's or XrayGLM's fine-tuning -> an adapter that peft loads.  Its base is
converted apart, with --leave-lora.

glm: ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B between their original folders and transformers' GLM.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.weights import chatglm_folder, glm, sat, sat_lora, visualglm, visualglm_convert
from model.weights.checkpoint import read_json


def convert_visualglm(args: argparse.Namespace) -> str:
    reference = None if args.reference is None else chatglm_folder.known_rows(args.reference)
    visualglm_convert.convert(
        args.source,
        args.target,
        to=args.to,
        qkv_order=args.qkv_order,
        reference=reference,
        leave_lora=args.leave_lora,
    )
    record = read_json(args.target / visualglm.RECORD)
    found = f"rows of query_key_value: {record['qkv_order']}"
    left_out = ", ".join(f"{name} ({count})" for name, count in record["left_out"].items())
    return f"{found}; left out, since nothing in them is learned: {left_out}" if left_out else found


def convert_adapter(args: argparse.Namespace) -> str:
    config, file = sat.read_config(args.source), sat.newest_file(args.source)
    adapter = sat_lora.read(sat.read_module(file), config, alpha=args.alpha, file=file)
    sat_lora.write(adapter, args.target, base=args.base)
    return f"rank {adapter.rank} on layers {', '.join(map(str, adapter.layers))}"


def convert_glm(args: argparse.Namespace) -> str:
    glm.convert(args.source, args.target, family=args.family, layout=args.to)
    return f"{args.family} in the layout of {args.to}"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = made.add_subparsers(dest="kind", required=True)
    for name, run in (("visualglm", convert_visualglm), ("adapter", convert_adapter), ("glm", convert_glm)):
        kind = kinds.add_parser(name, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        kind.add_argument("source", type=Path, metavar="SOURCE")
        kind.add_argument("target", type=Path, metavar="TARGET")
        kind.set_defaults(run=run)
        if name == "visualglm":
            kind.add_argument("--to", choices=["sat", "huggingface"], required=True)
            kind.add_argument("--qkv-order", choices=["blocks", "per_head"], help="of the source")
            kind.add_argument("--reference", type=Path, metavar="FOLDER", help="Hugging Face's ChatGLM-6B")
            kind.add_argument("--leave-lora", action="store_true", help="take the base alone")
        elif name == "adapter":
            kind.add_argument("--base", required=True, help="what the adapter belongs to; peft loads it from there")
            kind.add_argument("--alpha", type=float, default=1.0, help="lora_alpha of the training (SAT's default: 1)")
        else:
            kind.add_argument("--family", choices=["chatglm2", "chatglm3", "glm4"], required=True)
            kind.add_argument("--to", choices=["transformers", "original"], required=True)
    return made


def main() -> None:
    args = parser().parse_args()
    try:
        found = args.run(args)
    except ValueError as error:
        raise SystemExit(f"convert_weights: {error}") from error
    print(f"{args.target} is written ({found})")


if __name__ == "__main__":
    main()
