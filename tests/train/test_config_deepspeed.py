"""The DeepSpeed section: DeepSpeed would ignore a mistyped key, and find a wrong value when all is loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from train.config import CONFIG_DIR, compose
from train.config_check import ConfigError

SMOKE = "experiment=smoke"


def test_mistyped_key_in_a_files_deepspeed_section(tmp_path: Path) -> None:
    configs = tmp_path / "configs"
    shutil.copytree(CONFIG_DIR, configs)
    (configs / "train/engine/mine.yaml").write_text("zero_stage: 1\ndeepspeed:\n  wall_clock_brakedown: true\n")
    with pytest.raises(ConfigError, match=r"mine.yaml, line 3.*wall_clock_breakdown"):
        compose("pretrain", [SMOKE, "train/engine=mine"], config_dir=configs)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "zero_optimization.reduce_bucket_size=-5",
            "zero_optimization.reduce_bucket_size=-5 .*: should be greater than 0",
        ),
        (
            "zero_optimization.stage3_prefetch_bucket_size=-1",
            "stage3_prefetch_bucket_size=-1 .*greater than or equal to 0",
        ),
        ("zero_optimization.prefetch_bucket_size=-1", "zero_optimization.prefetch_bucket_size=-1 .*equal to 0"),
        ("zero_optimization.overlap_comm=sometimes", "overlap_comm=sometimes .*valid boolean"),
        ("zero_optimization={reduce_bucket_size: lots}", "reduce_bucket_size=lots .*valid integer"),
        (
            "zero_optimization.offload_optimizer.device=disk",
            "offload_optimizer.device=disk .*should be 'none', 'cpu' or 'nvme'",
        ),
        ("zero_optimization.offload_optimizer.ratio=2", "offload_optimizer.ratio=2 .*less than or equal to 1"),
        ("zero_optimization.offload_optimizer={ratio: 0.5}", "Partial offloading only supported for ZeRO Stage 3"),
        ("zero_optimization=3", "zero_optimization=3 .*valid dictionary"),
        ("comms_logger.prof_ops=all", "comms_logger.prof_ops=all .*valid list"),
        ("compile.passes=[z1,z9]", r"compile.passes.1=z9 .*'z1', 'z3', 'autosp' or 'autotp'"),
        ("torch_autocast.dtype=fp8", "torch_autocast.dtype=fp8 .*'fp32', 'float32'"),
        ("torch_autocast.enabled=sure", "torch_autocast.enabled=sure .*valid boolean"),
        ("wall_clock_breakdown=never", "wall_clock_breakdown=never .*valid boolean"),
        ("steps_per_print=0", "steps_per_print=0 .*greater than or equal to 1"),
        ("communication_data_type=int8", "communication_data_type=int8 .*'fp32', 'fp16' or 'bf16'"),
        ("activation_checkpointing.number_checkpoints=-1", "number_checkpoints=-1 .*greater than or equal to 1"),
        ("flops_profiler.profile_step=first", "flops_profiler.profile_step=first .*valid integer"),
        ("aio.block_size=0", "aio.block_size=0 .*greater than or equal to 1"),
        ("timers.throughput.enabled=5", "timers.throughput.enabled=5 .*valid boolean"),
        ("data_types.grad_accum_dtype=fp64", "grad_accum_dtype=fp64 .*'fp32', 'fp16' or 'bf16'"),
    ],
)
def test_impossible_value_in_the_deepspeed_section(override: str, message: str) -> None:
    override = f"train.engine.deepspeed.{override}"
    with pytest.raises(ConfigError, match=rf"^train\.engine\.deepspeed\..*{message}") as error:
        compose("pretrain", [SMOKE, override])
    assert f"on the command line: {override}" in str(error.value)


def test_impossible_value_in_a_files_deepspeed_section(tmp_path: Path) -> None:
    configs = tmp_path / "configs"
    shutil.copytree(CONFIG_DIR, configs)
    text = "zero_stage: 3\ndeepspeed:\n  zero_optimization:\n    offload_param:\n      buffer_count: none\n"
    (configs / "train/engine/mine.yaml").write_text(text)
    with pytest.raises(
        ConfigError, match=r"offload_param.buffer_count=none \(configs/train/engine/mine.yaml, line 5\)"
    ):
        compose("pretrain", [SMOKE, "train/engine=mine"], config_dir=configs)


@pytest.mark.parametrize(
    "overrides",
    [
        ("zero_optimization={reduce_bucket_size: 5e7, overlap_comm: true, offload_optimizer: {device: cpu}}",),
        ("zero_optimization.offload_optimizer={device: nvme, nvme_path: /tmp, ratio: 0.5}",),
        ("zero_optimization.stage3_param_persistence_threshold=0",),
        ("zero_optimization.reduce_bucket_size=auto",),
        ("torch_autocast={enabled: true, dtype: bfloat16, lower_precision_safe_modules: [torch.nn.Linear]}",),
        ("flops_profiler={enabled: true, module_depth: -1}", "wall_clock_breakdown=true"),
        ("aio.queue_depth=32", "timers.throughput.synchronized=false", "gradient_predivide_factor=2"),
        ("comms_logger={enabled: true, prof_ops: [all_reduce]}", "data_types.grad_accum_dtype=bf16"),
    ],
)
def test_what_deepspeed_takes_passes(overrides: tuple[str, ...]) -> None:
    given = [f"train.engine.deepspeed.{override}" for override in overrides]
    compose("pretrain", [SMOKE, "train/engine=zero3", *given])


def test_deepspeed_is_not_imported_for_a_config_without_its_section() -> None:
    code = "import sys; from train.config import compose; compose('pretrain', ['experiment=smoke'])"
    code += "\nprint('deepspeed' in sys.modules, 'pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONFIG_DIR.parent)
    assert done.stdout.splitlines()[-1:] == ["False False"], done.stderr
