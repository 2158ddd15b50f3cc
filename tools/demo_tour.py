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
    with EdgeRAG.open(Path(".demo") / model, settings={"models.llm": model}) as rag:
        add_documents(rag)
        out.print(f"loading {model}")
        rag.load()
        print_timings([ask(rag, question) for question in QUESTIONS])


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


def print_timings(answers: list[Answer]) -> None:
    """What each answer cost."""
    out.print()
    rows = [
        [
            answer.question,
            show.seconds(answer.timings.retrieve),
            show.seconds(answer.timings.first_token),
            show.seconds(answer.timings.total),
            str(answer.usage.prompt_tokens),
            str(answer.usage.cached_tokens),
            str(answer.usage.completion_tokens),
        ]
        for answer in answers
    ]
    columns = ["question", "retrieve", "first word", "total", "read", "cached", "written"]
    show.table(columns, rows, right=(1, 2, 3, 4, 5, 6))


if __name__ == "__main__":
    main()
