"""P-RAG's training, in a process of its own: `python -m tools.bench.prag FOLDER`. Uses the trainer's parts, and torch.

For each passage: an adapter of the feed-forward products that begins at the same numbers, one step on each of its
texts, AdamW at a constant rate, next-token loss on everything behind the prefix (Su et al., arXiv 2501.15915, and
their published code). Written as FOLDER/<chunk>.gguf; result.json says how it went.
"""

import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from edge_rag.learning.job import ADAPTER, RESULT, Result, read_job
from edge_rag.learning.trainer import device, export, lora
from edge_rag.learning.trainer.base import Base
from edge_rag.records import Recipe
from tools.bench.train_jobs import SEQUENCES

ALPHA = 32
RATE = 3e-4


class Trainer:
    """One model, and one adapter after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job = read_job(folder)
        self.device = device.prepare(self.job)
        self._base = Base(self.job)
        self._adapted = lora.attach(self._base.load(), self.job, self._base.facts).to(self.device)
        scale(self._adapted, ALPHA / self.job.rank)
        self._weights = lora.weights(self._adapted)
        self._first = {name: value.detach().clone() for name, value in self._weights.items()}

    def train(self, texts: Sequence[torch.Tensor], prefix: int) -> float:
        """One step on each text, from the beginning; the mean loss."""
        with torch.no_grad():
            for name, value in self._weights.items():
                value.copy_(self._first[name])
        optimiser = torch.optim.AdamW(self._weights.values(), lr=RATE)
        losses = [self._step(optimiser, text.to(self.device), prefix) for text in texts]
        return sum(losses) / len(losses)

    def _step(self, optimiser: torch.optim.Optimizer, text: torch.Tensor, prefix: int) -> float:
        labels = text.clone()
        labels[:prefix] = -100
        optimiser.zero_grad(set_to_none=True)
        loss = self._adapted(input_ids=text[None], labels=labels[None]).loss
        loss.backward()
        optimiser.step()
        return float(loss.detach())

    def write(self, chunk: int) -> int:
        """Write the adapter; its bytes. The file says α = 2 · rank as ours do, so the second matrices are scaled."""
        place = self.folder / str(chunk)
        place.mkdir(exist_ok=True)
        with torch.no_grad():
            for name, value in self._weights.items():
                if ".lora_B." in name:
                    value.mul_(ALPHA / lora.alpha(self.job))
        export.round_weights(self._adapted)
        _, size = export.write_gguf(place, self._adapted, self.job, self._base.facts)
        (place / ADAPTER).replace(self.folder / f"{chunk}.gguf")
        shutil.rmtree(place)
        return size


def scale(adapted: Any, factor: float) -> None:
    """Set what the adapter's products are multiplied by."""
    for module in adapted.modules():
        if hasattr(module, "lora_A"):
            module.scaling["default"] = factor


def read_texts(folder: Path) -> tuple[dict[int, list[torch.Tensor]], int]:
    """The texts of each passage, by its chunk; and how many tokens of each are not learned."""
    with np.load(folder / SEQUENCES, allow_pickle=False) as stored:
        tokens, ends, owners = stored["tokens"].astype(np.int64), stored["ends"], stored["owners"]
        prefix = int(stored["prefix"][0])
    found: dict[int, list[torch.Tensor]] = defaultdict(list)
    for place, owner in enumerate(owners.tolist()):
        found[owner].append(torch.from_numpy(tokens[ends[place] : ends[place + 1]]))
    return found, prefix


def main(folder: Path) -> None:
    """Train all passages of a folder."""
    texts, prefix = read_texts(folder)
    trainer = Trainer(folder)
    started, size, losses = time.perf_counter(), 0, []
    for number, (chunk, each) in enumerate(texts.items(), start=1):
        losses.append(trainer.train(each, prefix))
        size += trainer.write(chunk)
        if number % 20 == 0:
            print(f"P-RAG: {number} of {len(texts)} passages", flush=True)
    recipe = Recipe(
        targets=trainer.job.targets,
        layers=trainer.job.layers,
        rank=trainer.job.rank,
        epochs=1,
        examples=sum(map(len, texts.values())),
        tokens=sum(len(text) - prefix for each in texts.values() for text in each),
        seconds=time.perf_counter() - started,
        peak_bytes=device.peak(trainer.device),
        loss=sum(losses) / len(losses),
        device=str(trainer.device),
    )
    (folder / RESULT).write_bytes(msgspec.json.encode(Result(recipe, "", size)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
