"""What `adapters` makes of questions, answers and times, and what its rivals are made of."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace
from rich.console import Console

from edge_rag.config import Settings
from edge_rag.learning.job import JOB, RESULT, check_examples, pieces, read_result, write_arrays
from edge_rag.native.llama import Context, ContextSettings, LoRA, Model, Run
from edge_rag.records import Answer, Cluster, Plan, Timings, Usage
from edge_rag.runtime.prompting import Prompt
from edge_rag.store.items import TOP, Taught
from tests.learning.toy_jobs import toy_job
from tests.native.tiny_loras import write_tiny_lora
from tests.native.tiny_models import write_tiny_model
from tests.runtime.serving import Toy
from tools.bench import adapters, coverage_cost, recall, rivals
from tools.bench.__main__ import parser
from tools.bench.blank_loras import Blank, shapes_of, weight_bytes, write_blank
from tools.bench.coverage_cost import Sample, covered, latency_claims
from tools.bench.curriculum import Asking, Site, first_articles, split_of, wanted_settings
from tools.bench.data import Dataset, Question
from tools.bench.libraries import Places
from tools.bench.metrics import Span
from tools.bench.recall import asks, shipped
from tools.bench.recall_report import WAYS, Case, claims, difference, paired, quality_row, ratio
from tools.bench.rivals import Sequences, Text, examples, prag_texts
from tools.bench.summed import Summed
from tools.bench.train_jobs import SEQUENCES

TOKENS = tuple(range(5, 25))


# --- the split -------------------------------------------------------------------------------------------------------


def dataset(documents: int, questions: int) -> Dataset:
    return Dataset(
        "data",
        tuple(Path(f"/{name}.md") for name in range(documents)),
        tuple(
            Question(f"{name} {number}?", (Span(f"/{name}.md", 10 * number, 10 * number + 5),), ("yes",))
            for name in range(documents)
            for number in range(questions)
        ),
    )


def places(documents: int, questions: int) -> Places:
    spans = [
        Span(f"/{name}.md", 10 * number, 10 * number + 9) for name in range(documents) for number in range(questions)
    ]
    return Places(dict(enumerate(spans, start=1)))


def test_half_of_each_articles_questions_are_seen_and_each_has_the_chunk_that_holds_its_answer() -> None:
    split = split_of(dataset(3, 5), places(3, 5), seed=0)
    assert split.articles == ("0.md", "1.md", "2.md")
    for name in range(3):
        assert sum(asking.seen for asking in split.questions if asking.question.startswith(f"{name} ")) == 3
    assert all(asking.gold == asking.id + 1 for asking in split.questions)
    assert split == split_of(dataset(3, 5), places(3, 5), seed=0)
    assert split != split_of(dataset(3, 5), places(3, 5), seed=1)


def test_only_the_files_of_the_first_articles_are_taken_and_folders_whole(tmp_path: Path) -> None:
    few = first_articles(dataset(3, 2), 2)
    assert [file.name for file in few.files] == ["0.md", "1.md"]
    assert [question.text for question in few.questions] == ["0 0?", "0 1?", "1 0?", "1 1?"]
    folder = Dataset("data", (tmp_path,), dataset(3, 2).questions)
    assert first_articles(folder, 1).files == (tmp_path,)


# --- answers ---------------------------------------------------------------------------------------------------------


def case(number: int, *, seen: bool = True, wrong: str = "other", tempted: bool = True) -> Case:
    asking = Asking(number, f"{number}?", ("blue",), seen, 1)
    return Case(asking, (1, 2, 9), "own", frozenset({1, 2, 3}), wrong, tempted)


def cluster(name: int, *members: int) -> Cluster:
    return Cluster(name, members, 1, 1.0, 0.0, 0.0)


def test_each_way_has_its_passages_and_its_adapter() -> None:
    found = [cluster(4, 7, 8), cluster(6, 1, 2, 3)]
    assert asks("rag", case(0), found) == recall.Ask((1, 2, 9), "")
    assert asks("closed", case(0), found) == recall.Ask((), "own")
    assert asks("partial", case(0), found) == recall.Ask((9,), "own")
    assert asks("forced", case(0), found) == recall.Ask((1, 2, 9), "other")
    assert asks("wrong", case(0, wrong=""), found) is None
    assert asks("sft", case(0), found) == recall.Ask((), "sft-6")
    assert asks("sft", case(0), found[:1]) is None
    assert asks("format", case(0), found) == recall.Ask((), "format-1")


def test_pairs_are_drawn_together() -> None:
    values = [0.1, 0.9, 0.4, 0.7]
    assert paired(values, values, ratio) == (1.0, 1.0, 1.0)
    assert paired(values, values, difference) == (0.0, 0.0, 0.0)
    assert paired([0.2, 1.0], [0.1, 0.5], ratio) == pytest.approx((2.0, 2.0, 2.0))
    assert ratio([1.0], [0.0]) == 0.0


def told(**answers: list[str]) -> dict[str, dict[str, str]]:
    return {way: dict(enumerate_keys(answers.get(way, []))) for way in WAYS}


def enumerate_keys(texts: list[str]) -> Iterator[tuple[str, str]]:
    return ((str(number), text) for number, text in enumerate(texts))


def test_ways_are_compared_on_the_questions_that_both_were_asked() -> None:
    found = [case(0), case(1), case(2, seen=False)]
    by_way = told(rag=["blue", "blue", "blue"], closed=["blue", "red", "red"], prag=["blue", "red"])
    made = {claim.name: claim for claim in claims(found, by_way, set())}
    assert made["closed book ÷ in-context RAG, F1 on seen"].value == 0.5
    assert made["closed book ÷ in-context RAG, F1 on unseen"].value == 0.0
    assert made["closed book ÷ P-RAG, F1"].value == 1.0
    assert len(made) == 3
    row = quality_row("seen", "closed", found[:2], by_way)
    assert row
    assert (row["n"], row["F1"], row["EM"], row["÷ rag"]) == (2, 0.5, 0.5, 0.5)
    assert quality_row("seen", "base", found, by_way) is None


def test_only_questions_that_took_an_adapter_count_for_the_hybrid_and_drift_is_what_is_within_reach() -> None:
    found = [case(0), case(1), case(2, seen=False, tempted=False)]
    by_way = told(rag=["blue", "blue", "red"], hybrid=["red", "blue", "red"], forced=["blue", "green", "red"])
    made = [claim.value for claim in claims(found, by_way, {"0", "2"})]
    assert made == [1.0, 0.5]


# --- time and bytes --------------------------------------------------------------------------------------------------


def test_the_first_passages_stay_out_and_without_any_there_is_no_adapter() -> None:
    prompt = Prompt((1,), ((2,), (3,), (4,)), (5,), (7, 8, 9))
    assert covered(prompt, 0, "a") == prompt
    assert covered(prompt, 2, "a") == Prompt((1,), ((4,),), (5,), (9,), "a")
    assert covered(prompt, 3, "a").tokens == (1, 5)


def test_full_coverage_is_held_against_the_faster_plain_way_at_its_longest() -> None:
    step = 0.1 / (coverage_cost.ANSWER - 1)
    samples = {way: [Sample(2.9, step), Sample(3.9, step)] for way in ("plain", "bare loop", "0 covered", "5 covered")}
    samples["bare loop"] = [Sample(1.9, step), Sample(1.9, step)]
    samples["5 covered"] = [Sample(0.3, step), Sample(0.9, step)]
    longest, first, total = (claim.value for claim in latency_claims(samples))
    assert longest == pytest.approx(1.0 / 2.0)
    assert first == pytest.approx((0.3 / 2.9 + 0.9 / 3.9) / 2)
    assert total == pytest.approx((0.4 / 3.0 + 1.0 / 4.0) / 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rivals")


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with Toy(write_tiny_model("llama", folder), gpu_layers=0) as model:
        yield model


@pytest.mark.parametrize("blank", [Blank("down", 4), Blank("all", 2, "last_half")], ids=lambda blank: blank.name)
def test_a_blank_adapter_changes_nothing_and_has_the_bytes_that_are_told(
    model: Model, folder: Path, blank: Blank
) -> None:
    shapes = shapes_of(model)
    path = write_blank(folder, shapes, blank)
    assert 0 < path.stat().st_size - weight_bytes(shapes, blank) < 4096
    with LoRA(model, path) as adapter, Context(model, sizes()) as context:
        [place] = context.decode([Run(TOKENS, 0, 0, logits=True)])
        plain = context.logits(place)
        context.clear(0)
        context.wear(adapter)
        [place] = context.decode([Run(TOKENS, 0, 0, logits=True)])
        assert np.allclose(context.logits(place), plain, atol=1e-5)


def sizes() -> ContextSettings:
    return ContextSettings(n_ctx=128, n_batch=32, n_seq_max=1)


# --- rivals ----------------------------------------------------------------------------------------------------------


def taught(*tokens: int) -> Taught:
    rows = len(tokens)
    ids = np.tile(np.arange(TOP, dtype=np.int32), (rows, 1))
    return Taught("", np.array(tokens, np.int32), ids, np.full((rows, TOP), -3.0, np.float16))


def test_examples_of_texts_are_a_sound_job_in_which_each_comes_as_often_as_asked() -> None:
    texts = [Text((1, 2), (3,), taught(4, 5)), Text((1, 2), (6, 7), taught(8)), Text((0,), (9,), taught(4))]
    made = examples(texts, epochs=2, repeats=3)
    check_examples(made)
    assert [piece.tolist() for piece in pieces(made.contexts, made.context_ends)] == [[1, 2], [0]]
    assert made.examples.tolist() == [[0, 0, 0], [0, 1, 1], [1, 2, 2]]
    assert [np.bincount(epoch).tolist() for epoch in made.order] == [[3, 3, 3], [3, 3, 3]]


def test_three_pairs_and_two_forms_of_a_passage_are_five_texts() -> None:
    assert list(prag_texts([(1,), (2,)], [(10,), (11,), (12,)])) == [(1, 10), (2, 10), (1, 11), (2, 11), (12,)]
    assert list(prag_texts([(1,)], [(10,)])) == [(1, 10)]
    assert list(prag_texts([(1,)], [])) == []


def test_adapters_are_summed_in_any_order_and_one_alone_is_as_worn(model: Model, folder: Path) -> None:
    files = {seed: write_tiny_lora(folder, seed=seed) for seed in (1, 2)}
    with Summed(model, sizes(), files) as summed:
        said = {names: summed.answer(TOKENS * 2, names, 12) for names in ((), (1,), (2,), (1, 2), (2, 1))}
        assert said[()] == summed.answer(TOKENS * 2, (), 12)
        assert 1 in summed
        assert 3 not in summed
    assert said[(1, 2)] == said[(2, 1)]
    assert len({said[()], said[(1,)], said[(2,)], said[(1, 2)]}) == 4
    assert len(said[()]) == 12


def test_a_shipped_answer_is_kept_with_the_adapter_that_gave_it() -> None:
    answer = Answer("a", "?", "It is blue [1].", (), (), Usage(), Timings(), "stop", Plan(adapter="own"), "model")
    assert shipped(answer) == "own|It is blue."


@pytest.mark.skipif(not (find_spec("torch") and find_spec("peft")), reason="needs the train extra")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by an old name
def test_prag_trains_an_adapter_for_each_passage_and_they_differ(folder: Path, model: Model, tmp_path: Path) -> None:
    import torch

    from tools.bench import prag

    threads = torch.get_num_threads()
    try:
        job = toy_job(model.path, folder / "cache", rank=rivals.PRAG_RANK)
        texts = [(40, 41, *range(2, 12)), (40, 41, *range(12, 22)), (40, 41, *range(22, 30))]
        ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        tokens = np.concatenate([np.array(text, np.int32) for text in texts])
        owners, prefix = np.array([7, 7, 8], np.int32), np.array([2], np.int32)
        write_arrays(tmp_path / SEQUENCES, Sequences(tokens, ends, owners, prefix))
        (tmp_path / JOB).write_bytes(msgspec.json.encode(job))
        prag.main(tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    result = read_result(tmp_path)
    assert result
    assert (result.recipe.examples, result.recipe.tokens) == (3, 28)
    files = {int(file.stem): file for file in tmp_path.glob("[0-9]*.gguf")}
    assert sorted(files) == [7, 8]
    assert result.bytes == sum(file.stat().st_size for file in files.values())
    assert (tmp_path / RESULT).exists()
    assert logits(model, files[7]) != logits(model, files[8])


def logits(model: Model, file: Path) -> list[float]:
    with LoRA(model, file) as adapter, Context(model, sizes()) as context:
        context.wear(adapter)
        [place] = context.decode([Run(TOKENS, 0, 0, logits=True)])
        return [float(value) for value in context.logits(place)]


# --- the command -----------------------------------------------------------------------------------------------------


def test_variants_are_named_by_what_is_trained(small_settings: Settings, tmp_path: Path) -> None:
    options = parser().parse_args(["adapters", "--targets", "down", "--rank", "32", "--quick"])
    settings = wanted_settings(small_settings, **adapters._changes(options))
    assert Site(tmp_path, settings, Console(), 0.0).variant == "down-all-32"
    assert (settings.learning.epochs, settings.learning.idle, settings.kv.idle) == (adapters.QUICK_EPOCHS, False, False)


def test_without_time_nothing_is_begun(small_settings: Settings, tmp_path: Path) -> None:
    options = parser().parse_args(["adapters", "--minutes", "0", "--folder", str(tmp_path / "site")])
    result = adapters.run(options, small_settings, tmp_path, Console(quiet=True))
    assert not result.rows
    assert "Time was up" in result.notes[-1]


def test_parts_that_need_no_training_run(
    small_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coverage_cost, "BLANKS", (Blank("down", 2),))
    options = parser().parse_args(["adapters", "--quick", "--parts", "storage", "decode"])
    alone = replace(small_settings, engine=replace(small_settings.engine, threads=1))
    result = adapters.run(options, alone, tmp_path, Console(quiet=True))
    decoded = [row["adapter"] for row in result.rows if row["table"] == "decoding under an adapter"]
    assert decoded == ["none", "down-all-2"]
    stored = {str(row["kept as"]): row["bytes a passage"] for row in result.rows if row["table"] == "storage"}
    assert stored["P-RAG, rank 2"] == 4 * float(str(stored["adapter ffn-all-16, 32 passages each"]))
    assert all(claim.holds for claim in result.claims)
