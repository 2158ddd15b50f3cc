"""Questions with known places of their answers: the demo corpus, SQuAD files, folders of corpora with excerpts.

All become `Dataset`s: files to add, and questions whose references are spans of the files' extracted text, the text
that a chunk's offsets count in.
"""

import csv
import json
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct

from edge_rag.errors import InputError
from edge_rag.reading.readers import parse
from tools.bench.metrics import Span
from tools.make_demo_pdf import make_pdf

DEMO = Path(__file__).parent.parent / "demo_corpus"


class Question(Struct, frozen=True):
    """A question and where its answer stands. With `alternatives` one of the spans suffices, else all are wanted."""

    text: str
    spans: tuple[Span, ...]
    answers: tuple[str, ...] = ()
    alternatives: bool = False


class TwoPassageQuestion(Question, frozen=True, kw_only=True):
    """A question that takes both of its `spans`, which stand in two chunks; its first answer is the fullest.

    `kind` says how the two meet: a bridge (the first names a thing whose property stands in the second), a condition
    (the first decides which value of the second holds), a conjunction (only the answer stands in both) or a comparison
    (each has the size of one of two things, and the answer is the name of one, as the question calls it).
    """

    id: str
    kind: Literal["bridge", "condition", "conjunction", "comparison"]


class Dataset(Struct, frozen=True):
    """Files for one library, and questions about them. `lost` references were not found in the extracted text."""

    name: str
    files: tuple[Path, ...]
    questions: tuple[Question, ...]
    lost: int = 0


def load(paths: Sequence[Path], work: Path) -> list[Dataset]:
    """The datasets at `paths` (default: the demo corpus); SQuAD articles are written below `work` as files.

    Raises InputError for a path that is none of the three kinds.
    """
    return [dataset for path in paths or (DEMO,) for dataset in _load(path.resolve(), work.resolve())]


def _load(path: Path, work: Path) -> Iterator[Dataset]:
    if path.suffix == ".json" and path.is_file():
        yield load_squad(path, work)
    elif (path / "questions.csv").is_file():
        yield from load_excerpts(path)
    elif (path / "questions.jsonl").is_file():
        yield load_demo(path)
    else:
        remedy = "give a SQuAD-format .json, or a folder with questions.csv or questions.jsonl"
        raise InputError("is not a data set", field=str(path), remedy=remedy)


# --- the three kinds -------------------------------------------------------------------------------------------------


def load_squad(path: Path, work: Path) -> Dataset:
    """A SQuAD-format file: one Markdown document an article, its paragraphs apart by empty lines."""
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    folder = work / path.stem
    folder.mkdir(parents=True)
    files: list[Path] = []
    questions: list[Question] = []
    for number, article in enumerate(articles):
        title = str(article.get("title") or f"article {number}").replace("_", " ")
        file = folder / f"{number:04}.md"
        text, found = squad_document(str(file.absolute()), title, article["paragraphs"])
        file.write_text(text, encoding="utf-8", newline="")
        files.append(file)
        questions += found
    return Dataset(path.stem, tuple(files), tuple(questions))


def squad_document(document: str, title: str, paragraphs: Sequence[Any]) -> tuple[str, list[Question]]:
    """The text of an article and its answerable questions."""
    text = f"# {title}\n\n"
    questions = []
    for paragraph in paragraphs:
        # The reader turns every kind of line end into one character and drops control characters.
        context = "".join(char if char >= " " else " " for char in paragraph["context"])
        for asked in paragraph["qas"]:
            spans = dict.fromkeys(
                Span(document, len(text) + start, len(text) + start + len(answer["text"]))
                for answer in asked["answers"]
                for start in (int(answer["answer_start"]),)
            )
            answers = dict.fromkeys(str(answer["text"]) for answer in asked["answers"])
            if spans:
                questions.append(Question(asked["question"], tuple(spans), tuple(answers), alternatives=True))
        text += context + "\n\n"
    return text, questions


def load_excerpts(folder: Path) -> list[Dataset]:
    """A folder of `*.md` and questions.csv (question, references, corpus_id): one dataset a corpus."""
    csv.field_size_limit(sys.maxsize)
    with (folder / "questions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [_excerpts(folder / f"{name}.md", rows) for name in sorted({row["corpus_id"] for row in rows})]


def _excerpts(file: Path, rows: Sequence[dict[str, str]]) -> Dataset:
    text, document = extracted_text(file), str(file.absolute())
    questions: list[Question] = []
    lost = 0
    for row in rows:
        if row["corpus_id"] != file.stem:
            continue
        references = json.loads(row["references"])
        spans = [locate(text, document, entry["content"], near=int(entry["start_index"])) for entry in references]
        found = tuple(span for span in spans if span)
        lost += len(spans) - len(found)
        if found:
            questions.append(Question(row["question"], found))
    return Dataset(file.stem, (file,), tuple(questions), lost)


def load_demo(folder: Path) -> Dataset:
    """A folder with questions.jsonl (question, answers, document, evidence) and the documents below documents/."""
    make_handbook(folder)
    documents = folder / "documents"
    texts: dict[str, str] = {}
    questions: list[Question] = []
    lost = 0
    for entry in read_jsonl(folder / "questions.jsonl"):
        file = (documents / entry["document"]).absolute()
        if str(file) not in texts:
            texts[str(file)] = extracted_text(file)
        span = locate(texts[str(file)], str(file), entry["evidence"])
        lost += span is None
        if span:
            questions.append(Question(entry["question"], (span,), tuple(entry["answers"])))
    return Dataset(folder.name, (documents,), tuple(questions), lost)


def two_passage_questions(folder: Path = DEMO) -> list[TwoPassageQuestion]:
    """The questions of the folder's two_passages.jsonl (id, kind, question, answers, evidence), in its order.

    Raises InputError for an excerpt that is not in its document.
    """
    make_handbook(folder)
    text_of = cache(extracted_text)

    def span(question: str, document: str, excerpt: str) -> Span:
        file = (folder / "documents" / document).absolute()
        found = locate(text_of(file), str(file), excerpt)
        if found is None:
            raise InputError(f"has an excerpt that is not in {document}", field=question, remedy="quote the document")
        return found

    return [
        TwoPassageQuestion(
            id=entry["id"],
            kind=entry["kind"],
            text=entry["question"],
            answers=tuple(entry["answers"]),
            spans=tuple(span(entry["id"], **evidence) for evidence in entry["evidence"]),
        )
        for entry in read_jsonl(folder / "two_passages.jsonl")
    ]


def make_handbook(folder: Path) -> None:
    """Generate the demo corpus' PDF when it is missing."""
    source, target = folder / "handbook.md", folder / "documents" / "handbook.pdf"
    if source.is_file() and not target.exists():
        target.write_bytes(make_pdf(source.read_text(encoding="utf-8")))


def read_jsonl(path: Path) -> list[Any]:
    """One value a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


# --- places ----------------------------------------------------------------------------------------------------------


def extracted_text(file: Path) -> str:
    """The text in which chunk offsets count; what no section holds is blank."""
    text = ""
    for section in parse(file, file.read_bytes()).sections:
        text = text.ljust(section.start) + section.text
    return text


def locate(text: str, document: str, content: str, *, near: int = 0) -> Span | None:
    """The place of `content`: at offset `near` when it is there, else the nearest one, white space being equal."""
    content = content.strip()
    if text.startswith(content, near):
        return Span(document, near, near + len(content))
    pattern = r"\s+".join(map(re.escape, content.split()))
    matches = [Span(document, *match.span()) for match in re.finditer(pattern, text)]
    return min(matches, key=lambda span: abs(span.start - near), default=None)
