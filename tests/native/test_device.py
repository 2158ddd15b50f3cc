"""What the machine is: values that any machine must have, and what control groups and NVML make of them."""

import mmap
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import msgspec
import psutil
import pytest

from edge_rag.native import device
from edge_rag.native.device import DeviceMemory

GIB = 2**30
MEMINFO = {"MemTotal": 8 * GIB, "MemFree": GIB, "MemAvailable": 6 * GIB}
MEMINFO |= dict.fromkeys(["Buffers", "Cached", "SReclaimable", "Shmem", "Active", "Inactive", "Slab"], 0)

Machine = Callable[[Mapping[str, str]], Path]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Makes a machine's /proc and /sys: 8 GiB, 6 of them available, 8 cores, and whatever files it is given."""
    meminfo = "".join(f"{name}: {count // 1024} kB\n" for name, count in MEMINFO.items())

    def make(files: Mapping[str, str]) -> Path:
        for name, text in {"proc/meminfo": meminfo, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
        monkeypatch.setattr(psutil, "cpu_count", lambda logical: 8)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
        return tmp_path

    return make


def v2(path: str, **files: str) -> dict[str, str]:
    """The files of a control group, version 2: `memory__max` is memory.max."""
    return {f"sys/fs/cgroup{path}/{name.replace('__', '.')}": text for name, text in files.items()}


def v1(controller: str, path: str, **files: str) -> dict[str, str]:
    """The same, version 1."""
    return {f"sys/fs/cgroup/{controller}{path}/{name.replace('__', '.')}": text for name, text in files.items()}


def own(*lines: str) -> dict[str, str]:
    return {"proc/self/cgroup": "".join(f"{line}\n" for line in lines)}


# --- this machine ----------------------------------------------------------------------------------------------------


def test_cores_are_at_least_one_and_no_more_than_this_process_may_use() -> None:
    assert 1 <= device.physical_cores() <= len(os.sched_getaffinity(0))


def test_cores_follow_the_affinity_of_the_process() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert device.physical_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_available_memory_is_less_than_all_memory() -> None:
    assert 0 < device.memory_available() < psutil.virtual_memory().total


def test_memory_of_this_machine_is_within_its_bounds() -> None:
    found = device.host_memory()
    assert found.kind in ("cpu", "integrated")
    assert 0 < found.available < found.total <= psutil.virtual_memory().total


def test_used_memory_is_that_of_this_process_in_bytes() -> None:
    size = 2**26
    before = device.memory_used()
    with mmap.mmap(-1, size) as held:  # not from memory that an allocator has kept
        held.write(bytes(size))
        grown = device.memory_used() - before
    assert 0.8 * size < grown < 3 * size  # the zeros that were written may still be there


def test_the_machine_is_described_in_words() -> None:
    described = device.describe()
    assert set(described) == {"machine", "cpu", "cores", "memory", "system", "python"}
    assert all(described.values())
    assert described["cores"] == str(device.physical_cores())
    assert described["python"] == platform.python_version()
    assert described["memory"].endswith(" GiB")


# --- cores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        pytest.param({}, 8, id="no control groups"),
        pytest.param({**own("0::/"), **v2("", cpu__max="300000 100000\n")}, 3, id="a container"),
        pytest.param({**own("0::/"), **v2("", cpu__max="max 100000\n")}, 8, id="a container without a quota"),
        pytest.param({**own("0::/"), **v2("", cpu__max="250000 100000\n")}, 2, id="half a core is none"),
        pytest.param({**own("0::/"), **v2("", cpu__max="50000 100000\n")}, 1, id="but one there is always"),
        pytest.param({**own("0::/"), **v2("", cpu__max="9900000 100000\n")}, 8, id="a quota above the cores"),
        pytest.param(
            {**own("0::/a/b"), **v2("/a/b", cpu__max="max 100000"), **v2("/a", cpu__max="200000 100000")},
            2,
            id="the quota of a group around it",
        ),
        pytest.param(
            {**own("0::/a"), **v2("/a", cpu__max="400000 100000"), **v2("/b", cpu__max="100000 100000")},
            4,
            id="not the quota of another group",
        ),
        pytest.param(
            {
                **own("3:cpu,cpuacct:/a", "0::/"),
                **v1("cpu", "/a", cpu__cfs_quota_us="200000\n", cpu__cfs_period_us="100000\n"),
            },
            2,
            id="version 1",
        ),
        pytest.param(
            {**own("3:cpu:/a", "0::/"), **v1("cpu", "/a", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")},
            8,
            id="version 1 without a quota",
        ),
        pytest.param(
            {
                **own("3:cpu:/docker/gone", "0::/"),
                **v1("cpu", "", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000"),
            },
            2,
            id="version 1 in a container that sees only itself",
        ),
    ],
)
def test_cores_follow_the_quota_of_the_control_group(files: dict[str, str], cores: int, machine: Machine) -> None:
    assert device.physical_cores(machine(files)) == cores


# --- memory ----------------------------------------------------------------------------------------------------------

LIMITED = {"memory__max": str(4 * GIB), "memory__current": str(3 * GIB)}
CACHED = f"anon 5\nactive_file {GIB // 2}\ninactive_file {GIB}\n"
V1_LIMITED = {"memory__limit_in_bytes": str(4 * GIB), "memory__usage_in_bytes": str(3 * GIB)}
V1_CACHED = f"active_file 1\ninactive_file 1\ntotal_active_file {GIB // 2}\ntotal_inactive_file {GIB}\n"


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        pytest.param({}, 8, 6, id="no control groups"),
        pytest.param({**own("0::/"), **v2("", memory__max="max\n")}, 8, 6, id="no limit"),
        pytest.param({**own("0::/"), **v2("", **LIMITED)}, 4, 1, id="what is left of the limit"),
        pytest.param({**own("0::/"), **v2("", **LIMITED, memory__stat=CACHED)}, 4, 2.5, id="cached files can go"),
        pytest.param(
            {**own("0::/"), **v2("", memory__max=str(4 * GIB), memory__current=str(GIB), memory__stat=CACHED)},
            4,
            4,
            id="no more of them than is used",
        ),
        pytest.param(
            {**own("0::/a"), **v2("/a", **LIMITED, memory__high=str(2 * GIB))},
            2,
            0,
            id="slowed down above 2, and used up",
        ),
        pytest.param(
            {**own("0::/a/b"), **v2("/a/b", memory__max="max", memory__current="5"), **v2("/a", **LIMITED)},
            4,
            1,
            id="the limit of a group around it",
        ),
        pytest.param(
            {**own("0::/"), **v2("", memory__max=str(99 * GIB), memory__current=str(GIB))},
            8,
            6,
            id="a limit above what there is",
        ),
        pytest.param({**own("4:memory:/a", "0::/"), **v1("memory", "/a", **V1_LIMITED)}, 4, 1, id="version 1"),
        pytest.param(
            {**own("4:memory:/a", "0::/"), **v1("memory", "/a", **V1_LIMITED, memory__stat=V1_CACHED)},
            4,
            2.5,
            id="version 1, files cached by groups within too",
        ),
        pytest.param(
            {
                **own("4:memory:/a", "0::/"),
                **v1("memory", "/a", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="77"),
            },
            8,
            6,
            id="version 1 without a limit",
        ),
    ],
)
def test_memory_is_what_the_control_groups_leave(
    files: dict[str, str], total: float, available: float, machine: Machine
) -> None:
    found = device.host_memory(machine(files))
    assert found == DeviceMemory(kind="cpu", total=int(total * GIB), available=int(available * GIB))


