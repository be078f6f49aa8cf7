"""Fine-tuning VisualGLM at full size on one GPU, with random weights: speed, and what QLoRA needs in memory.

    python benchmarks/finetune.py                                            every variant, about 35 s each
    python benchmarks/finetune.py --variants visualglm ours --profile        and where the time of a step goes
    python benchmarks/finetune.py --variants visualglm train/engine=zero1    with another engine
    python benchmarks/finetune.py --tiny --variants ours qlora               the same code on a CPU

Model, adapters, loss, precision, optimizer and DeepSpeed engine are those of `experiment=finetune/visualglm_lora` and
`visualglm_qlora`; more Hydra overrides may follow.  One line a variant: samples/s, tokens/s (real ones, image tokens
included, padding not), TFLOP/s of the arithmetic that is done (recomputed blocks included, `model/flops.py`), its share
of the GPU's peak, peak memory from the first allocation on (QLoRA's: also while it is built).  It times forward,
backward, clipping and optimizer; no data loading.  Each variant is a process of its own, or the peaks would add up.

    visualglm      VisualGLM's recipe: batch 4, every sample padded to 320, LoRA of rank 10 on two blocks, recomputed
    ours           ours at the same batch: padded to the longest of the batch (and to a multiple of 32), grouped by
                   length, LoRA on every map; small batches as CUDA graphs, which train.cuda_graphs=0 leaves out
    large          batch 64 of 112 tokens each, which VisualGLM's own code was measured at
    qlora          VisualGLM's QLoRA recipe: batch 1, four times accumulated, padded to 320; our adapter
    ..._theirs     with VisualGLM's adapter   ..._keep   activations kept   ..._recompute   recomputed

Samples are random ids and pixels: one picture, a question of 4 to 20 tokens, an answer whose length is drawn from a
log-normal with mean 60 (XrayGLM's Chinese reports have 90 characters on average).  The same samples for every variant.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from omegaconf import DictConfig

from data.batch import IGNORED, DialogueBatch, EncodedDialogue
from model.weights.checkpoint import Checkpoint
from model.weights.filling import Home, Part, fill, send_home
from train.config import build, compose
from train.distributed import Ranks
from train.engine import Engine, resolve_precision, store_frozen
from train.loading import padding_multiple
from train.run import Run, make_engine, own_device
from train.stage import Stage
from train.tracking import peak_tflops

FULL = [
    "data.source.mine.path=none",
    "model.llm.tokenizer=null",
    "model.weights.visualglm=none",
    "model.weights.qkv_order=per_head",
    "model.vision.dtype=bfloat16",
    "run.wandb.mode=disabled",
]
TINY = [
    "model.vision.image_size=28",
    "model.vision.width=64",
    "model.vision.num_layers=2",
    "model.vision.num_heads=2",
    "model.vision.mlp_width=64",
    "model.vision.dtype=float32",
    "model.qformer.hidden_size=64",
    "model.qformer.num_layers=2",
    "model.qformer.num_heads=2",
    "model.qformer.intermediate_size=64",
    "model.llm.hidden_size=64",
    "model.llm.num_layers=15",
    "model.llm.num_heads=2",
    "model.llm.inner_size=128",
    "model.llm.vocab_size=1000",
    "model.llm.ids={bos: 994, eos: 995, mask: 990, gmask: 991, pad: 3}",
    "model.llm.dtype=float32",
    "train.precision=bf16",
]
# VisualGLM's finetune_visualglm.sh: LoRA of rank 10 and alpha 1 on the attention of blocks 0 and 14, clipping at 0.1.
# Its q, k and v have a pair of matrices each, peft's one for the three; its precision is fp16, ours bf16.
BLOCKS_0_AND_14 = [f"layers.{block}.attention.{name}" for block in (0, 14) for name in ("query_key_value", "dense")]
THEIRS = [
    f"model.adapter.target_modules=[{','.join(BLOCKS_0_AND_14)}]",
    "model.adapter.alpha=1",
    "train.clip_grad_norm=0.1",
]
KEEP = ["model.llm.checkpoint_activations=false"]
RECOMPUTE = ["model.llm.checkpoint_above=0"]


@dataclass(frozen=True)
class Variant:
    batch_size: int
    overrides: Sequence[str] = ()
    padded: int | None = None  # all samples padded to this length; None: each batch to its own longest
    length: int | None = None  # all samples of just this length; None: drawn
    accumulate: int = 1
    experiment: str = "finetune/visualglm_lora"


VARIANTS = {
    "visualglm": Variant(4, [*THEIRS, *RECOMPUTE], padded=320),
    "visualglm_keep": Variant(4, [*THEIRS, *KEEP], padded=320),
    "ours": Variant(4),
    "ours_recompute": Variant(4, RECOMPUTE),
    "ours_320": Variant(4, padded=320),
    "ours_16": Variant(16),
    "large": Variant(64, RECOMPUTE, length=112),
    "large_keep": Variant(64, KEEP, length=112),
    "large_theirs": Variant(64, [*THEIRS, *RECOMPUTE], length=112),
    "qlora": Variant(1, padded=320, accumulate=4, experiment="finetune/visualglm_qlora"),
    "qlora_theirs": Variant(1, THEIRS, padded=320, accumulate=4, experiment="finetune/visualglm_qlora"),
}


# ------------------------------------------------------------------------------------------------------ the samples


def samples(count: int, *, special: dict[str, int], image_tokens: int, length: int | None) -> list[EncodedDialogue]:
    """ChatGLM-6B's layout (`model/llm/chatglm.py`), of random words, in the order of a data set."""
    random = torch.Generator().manual_seed(0)
    first_special = min(i for i in special.values() if i != special["pad"])

    def words(number: int) -> list[int]:
        return torch.randint(10, first_special, (number,), generator=random).tolist()

    found = []
    for _ in range(count):
        question = int(torch.randint(4, 21, (), generator=random))
        spread = 0.5  # of a log-normal: half of the reports are between 0.7 and 1.4 times the median
        drawn = 60 * torch.exp(spread * torch.randn((), generator=random) - spread**2 / 2)
        before = [*words(2), *[special["pad"]] * image_tokens, *words(question + 8), special["gmask"]]
        answer = int(drawn.clamp(8, 254)) if length is None else length - len(before) - 2
        tail = [*words(answer), special["eos"]]
        ids = [*before, special["bos"], *tail]
        labels = [*[IGNORED] * len(before), special["bos"], *tail]
        found.append(EncodedDialogue(tuple(ids), tuple(labels), (2,)))
    return found


