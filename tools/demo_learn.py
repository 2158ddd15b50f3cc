"""What `tools/demo --learn` shows: questions are asked, their passages become an adapter, and it answers them itself.

A short course: few questions, few passages. What a machine learns while it is idle is larger and takes hours; how good
that is stands in docs/log.md.
"""

import argparse
from pathlib import Path

from edge_rag import Answer, EdgeRAG
from edge_rag.cli import show
from edge_rag.cli.app import out
from edge_rag.records import LearningStatus, Lesson
from tools.demo_tour import add_documents

QUESTIONS = (
    "How many owners were sent a new intake coupling O-ring by letter?",
    "Until when can the old membrane KS-4410 be ordered?",
    "How much does the Kestrel 12 weigh?",
)
SETTINGS = {
    "retrieval.top_k": 2,
    "answering.max_tokens": 32,
    "answering.instructions": "Answer in a few words.",
    "learning.idle": False,
    "learning.study_questions": 2,
    "learning.most_passages": 8,
    "learning.epochs": 12,
    "learning.rank": 8,
}


def main() -> None:
    """Ask, learn, and ask again, in `.demo/<model>-learn`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    model = parser.parse_args().model
    with EdgeRAG.open(Path(".demo") / f"{model}-learn", settings={"models.llm": model} | SETTINGS) as rag:
        add_documents(rag)
        rag.load()
        before = [rag.ask(question) for question in QUESTIONS]
        out.print(f"\n{len(QUESTIONS)} questions were asked; their passages are learned now.")
        print_lessons(learn(rag))
        after = [rag.ask(question) for question in QUESTIONS]
    print_answers(before, after)


def learn(rag: EdgeRAG) -> list[Lesson]:
    """Learn everything that was asked about."""
    with show.bar() as bar:

        def progress(now: LearningStatus) -> None:
            if now.total:
                bar(now.doing, now.done, now.total)

        return rag.learn(progress=progress)


def print_lessons(lessons: list[Lesson]) -> None:
    """What became of each cluster of passages."""
    rows = [
        [
            str(each.passages),
            str(each.items),
            show.seconds(each.seconds),
            f"adapter {each.adapter[:12]}" if each.adapter else each.reason,
        ]
        for each in lessons
    ]
    show.table(["passages", "questions and answers", "took", "outcome"], rows, right=(0, 1, 2))


def print_answers(before: list[Answer], after: list[Answer]) -> None:
    """The answers from the passages and from memory, and what had to be read for each."""
    for first, then in zip(before, after, strict=True):
        how = "from memory" if then.plan.adapter else "read again: the adapter did not answer this one well enough"
        out.print(f"\n> {first.question}\n  before: {first.text.strip()}\n  now:    {then.text.strip()}   ({how})")
    rows = [
        [
            first.question,
            str(first.usage.prompt_tokens),
            show.seconds(first.timings.total),
            str(then.usage.prompt_tokens),
            show.seconds(then.timings.total),
        ]
        for first, then in zip(before, after, strict=True)
    ]
    out.print()
    show.table(["question", "prompt", "total", "now: prompt", "total"], rows, right=(1, 2, 3, 4))


if __name__ == "__main__":
    main()
