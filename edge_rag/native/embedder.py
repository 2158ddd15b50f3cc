"""Text → unit vectors with an ONNX sentence encoder: tokenise, batch by length, run, mean-pool, normalise.

Batches are made of texts of similar length, because a batch is padded to its longest one and padding is computed like
text. The int8 model quantises activations per batch, so a vector may differ in the last digits with its companions.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from tokenizers import Encoding, Tokenizer

from edge_rag.errors import EngineError, ModelError

Vectors = npt.NDArray[np.float32]

MAX_TOKENS = 512  # positions of a BERT encoder
BATCH_TOKENS = 1024  # padded tokens of a batch: bounds memory and keeps single texts of a long batch from waiting


class Embedder:
    """A sentence encoder. Thread-safe. Raises ModelError when model or tokenizer cannot be loaded."""

    def __init__(self, model: Path, tokenizer: Path, *, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Spinning threads would steal the cores from a decode that runs at the same time.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with _load_errors(model):
            self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        with _load_errors(tokenizer):
            self._tokenizer: Any = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._inputs = {entry.name for entry in self._session.get_inputs()}
        self.dimensions = int(self._session.get_outputs()[0].shape[-1])

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors of `texts`, shape [len(texts), dimensions], float32. Text past 512 tokens is not read."""
        vectors = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        encodings = self._encode(texts)
        for places in batches_by_length([len(encoding.ids) for encoding in encodings]):
            vectors[places] = self._run([encodings[place] for place in places])
        return vectors

    def count_tokens(self, texts: Sequence[str]) -> int:
        """How many tokens of `texts` `embed` reads, the encoder's own marks included."""
        return sum(len(encoding.ids) for encoding in self._encode(texts))

    def _encode(self, texts: Sequence[str]) -> list[Encoding]:
        # A lone surrogate (an undecodable byte of a command line, say) is read as '?'; the tokenizer would refuse it.
        encodings: list[Encoding] = self._tokenizer.encode_batch(
            [text.encode("utf-8", "replace").decode() for text in texts]
        )
        return encodings

    def _run(self, encodings: Sequence[Encoding]) -> Vectors:
        ids, mask = _pad(encodings)
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        try:
            hidden = self._session.run(None, {name: feed[name] for name in self._inputs})[0]
        except Exception as error:  # onnxruntime's exceptions share no public base
            raise EngineError(f"the embedding model failed: {error}", remedy="run `edge-rag doctor`") from error
        weights = mask[:, :, None].astype(np.float32)
        pooled = (hidden * weights).sum(axis=1)
        # Dividing by the token count would cancel out here.
        return np.asarray(pooled / np.maximum(np.linalg.norm(pooled, axis=1, keepdims=True), 1e-12), dtype=np.float32)


@contextlib.contextmanager
def _load_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # both libraries raise bare or private exception types
        raise ModelError(f"cannot be loaded: {error}", field=str(path), remedy="run `edge-rag doctor`") from error


def batches_by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of texts in batches of similar length, at most BATCH_TOKENS padded tokens each (or one text)."""
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    batch: list[int] = []
    for place in order:
        if batch and (len(batch) + 1) * lengths[place] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _pad(encodings: Sequence[Encoding]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    longest = max(len(encoding.ids) for encoding in encodings)
    ids = np.zeros((len(encodings), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, encoding in enumerate(encodings):
        ids[row, : len(encoding.ids)] = encoding.ids
        mask[row, : len(encoding.ids)] = 1
    return ids, mask
