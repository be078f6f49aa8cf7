"""Stage one's training step at full size on one GPU: the shipped recipe with random weights, pixels and captions.

    python benchmarks/stage_one.py --batch 100 256

Model, losses, precision, optimizer and DeepSpeed engine are those of `experiment=stage_one/visualglm`; more Hydra
overrides may follow.  Prints one line a variant: samples/s, TFLOP/s (of the arithmetic that is done), share of the
GPU's peak, peak memory, milliseconds a step; with --profile also where time goes.  It times the step alone: forward,
backward, clipping, optimizer; no data loading.  Variants run in one process, so compare their ratios.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from omegaconf import DictConfig

from data.batch import ImageTextBatch
from train.config import build, compose
from train.distributed import Ranks
from train.engine import Engine, resolve_precision, store_frozen
from train.pretrain import flops_counter
from train.run import Run, make_engine
from train.stage import Stage
from train.tracking import peak_tflops

RECIPE = ["experiment=stage_one/visualglm", "data.source.zh.paths=none", "data.source.en.paths=none"]


def recipe_stage(config: DictConfig, device: torch.device, *, vocab_size: int) -> Stage:
    with device:  # 1.2 billion random numbers are drawn faster there
        vision = build(config.model.vision)
        qformer = build(config.model.qformer, vocab_size=vocab_size, pad_id=0, image_width=vision.width)
        model = build(config.model.image_text, vision=vision, qformer=qformer)
    return Stage(model.to(device), build(config.train.loss), Ranks.alone())


def generated_batch(*, size: int, image_size: int, length: int, shortest: int, vocab_size: int) -> ImageTextBatch:
    """Captions of `shortest` to `length` tokens, padded to `length`."""
    generator = torch.Generator().manual_seed(0)
    size_B = torch.randint(shortest, length + 1, (size,), generator=generator)
    size_B[0] = length
    mask_BL = torch.arange(length) < size_B[:, None]
    ids_BL = torch.randint(103, vocab_size - 1, (size, length), generator=generator).masked_fill(~mask_BL, 0)
    row_B = torch.arange(size)
    batch = ImageTextBatch(
        image_BCHW=torch.randint(0, 256, (size, 3, image_size, image_size), dtype=torch.uint8, generator=generator),
        text_ids_BL=ids_BL,
        text_mask_BL=mask_BL,
        bos_id_B=torch.full((size,), vocab_size - 1),
        image_key_B=row_B,
        text_key_B=row_B + size,
        row_B=row_B,
        language_B=row_B % 2,
        languages=("zh", "en"),
        pad_id=0,
        step=0,
    )
    return batch.agreed(step_target_tokens=batch.num_target_tokens, text_length=length)


def measure(engine: Engine, batch: ImageTextBatch, *, steps: int, warm_up: int, profile: bool) -> tuple[float, float]:
    """-> (median seconds a step, peak memory in GiB)"""

    def step(number: int) -> None:
        output = engine(replace(batch, step=number))
        engine.backward(sum(output.losses.values()))
        engine.step(1.0)

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
        with torch.profiler.profile() as trace:
            step(0)
            torch.cuda.synchronize()
        print(trace.key_averages().table(sort_by="cuda_time_total", row_limit=45, max_name_column_width=90))
    return times[len(times) // 2] / 1e3, torch.cuda.max_memory_allocated() / 2**30


def run(args: argparse.Namespace, batch_size: int, length: int) -> str:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    sizes = [f"train.global_batch_size={batch_size}", "train.accumulate=1"]
    config = compose("pretrain", [*RECIPE, *sizes, *args.overrides])
    torch.manual_seed(0)
    stage = recipe_stage(config, device, vocab_size=args.vocab)
    precision = resolve_precision(config.train.precision, device)
    store_frozen(stage, precision)
    engine = make_engine(config, Run(device, Ranks.alone(), Path()), stage, precision)
    batch = generated_batch(
        size=batch_size,
        image_size=config.model.vision.image_size,
        length=length,
        shortest=min(args.shortest, length),
        vocab_size=args.vocab,
    ).to(device)
    seconds, memory = measure(engine, batch, steps=args.steps, warm_up=args.warm_up, profile=args.profile)
    tflops = batch_size * flops_counter(stage.model)(batch) / seconds / 1e12
    peak = peak_tflops(torch.cuda.get_device_name())
    share = f"{tflops / peak:.1%} of peak" if peak else "peak unknown"
    return (
        f"batch {batch_size:4d}  caption tokens {length:3d}  {batch_size / seconds:7.1f} samples/s  "
        f"{tflops:6.1f} TFLOP/s  {share}  {memory:5.1f} GiB  {seconds * 1e3:7.1f} ms/step"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[100, 256])
    parser.add_argument("--caption-tokens", type=int, nargs="+", default=[32], help="the padded length")
    parser.add_argument("--shortest", type=int, default=8, help="captions have between this many tokens and all")
    parser.add_argument("--vocab", type=int, default=21129, help="bert-base-chinese and one generation token")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    args, overrides = parser.parse_known_args()
    args.overrides = overrides
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU; torch.cuda.is_available() is False")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    for batch_size in args.batch:
        for length in args.caption_tokens:
            print(run(args, batch_size, length), flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
