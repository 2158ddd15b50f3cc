"""What the machine is: values that any machine must have."""

import os
import platform

import numpy as np
import psutil

from edge_rag.native import device


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


def test_used_memory_is_that_of_this_process_in_bytes() -> None:
    before = device.memory_used()
    held = np.ones(2**23)  # 64 MiB, every page written
    grown = device.memory_used() - before
    assert 0.8 * held.nbytes < grown < 2 * held.nbytes


def test_the_machine_is_described_in_words() -> None:
    described = device.describe()
    assert set(described) == {"machine", "cpu", "cores", "memory", "system", "python"}
    assert all(described.values())
    assert described["cores"] == str(device.physical_cores())
    assert described["python"] == platform.python_version()
    assert described["memory"].endswith(" GiB")
