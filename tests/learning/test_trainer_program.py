"""The trainer as the process that it is: killed, paused, told apart from another one, and without its libraries."""

import sys
from pathlib import Path

import pytest

from edge_rag.errors import MachineError, StorageError
from edge_rag.learning.child import Child
from edge_rag.learning.events import Checkpoint, Event, Failed, Finished, Loaded, Started
from edge_rag.learning.job import ADAPTER, read_result
from edge_rag.learning.trainer.program import failed
from tests.learning import training
from tests.learning.toy_jobs import toy_examples, toy_folder
from tests.learning.training import train

EPOCHS = 12

pytestmark = training.MARKS


def test_a_killed_training_goes_on_and_ends_with_the_very_same_file(
    toy_models: dict[str, Path], toy_cache: Path, tmp_path: Path
) -> None:
    examples = toy_examples(epochs=EPOCHS)
    whole, broken = (
        toy_folder(tmp_path / name, toy_models["llama"], toy_cache, examples=examples, checkpoint_seconds=0)
        for name in ("whole", "broken")
    )
    train(whole)

    with Child(broken, threads=1) as child:
        child.start()
        events = child.events()
        next(event for event in events if isinstance(event, Checkpoint) and event.step >= 3)
        child.pause()
        other = rival(broken)
        assert isinstance(other[-1], Failed)
        assert "another trainer is at work" in other[-1].reason
        child.resume()
        next(event for event in events if isinstance(event, Checkpoint) and event.step >= 5)
        child.kill()
        assert child.state == "stopped"
    assert read_result(broken) is None

    said = train(broken)
    loaded = next(event for event in said if isinstance(event, Loaded))
    assert 5 <= loaded.done < 6 * EPOCHS
    assert isinstance(said[-1], Finished)
    assert (whole / ADAPTER).read_bytes() == (broken / ADAPTER).read_bytes()


def rival(folder: Path) -> list[Event]:
    """What a second trainer over the same folder says; in this process, which is another one."""
    try:
        return train(folder)
    except StorageError as error:
        return [Failed(error.message)]


def test_missing_libraries_are_told_as_an_event(toy_models: dict[str, Path], tmp_path: Path) -> None:
    toy_folder(tmp_path, toy_models["llama"], tmp_path)
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, pathlib\nsys.modules['torch'] = None\n"
        "from edge_rag.learning.trainer.program import main\nsys.exit(main(pathlib.Path(sys.argv[1])))\n"
    )
    with Child(tmp_path, program=(sys.executable, str(program))) as child:
        child.start()
        (event,) = child.events()
    assert isinstance(event, Failed)
    assert "libraries that are not installed" in event.reason
    assert "edge-rag[train]" in event.remedy


def test_a_folder_without_a_job_fails_with_its_name(tmp_path: Path) -> None:
    with Child(tmp_path) as child:
        child.start()
        events = list(child.events())
    assert isinstance(events[-1], Failed)
    assert "job.json" in events[-1].reason
    assert not any(isinstance(event, Started) for event in events)
    assert child.state == "failed"


@pytest.mark.parametrize(
    ("error", "reason", "remedy"),
    [
        (MachineError("too hot", field="device", remedy="wait"), "device: too hot", "wait"),
        (MemoryError("no more"), "memory is short: no more", "free some"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory is short", "free some"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero", "our fault"),
    ],
)
def test_errors_are_told_with_a_remedy(error: Exception, reason: str, remedy: str) -> None:
    told = failed(error)
    assert reason in told.reason
    assert remedy in told.remedy