def test_a_jetson_shares_its_memory_with_its_gpu_and_nvml_is_not_asked(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml(gpu(80, 70)))
    root = machine({"proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0"})
    assert device.host_memory(root).kind == "integrated"
    assert device.memory(root) == DeviceMemory(kind="integrated", total=8 * GIB, available=6 * GIB)


def test_memory_is_a_value_that_can_be_printed(machine: Machine) -> None:
    found = device.host_memory(machine({}))
    assert msgspec.json.decode(msgspec.json.encode(found), type=DeviceMemory) == found


# --- NVML ------------------------------------------------------------------------------------------------------------


class NVMLError(Exception):
    """What NVML raises."""


def gpu(total: int, free: int, *, name: str = "NVIDIA H100", uuid: str = "GPU-1") -> SimpleNamespace:
    return SimpleNamespace(name=name, uuid=uuid, memory=SimpleNamespace(total=total * GIB, free=free * GIB))


class FakeNVML(SimpleNamespace):
    """NVML with these GPUs; `open` counts inits without their shutdown."""

    def __init__(self, *gpus: SimpleNamespace) -> None:
        super().__init__(gpus=gpus, open=0, NVMLError=NVMLError)

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> SimpleNamespace:
        if index >= len(self.gpus):
            raise NVMLError("Invalid Argument")
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> SimpleNamespace:
        found = [gpu for gpu in self.gpus if gpu.uuid == uuid]
        if not found:
            raise NVMLError("Not Found")
        return found[0]

    def nvmlDeviceGetName(self, gpu: SimpleNamespace) -> str:
        return str(gpu.name)

    def nvmlDeviceGetMemoryInfo(self, gpu: SimpleNamespace) -> SimpleNamespace:
        if gpu.memory is None:
            raise NVMLError("Not Supported")
        return gpu.memory