def batches(variant: Variant, config: DictConfig, *, steps: int) -> list[list[DialogueBatch]]:
    """`steps` steps, each a list of micro-batches.  Without a fixed length, rows of `group_steps` steps are grouped by
    length, as the loader does (`data/length_groups.py`)."""
    per_step = variant.batch_size * variant.accumulate
    special = dict(config.model.llm.ids)
    multiple = padding_multiple(config, "cuda") or 1
    image_tokens, image_size = config.model.qformer.num_query_tokens, config.model.vision.image_size
    rows = samples(steps * per_step, special=special, image_tokens=image_tokens, length=variant.length)
    if variant.padded is None:
        group = config.data.loader.group_steps * per_step
        rows = [
            row for at in range(0, len(rows), group) for row in sorted(rows[at : at + group], key=lambda r: len(r.ids))
        ]
    random = torch.Generator().manual_seed(1)
    picture = torch.randint(0, 256, (3, image_size, image_size), dtype=torch.uint8, generator=random)
    found = []
    for at in range(0, len(rows), per_step):
        micro = []
        for number in range(variant.accumulate):
            own = rows[at + number * variant.batch_size :][: variant.batch_size]
            batch = DialogueBatch.collate(
                own,
                [[picture]] * len(own),
                pad_id=special["pad"],
                image_size=image_size,
                language_of=["zh"] * len(own),
                languages=("zh",),
                micro_step=number,
                num_micro_steps=variant.accumulate,
                pad_to_multiple_of=multiple,
            )
            micro.append(batch if variant.padded is None else padded(batch, variant.padded, special["pad"]))
        tokens = sum(batch.num_target_tokens for batch in micro)
        found.append([b.agreed(step_target_tokens=tokens, text_length=b.text_length) for b in micro])
    return found


