"""What `adapters` is compared with: other ways to put passages, or nothing but their form, into an adapter.

    P-RAG        one adapter for each passage, those of the first three summed (Su et al., arXiv 2501.15915): rank 2,
                 α 32, learning rate 3e-4, five steps (`tools.bench.prag`)
    format       trained to read other clusters' passages: it knows how answers look, and nothing of what is asked
    SFT          our recipe on the logged questions alone, with the teacher's words and not its distribution

A wrong adapter is another cluster's, so it needs no training. All of them answer without passages in the prompt.
"""

import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from edge_rag.learning import dataset
from edge_rag.learning.dataset import LOGGED, Lessons
from edge_rag.learning.job import (
    ADAPTER,
    JOB,
    RESULT,
    Examples,
    Ints,
    Job,
    Offsets,
    read_result,
    write_arrays,
    write_job,
)
from edge_rag.records import Cluster, Item
from edge_rag.runtime.course import Tools
from edge_rag.runtime.prompting import PromptBuilder, Tokens
from edge_rag.runtime.training import Training
from edge_rag.store import clusters
from edge_rag.store.items import TOP, Taught
from tools.bench import libraries
from tools.bench.courses import SLICE, TAUGHT, tools_of
from tools.bench.curriculum import REWRITES, Site
from tools.bench.report import Row
from tools.bench.train_jobs import PRAG, SEQUENCES

RIVALS, SFT, FORMAT = "rivals", "sft", "format"
PAIRS = 3  # questions with answers of each passage, for P-RAG
SUMMED = 3  # adapters
PRAG_RANK = 2


class Text(Struct, frozen=True):
    """Something to train on: what stands before (read by the base), question and header, and the answer."""

    context: Tokens
    tail: Tokens
    answer: Taught


class Sequences(Struct, frozen=True):
    """P-RAG's texts: sequence i is `tokens[ends[i]:ends[i + 1]]` and belongs to the passage `owners[i]`.

    All begin with `prefix[0]` tokens that are not learned.
    """

    tokens: Ints
    ends: Offsets
    owners: Ints
    prefix: Ints


def examples(texts: Sequence[Text], *, epochs: int, repeats: int = 1) -> Examples:
    """A job's examples: each text `repeats` times an epoch, in an order that is drawn."""
    contexts = list(dict.fromkeys(text.context for text in texts))
    places = {context: place for place, context in enumerate(contexts)}
    drawn = np.random.default_rng(0)
    order = [drawn.permutation(np.tile(np.arange(len(texts)), repeats)) for _ in range(epochs)]
    return Examples(
        *_flat(contexts),
        *_flat([text.tail for text in texts]),
        *_flat([text.answer.tokens for text in texts]),
        top_ids=np.concatenate([text.answer.top_ids for text in texts]).reshape(-1, TOP),
        top_logprobs=np.concatenate([text.answer.top_logprobs for text in texts]).reshape(-1, TOP),
        examples=np.array([(places[text.context], place, place) for place, text in enumerate(texts)], np.int32),
        order=np.array(order, np.int32),
    )


def _flat(texts: Sequence[Sequence[int] | Ints]) -> tuple[Ints, Offsets]:
    ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return np.concatenate([np.asarray(text, np.int32) for text in texts]), ends


# --- training --------------------------------------------------------------------------------------------------------


def prepare(site: Site) -> None:
    """Write the jobs of all rivals from what was taught, if they are not there yet."""
    if (site.folder / RIVALS / PRAG / JOB).exists():  # it is written last
        return
    with site.house(site.taught) as house:
        tools = tools_of(house, site, TAUGHT)
        with house.database.read() as connection:
            found = clusters.clusters(connection)
            known = {each.id: dataset.lessons(connection, each.members, model=tools.base) for each in found}
        builder = house.builder()
        write_sft(site, tools, builder, known)
        write_format(site, tools, builder, found, known)
        write_prag(site, tools, builder, known)


def train(site: Site) -> list[Row]:
    """Train all rivals that are not trained yet; a row for each."""
    prepare(site)
    folders = sorted(file.parent for file in (site.folder / RIVALS).glob(f"*/{JOB}"))
    return [row for folder in folders for row in _train_one(folder, site)]


def _train_one(folder: Path, site: Site) -> Iterator[Row]:
    if not site.out_of_time and not (folder / RESULT).exists():
        site.console.print(f"training {folder.name}")
        if folder.name == PRAG:
            subprocess.run([sys.executable, "-m", "tools.bench.prag", str(folder)], check=True)
        else:
            run_job(folder, site)
    if result := read_result(folder):
        yield {
            "table": "rivals",
            "rival": folder.name,
            "examples": result.recipe.examples,
            "seconds": result.recipe.seconds,
            "tokens": result.recipe.tokens,
            "bytes": result.bytes,
            "loss": result.recipe.loss,
            "device": result.recipe.device,
        }


def run_job(folder: Path, site: Site) -> None:
    """Train until it is done or time is up. Raises SystemExit when it fails."""
    with Training(
        folder, busy=lambda: False, short=lambda: False, threads=libraries.threads(site.settings)
    ) as training:
        while not site.out_of_time and (outcome := training.run(SLICE)) != "finished":
            if outcome == "failed" and training.failure:
                raise SystemExit(f"{folder.name}: {training.failure.reason} ({training.failure.remedy})")


