"""`answers`: right answers, citations and refusals on questions whose answers are known.

Passes: `passages` (the product, asked for a short phrase), `none` (same model and template, no passages), `gold` (only
the chunk that holds the answer) and `sentences` (the product without instructions, for citations on usual answers).
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from msgspec import Struct
from rich.console import Console
from rich.progress import track

from edge_rag import EdgeRAG
from edge_rag.config import Settings
from edge_rag.errors import InputError
from edge_rag.native.llama import Model
from edge_rag.records import Answer, Passage, Sampling, Sources
from edge_rag.runtime.generations import Text
from edge_rag.runtime.parts import make_engine
from edge_rag.runtime.prompting import Prompt, PromptBuilder
from edge_rag.store import library
from edge_rag.store.database import Database
from tools.bench import data, libraries
from tools.bench.data import Dataset, Question
from tools.bench.libraries import Places
from tools.bench.metrics import bootstrap, contains_answer, exact_match, f1, mean, without_marks
from tools.bench.overhead import model_path
from tools.bench.quality import first_questions
from tools.bench.report import Result, Row

SHORT = "Answer with a short phrase, nothing else."
PASSES = ("passages", "none", "gold", "sentences")
MAX_TOKENS, MAX_TOKENS_SENTENCES = 48, 160
QUICK_QUESTIONS, QUICK_PASSES = 3, ("passages", "none", "gold")


class Said(Struct, frozen=True):
    """What was answered to a question; `answer` is there when the product was asked."""

    question: Question
    text: str
    answer: Answer | None = None

    @property
    def right(self) -> bool:
        """Whether one of the known answers stands in it."""
        return contains_answer(self.text, self.question.answers) > 0


Ask = Callable[[Question], Said]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark alone."""
    parser.add_argument("--limit", type=int, help="questions of each data set (default: all)")
    parser.add_argument("--passes", nargs="+", choices=PASSES, help="which ways of asking (default: all)")


def run(options: argparse.Namespace, settings: Settings, work: Path, console: Console) -> Result:
    """Ask everything."""
    limit = options.limit or (QUICK_QUESTIONS if options.quick else 0)
    passes = options.passes or (QUICK_PASSES if options.quick else PASSES)
    datasets = data.load(options.data or [data.DEMO], work / "data")
    result = Result(
        notes=["95 % percentile bootstrap intervals over questions, 1,000 rounds, seed 0; greedy decoding."]
    )
    for number, dataset in enumerate(datasets):
        if not all(question.answers for question in dataset.questions):
            raise InputError("has excerpts but no answers", field=dataset.name, remedy="see the retrieval benchmark")
        console.print(f"adding {dataset.name}")
        folder = work / str(number)
        libraries.fill(folder, dataset, settings)
        chosen = first_questions(dataset, limit) if limit else dataset
        with Asker(folder, settings) as asker:
            result.extend(ask_all(asker, chosen, passes))
            if dataset.name == data.DEMO.name:
                result.rows.append(refusals(asker.rag, data.DEMO / "unanswerable.jsonl"))
    return result


