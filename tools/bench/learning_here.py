"""Learning end to end on this machine: a library of few passages, from its log to the adapter.

Half of its questions are asked, then everything that `learn` does is done, while questions keep coming until training
was interrupted so often as is promised.
"""

import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from edge_rag import EdgeRAG
from edge_rag.closing import Closing
from edge_rag.config import Settings
from edge_rag.records import LearningStatus
from tools.bench import data, libraries
from tools.bench.curriculum import first_articles
from tools.bench.report import Result, Row, at_least, at_most

PASSAGES = 10
MINUTES = 40.0
INTERRUPTED, QUICK_INTERRUPTED = 20, 1
GAP = 15.0  # seconds between questions that interrupt, at most


def end_to_end(settings: Settings, paths: Sequence[Path], work: Path, console: Console, *, quick: bool) -> Result:
    """Seconds of learning about few passages, from their log to the adapter."""
    dataset = first_articles(data.load(paths, work / "articles")[0], 1 if quick else 2)
    folder = work / "learning"
    libraries.fill(folder, dataset, settings)
    wanted = QUICK_INTERRUPTED if quick else INTERRUPTED
    with EdgeRAG.open(folder, settings=settings) as rag:
        asked, spare = dataset.questions[::2], dataset.questions[1::2]
        for question in track(asked, "asking", console=console):
            rag.ask(question.text)
        caller = Caller(rag, [question.text for question in spare], wanted)
        teller = Teller(console)
        started = time.perf_counter()

        def heed(status: LearningStatus) -> None:
            teller.tell(status)
            caller.heed(status)

        with caller:
            lessons = rag.learn(progress=heed)
        seconds = time.perf_counter() - started
        recipes = [each.recipe for each in rag.adapters()]
        chunks = rag.status().chunks
    rows: list[Row] = [
        {
            "table": "learning end to end",
            "passages": lesson.passages,
            "questions": lesson.items,
            "seconds": lesson.seconds,
            "outcome": f"adapter {lesson.adapter[:12]}" if lesson.adapter else lesson.reason,
            "kept seen": lesson.gate.seen.f1 if lesson.gate else None,
            "kept unseen": lesson.gate.unseen.f1 if lesson.gate else None,
        }
        for lesson in lessons
    ]
    rows += [{"table": "learning: seconds", "work": what, "seconds": spent} for what, spent in teller.spent.items()]
    rows += [
        {
            "table": "learning: training",
            "tokens": recipe.tokens,
            "seconds": recipe.seconds,
            "tokens/s": recipe.tokens / max(1e-9, recipe.seconds),
            "peak MB": recipe.peak_bytes / 1e6,
            "device": recipe.device,
        }
        for recipe in recipes
    ]
    learned = sum(lesson.passages for lesson in lessons)
    per_ten = seconds / 60 * PASSAGES / max(1, learned)
    return Result(
        rows=rows,
        claims=[
            at_most(f"minutes of learning for {PASSAGES} passages ({learned} learned)", per_ten, MINUTES, "min"),
            at_least("questions that interrupted the training", caller.asked, wanted),
        ],
        notes=[f"{chunks} passages in all; {libraries.threads(settings)} threads; with the answers that came between."],
    )


class Teller:
    """Says what is being learned, and counts the seconds of each kind of work."""

    def __init__(self, console: Console) -> None:
        self.spent: dict[str, float] = {}
        self._console = console
        self._last = time.perf_counter()
        self._told = ""

    def tell(self, status: LearningStatus) -> None:
        """A piece of work is done. Behind the last one of a cluster nothing is said of what it was: the exam."""
        now = time.perf_counter()
        what = status.doing.partition(": ")[2] or "examining the adapter"
        self.spent[what] = self.spent.get(what, 0.0) + now - self._last
        self._last = now
        if what != self._told:
            self._told = what
            self._console.print(f"{status.doing} ({status.done} of {status.total})")


class Caller(Closing):
    """Asks questions while there is training, so many of them, at random moments."""

    def __init__(self, rag: EdgeRAG, questions: Sequence[str], count: int) -> None:
        self.asked = 0
        self._rag = rag
        self._questions = questions
        self._count = count
        self._training = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._call, name="caller", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ask no more."""
        self._closed.set()
        self._training.set()
        self._thread.join()

    def heed(self, status: LearningStatus) -> None:
        """Whether there is training now."""
        if status.doing.endswith(": training"):
            self._training.set()
        elif not self._closed.is_set():
            self._training.clear()

    def _call(self) -> None:
        drawn = random.Random(0)
        while self.asked < self._count and not self._closed.wait(drawn.uniform(0, GAP)):
            self._training.wait()
            if self._closed.is_set():
                return
            self._rag.ask(self._questions[self.asked % len(self._questions)])
            self.asked += 1
