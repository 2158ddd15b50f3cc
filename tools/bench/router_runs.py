"""Runs policies in made-up worlds, several seeds at a time."""

import argparse
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from msgspec.structs import replace
from rich.console import Console

from tools.bench.router_play import Run, Way, play
from tools.bench.router_world import Shape, world

SEEDS, QUICK_SEEDS = 10, 2
REQUESTS, QUICK_REQUESTS = 32_000, 400  # at most

Task = tuple[Shape, int, tuple[Way, ...]]


class Bench:
    """How much is to be done, where plots go, and who does it."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.quick: bool = options.quick
        self.plots: Path = options.plots
        self._most: int = min(options.requests, QUICK_REQUESTS) if options.quick else options.requests
        self._seeds: int = min(options.seeds, QUICK_SEEDS) if options.quick else options.seeds
        self._jobs: int = options.jobs
        self._console = console

    def play(self, shapes: Sequence[Shape], policies: Sequence[Way]) -> dict[tuple[str, str], list[Run]]:
        """A run for each seed, by the names of world and policy."""
        tasks = [(self._cut(shape), seed, tuple(policies)) for shape in shapes for seed in range(self._seeds)]
        found: dict[tuple[str, str], list[Run]] = {(s.name, way.name): [] for s in shapes for way in policies}
        for (shape, seed, _), runs in zip(tasks, self._all(tasks), strict=True):
            self._console.print(f"{shape.name}: {1 + seed} of {self._seeds}")
            for way, run in zip(policies, runs, strict=True):
                found[shape.name, way.name].append(run)
        return found

    def _cut(self, shape: Shape) -> Shape:
        return replace(shape, requests=min(shape.requests, self._most))

    def _all(self, tasks: Sequence[Task]) -> Iterator[list[Run]]:
        if self._jobs == 1:
            yield from map(played, tasks)
            return
        # Forked processes would take over how the whole run ends on SIGTERM, and go on with their seeds.
        with ProcessPoolExecutor(self._jobs, get_context("spawn")) as pool:
            yield from pool.map(played, tasks)


def played(task: Task) -> list[Run]:
    """All policies in one world of one seed."""
    shape, seed, policies = task
    made = world(shape, seed)
    return [play(made, way) for way in policies]
