"""What training takes from those who ask meanwhile.

Questions are put to the product while the trainer stands still and while it runs, in turns, each asked once, with all
passages' KV kept. The trainer is the real child, driven as idle work drives it, over a job of random tokens.
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
from edge_rag.runtime.school import DEQUANTISED
from edge_rag.runtime.training import Training
from edge_rag.store.items import Taught
from tools.bench import data, libraries
from tools.bench.curriculum import first_articles
from tools.bench.data import Dataset
from tools.bench.metrics import percentile
from tools.bench.overhead import model_path
from tools.bench.report import Result, Row, at_most
from tools.bench.rivals import Text, examples

ASKED, QUICK_ASKED = 60, 4  # half of them while the trainer runs
SLOWER = 1.3  # times, of the median time to the first token
YIELD_MS = 300.0
SLICE = 10.0  # seconds, as idle work does
FAKES = 200  # examples of the job of random tokens


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
