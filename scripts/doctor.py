#!/usr/bin/env python3
"""Says whether this machine is fit to train, and what to do where it is not.

    python scripts/doctor.py [--lang en|zh] [--json]

Exit code 1 when something would stop training, 0 otherwise (a machine without a GPU is no fault).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
OLDEST_TORCH = (2, 10)  # closes the last known way around torch.load(weights_only=True)
VERDICTS = {"ok": ("ok", "正常"), "warning": ("warning", "注意"), "problem": ("problem", "故障")}

# (English, Chinese) -> the one to print
Translate = Callable[[str, str], str]


@dataclass(frozen=True)
class Check:
    name: str
    verdict: str  # ok, warning, problem
    finding: str
    advice: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def check_python(t: Translate, version: tuple[int, int, int] | None = None) -> Check:
    version = version or sys.version_info[:3]
    text = ".".join(map(str, version))
    values = {"version": text}
    if (3, 11) <= version[:2] <= (3, 13):
        return Check("python", "ok", f"{text} ({sys.executable})", values=values)
    return Check(
        "python",
        "problem",
        text,
        t(
            "use Python 3.11, 3.12 or 3.13: QUEQIAO_PYTHON=/path/to/python3.12 bash scripts/setup.sh",
            "请使用 Python 3.11、3.12 或 3.13：QUEQIAO_PYTHON=/path/to/python3.12 bash scripts/setup.sh",
        ),
        values,
    )


def check_machine(t: Translate) -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    finding = t(
        f"{platform.system()} {platform.machine()}, {cores} CPU cores, {memory / GIB:.0f} GiB of memory",
        f"{platform.system()} {platform.machine()}，{cores} 个 CPU 核，内存 {memory / GIB:.0f} GiB",
    )
    values = {"system": platform.system(), "cpu_cores": cores, "memory_bytes": memory}
    if platform.system() != "Linux":
        return Check("machine", "problem", finding, t("training runs on Linux", "训练需要 Linux"), values)
    if memory < 6 * GIB:
        advice = t("under 6 GiB the demo may run out of memory", "内存不足 6 GiB，演示可能会内存溢出")
        return Check("machine", "warning", finding, advice, values)
    return Check("machine", "ok", finding, values=values)


def check_compiler(t: Translate) -> Check:
    found = {name: path for name in ("c++", "nvcc") if (path := shutil.which(name))}
    finding = ", ".join(found.values()) or t("none found", "未找到")
    if "c++" not in found:
        advice = t(
            "DeepSpeed compiles operators when first used (CPU offload, for one): apt install g++",
            "DeepSpeed 会在首次使用时编译算子（例如 CPU offload）：apt install g++",
        )
        return Check("compiler", "warning", finding, advice, {"found": found})
    return Check("compiler", "ok", finding, values={"found": found})


def driver_gpus() -> list[dict[str, str]] | None:
    """What nvidia-smi says, a dict per GPU; None where there is no driver."""
    keys = ("name", "driver_version", "memory.total", "memory.used")
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip(keys, row, strict=False)) for row in rows] or None


def check_driver(t: Translate, gpus: list[dict[str, str]] | None, seen_by_torch: int = 0) -> Check:
    if gpus is None and seen_by_torch:  # a container without the tool
        finding = t(
            f"no nvidia-smi, but torch sees {seen_by_torch} GPU(s)",
            f"没有 nvidia-smi，但 torch 看到 {seen_by_torch} 块 GPU",
        )
        return Check("driver", "ok", finding)
    if gpus is None:
        return Check(
            "driver",
            "warning",
            t("no NVIDIA driver (nvidia-smi did not answer)", "没有 NVIDIA 驱动（nvidia-smi 无响应）"),
            t(
                "the CPU is enough for the demo and the tests; train real models on a machine with NVIDIA GPUs",
                "CPU 足够运行演示和测试；正式训练请换到带 NVIDIA GPU 的机器",
            ),
        )
    version = gpus[0].get("driver_version", "?")
    return Check("driver", "ok", t(f"NVIDIA {version}, {len(gpus)} GPU(s)", f"NVIDIA {version}，{len(gpus)} 块 GPU"),
                 values={"version": version, "gpus": gpus})  # fmt: skip


def check_torch(t: Translate, version: str, cuda: str | None, available: bool, has_driver: bool) -> Check:
    """torch and its CUDA build against the driver.  The facts are arguments, so that a test can make them up."""
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    finding = f"{version}, " + (f"CUDA {cuda}" if cuda else t("CPU build", "CPU 版"))
    values = {"version": version, "cuda": cuda, "cuda_available": available}
    if number < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        advice = t(
            f"torch {oldest} or newer is needed (older ones can be made to run code by a checkpoint): "
            "bash scripts/setup.sh",
            f"需要 torch {oldest} 或更新版本（旧版加载权重时可能被植入代码）：bash scripts/setup.sh",
        )
        return Check("torch", "problem", finding, advice, values)
    if has_driver and cuda is None:
        advice = t(
            "this torch cannot use the GPU here; reinstall it: .venv/bin/pip install --force-reinstall "
            "-r requirements/torch.txt -c requirements/cuda.txt (check PIP_INDEX_URL and QUEQIAO_TORCH_INDEX)",
            "当前 torch 是 CPU 版，用不了本机的 GPU，请重装：.venv/bin/pip install --force-reinstall "
            "-r requirements/torch.txt -c requirements/cuda.txt（并检查 PIP_INDEX_URL、QUEQIAO_TORCH_INDEX）",
        )
        return Check("torch", "problem", finding, advice, values)
    if has_driver and not available:
        advice = t(
            f"torch does not see the GPU: the driver is probably older than CUDA {cuda} asks for, or "
            "CUDA_VISIBLE_DEVICES is empty; update the driver",
            f"torch 看不到 GPU：多半是驱动版本低于 CUDA {cuda} 的要求，或 CUDA_VISIBLE_DEVICES 为空；请升级驱动",
        )
        return Check("torch", "problem", finding, advice, values)
    return Check("torch", "ok", finding, values=values)


def check_gpus(t: Translate, torch: Any) -> Iterator[Check]:
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        gib = {"total": total / GIB, "used": (total - free) / GIB, "free": free / GIB}
        finding = t(
            f"{facts.name} (sm_{facts.major}{facts.minor}), {gib['total']:.1f} GiB: {gib['used']:.1f} used, "
            f"{gib['free']:.1f} free",
            f"{facts.name}（sm_{facts.major}{facts.minor}），共 {gib['total']:.1f} GiB：已用 {gib['used']:.1f}，"
            f"可用 {gib['free']:.1f}",
        )
        values = {"name": facts.name, "total_bytes": total, "used_bytes": total - free, "free_bytes": free}
        if free < 0.8 * total:
            advice = t(
                "somebody else is using this GPU (nvidia-smi shows who); choose others with CUDA_VISIBLE_DEVICES",
                "这块 GPU 正被占用（nvidia-smi 可查是谁）；可用 CUDA_VISIBLE_DEVICES 选择其他 GPU",
            )
            yield Check(f"gpu {index}", "warning", finding, advice, values)
        else:
            yield Check(f"gpu {index}", "ok", finding, values=values)


def check_cudnn(t: Translate, torch: Any) -> Check:
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if version:
        return Check("cudnn", "ok", str(version), values={"version": version})
    if torch.cuda.is_available():
        advice = t("torch found no cuDNN; reinstall torch", "torch 未找到 cuDNN，请重装 torch")
        return Check("cudnn", "problem", t("missing", "缺失"), advice)
    return Check("cudnn", "ok", t("none, and without a GPU none is needed", "无；没有 GPU 时不需要"))


def check_bf16(t: Translate, torch: Any) -> Check:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        advice = t(
            "this GPU has no bf16 (Ampere and later have): set the precision to fp16 or fp32",
            "该 GPU 不支持 bf16（Ampere 及以后才有）：请把精度设为 fp16 或 fp32",
        )
        return Check("bf16", "warning", t("not on this GPU", "该 GPU 不支持"), advice, {"supported": False})
    torch.manual_seed(0)
    left, right = torch.randn(2, 64, 64, device=device)
    error = ((left.bfloat16() @ right.bfloat16()).float() - left @ right).abs().max() / 64**0.5
    if error.item() > 0.05:  # bf16 keeps 8 bits; entries of the product are about 8
        advice = t("bf16 matrix products are wrong here; use fp32", "本机 bf16 矩阵乘结果有误，请使用 fp32")
        return Check("bf16", "problem", f"{error.item():.3f}", advice)
    where = (
        t("on the GPU", "GPU") if device == "cuda" else t("on the CPU (fp32 is the default there)", "CPU（默认 fp32）")
    )
    return Check("bf16", "ok", where, values={"supported": True, "device": device})


def check_attention(t: Translate, torch: Any) -> Check:
    """Runs scaled_dot_product_attention through each fused kernel and compares with the plain one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 128, 64, device=device, dtype=dtype)
    attend = torch.nn.functional.scaled_dot_product_attention
    with sdpa_kernel(SDPBackend.MATH):
        plain = attend(query, key, value).float()
    works: list[str] = []
    wrong: list[str] = []
    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    for name, backend in kernels.items():
        try:
            with sdpa_kernel(backend), warnings.catch_warnings(action="ignore"):
                error = (attend(query, key, value).float() - plain).abs().max().item()
        except RuntimeError:  # not built, or not for this device
            continue
        (works if error < 1e-2 else wrong).append(name)
    values = {"device": device, "works": works, "wrong": wrong}
    finding = t(f"fused on {device}: ", f"{device} 融合内核：") + (", ".join(works) or t("none", "无"))
    if wrong:
        advice = t(f"wrong results from {wrong}: update torch or the driver", f"{wrong} 结果有误：请升级 torch 或驱动")
        return Check("attention", "problem", finding, advice, values)
    if not works:
        advice = t("training works, but slower and with more memory", "可以训练，但更慢、更占显存")
        return Check("attention", "warning", finding, advice, values)
    return Check("attention", "ok", finding, values=values)


