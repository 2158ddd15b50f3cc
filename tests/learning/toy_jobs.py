"""Job folders for toy models of 64 tokens: questions of three tokens, each with its answer, some behind a passage."""

import hashlib
from pathlib import Path

import numpy as np

from edge_rag.learning.job import TOP, Examples, Job, write_job
from tests.native.tiny_models import VOCABULARY

PREFIX = [40, 41, 42, 43]
END = 1
CONTEXTS = [PREFIX, [*PREFIX, *range(10, 30)], [*PREFIX, *range(30, 39)]]
QUESTIONS = 12


def flat(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    ends = np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64)
    return np.concatenate(texts).astype(np.int32), ends


def toy_examples(*, epochs: int = 2, seed: int = 3) -> Examples:
    """Every question bare, and behind one of two passages; the teacher is sure of its answer, with 2 to 4 tokens."""
    random = np.random.default_rng(seed)
    tails = [random.integers(2, VOCABULARY, 3).tolist() for _ in range(QUESTIONS)]
    answers = [[*random.integers(2, VOCABULARY, 1 + number % 3).tolist(), END] for number in range(QUESTIONS)]
    words, answer_ends = flat(answers)
    others = np.stack([random.permutation(np.delete(np.arange(VOCABULARY), word))[: TOP - 1] for word in words])
    chances = np.array([0.9] + [0.06 / (TOP - 1)] * (TOP - 1))
    pairs = [(0, number, number) for number in range(QUESTIONS)] + [
        (1 + number % 2, number, number) for number in range(QUESTIONS)
    ]
    return Examples(
        *flat(CONTEXTS),
        *flat(tails),
        words,
        answer_ends,
        np.concatenate([words[:, None], others], axis=1).astype(np.int32),
        np.tile(np.log(chances), (len(words), 1)).astype(np.float16),
        np.array(pairs, dtype=np.int32),
        np.stack([random.permutation(len(pairs)) for _ in range(epochs)]).astype(np.int32),
    )


def toy_job(model: Path, cache: Path, **options: object) -> Job:
    """A job for a file, on one thread of the processor."""
    sha256 = hashlib.sha256(model.read_bytes()).hexdigest()
    values = {"rank": 4, "epochs": 2, "learning_rate": 0.02, "device": "cpu", "threads": 1, **options}
    return Job(model=str(model), sha256=sha256, cache=str(cache), **values)  # type: ignore[arg-type]


def toy_folder(folder: Path, model: Path, cache: Path, *, examples: Examples | None = None, **options: object) -> Path:
    """A job folder that is ready to be trained."""
    write_job(folder, toy_job(model, cache, **options), examples or toy_examples())
    return folder
