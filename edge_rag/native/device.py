"""What the machine is and what it has: cores, memory. Values only; decisions are made in `policy`.

A process may have less than its machine: control groups (containers, systemd units) bound its memory and its share of
the cores. Both of their versions are read, the group of this process and all around it, because any may be the bound.

Where the GPU shares the machine's memory (Jetson), CUDA's own figure leaves out the page cache and is too small: there
MemAvailable counts, as on a CPU. A discrete GPU is asked through NVML, NVIDIA's library (nvidia-ml-py, optional).
"""

import importlib
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import psutil
from msgspec.structs import replace

from edge_rag.records import Power, Record

ROOT = Path("/")  # of /proc and /sys; tests have their own
CGROUPS = "sys/fs/cgroup"
JETSON = "NVIDIA Jetson"  # begins the model in a Jetson's device tree
INTEGRATED = "(nvgpu)"  # stands in NVML's name of a Jetson's GPU
MEMORY_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
MEMORY_USES = ("memory.current", "memory.usage_in_bytes")
FILE_PAGES = ("active_file", "inactive_file")  # page cache: given up when memory is short


class DeviceMemory(Record, frozen=True):
    """Memory that weights and KV cells can be put in, in bytes.

    `kind`: the machine's ("cpu"), the machine's and shared with its GPU ("integrated"), or the GPU's own ("discrete").
    `note`: why a GPU that may be there was not asked; '' when there is nothing to say.
    """

    kind: Literal["cpu", "integrated", "discrete"]
    total: int
    available: int
    note: str = ""


def physical_cores(root: Path = ROOT) -> int:
    """Cores this process may use, hyper-threads counted once: more threads than that slow llama.cpp down.

    Of a part of a core nothing is counted: threads that wait for each other would wait for the one that has no time.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min((_cpu_quota(group) for group in _groups("cpu", root)), default=math.inf)
    return max(1, int(min(allowed, psutil.cpu_count(logical=False) or allowed, quota)))


def host_memory(root: Path = ROOT) -> DeviceMemory:
    """The machine's memory, as far as this process may use it; available is what can be had without swapping."""
    machine = psutil.virtual_memory()
    bounds = [bound for group in _groups("memory", root) if (bound := _memory_bound(group))]
    return DeviceMemory(
        kind="integrated" if JETSON in _text(root / "proc/device-tree/model") else "cpu",
        total=min([machine.total, *(limit for limit, _ in bounds)]),
        available=min([machine.available, *(left for _, left in bounds)]),
    )


def memory(root: Path = ROOT) -> DeviceMemory:
    """The memory that a GPU computes in; the machine's where the two are the same, or where no GPU could be asked.

    Of several GPUs (CUDA_VISIBLE_DEVICES is heeded) the one with the least memory available stands for all.
    """
    host = host_memory(root)
    if host.kind == "integrated":
        return host
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return replace(host, note="the GPU's memory is not known, because nvidia-ml-py is not installed")
    try:
        nvml.nvmlInit()
        try:
            return min((_gpu_memory(nvml, gpu, host) for gpu in _visible(nvml)), key=lambda found: found.available)
        finally:
            nvml.nvmlShutdown()
    except (nvml.NVMLError, ValueError) as error:  # ValueError: no GPU may be used
        return replace(host, note=f"the GPU's memory is not known: {error}")


def memory_available() -> int:
    """Bytes that can be allocated without swapping."""
    return host_memory().available


def memory_used() -> int:
    """Resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def power() -> Power:
    """How warm the device is and what it runs on; what it has no sensors for is not known and counts as fine."""
    sensors = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    warmest = max((each.current for group in sensors.values() for each in group if each.current), default=None)
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return Power(celsius=warmest, on_battery=battery is not None and battery.power_plugged is False)


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
    lines = _text(ROOT / "proc/cpuinfo").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


# --- NVML ------------------------------------------------------------------------------------------------------------


def _visible(nvml: Any) -> list[Any]:
    """The GPUs that CUDA may use. Raises ValueError when there is none."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(nvml.nvmlDeviceGetCount())) if named is None else named.split(",")
    found = [_gpu(nvml, name.strip()) for name in names if name.strip()]
    if not found:
        raise ValueError("no GPU may be used")
    return found


def _gpu(nvml: Any, name: str) -> Any:
    """By number or by UUID, as in CUDA_VISIBLE_DEVICES."""
    return nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)


def _gpu_memory(nvml: Any, gpu: Any, host: DeviceMemory) -> DeviceMemory:
    if INTEGRATED in nvml.nvmlDeviceGetName(gpu):
        return replace(host, kind="integrated")
    found = nvml.nvmlDeviceGetMemoryInfo(gpu)
    return DeviceMemory(kind="discrete", total=int(found.total), available=int(found.free))


# --- control groups --------------------------------------------------------------------------------------------------


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The folders of this process's control group and of all around it; those that are not to be seen are missing.

    /proc/self/cgroup has a line 'number:controllers:path' for each hierarchy; version 2 has one, without controllers.
    """
    paths = {"": "/"}
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    mount = root / CGROUPS / (controller if controller in paths else "")
    innermost = mount / paths.get(controller, paths[""]).lstrip("/")
    return (group for group in (innermost, *innermost.parents) if group.is_relative_to(mount) and group.is_dir())


def _memory_bound(group: Path) -> tuple[int, int] | None:
    """A group's limit, and the bytes that are left of it; None when it has no limit."""
    limits = [number for name in MEMORY_LIMITS if (number := _number(_text(group / name))) is not None]
    used = next((number for name in MEMORY_USES if (number := _number(_text(group / name))) is not None), 0)
    if not limits:
        return None
    lines = [line.split() for line in _text(group / "memory.stat").splitlines()]
    stat = {name: int(value) for name, value in lines}
    cache = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in FILE_PAGES)  # total_: version 1, groups within
    return min(limits), max(0, min(limits) - used + min(cache, used))


def _cpu_quota(group: Path) -> float:
    """Cores' worth of time that a group may use."""
    quota, _, period = _text(group / "cpu.max").partition(" ")
    if not period:
        quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
    allowed, of = _number(quota), _number(period)
    return allowed / of if allowed is not None and of else math.inf


def _number(text: str) -> int | None:
    """A number of a control group's file; None for 'max', -1 and what is not there: no limit."""
    return int(text) if text.strip().isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