ALL_REDUCE = """
import torch, torch.cuda.nccl as nccl
gpus = [torch.full((1024,), float(i + 1), device=f"cuda:{i}") for i in range(torch.cuda.device_count())]
nccl.all_reduce(gpus)
assert all(float(g[0]) == len(gpus) * (len(gpus) + 1) / 2 for g in gpus), [float(g[0]) for g in gpus]
"""


def check_collectives(t: Translate, torch: Any) -> Check:
    import torch.distributed as dist

    if not torch.cuda.is_available():
        if dist.is_available() and dist.is_gloo_available():
            return Check("nccl", "ok", t("no GPU: CPU processes use gloo", "无 GPU：CPU 进程使用 gloo"))
        advice = t("this torch has no gloo: one process only", "该 torch 不含 gloo：只能单进程运行")
        return Check("nccl", "warning", t("neither NCCL nor gloo", "NCCL 和 gloo 都没有"), advice)
    if not dist.is_nccl_available():
        advice = t("several GPUs cannot work together with this torch", "该 torch 无法多卡训练")
        verdict = "problem" if torch.cuda.device_count() > 1 else "warning"
        return Check("nccl", verdict, t("missing", "缺失"), advice)
    version = ".".join(map(str, torch.cuda.nccl.version()))
    count = torch.cuda.device_count()
    if count == 1:
        return Check("nccl", "ok", version, values={"version": version})
    try:
        # In a process of its own: where the links between GPUs are broken, this hangs.
        subprocess.run([sys.executable, "-c", ALL_REDUCE], check=True, timeout=120, capture_output=True, text=True)
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or str(error))[-300:]
        advice = t("the GPUs cannot exchange data; try NCCL_P2P_DISABLE=1, NCCL_DEBUG=INFO shows more. ",
                   "多卡之间无法通信；可尝试 NCCL_P2P_DISABLE=1，用 NCCL_DEBUG=INFO 查看详情。")  # fmt: skip
        return Check("nccl", "problem", version, advice + said, {"version": version})
    finding = t(f"{version}, all-reduce over {count} GPUs is right", f"{version}，{count} 卡 all-reduce 正确")
    return Check("nccl", "ok", finding, values={"version": version})


