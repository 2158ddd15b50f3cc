"""What training takes on this machine, and what it takes from those who ask meanwhile.

`end_to_end`: a library of few passages, half of its questions asked, then `learn` with everything that belongs to it,
while questions keep coming until training was interrupted so often as is promised.

`foreground`: questions to the product while the trainer stands still and while it runs, in turns, each asked once, with
all passages' KV kept. The trainer is the real child, driven as idle work drives it, over a job of random tokens.
"""

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.progress import track

from edge_rag import EdgeRAG
from edge_rag.closing import Closing
from edge_rag.config import Settings, models_folder
from edge_rag.errors import EdgeRAGError
from edge_rag.learning.job import TOP, Job, write_job
from edge_rag.records import LearningStatus
from edge_rag.runtime.house import DEQUANTISED
from edge_rag.runtime.training import Training
from edge_rag.store.items import Taught
from tools.bench import data, libraries
from tools.bench.curriculum import first_articles
from tools.bench.data import Dataset
from tools.bench.metrics import percentile
from tools.bench.overhead import model_path
from tools.bench.report import Result, Row, at_least, at_most
from tools.bench.rivals import Text, examples

PASSAGES = 10
MINUTES = 40.0
INTERRUPTED, QUICK_INTERRUPTED = 20, 1
GAP = 15.0  # seconds between questions that interrupt, at most
ASKED, QUICK_ASKED = 60, 4  # half of them while the trainer runs
SLOWER = 1.3  # times, of the median time to the first token
YIELD_MS = 300.0
SLICE = 10.0  # seconds, as idle work does
FAKES = 200  # examples of the job of random tokens


# --- end to end ------------------------------------------------------------------------------------------------------


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
        notes=[f"{chunks} passages in all; {libraries.threads(settings)} threads; asking included."],
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


# --- foreground ------------------------------------------------------------------------------------------------------


def foreground(settings: Settings, paths: Sequence[Path], work: Path, console: Console, *, quick: bool) -> Result:
    """Time to the first token beside a training, and how long the trainer takes to stand still."""
    dataset = first_articles(data.load(paths, work / "asked")[0], 2 if quick else 12)
    folder, count = work / "foreground", QUICK_ASKED if quick else ASKED
    libraries.fill(folder, dataset, settings)
    with ExitStack() as stack:
        rag = stack.enter_context(EdgeRAG.open(folder, settings=settings))
        rag.load()
        rag.warm()
        questions = drawn_questions(dataset, count + 2)
        write_random_job(work / "job", settings)
        beside = stack.enter_context(Beside(rag, work / "job", threads=libraries.threads(settings)))
        rag.ask(questions.pop(), max_tokens=8)
        firsts = _asked_in_turns(rag, beside, questions[:count], console)
    still, running = firsts[False], firsts[True]
    rows = [_foreground_row(name, each) for name, each in (("it stands still", still), ("it runs", running))]
    longest, slower = 1000 * beside.longest_pause, median(running) / median(still)
    return Result(
        rows=rows,
        claims=[
            at_most("first token while training ÷ while not, median", slower, SLOWER, "×"),
            at_most(f"longest of {beside.pauses} pauses of the trainer", longest, YIELD_MS, "ms"),
        ],
        notes=[f"{libraries.threads(settings)} threads; the trainer took {beside.steps} steps."],
    )


def drawn_questions(dataset: Dataset, count: int) -> list[str]:
    """So many different questions in an order that is drawn, or as many as there are."""
    texts = list(dict.fromkeys(question.text for question in dataset.questions))
    random.Random(0).shuffle(texts)
    return texts[:count]


def _asked_in_turns(
    rag: EdgeRAG, beside: "Beside", questions: Sequence[str], console: Console
) -> dict[bool, list[float]]:
    """Seconds to the first token of each question, by whether the trainer was running when it came."""
    drawn = random.Random(1)
    beside.begin()
    firsts: dict[bool, list[float]] = {False: [], True: []}
    for number, question in enumerate(track(questions, "asking", console=console)):
        running = number % 2 == 1
        with beside.running() if running else beside.standing():
            time.sleep(drawn.uniform(0.5, 2.0))  # the arrival is to be random
            firsts[running].append(rag.ask(question, max_tokens=8).timings.first_token)
    return firsts