class Asker:
    """A filled library, and the same model without it."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        with ExitStack() as stack:
            self.rag = stack.enter_context(EdgeRAG.open(folder, settings=settings))
            self._database = stack.enter_context(Database(folder))
            self.places: Places = libraries.places(self._database)
            model = stack.enter_context(Model(model_path(settings), gpu_layers=settings.engine.gpu_layers))
            self._engine = stack.enter_context(make_engine(model, settings, threads=libraries.threads(settings)))
            self._builder = PromptBuilder(model)
            self._closing = stack.pop_all()

    def __enter__(self) -> "Asker":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def ways(self) -> dict[str, Ask]:
        """How each pass asks."""
        return {
            "passages": self.product,
            "none": lambda question: self.alone(question, []),
            "gold": lambda question: self.alone(question, self.gold(question)),
            "sentences": self.product_in_sentences,
        }

    def product(self, question: Question) -> Said:
        """The product, asked for a short phrase."""
        answer = self.rag.ask(question.text, instructions=SHORT, max_tokens=MAX_TOKENS)
        return Said(question, without_marks(answer.text), answer)

    def product_in_sentences(self, question: Question) -> Said:
        """The product, asked plainly."""
        answer = self.rag.ask(question.text, max_tokens=MAX_TOKENS_SENTENCES)
        return Said(question, without_marks(answer.text), answer)

    def alone(self, question: Question, passages: Sequence[Passage]) -> Said:
        """The model with exactly these passages in its prompt."""
        builder = self._builder
        shown = tuple(builder.passage(passage) for passage in passages)
        prompt = Prompt(builder.prefix, shown, builder.tail([], question.text, SHORT))
        steps = self._engine.submit(prompt, Sampling(max_tokens=MAX_TOKENS))
        return Said(question, "".join(step.text for step in steps if isinstance(step, Text)).strip())

    def gold(self, question: Question) -> list[Passage]:
        """The chunk that shares most characters with the (first) reference."""
        span = question.spans[0]
        best = max(self.places.spans, key=lambda chunk_id: self.places.spans[chunk_id].overlap(span))
        with self._database.read() as connection:
            return list(library.passages(connection, [best]).values())


def ask_all(asker: Asker, dataset: Dataset, passes: Sequence[str]) -> Result:
    """All passes over one data set."""
    result = Result()
    for name in passes:
        ask = asker.ways()[name]
        said = [ask(question) for question in track(dataset.questions, description=f"{dataset.name}: {name}")]
        result.rows += list(answer_rows(dataset.name, name, said))
        answered = [entry for entry in said if entry.answer]
        if answered:
            result.rows += list(grounding_rows(dataset.name, name, answered, asker.places))
        result.rows += [_transcript(dataset.name, name, entry) for entry in said[:3]]
    return result


def _transcript(dataset: str, name: str, said: Said) -> Row:
    return {
        "table": "examples",
        "data": dataset,
        "pass": name,
        "question": said.question.text,
        "said": said.text,
        "wanted": " | ".join(said.question.answers),
    }


# --- rows ------------------------------------------------------------------------------------------------------------


def answer_rows(dataset: str, name: str, said: Sequence[Said]) -> Iterator[Row]:
    """EM, F1 and whether the answer holds a right one."""
    measures: dict[str, Callable[[str, Sequence[str]], float]] = {
        "exact match": exact_match,
        "F1": f1,
        "contains the answer": contains_answer,
    }
    for measure, function in measures.items():
        if name == "sentences" and function is not contains_answer:
            continue  # whole sentences never match a phrase
        values = [function(entry.text, entry.question.answers) for entry in said]
        yield _interval_row("answers", dataset, name, measure, values)


def grounding_rows(dataset: str, name: str, said: Sequence[Said], places: Places) -> Iterator[Row]:
    """Retrieval hits, false refusals, and what the citations are worth."""
    hits = [
        float(any(holds_evidence(entry.question, passage, places) for passage in _passages(entry))) for entry in said
    ]
    yield _interval_row("grounding", dataset, name, "evidence among the passages", hits)
    refused = [float(_refused(entry)) for entry in said]
    yield _interval_row("grounding", dataset, name, "false refusals", refused)
    answered = [entry for entry in said if not _refused(entry)]
    for measure, holds in _citation_checks(places).items():
        cited = [float(holds(entry, passage)) for entry in answered for passage in _cited(entry)]
        yield _interval_row("grounding", dataset, name, f"citation precision: passage holds {measure}", cited)
    recall = [
        float(any(holds_evidence(entry.question, passage, places) for passage in _cited(entry)))
        for entry in answered
        if entry.right
    ]
    yield _interval_row("grounding", dataset, name, "citation recall: right answers with a right citation", recall)


def _citation_checks(places: Places) -> dict[str, Callable[[Said, Passage], bool]]:
    return {
        "the evidence": lambda said, passage: holds_evidence(said.question, passage, places),
        "the text that was said": lambda said, passage: contains_answer(passage.text, [said.text]) > 0,
        "a right answer": lambda said, passage: contains_answer(passage.text, said.question.answers) > 0,
    }


def holds_evidence(question: Question, passage: Passage, places: Places) -> bool:
    """Whether the passage contains a whole reference of the question."""
    return any(places.spans[passage.chunk_id].contains(span) for span in question.spans)


def _passages(said: Said) -> Sequence[Passage]:
    return said.answer.passages if said.answer else ()


def _cited(said: Said) -> list[Passage]:
    return [said.answer.passages[citation.n - 1] for citation in said.answer.citations] if said.answer else []


def _refused(said: Said) -> bool:
    return said.answer is not None and said.answer.finish_reason == "no_passages"


def refusals(rag: EdgeRAG, file: Path) -> Row:
    """How many unanswerable questions are refused. Refusal is decided before generation, which is not waited for."""
    refused: list[float] = []
    for entry in data.read_jsonl(file):
        events = rag.stream(entry["question"])
        first = next(iter(events))
        refused.append(float(isinstance(first, Sources) and not first.passages))
    return _interval_row("grounding", data.DEMO.name, "unanswerable", "refusals", refused)


def _interval_row(table: str, dataset: str, name: str, measure: str, values: Sequence[float]) -> Row:
    found = bootstrap(values)
    return {
        "table": table,
        "data": dataset,
        "pass": name,
        "measure": measure,
        "value": mean(values),
        "low": found.low,
        "high": found.high,
        "n": len(values),
    }
