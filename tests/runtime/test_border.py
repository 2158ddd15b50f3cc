"""What happens at the edges of the Python interface: plain values, closing, a journal that cannot be written."""

import threading
from pathlib import Path

import pytest

from edge_rag import EdgeRAG
from edge_rag.config import Settings
from edge_rag.errors import ConfigError, EdgeRAGError, InputError
from edge_rag.native.llama import Model
from edge_rag.runtime import checked


def test_plain_dicts_are_taken_for_records() -> None:
    [turn] = checked.as_history([{"role": "user", "content": "Hello?"}])
    assert (turn.role, turn.content) == ("user", "Hello?")
    where = checked.as_filter({"kinds": ["md"]})
    assert where is not None
    assert where.kinds == ("md",)


def test_a_single_glob_or_stop_may_be_given_as_it_is() -> None:
    assert checked.as_globs("*.md", "include") == ("*.md",)
    assert checked.as_sampling(Settings(), {"stop": "END"}).stop == ("END",)


@pytest.mark.parametrize("paths", [[], [5], [None], [["a"]]])
def test_paths_must_be_paths(paths: list[object]) -> None:
    with pytest.raises(InputError) as caught:
        checked.as_paths(paths)
    assert caught.value.field == "paths"


@pytest.mark.parametrize("limit", [0, -1, True, "a", 1.5])
def test_a_limit_is_a_positive_number(limit: object) -> None:
    with pytest.raises(InputError):
        checked.as_limit(limit)


def test_a_model_of_another_kind_is_refused_by_its_setting(tmp_path: Path) -> None:
    with (
        EdgeRAG.open(tmp_path, settings=Settings(models=Settings().models.__class__(embedder="smollm2-135m"))) as rag,
        pytest.raises(ConfigError) as caught,
    ):
        rag.search("anything")
    assert caught.value.field == "models.embedder"


def test_closing_while_another_thread_adds_ends_that_with_an_error(tmp_path: Path, small_settings: Settings) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for number in range(150):  # several batches, each of them soon embedded
        (files / f"{number}.txt").write_text("The pump hums all night. " * 4)
    rag = EdgeRAG.open(tmp_path / "library", settings=small_settings)
    begun = threading.Event()
    ended: list[str] = []

    def add() -> None:
        try:
            rag.add(files, progress=lambda _: begun.set())
        except EdgeRAGError as error:
            ended.append(str(error))
        else:
            ended.append("done")

    adding = threading.Thread(target=add)
    adding.start()
    begun.wait(60)
    rag.close()
    adding.join(60)
    assert len(ended) == 1


def test_a_closed_model_refuses_to_tokenise(small_llm: Path) -> None:
    model = Model(small_llm, vocab_only=True)
    model.close()
    with pytest.raises(EdgeRAGError, match="closed"):
        model.tokenize("text")