def _foreground_row(name: str, seconds: Sequence[float]) -> Row:
    return {
        "table": "first token beside a training",
        "the trainer": name,
        "questions": len(seconds),
        "median ms": 1000 * median(seconds),
        "95 % ms": 1000 * percentile(seconds, 0.95),
        "99 % ms": 1000 * percentile(seconds, 0.99),
        "most ms": 1000 * max(seconds),
    }


def write_random_job(folder: Path, settings: Settings) -> None:
    """A job of texts of usual lengths that mean nothing."""
    drawn = np.random.default_rng(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(int(token) for token in drawn.integers(100, 10_000, count))

    def answer(count: int) -> Taught:
        ids = np.arange(TOP, dtype=np.int32) + 100
        odds = np.full((count, TOP), -4.0, np.float16)
        return Taught("", np.array(tokens(count), np.int32), np.tile(ids, (count, 1)), odds)

    prefix = tokens(40)
    texts = [Text(prefix if place % 2 else (*prefix, *tokens(200)), tokens(40), answer(8)) for place in range(FAKES)]
    models, wanted = libraries.model_folder(settings), settings.learning
    job = Job(
        model=str(model_path(settings)),
        sha256=models.spec(settings.models.llm).sha256,
        cache=str(models_folder(settings) / DEQUANTISED),
        targets=wanted.targets,
        layers=wanted.layers,
        rank=wanted.rank,
        epochs=200,  # it must not end before we do
        device=wanted.device,
    )
    write_job(folder, job, examples(texts, epochs=job.epochs))


class Beside(Closing):
    """A trainer that runs when it is told to and nobody is served, as idle work runs it."""

    def __init__(self, rag: EdgeRAG, job: Path, *, threads: int) -> None:
        self._rag = rag
        self._training = Training(job, busy=lambda: self._busy, short=lambda: False, threads=threads)
        self._allowed = threading.Event()
        self._still = threading.Event()
        self._closed = False
        self._failure = ""
        self._thread = threading.Thread(target=self._run, name="training", daemon=True)

    def begin(self) -> None:
        """Start, and wait until it has taken a step. Raises SystemExit when it fails."""
        self._thread.start()
        self._allowed.set()
        while self._training.last is None:
            if self._failure:
                raise SystemExit(self._failure)
            time.sleep(0.1)

    def close(self) -> None:
        """End it."""
        self._closed = True
        self._allowed.set()
        if self._thread.is_alive():
            self._thread.join()
        self._training.close()

    @property
    def pauses(self) -> int:
        """How often it stood still."""
        return self._training.pauses

    @property
    def longest_pause(self) -> float:
        """Seconds that it took to stand still, at most."""
        return self._training.longest_pause

    @property
    def steps(self) -> int:
        """Steps that it took."""
        return self._training.last.step if self._training.last else 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, it runs when nobody is served."""
        self._allowed.set()
        yield

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Inside, it stands still."""
        self._still.clear()
        self._allowed.clear()
        while self._thread.is_alive() and not self._still.wait(0.1):
            pass
        yield

    @property
    def _busy(self) -> bool:
        engine = self._rag.engine
        return not self._allowed.is_set() or self._closed or bool(engine and (engine.active or engine.waiting))

    def _run(self) -> None:
        try:
            while not self._closed:
                if self._busy:
                    self._rest()
                elif self._training.run(SLICE) in ("finished", "failed"):
                    failure = self._training.failure
                    self._failure = failure.reason if failure else "the training ended"
                    break
        except EdgeRAGError as error:
            self._failure = str(error)
        self._still.set()

    def _rest(self) -> None:
        if not self._allowed.is_set():
            self._still.set()
        time.sleep(0.02)