def padded(batch: DialogueBatch, length: int, pad_id: int) -> DialogueBatch:
    missing = (0, length - batch.text_length)
    pad = torch.nn.functional.pad
    return replace(
        batch,
        ids_BL=pad(batch.ids_BL, missing, value=pad_id),
        labels_BL=pad(batch.labels_BL, missing, value=IGNORED),
        mask_BL=pad(batch.mask_BL, missing, value=False),
    )


# -------------------------------------------------------------------------------------------------------- the model


def build_stage(config: DictConfig, device: torch.device) -> Stage:
    """As `finetune.py`, but random weights, drawn on the device and in 16 bits from the start."""
    with device, default_dtype(getattr(torch, config.model.vision.dtype)):
        vision = build(config.model.vision)
    with device:
        qformer = build(config.model.qformer, vocab_size=1, pad_id=0, image_width=vision.width)
    quantised = config.model.adapter["_target_"].endswith("QLora")
    if not quantised:  # else on the meta device, as the experiment says
        config.model.llm.device, config.model.llm.initial_std = str(device), 0.02
    llm = build(config.model.llm)
    with device:
        model = build(config.model.visual_chat, vision=vision, qformer=qformer, llm=llm)
    adapter = build(config.model.adapter)
    adapter.prepare(model, device=device)
    send_home(model, Home(device))
    if quantised:
        checkpoint = random_checkpoint(llm, device, getattr(torch, config.model.llm.dtype))
        fill(model, checkpoint, [Part(f"llm.{name}", (name,), "llm") for name in checkpoint.shapes])
    adapter.attach(model, device=device)
    return Stage(model, build(config.train.loss), Ranks.alone())