def job(tools: Tools, **changes: object) -> Job:
    """A job as the product would make it, with changes."""
    return replace(tools.asked_for(), **changes)


def write_sft(site: Site, tools: Tools, builder: PromptBuilder, known: Mapping[int, Lessons]) -> None:
    """A job for each cluster: its logged questions without passages, as often as our adapter sees them."""
    for cluster_id, lessons in known.items():
        texts = [Text(builder.prefix, _tail(builder, tools, item), lessons.taught[item.id]) for item in logged(lessons)]
        if texts:
            made = examples(texts, epochs=site.settings.learning.epochs, repeats=LOGGED)
            write_job(site.folder / RIVALS / f"{SFT}-{cluster_id}", job(tools, kl=0.0), made)


def write_format(
    site: Site, tools: Tools, builder: PromptBuilder, found: Sequence[Cluster], known: Mapping[int, Lessons]
) -> None:
    """Two jobs, each of half of the clusters, for questions of the other half: `format_of` says which is whose."""
    for side in (0, 1):
        lessons = [known[each.id] for each in found if format_of(each.id, found) != side]
        texts = [text for each in lessons for text in _read_texts(each, tools, builder)]
        if texts:
            made = examples(texts, epochs=site.settings.learning.epochs)
            write_job(site.folder / RIVALS / f"{FORMAT}-{side}", job(tools, kl=0.0), made)


def format_of(cluster_id: int, found: Sequence[Cluster]) -> int:
    """Which of the two format adapters has not seen this cluster."""
    return sorted(each.id for each in found).index(cluster_id) % 2


def _read_texts(lessons: Lessons, tools: Tools, builder: PromptBuilder) -> Iterator[Text]:
    for item in logged(lessons):
        passages = [builder.passage(lessons.passages[chunk]) for chunk in item.chunks if chunk in lessons.passages]
        context = (*builder.prefix, *(token for passage in passages for token in passage))
        yield Text(context, _tail(builder, tools, item), lessons.taught[item.id])


def logged(lessons: Lessons) -> list[Item]:
    """The asked questions that may be learned."""
    return [item for item in lessons.inside if item.kind == "logged"]


def _tail(builder: PromptBuilder, tools: Tools, item: Item) -> Tokens:
    return builder.tail((), item.question, tools.instructions)


# --- P-RAG -----------------------------------------------------------------------------------------------------------


def write_prag(site: Site, tools: Tools, builder: PromptBuilder, known: Mapping[int, Lessons]) -> None:
    """One job for all passages of clusters: five texts each, as `prag_texts` makes them."""
    rewrites = site.read(REWRITES, dict[str, str], dict)
    sequences: list[Tokens] = []
    owners: list[int] = []
    for lessons in known.values():
        for chunk in sorted((lessons.members & lessons.passages.keys()).difference(owners)):
            passage = lessons.passages[chunk]
            shown = [builder.passage(passage)]
            if rewrite := rewrites.get(str(chunk)):
                shown.insert(0, builder.passage(replace(passage, text=rewrite)))
            pairs = [
                (*_tail(builder, tools, item), *map(int, lessons.taught[item.id].tokens))
                for item in _about(chunk, lessons)[:PAIRS]
            ]
            texts = [(*builder.prefix, *text) for text in prag_texts(shown, pairs)]
            sequences += texts
            owners += [chunk] * len(texts)
    if sequences:
        folder = site.folder / RIVALS / PRAG
        folder.mkdir(parents=True, exist_ok=True)
        made = Sequences(*_flat(sequences), np.array(owners, np.int32), np.array([len(builder.prefix)], np.int32))
        write_arrays(folder / SEQUENCES, made)
        task = job(tools, targets="ffn", layers="all", rank=PRAG_RANK, epochs=1)
        (folder / JOB).write_bytes(msgspec.json.encode(task))


def _about(chunk: int, lessons: Lessons) -> list[Item]:
    """Written questions about just this passage, then asked ones for which it was found first."""
    written = [item for item in lessons.inside if item.chunks == (chunk,)]
    return written + [item for item in logged(lessons) if item.chunks[0] == chunk]


def prag_texts(passages: Sequence[Tokens], pairs: Sequence[Tokens]) -> Iterator[Tokens]:
    """The first half of the pairs behind each form of the passage, the others alone; of 3 pairs and 2 forms 5 texts."""
    for place, pair in enumerate(pairs):
        forms: Iterable[Tokens] = passages if place < (len(pairs) + 1) // 2 else [()]
        for form in forms:
            yield (*form, *pair)


def rival_files(site: Site) -> dict[str, Path]:
    """The adapters of all rivals but P-RAG, by name."""
    return {file.parent.name: file for file in sorted((site.folder / RIVALS).glob(f"*/{ADAPTER}"))}


def prag_files(site: Site) -> dict[int, Path]:
    """P-RAG's adapters by the chunk that each knows."""
    return {int(file.stem): file for file in sorted((site.folder / RIVALS / PRAG).glob("[0-9]*.gguf"))}