def check_packages(t: Translate) -> Check:
    """What pyproject.toml asks for against what is installed."""
    import tomllib  # here, so that an older Python gets as far as being told that it is too old

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found: dict[str, str | None] = {}
    faults = []
    for line in project["dependencies"]:
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate():
            continue
        try:
            found[wanted.name] = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            found[wanted.name] = None
        if found[wanted.name] is None or not wanted.specifier.contains(found[wanted.name] or "", prereleases=True):
            faults.append(f"{wanted.name} {found[wanted.name] or t('missing', '缺失')} ({wanted.specifier})")
    finding = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    if faults:
        return Check("packages", "problem", ", ".join(faults), "bash scripts/setup.sh", {"versions": found})
    return Check("packages", "ok", finding, values={"versions": found})


def check_space(t: Translate, name: str, path: str, warn: float, stop: float, advice: str) -> Check:
    """Free space at `path` in bytes against two limits in GiB."""
    if not Path(path).exists():
        return Check(name, "warning", t(f"{path} is missing", f"{path} 不存在"), advice)
    usage = shutil.disk_usage(path)
    finding = t(f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free at {path}",
                f"{path}：共 {usage.total / GIB:.1f} GiB，可用 {usage.free / GIB:.1f} GiB")  # fmt: skip
    verdict = "problem" if usage.free < stop * GIB else "warning" if usage.free < warn * GIB else "ok"
    values = {"free_bytes": usage.free, "total_bytes": usage.total}
    return Check(name, verdict, finding, advice if verdict != "ok" else "", values)