def random_checkpoint(llm: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> Checkpoint:
    """Each tensor is drawn when it is asked for, as one from a file is read."""
    shapes = {name: tuple(parameter.shape) for name, parameter in llm.named_parameters()}

    def read(name: str) -> torch.Tensor:
        tensor = torch.empty(shapes[name], dtype=dtype, device=device)
        return tensor.normal_(0, 0.02) if tensor.ndim > 1 else tensor.fill_(float("norm" in name and "weight" in name))

    return Checkpoint("random numbers", shapes, read)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# --------------------------------------------------------------------------------------------------------- the clock


def one_step(engine: Engine, micro_batches: Sequence[DialogueBatch]) -> None:
    for batch in micro_batches:
        output = engine(batch)
        engine.backward(sum(output.losses.values()))
    engine.step(1.0)


def measure(engine: Engine, steps: Sequence[Sequence[DialogueBatch]], *, rounds: int) -> float:
    """-> seconds for all `steps` once, the median of `rounds`"""
    for micro_batches in steps:
        one_step(engine, micro_batches)
    times = []
    for _ in range(rounds):
        synchronize(engine.device)
        started = time.perf_counter()
        for micro_batches in steps:
            one_step(engine, micro_batches)
        synchronize(engine.device)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory(device: torch.device) -> str:
    """Bytes in GB of 1e9: tensors at the peak, what the allocator took, and all of the GPU that is not free now."""
    if device.type != "cuda":
        return "memory not measured"
    free, whole = torch.cuda.mem_get_info()
    peak, reserved = torch.cuda.max_memory_allocated() / 1e9, torch.cuda.max_memory_reserved() / 1e9
    return f"{peak:5.2f} GB peak ({reserved:5.2f} reserved, {(whole - free) / 1e9:5.2f} of the GPU in use)"


def profile(engine: Engine, steps: Sequence[Sequence[DialogueBatch]], rows: int) -> None:
    """Where the time of three steps goes, by kernels and by the host."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if engine.device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as trace:
        for micro_batches in steps[:3]:
            one_step(engine, micro_batches)
        synchronize(engine.device)
    events = trace.key_averages()
    for name, attribute in (("GPU", "self_device_time_total"), ("host", "self_cpu_time_total")):
        total = sum(getattr(event, attribute) for event in events)
        if not total:  # no GPU
            continue
        print(f"{name}: {total / 3e3:.1f} ms a step; share, ms a step, calls a step")
        for event in sorted(events, key=lambda e: getattr(e, attribute), reverse=True)[:rows]:
            spent = getattr(event, attribute)
            print(f"  {spent / total:5.1%} {spent / 3e3:7.2f} {event.count / 3:7.1f}  {short(event.key)}")


def short(name: str, width: int = 76) -> str:
    return name if len(name) <= width else name[: width // 2 - 2] + " .. " + name[-width // 2 + 2 :]


# ------------------------------------------------------------------------------------------------------ the variants


def run(args: argparse.Namespace, name: str, device: torch.device) -> str:
    variant = VARIANTS[name]
    overrides = [*FULL, *(TINY if args.tiny else []), *variant.overrides, *args.overrides]
    sizes = [
        f"train.global_batch_size={variant.batch_size * variant.accumulate}",
        f"train.accumulate={variant.accumulate}",
    ]
    config = compose("finetune", [f"experiment={variant.experiment}", *overrides, *sizes])
    torch.manual_seed(0)
    started = time.perf_counter()
    precision = resolve_precision(config.train.precision, device)
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        stage = build_stage(config, device)
        store_frozen(stage, precision)
        engine = make_engine(config, Run(device, Ranks.alone(), Path()), stage, precision)
    if args.verbose:
        print(told.getvalue())
    steps = [[batch.to(device) for batch in micro] for micro in batches(variant, config, steps=args.steps)]
    built = time.perf_counter() - started
    seconds = measure(engine, steps, rounds=args.rounds)
    every = [batch for micro in steps for batch in micro]
    rows = sum(map(len, every))
    tokens = sum(int(batch.mask_BL.sum()) for batch in every)
    tflops = sum(stage.model.train_flops_per_sample(batch) * len(batch) for batch in every) / seconds / 1e12
    peak = peak_tflops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    if args.profile:
        profile(engine, steps, args.profile_rows)
    trained = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    return (
        f"{name:15s} batch {variant.batch_size:2d}{f' x {variant.accumulate}' if variant.accumulate > 1 else '':4s} "
        f"{tokens / rows:5.1f} real of {sum(b.ids_BL.numel() for b in every) / rows:5.1f} tokens  "
        f"{rows / seconds:6.1f} samples/s {tokens / seconds:7.0f} tokens/s  {tflops:5.1f} TFLOP/s "
        f"{f'({tflops / peak:.1%})' if peak else '':7s}  {seconds / len(steps) * 1e3:6.1f} ms/step  {memory(device)}  "
        f"ZeRO-{engine.zero_stage}, {trained / 1e6:.2f} M trained, built in {built:.0f} s"
    )


def apart(args: argparse.Namespace) -> None:
    """Every variant in a process of its own."""
    for number, name in enumerate(args.variants):
        options = [f"--steps={args.steps}", f"--rounds={args.rounds}", f"--profile-rows={args.profile_rows}"]
        options += [f"--{flag}" for flag in ("tiny", "profile", "verbose") if getattr(args, flag)]
        options += ["--no-title"] if number else []
        subprocess.run([sys.executable, __file__, "--variants", name, *options, *args.overrides], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=16, help="different steps in a round")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts, after one to warm up")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on a CPU where there is no GPU")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--profile-rows", type=int, default=25)
    parser.add_argument("--verbose", action="store_true", help="also what the run says at its start")
    parser.add_argument("--one-process", action="store_true", help="quicker; only the first variant's memory is right")
    parser.add_argument("--no-title", action="store_true")
    args, args.overrides = parser.parse_known_args()
    if len(args.variants) > 1 and not args.one_process:
        return apart(args)
    device = own_device("auto")
    if device.type == "cpu" and not args.tiny:
        raise SystemExit("this benchmark needs a GPU, or --tiny; torch.cuda.is_available() is False")
    if not args.no_title:
        print(
            torch.cuda.get_device_name() if device.type == "cuda" else "CPU", f"torch {torch.__version__}", flush=True
        )
    for name in args.variants:
        try:
            print(run(args, name, device), flush=True)
        except torch.cuda.OutOfMemoryError as error:
            print(f"{name:15s} does not fit: {str(error).splitlines()[0][:110]}", flush=True)


if __name__ == "__main__":
    main()
