"""`codec`: what keeping KV costs in bytes, time and quality, by codec, on real passages of the model.

A passage directly behind the prefix is kept in each codec, put back at its place, and a question about it is read.
`KL` is the divergence of the next-token distribution after that question from the one behind the KV as it was (float16,
never touched): what quantising alone does, no seams. It has a floor: where a model's products are computed with
quantised activations, any change, however small, moves some of them by a step. So the first row flips the last bit of
one number in 100,000, and both are held against the targets: the KL, and what it adds to that of float16 turned back
and forth.

Rates are float16-equivalent bytes by second of one thread's processor time. `decode` is dequantising alone, `place`
also turns the keys and writes everything into a state; `pack` turns them back and encodes.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

import numpy as np
from msgspec import Struct
from rich.console import Console
from rich.progress import track

from edge_rag.config import Settings
from edge_rag.native import kv_blob
from edge_rag.native.kv_blob import Blob
from edge_rag.native.kv_codec import CODECS, Codec, Decoder, encode
from edge_rag.native.kv_passage import BLOCK_BYTES, pack, part, unpack_into
from edge_rag.native.llama import Context, Run
from edge_rag.native.llama.geometry import Geometry, geometry
from edge_rag.policy.audit import Logits, divergence
from edge_rag.runtime.prompting import Prompt, Tokens
from edge_rag.store.kv_files import KVFolder
from edge_rag.store.kv_format import KVFields
from tools.bench.kv import Bench
from tools.bench.metrics import Interval, bootstrap, percentile
from tools.bench.report import Claim, Result, Row, at_least, at_most

PASSAGES, QUICK_PASSAGES = 24, 2
REPETITIONS = 3  # of each timing; the median counts
BYTES = {"q8": 0.55, "q5": 0.38}  # of float16's, at most
KL = {"q8": 0.002, "q5": 0.005}  # nats, at most
DECODE = 1.0  # GB/s, at least
FLIPPED = 1e-5  # share of numbers


class Sample(Struct, frozen=True):
    """One passage in one codec: bytes kept and on disk, for so many tokens; seconds; and nats."""

    tokens: int
    kept: int
    file: int
    seconds: dict[str, float]
    kl: float
    same: bool


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark alone."""
    parser.add_argument("--passages", type=int, help=f"how many are kept (default {PASSAGES})")


def run(options: argparse.Namespace, settings: Settings, work: Path, console: Console) -> Result:
    """Measure all codecs on all passages."""
    count = options.passages or (QUICK_PASSAGES if options.quick else PASSAGES)
    with Bench(settings, options.data, work, count, quick=options.quick) as bench:
        shape = geometry(bench.model)
        if isinstance(shape, str):
            return Result(notes=[f"Passages of this model cannot be moved: {shape}."])
        folder = KVFolder(work / "files", library="bench", generation="bench", zstd_level=settings.kv.zstd_level)
        samples: dict[Codec, list[Sample]] = {codec: [] for codec in CODECS}
        floor = []
        with Context(bench.model, bench.sizes) as context:
            for place in track(range(len(bench.excerpts)), "passages", console=console):
                exact = Exact(context, shape, bench.prompt([place], place))
                floor.append(divergence(exact.expected, exact.with_flips(place)))
                for codec in CODECS:
                    samples[codec].append(measure(exact, codec, folder))
    plain = shape.shape.bytes_per_token
    rows = [_floor_row(floor), *(_quality_row(codec, samples) for codec in samples)]
    rows += [_size_row(codec, found, plain) for codec, found in samples.items()]
    notes = [
        f"{len(floor)} passages; zstd level {settings.kv.zstd_level} in files; float16 takes {plain} bytes a token.",
        "KL: mean and largest; added: to f16's, with a 95 % percentile bootstrap interval over passages (seed 0).",
    ]
    return Result(rows=rows, claims=list(claims(samples, plain)), notes=notes)


class Exact:
    """The state of a prompt of one passage, and the logits of the token that follows its question."""

    def __init__(self, context: Context, shape: Geometry, prompt: Prompt) -> None:
        self._context = context
        self.geometry = shape
        self._tail, self._start = prompt.tail, prompt.seams[-1]
        context.clear(0)
        self._read(prompt.tokens[: self._start], 0)
        whole = kv_blob.parse(context.save(0), shape.shape)
        self._whole = kv_blob.cut(whole, shape.shape, 0, self._start)
        self.passage = part(self._whole, len(prompt.prefix), self._start)
        self.expected = self._after(self._whole)

    def with_flips(self, seed: int) -> Logits:
        """Logits of the next token when the last bits of a few numbers are others."""
        state = kv_blob.parse(self._whole.buffer.copy(), self.geometry.shape)
        rng = np.random.default_rng(seed)
        for numbers in (state.keys, state.values):
            flipped = numbers.copy().view(np.uint16)
            flipped ^= rng.random(numbers.shape) < FLIPPED
            numbers[:] = flipped.view(np.float16)
        return self._after(state)

    def with_passage(self, sections: Mapping[str, Any], codec: Codec) -> Logits:
        """Logits of the next token when the passage was kept in these sections."""
        state = kv_blob.parse(self._whole.buffer.copy(), self.geometry.shape)
        place = part(state, self._start - self.passage.tokens, self._start)
        unpack_into(place, codec, sections, self.geometry.shape, self.geometry.rope)
        return self._after(state)

    def _after(self, state: Blob) -> Logits:
        self._context.restore(0, state.buffer)
        self._read(self._tail, self._start)
        return self._context.logits()

    def _read(self, tokens: Tokens, position: int) -> None:
        step = self._context.settings.n_batch
        for first in range(0, len(tokens), step):
            self._context.decode([Run(tokens[first : first + step], 0, position + first, logits=True)])


