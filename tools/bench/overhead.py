"""`overhead`: what our layers cost over bare loops on llama-cpp-python, and on onnxruntime with tokenizers.

Generation compares the decode phase only (tokens after the first ÷ time after the first token), the same prompt, model,
context settings and number of tokens, greedy, in one process; embedding compares texts a second. Baseline and ours take
turns and swap who goes first; the claim is about the median of the ratios of the pairs.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

from rich.console import Console

from edge_rag import EdgeRAG
from edge_rag.config import Settings
from edge_rag.native.llama import ContextSettings, Model
from edge_rag.policy.views import embedded_views
from edge_rag.records import Answer, Sampling
from edge_rag.runtime.engine import Engine
from edge_rag.runtime.generations import Finished
from edge_rag.runtime.parts import batch_size, make_engine
from edge_rag.runtime.prompting import Prompt, PromptBuilder
from edge_rag.store import library
from tools.bench import data, libraries
from tools.bench.bare import BareEmbedder, BareLoop
from tools.bench.report import Result, Row, at_least

TOKENS, QUICK_TOKENS = 128, 32
REPETITIONS, QUICK_REPETITIONS = 9, 5
CHUNKS, QUICK_CHUNKS = 400, 24
STREAM_PASSAGES = 2  # decoding is measured, but each repetition reads the prompt twice
GENERATION, EMBEDDING = 0.97, 0.9

REQUEST = (
    "Write a very long story about a lighthouse keeper, her dog and a lost ship. "
    "Describe every room of the lighthouse, every storm and every visitor in detail. Do not stop early."
)

Measure = Callable[[], float]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark alone."""
    parser.add_argument("--only", choices=("generation", "embedding"), help="one half of it")
    parser.add_argument("--repetitions", type=int, help=f"pairs of runs (default {REPETITIONS})")


def run(options: argparse.Namespace, settings: Settings, work: Path, console: Console) -> Result:
    """Measure what the options ask for."""
    repetitions = options.repetitions or (QUICK_REPETITIONS if options.quick else REPETITIONS)
    datasets = data.load(options.data, work / "data")
    folders = [work / str(number) for number in range(len(datasets))]
    for folder, dataset in zip(folders, datasets, strict=True):
        console.print(f"adding {dataset.name}")
        libraries.fill(folder, dataset, settings)
    result = Result(notes=[f"{repetitions} pairs after a warm-up, {libraries.threads(settings)} threads."])
    if options.only != "embedding":
        tokens = QUICK_TOKENS if options.quick else TOKENS
        console.print("generation: engine against bare loop")
        result.extend(generation(settings, tokens, repetitions))
        console.print("generation: whole stream against bare loop")
        result.rows.append(whole_stream(settings, folders[0], datasets[0].questions[0].text, tokens, repetitions))
    if options.only != "generation":
        texts = chunk_texts(folders, QUICK_CHUNKS if options.quick else CHUNKS)
        console.print("embedding")
        result.extend(embedding(settings, texts, repetitions))
    return result


def pairs(baseline: Measure, ours: Measure, repetitions: int) -> list[tuple[float, float]]:
    """(baseline, ours) of each repetition, after one of each to warm up; who goes first changes every time."""
    baseline(), ours()
    measured = []
    for repetition in range(repetitions):
        if repetition % 2:
            second = ours()
            measured.append((baseline(), second))
        else:
            first = baseline()
            measured.append((first, ours()))
    return measured


def row(what: str, unit: str, measured: Sequence[tuple[float, float]]) -> Row:
    """Medians of both, and the median of their ratios: the number that counts."""
    ratios = [ours / baseline for baseline, ours in measured]
    return {
        "table": "overhead",
        "what": what,
        "unit": unit,
        "baseline": median(baseline for baseline, _ in measured),
        "ours": median(ours for _, ours in measured),
        "ours ÷ baseline": median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "pairs": len(measured),
    }


def _ratio(measured: Sequence[tuple[float, float]]) -> float:
    return median(ours / baseline for baseline, ours in measured)


# --- generation ------------------------------------------------------------------------------------------------------


def context_settings(settings: Settings) -> ContextSettings:
    """As the product makes its context."""
    wanted = settings.engine
    return ContextSettings(n_ctx=wanted.n_ctx, n_batch=batch_size(settings), threads=libraries.threads(settings))


def model_path(settings: Settings) -> Path:
    """The language model's file."""
    return libraries.model_folder(settings).path(settings.models.llm)


