import re
import stat
from pathlib import Path

import msgspec
import numpy as np
import pytest
from msgspec.structs import asdict, replace

from edge_rag.errors import InputError, StorageError
from edge_rag.learning import job as jobs
from edge_rag.learning.job import EXAMPLES, JOB, PROOF, RESULT, Examples, Job, Proof, Result
from edge_rag.records import Recipe
from tests.learning.toy_jobs import CONTEXTS, toy_examples

ASKED = Job(model="/models/small.gguf", sha256="ab" * 32, cache="/cache", targets="down", rank=8, memory=1 << 30)
RECIPE = Recipe("down", "all", 8, 2, 24, 100, 1.5, 1 << 20, 0.5, "cpu")


def same(one: Examples | Proof, other: Examples | Proof) -> bool:
    return all(
        np.array_equal(value, asdict(other)[name]) and value.dtype == asdict(other)[name].dtype
        for name, value in asdict(one).items()
    )


def test_a_job_comes_back_as_it_was_written(tmp_path: Path) -> None:
    jobs.write_job(tmp_path / "job", ASKED, toy_examples())
    assert jobs.read_job(tmp_path / "job") == ASKED
    assert same(jobs.read_examples(tmp_path / "job"), toy_examples())


def test_a_job_belongs_to_its_owner_alone_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    jobs.write_job(tmp_path / "job", ASKED, toy_examples())
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "job").iterdir()}
    assert modes == {JOB: 0o600, EXAMPLES: 0o600}
    assert stat.S_IMODE((tmp_path / "job").stat().st_mode) == 0o700


def test_a_job_that_is_written_again_replaces_the_old_one(tmp_path: Path) -> None:
    jobs.write_job(tmp_path, ASKED, toy_examples())
    jobs.write_job(tmp_path, replace(ASKED, rank=2), toy_examples(epochs=5))
    assert jobs.read_job(tmp_path).rank == 2
    assert jobs.read_examples(tmp_path).order.shape[0] == 5


def test_pieces_of_a_flat_array_are_its_sequences() -> None:
    examples = toy_examples()
    assert [piece.tolist() for piece in jobs.pieces(examples.contexts, examples.context_ends)] == CONTEXTS


def test_a_job_of_another_format_is_refused(tmp_path: Path) -> None:
    jobs.write_job(tmp_path, replace(ASKED, format=2), toy_examples())
    with pytest.raises(StorageError, match="has format 2"):
        jobs.read_job(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"model": "a"}'])
def test_a_damaged_job_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / JOB).write_bytes(content)
    with pytest.raises(StorageError, match="is damaged"):
        jobs.read_job(tmp_path)


def test_a_setting_out_of_its_range_is_refused(tmp_path: Path) -> None:
    (tmp_path / JOB).write_bytes(msgspec.json.encode(replace(ASKED, rank=0)))
    with pytest.raises(StorageError, match=re.escape("$.rank")):
        jobs.read_job(tmp_path)


def test_a_folder_without_a_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        jobs.read_job(tmp_path)


def test_torn_examples_are_refused(tmp_path: Path) -> None:
    jobs.write_job(tmp_path, ASKED, toy_examples())
    whole = (tmp_path / EXAMPLES).read_bytes()
    for size in (0, 10, len(whole) // 2):
        (tmp_path / EXAMPLES).write_bytes(whole[:size])
        with pytest.raises(StorageError, match="is damaged"):
            jobs.read_examples(tmp_path)


def test_pickled_examples_are_refused(tmp_path: Path) -> None:
    arrays = {**asdict(toy_examples()), "order": np.array([[object()]])}
    with (tmp_path / EXAMPLES).open("wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(StorageError, match="is damaged"):
        jobs.read_examples(tmp_path)


def test_examples_without_one_of_their_arrays_are_refused(tmp_path: Path) -> None:
    arrays = asdict(toy_examples())
    del arrays["tails"]
    with (tmp_path / EXAMPLES).open("wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(StorageError, match="tails"):
        jobs.read_examples(tmp_path)


GOOD = toy_examples()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        pytest.param({"context_ends": GOOD.context_ends[:0]}, "context_ends", id="no offsets"),
        pytest.param({"context_ends": GOOD.context_ends + 1}, "context_ends", id="does not begin at 0"),
        pytest.param({"tail_ends": GOOD.tail_ends[:-1]}, "tail_ends", id="does not span its ids"),
        pytest.param({"tails": GOOD.tails[:-1]}, "tail_ends", id="ids are missing"),
        pytest.param(
            {"answer_ends": np.sort(GOOD.answer_ends)[[0, 0, *range(2, 13)]]}, "answer_ends", id="empty answer"
        ),
        pytest.param({"top_ids": GOOD.top_ids[:, :8]}, "top_ids", id="too few tokens of the teacher"),
        pytest.param({"top_logprobs": GOOD.top_logprobs[1:]}, "top_logprobs", id="a row of the teacher is missing"),
        pytest.param({"examples": GOOD.examples[:, :2]}, "examples", id="two columns"),
        pytest.param({"examples": GOOD.examples + 1}, "examples", id="no such answer"),
        pytest.param({"examples": -GOOD.examples}, "examples", id="negative index"),
        pytest.param({"order": GOOD.order[0]}, "order", id="one dimension"),
        pytest.param({"order": GOOD.order[:, :0]}, "order", id="nothing to train on"),
        pytest.param({"order": GOOD.order + 1}, "order", id="no such example"),
    ],
)
def test_examples_that_do_not_fit_each_other_are_refused(
    changes: dict[str, np.ndarray], field: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        jobs.write_job(tmp_path, ASKED, replace(GOOD, **changes))
    assert caught.value.field == field
    assert not list(tmp_path.iterdir())


def test_a_job_without_a_result_is_not_done(tmp_path: Path) -> None:
    assert jobs.read_result(tmp_path) is None


def test_a_result_comes_back_as_it_was_written(tmp_path: Path) -> None:
    result = Result(RECIPE, "cd" * 32, 12345, "the best epoch was kept")
    jobs.write_whole(tmp_path / RESULT, msgspec.json.encode(result))
    assert jobs.read_result(tmp_path) == result


def test_a_proof_comes_back_as_it_was_written(tmp_path: Path) -> None:
    numbers, values = np.arange(6, dtype=np.int32), np.ones((2, 3), dtype=np.float32)
    ends = np.array([0, 6])
    top = (numbers.reshape(2, 3), values, values[:, 0])
    proof = Proof(numbers, ends, numbers, ends, numbers[:1], np.array([0, 2]), *top, *top)
    jobs.write_arrays(tmp_path / PROOF, proof)
    assert same(jobs.read_proof(tmp_path), proof)


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / RESULT).mkdir()
    with pytest.raises(StorageError):
        jobs.write_whole(tmp_path / RESULT, b"{}")
    assert [file.name for file in tmp_path.iterdir()] == [RESULT]
