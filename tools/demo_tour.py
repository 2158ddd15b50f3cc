"""The tour that `tools/demo` gives: add the bundled documents, ask three questions, show what it cost."""

import argparse
from pathlib import Path

from edge_rag import Answer, EdgeRAG
from edge_rag.cli import show
from edge_rag.cli.app import out
from edge_rag.cli.asking import print_sources, print_stream
from edge_rag.runtime.ingest import AddProgress
from tools import make_demo_pdf

CORPUS = Path(__file__).parent / "demo_corpus"
QUESTIONS = (
    "How many owners were sent a new intake coupling O-ring by letter?",
    "Until when can the old membrane KS-4410 be ordered?",
    "What is the capital of Australia?",
)


def main() -> None:
    """Run the tour in `.demo/<model>`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    model = parser.parse_args().model
    handbook = CORPUS / "documents" / "handbook.pdf"
    if not handbook.exists():
        make_demo_pdf.main([str(CORPUS / "handbook.md"), str(handbook)])
    library, settings = Path(".demo") / model, {"models.llm": model}
    with EdgeRAG.open(library, settings=settings) as rag:
        add_documents(rag)
        out.print(f"loading {model}")
        rag.load()
        first = [ask(rag, question) for question in QUESTIONS]
    out.print("\nOnce more, after a restart: what the model has read is on the disk now.")
    with EdgeRAG.open(library, settings=settings) as rag:
        rag.load()
        again = [rag.ask(question, max_tokens=96) for question in QUESTIONS]
    print_timings(first, again)


def add_documents(rag: EdgeRAG) -> None:
    """Ingest the corpus: the manual, bulletins, field reports, FAQ and handbook of a water purifier nobody built."""
    with show.bar() as bar:

        def progress(step: AddProgress) -> None:
            bar("adding documents", step.done, step.total)

        report = rag.add(CORPUS / "documents", progress=progress)
    status = rag.status()
    fresh = report.count("added") + report.count("replaced")
    out.print(
        f"{status.documents} documents in {status.chunks} chunks of the manual of a fictional water purifier "
        f"({fresh} new, {show.seconds(report.seconds)})"
    )


def ask(rag: EdgeRAG, question: str) -> Answer:
    """Ask one question and show answer and sources."""
    out.print(f"\n> {question}\n")
    answer = print_stream(rag.stream(question, max_tokens=96))
    print_sources(answer)
    return answer


def print_timings(first: list[Answer], again: list[Answer]) -> None:
    """What each answer cost, the first time and with its passages loaded instead of read."""
    out.print()
    rows = [
        [
            answer.question,
            str(answer.usage.prompt_tokens),
            *(text for entry in (answer, later) for text in _costs(entry)),
        ]
        for answer, later in zip(first, again, strict=True)
    ]
    columns = ["question", "prompt", "cached", "first word", "total", "again: cached", "first word", "total"]
    show.table(columns, rows, right=(1, 2, 3, 4, 5, 6, 7))


def _costs(answer: Answer) -> tuple[str, str, str]:
    timings = answer.timings
    return str(answer.usage.cached_tokens), show.seconds(timings.first_token), show.seconds(timings.total)


if __name__ == "__main__":
    main()