def generation(settings: Settings, tokens: int, repetitions: int) -> Result:
    """The engine's stream against the bare loop, decode phase, tokens a second."""
    sizes = context_settings(settings)
    with (
        Model(model_path(settings), gpu_layers=settings.engine.gpu_layers) as model,
        make_engine(model, settings, threads=sizes.threads) as engine,
        BareLoop(model, sizes) as bare,
    ):
        builder = PromptBuilder(model)
        prompt = Prompt(builder.prefix, (), builder.tail([], REQUEST))
        flat = [*prompt.prefix, *prompt.tail]
        tokens = min(tokens, engine_decode(engine, prompt, tokens)[0])  # no longer than until the model stops
        measured = pairs(
            lambda: bare.decode_rate(flat, tokens),
            lambda: _rate(*engine_decode(engine, prompt, tokens)),
            repetitions,
        )
        same = bare.tokens(flat, tokens) == engine_text_tokens(engine, prompt, tokens, bare)
    return Result(
        rows=[row(f"Engine.submit, {tokens} tokens", "tokens/s", measured)],
        claims=[at_least("generation: Engine.submit ÷ bare llama.cpp loop", _ratio(measured), GENERATION)],
        notes=[f"Engine and bare loop wrote the same text: {'yes' if same else 'NO'}."],
    )


def engine_decode(engine: Engine, prompt: Prompt, tokens: int) -> tuple[int, float]:
    """Tokens written, and the seconds from the first token to the end, as the caller sees it."""
    asked = engine.submit(prompt, Sampling(max_tokens=tokens))
    for step in asked:
        if isinstance(step, Finished):
            return step.usage.completion_tokens, time.perf_counter() - asked.submitted - step.first_token
    raise AssertionError("a generation ends with Finished")


def engine_text_tokens(engine: Engine, prompt: Prompt, tokens: int, bare: BareLoop) -> list[int]:
    """The tokens whose text the engine wrote: the bare loop's when the texts agree, else none."""
    said = "".join(getattr(step, "text", "") for step in engine.submit(prompt, Sampling(max_tokens=tokens)))
    expected = bare.tokens([*prompt.prefix, *prompt.tail], tokens)
    return expected if engine.model.text(expected) == said else []


def _rate(tokens: int, seconds: float) -> float:
    return (tokens - 1) / seconds


def whole_stream(settings: Settings, folder: Path, question: str, tokens: int, repetitions: int) -> Row:
    """A whole `EdgeRAG.stream` (with citations and journal) against the bare loop on the same prompt."""
    sizes = context_settings(settings)
    with (
        EdgeRAG.open(folder, settings=settings) as rag,
        Model(model_path(settings), gpu_layers=settings.engine.gpu_layers) as model,
        BareLoop(model, sizes) as bare,
    ):
        instructions = "Answer in detail and at great length, in many full sentences."
        first = rag.ask(question, instructions=instructions, max_tokens=tokens, top_k=STREAM_PASSAGES)
        flat = answer_prompt(PromptBuilder(model), first, instructions)
        count = first.usage.completion_tokens

        def ours() -> float:
            answer = rag.ask(question, instructions=instructions, max_tokens=count, top_k=STREAM_PASSAGES)
            return _rate(answer.usage.completion_tokens, answer.timings.total - answer.timings.first_token)

        measured = pairs(lambda: bare.decode_rate(flat, count), ours, repetitions)
    return row(f"EdgeRAG.stream with citations, {count} tokens", "tokens/s", measured)


def answer_prompt(builder: PromptBuilder, answer: Answer, instructions: str) -> list[int]:
    """The prompt that the answer was made from."""
    passages = [token for passage in answer.passages for token in builder.passage(passage)]
    return [*builder.prefix, *passages, *builder.tail([], answer.question, instructions)]


# --- embedding -------------------------------------------------------------------------------------------------------


def chunk_texts(folders: Sequence[Path], count: int) -> list[str]:
    """What is embedded for real chunks, the first `count`, in the order in which they are stored."""

    def texts() -> Iterator[str]:
        for folder in folders:
            with libraries.opened(folder) as database, database.read() as connection:
                for row in library.chunk_texts(connection, after=0, limit=count):
                    yield from embedded_views(*row[1:])

    return list(texts())[:count]


def embedding(settings: Settings, texts: list[str], repetitions: int) -> Result:
    """Our embedder against the bare libraries, texts a second."""
    models = libraries.model_folder(settings)
    spec = models.spec(settings.models.embedder)
    bare = BareEmbedder(models.path(spec.name), models.path(spec.tokenizer), threads=libraries.threads(settings))
    ours = libraries.embedder(settings)
    measured = pairs(
        lambda: _texts_a_second(bare.embed, texts), lambda: _texts_a_second(ours.embed, texts), repetitions
    )
    agree = float((bare.embed(texts) * ours.embed(texts)).sum(axis=1).min())
    return Result(
        rows=[row(f"Embedder.embed, {len(texts)} chunks", "texts/s", measured)],
        claims=[at_least("embedding: Embedder.embed ÷ bare onnxruntime", _ratio(measured), EMBEDDING)],
        notes=[f"Least cosine between our vector and the bare one: {agree:.4f}."],
    )


def _texts_a_second(embed: Callable[[list[str]], object], texts: list[str]) -> float:
    started = time.perf_counter()
    embed(texts)
    return len(texts) / (time.perf_counter() - started)