def measure(exact: Exact, codec: Codec, folder: KVFolder) -> Sample:
    """Keep a passage in a codec, on disk too, take the times, put it back and ask."""
    passage, shape, rope = exact.passage, exact.geometry.shape, exact.geometry.rope
    sections: dict[str, Any] = pack(passage, codec, rope)
    fields = KVFields(
        key="0" * 64,
        chunk_id=0,
        space="",
        tokens=passage.tokens,
        layers=shape.layers,
        k_width=shape.k_width,
        v_width=shape.v_width,
        codec=codec,
        seconds=0.0,
    )
    found = exact.with_passage(sections, codec)
    return Sample(
        tokens=passage.tokens,
        kept=sum(section.nbytes for section in sections.values()),
        file=folder.write(fields, sections),
        seconds=timings(exact, codec, sections),
        kl=divergence(exact.expected, found),
        same=int(found.argmax()) == int(exact.expected.argmax()),
    )


# --- times -----------------------------------------------------------------------------------------------------------


def timings(exact: Exact, codec: Codec, sections: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of processor time for encoding, with turning back, for decoding, and with turning and writing."""
    passage, shape, rope = exact.passage, exact.geometry.shape, exact.geometry.rope
    keys, values = passage.keys.astype(np.float32), np.ascontiguousarray(passage.values)
    state = kv_blob.new(shape, passage.positions)
    works: dict[str, Callable[[], object]] = {
        "encode": lambda: encode(codec, keys, values),
        "pack": lambda: pack(passage, codec, rope),
        "decode": lambda: decode(state, codec, sections, exact.geometry),
        "place": lambda: unpack_into(state, codec, sections, shape, rope),
    }
    return {name: median(_processor_time(work) for _ in range(REPETITIONS)) for name, work in works.items()}


def _processor_time(work: Callable[[], object]) -> float:
    started = time.thread_time()
    work()
    return time.thread_time() - started


def decode(state: Blob, codec: Codec, sections: Mapping[str, Any], shape: Geometry) -> None:
    """Dequantise by blocks of layers, as `native.kv_passage` does: keys into one block's room, values into a state."""
    sizes, tokens = shape.shape, state.tokens
    decoder = Decoder(codec, sections, layers=sizes.layers, tokens=tokens, k_width=sizes.k_width, v_width=sizes.v_width)
    step = max(1, BLOCK_BYTES // (4 * tokens * sizes.k_width))
    for start in range(0, sizes.layers, step):
        layers = slice(start, min(start + step, sizes.layers))
        decoder.keys(layers, np.empty((layers.stop - start, tokens, sizes.k_width), dtype=np.float32))
        decoder.values(layers, state.values[layers])


# --- rows ------------------------------------------------------------------------------------------------------------


def rate(samples: Sequence[Sample], work: str, plain: int) -> float:
    """float16-equivalent GB/s of one thread, over all passages."""
    return sum(sample.tokens for sample in samples) * plain / sum(sample.seconds[work] for sample in samples) / 1e9


def share(samples: Sequence[Sample], field: Literal["kept", "file"], plain: int) -> float:
    """Bytes, as a share of float16's."""
    size = sum(sample.kept if field == "kept" else sample.file for sample in samples)
    return size / (sum(sample.tokens for sample in samples) * plain)


def added(samples: Mapping[Codec, Sequence[Sample]], codec: Codec) -> Interval:
    """Nats of KL that a codec adds to float16's, passage by passage."""
    return bootstrap([ours.kl - exact.kl for ours, exact in zip(samples[codec], samples["f16"], strict=True)])


def _floor_row(kl: Sequence[float]) -> Row:
    return {"table": "quality", "codec": "(last bits)", "KL": fmean(kl), "largest": percentile(kl, 1.0)}


def _quality_row(codec: Codec, samples: Mapping[Codec, Sequence[Sample]]) -> Row:
    kl, more = [sample.kl for sample in samples[codec]], added(samples, codec)
    return {
        "table": "quality",
        "codec": codec,
        "KL": fmean(kl),
        "largest": percentile(kl, 1.0),
        "added KL": more.mean,
        "low": more.low,
        "high": more.high,
        "same next token": fmean(sample.same for sample in samples[codec]),
    }


def _size_row(codec: Codec, samples: Sequence[Sample], plain: int) -> Row:
    return {
        "table": "bytes and rates",
        "codec": codec,
        "bytes/token": share(samples, "kept", plain) * plain,
        "÷ f16": share(samples, "kept", plain),
        "file ÷ f16": share(samples, "file", plain),
        **{f"{work} GB/s": rate(samples, work, plain) for work in samples[0].seconds},
    }


def claims(samples: Mapping[Codec, Sequence[Sample]], plain: int) -> Iterator[Claim]:
    """What is promised of each codec."""
    for codec, found in samples.items():
        if codec in BYTES:
            yield at_most(f"{codec}: bytes kept ÷ float16", share(found, "kept", plain), BYTES[codec])
            yield at_most(f"{codec}: bytes of the file ÷ float16", share(found, "file", plain), BYTES[codec])
            yield at_most(f"{codec}: KL", fmean(sample.kl for sample in found), KL[codec], "nats")
            yield at_most(f"{codec}: KL beyond float16's", added(samples, codec).mean, KL[codec], "nats")
        yield at_least(f"{codec}: decode, one thread", rate(found, "decode", plain), DECODE, "GB/s")