def nvml(*gpus: SimpleNamespace) -> FakeNVML:
    return FakeNVML(*gpus)


@pytest.fixture
def found(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DeviceMemory]:
    """What is found on a machine with these GPUs, and with CUDA_VISIBLE_DEVICES."""

    def find(*gpus: SimpleNamespace, visible: str | None = None) -> DeviceMemory:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        library = nvml(*gpus)
        monkeypatch.setitem(sys.modules, "pynvml", library)
        memory = device.memory(machine({}))
        assert library.open == 0
        return memory

    return find


@pytest.mark.parametrize(
    ("visible", "available"),
    [
        pytest.param(None, 10, id="the fullest of all"),
        pytest.param("2", 30, id="by number"),
        pytest.param("0, 2", 30, id="the fullest of two"),
        pytest.param("GPU-a", 70, id="by UUID"),
    ],
)
def test_a_discrete_gpu_has_memory_of_its_own(
    visible: str | None, available: int, found: Callable[..., DeviceMemory]
) -> None:
    gpus = gpu(80, 70, uuid="GPU-a"), gpu(80, 10, uuid="GPU-b"), gpu(80, 30, uuid="GPU-c")
    expected = DeviceMemory(kind="discrete", total=80 * GIB, available=available * GIB)
    assert found(*gpus, visible=visible) == expected


def test_the_gpu_of_a_jetson_is_known_by_its_name_too(found: Callable[..., DeviceMemory]) -> None:
    integrated = SimpleNamespace(name="Orin (nvgpu)", uuid="GPU-1", memory=None)
    assert found(integrated) == DeviceMemory(kind="integrated", total=8 * GIB, available=6 * GIB)


@pytest.mark.parametrize(
    ("gpus", "visible", "words"),
    [
        pytest.param([], None, "no GPU may be used", id="none there"),
        pytest.param([gpu(80, 70)], "", "no GPU may be used", id="all hidden"),
        pytest.param([gpu(80, 70)], "-1", "Not Found", id="hidden in the other way"),
        pytest.param([gpu(80, 70)], "5", "Invalid Argument", id="one that is not there"),
        pytest.param([SimpleNamespace(name="GB10", memory=None)], None, "Not Supported", id="one that does not tell"),
    ],
)
def test_a_gpu_that_cannot_be_asked_is_budgeted_like_the_machine_with_a_note(
    gpus: list[SimpleNamespace], visible: str | None, words: str, found: Callable[..., DeviceMemory]
) -> None:
    memory = found(*gpus, visible=visible)
    assert (memory.kind, memory.available) == ("cpu", 6 * GIB)
    assert words in memory.note


def test_without_its_library_nvml_is_not_asked_and_a_note_says_so(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    memory = device.memory(machine({}))
    assert (memory.kind, memory.total, memory.available) == ("cpu", 8 * GIB, 6 * GIB)
    assert "nvidia-ml-py is not installed" in memory.note
