"""Stage one's training step at full size on one GPU: random weights, generated pixels and captions.

    python benchmarks/stage_one.py --batch 256 --caption-tokens 32

Prints one line a variant: samples/s, TFLOP/s (of the arithmetic that is done, `blip2.md` 6.1), share of the GPU's peak,
peak memory, milliseconds a step; and, with --profile, where the time goes.  Variants run in one process, one after the
other; compare their ratios.  It times the step alone (forward, backward, optimizer): no data loading, no DeepSpeed.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from data.batch import ImageTextBatch
from model.image_text import ImageTextModel
from model.qformer import QFormer
from model.vision.encoder import eva_vit
from train.distributed import Ranks
from train.loss.stage_one import ImageGroundedTextGeneration, ImageTextContrastive, ImageTextMatching, StageOneLoss
from train.stage import Stage

PEAK_TFLOPS = 989.0  # dense bf16 of H100 and H200 SXM, by the vendor's datasheet


def full_size_stage(device: torch.device, *, vocab_size: int, dropout: float, compile_vision: bool) -> Stage:
    with device:
        vision = eva_vit(compile_blocks=compile_vision, dtype="bfloat16").to(device)
        qformer = QFormer(vocab_size=vocab_size, image_width=vision.width, dropout=dropout)
        model = ImageTextModel(vision, qformer)
    losses = StageOneLoss(ImageTextContrastive(), ImageTextMatching(), ImageGroundedTextGeneration())
    return Stage(model.to(device), losses, Ranks.alone())


def generated_batch(
    device: torch.device, *, batch_size: int, length: int, shortest: int, vocab_size: int
) -> ImageTextBatch:
    """Captions of `shortest` to `length` tokens, padded to `length`."""
    generator = torch.Generator().manual_seed(0)
    size_B = torch.randint(shortest, length + 1, (batch_size,), generator=generator)
    size_B[0] = length
    mask_BL = torch.arange(length) < size_B[:, None]
    ids_BL = torch.randint(103, vocab_size - 1, (batch_size, length), generator=generator).masked_fill(~mask_BL, 0)
    row_B = torch.arange(batch_size)
    batch = ImageTextBatch(
        image_BCHW=torch.randint(0, 256, (batch_size, 3, 224, 224), dtype=torch.uint8, generator=generator),
        text_ids_BL=ids_BL,
        text_mask_BL=mask_BL,
        bos_id_B=torch.full((batch_size,), vocab_size - 1),
        image_key_B=row_B,
        text_key_B=row_B + batch_size,
        row_B=row_B,
        language_B=row_B % 2,
        languages=("zh", "en"),
        pad_id=0,
        step=0,
    )
    return batch.agreed(step_target_tokens=batch.num_target_tokens, text_length=length).to(device)


def step_flops(stage: Stage, *, batch_size: int, length: int) -> float:
    model = stage.model
    vision = model.vision.flops_per_image()
    rest = model.train_flops_per_sample(num_image_tokens=model.vision.num_tokens, text_length=length)
    return batch_size * (vision + rest)


def measure(stage: Stage, batch: ImageTextBatch, *, steps: int, warm_up: int, profile: bool) -> tuple[float, float]:
    """-> (median seconds a step, peak memory in GiB)"""
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.98), weight_decay=0.05, fused=True)

    def step(number: int) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            output = stage(replace(batch, step=number))
        torch.stack(list(output.losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for number in range(warm_up):
        step(number)
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for number in range(steps):
        step(warm_up + number)
        events[number + 1].record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in zip(events[:-1], events[1:], strict=True))
    if profile:
        from torch.profiler import ProfilerActivity, profile as profiled

        with profiled(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
            step(0)
            torch.cuda.synchronize()
        print(trace.key_averages().table(sort_by="cuda_time_total", row_limit=45, max_name_column_width=90))
    return times[len(times) // 2] / 1e3, torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[256])
    parser.add_argument("--caption-tokens", type=int, nargs="+", default=[32], help="the padded length")
    parser.add_argument("--shortest", type=int, default=8, help="captions have between this many tokens and all")
    parser.add_argument("--vocab", type=int, default=21129, help="bert-base-chinese and one generation token")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--compile", action="store_true", help="compile the image encoder's blocks as well")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()

    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for compiled in (False, True) if args.compile else (False,):
        started = time.perf_counter()
        stage = full_size_stage(device, vocab_size=args.vocab, dropout=args.dropout, compile_vision=compiled)
        print(f"built in {time.perf_counter() - started:.1f} s")
        for batch_size in args.batch:
            for length in args.caption_tokens:
                batch = generated_batch(
                    device,
                    batch_size=batch_size,
                    length=length,
                    shortest=min(args.shortest, length),
                    vocab_size=args.vocab,
                )
                seconds, memory = measure(stage, batch, steps=args.steps, warm_up=args.warm_up, profile=args.profile)
                tflops = step_flops(stage, batch_size=batch_size, length=length) / seconds / 1e12
                print(
                    f"batch {batch_size:4d}  caption {length:3d}  compiled {compiled!s:5}  {batch_size / seconds:7.1f} samples/s"
                    f"  {tflops:6.1f} TFLOP/s  {tflops / PEAK_TFLOPS:6.1%} of peak  {memory:5.1f} GiB  {seconds * 1e3:7.1f} ms",
                    flush=True,
                )
        del stage
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
