"""How much memory a model takes where it is."""

from __future__ import annotations

from pathlib import Path

import torch


def used_bytes(device: torch.device) -> tuple[int, int]:
    """-> used, and in all: of the GPU, by whomever; on a CPU of this process, and of the machine."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free, total
    found = {}
    for file, name in (("/proc/self/status", "VmRSS"), ("/proc/meminfo", "MemTotal")):
        try:
            lines = Path(file).read_text().splitlines()
        except OSError:  # not Linux
            lines = []
        found[name] = next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
    return found["VmRSS"], found["MemTotal"]