def guarded(t: Translate, name: str, check: Callable[[], Check | Iterator[Check]]) -> list[Check]:
    """A check that breaks is a finding, not the end of the visit."""
    try:
        done = check()
        return [done] if isinstance(done, Check) else list(done)
    except Exception as error:
        said = f"{type(error).__name__}: {str(error)[:300]}"
        return [Check(name, "problem", said, t("this check itself failed", "检查本身出错"))]


def examine(t: Translate) -> list[Check]:
    checks = guarded(t, "python", lambda: check_python(t))
    checks += guarded(t, "machine", lambda: check_machine(t))
    gpus = driver_gpus()
    try:
        import torch
    except Exception as error:
        checks += guarded(t, "driver", lambda: check_driver(t, gpus))
        checks.append(Check("torch", "problem", f"{type(error).__name__}: {error}", "bash scripts/setup.sh"))
    else:
        available = torch.cuda.is_available()
        version, cuda = torch.__version__, torch.version.cuda
        seen = torch.cuda.device_count() if available else 0
        checks += guarded(t, "driver", lambda: check_driver(t, gpus, seen))
        checks += guarded(t, "torch", lambda: check_torch(t, version, cuda, available, gpus is not None))
        checks += guarded(t, "gpu", lambda: check_gpus(t, torch))
        for name, check in {
            "cudnn": check_cudnn, "bf16": check_bf16, "attention": check_attention, "nccl": check_collectives
        }.items():  # fmt: skip
            checks += guarded(t, name, lambda check=check: check(t, torch))  # type: ignore[misc]
    checks += guarded(t, "packages", lambda: check_packages(t))
    checks += guarded(t, "compiler", lambda: check_compiler(t))
    room = t(
        "checkpoints and shards need room: point run.dir to another disk",
        "检查点和分片需要空间：可把 run.dir 指到别的磁盘",
    )
    checks += guarded(t, "disk", lambda: check_space(t, "disk", str(ROOT), 20, 2, room))
    shm = t(
        "loader workers hand batches over in shared memory; in Docker start with --shm-size=8g, or fewer workers",
        "数据加载进程通过共享内存传递数据；Docker 请加 --shm-size=8g，或减少加载进程数",
    )
    checks += guarded(t, "shared memory", lambda: check_space(t, "shared memory", "/dev/shm", 1, 0.03, shm))
    return checks


def report(checks: list[Check], t: Translate) -> str:
    lines = []
    for check in checks:
        lines.append(f"{t(*VERDICTS[check.verdict]):<8} {check.name:<14} {check.finding}")
        if check.advice:
            lines.append(f"{'':<23}  -> {check.advice}")
    num = {verdict: sum(check.verdict == verdict for check in checks) for verdict in VERDICTS}
    if num["problem"]:
        lines.append(t(f"{num['problem']} problem(s) to solve first.", f"有 {num['problem']} 处故障，请先解决。"))
    else:
        lines.append(t(f"Fit to train ({num['warning']} warning(s)).", f"可以训练（{num['warning']} 处注意）。"))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lang", choices=("en", "zh"), default="en", help="language of the report / 报告语言")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()

    def t(english: str, chinese: str) -> str:
        return chinese if args.lang == "zh" else english

    checks = examine(t)
    healthy = all(check.verdict != "problem" for check in checks)
    if args.json:
        print(json.dumps({"ok": healthy, "checks": [asdict(check) for check in checks]}, ensure_ascii=False, indent=2))
    else:
        print(report(checks, t))
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
