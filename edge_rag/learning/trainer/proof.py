"""Logits of a few examples, to compare llama.cpp with: the exported file must do what was trained.

With and without the adapter: if already the base differs, the model was understood wrongly, not the adapter.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edge_rag.learning.job import PROOF, Examples, Ints, Proof, write_arrays
from edge_rag.learning.trainer.batches import tensors
from edge_rag.learning.trainer.contexts import Contexts
from edge_rag.learning.trainer.loop import answer_states

EXAMPLES = 4
TOP = 64  # logits of each place that are kept
LONG = 1024  # tokens: longer examples are left out where there are others


def write_proof(folder: Path, adapted: Any, data: Examples, device: torch.device) -> None:
    """Compute and write proof.npz. Raises StorageError."""
    contexts = Contexts(adapted, data, device, sys.maxsize)  # kept, for they are needed twice
    chosen = choose(data)
    with torch.no_grad():
        own = [_top(adapted, data, contexts, one, device) for one in chosen]
        with adapted.disable_adapter():
            base = [_top(adapted, data, contexts, one, device) for one in chosen]
    texts = [_texts(data, one) for one in chosen]
    context, context_ends = _flat([text[0] for text in texts])
    tokens, token_ends = _flat([np.concatenate([text[1], text[2][:-1]]) for text in texts])
    proof = Proof(
        context,
        context_ends,
        tokens,
        token_ends,
        np.array([len(text[1]) - 1 for text in texts], dtype=np.int32),
        _ends([len(text[2]) for text in texts]),
        *(np.concatenate(parts) for parts in zip(*base, strict=True)),
        *(np.concatenate(parts) for parts in zip(*own, strict=True)),
    )
    write_arrays(folder / PROOF, proof)


def choose(data: Examples) -> list[int]:
    """A few examples of the first epoch: the shortest and the longest context, and others between."""
    used = np.unique(data.order[0])
    contexts = np.diff(data.context_ends)[data.examples[used, 0]]
    used = used[np.argsort(contexts, kind="stable")]
    short = used[: max(EXAMPLES, int((contexts <= LONG).sum()))]
    places = np.linspace(0, len(short) - 1, min(EXAMPLES, len(short))).round().astype(int)
    return [int(one) for one in dict.fromkeys(short[places])]


def _top(
    adapted: Any, data: Examples, contexts: Contexts, one: int, device: torch.device
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Ids and values of the highest logits at each answer place, and the logarithm of the sum of all exponentials."""
    model = adapted.get_base_model()
    logits = model.lm_head(answer_states(model, contexts, tensors(data, [one], device)))
    values, ids = logits.topk(min(TOP, logits.shape[-1]), dim=-1)
    return (
        ids.cpu().numpy().astype(np.int32),
        values.cpu().numpy().astype(np.float32),
        torch.logsumexp(logits, dim=-1).cpu().numpy().astype(np.float32),
    )


def _texts(data: Examples, one: int) -> tuple[Ints, Ints, Ints]:
    context, tail, answer = data.examples[one]
    return (
        data.contexts[data.context_ends[context] : data.context_ends[context + 1]],
        data.tails[data.tail_ends[tail] : data.tail_ends[tail + 1]],
        data.answers[data.answer_ends[answer] : data.answer_ends[answer + 1]],
    )


def _flat(texts: list[Ints]) -> tuple[Ints, npt.NDArray[np.int64]]:
    return np.concatenate(texts).astype(np.int32), _ends([len(text) for text in texts])


def _ends(lengths: list[int]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
