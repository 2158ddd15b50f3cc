"""What the machine is and what it has: cores, memory. Values only; decisions are made in `policy`."""

import os
import platform
from pathlib import Path

import psutil


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once: more threads than that slow llama.cpp down."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def memory_available() -> int:
    """Bytes that can be allocated without swapping."""
    return int(psutil.virtual_memory().available)


def memory_used() -> int:
    """Resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def describe() -> dict[str, str]:
    """Machine, operating system and Python, for `status` and for benchmark records."""
    return {
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": str(physical_cores()),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or "unknown"
