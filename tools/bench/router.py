"""`router`: what policies for routing and residency lose against one who knows all, in made-up worlds.

Nothing is loaded and nobody is asked: qualities, questions and prices are drawn (`router_world`), and the product's
own bandit and rules decide (`router_play`). Parts: `table` is the table of the notes, with α = 1 for all; `shipped`
compares POLAR as shipped with LRU at its best α; `changes` tells what helped and what did not; `others` are other
worlds; `fading` has qualities that change; `lockin` tells what too little optimism does; `scaling` fits exponents;
`greedy` compares the choice of the set with all sets there are. With --page-in worlds are added with the prices of this
machine.
"""

import argparse
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from rich.console import Console

from edge_rag.config import Settings
from edge_rag.policy.resident_set import Array, choose, worth
from tools.bench import router_ways as ways
from tools.bench.metrics import mean
from tools.bench.report import Claim, Result, Row, above, at_least, at_most
from tools.bench.router_play import Run
from tools.bench.router_rows import Runs, against, arms_used, details, exponents, no_worse, table
from tools.bench.router_runs import REQUESTS, SEEDS, Bench
from tools.bench.router_world import Shape

INSTANCES, QUICK_INSTANCES = 1000, 100
SHORT = 2000  # requests are enough to see who is locked in
NEARLY = 0.9  # of the best set
PROMISED = 0.6  # the exponent of requests; without logarithms it would be a half

Pairs = list[tuple[Row, Claim]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark alone."""
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS], help="what to do (default: all)")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help="worlds of each shape")
    parser.add_argument("--requests", type=int, default=REQUESTS, metavar="N", help="of a world at most")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--page-in", type=float, default=0.0, metavar="MS", help="what a page-in takes on this machine")
    parser.add_argument("--plots", type=Path, default=Path("build") / "bench", metavar="FOLDER", help="for PNG files")


def run(options: argparse.Namespace, settings: Settings, work: Path, console: Console) -> Result:
    """Do the parts that were asked for."""
    bench = Bench(options, console)
    result = Result(notes=["Regret: what one who knows all gains more by a request, in quality less price."])
    result.notes.append("POLAR and POLAR+ are after POLAR (arXiv 2604.16583), reconstructed from its abstract.")
    if not _can_plot():
        result.notes.append("No plots: the `bench` extra is missing.")
    for name in options.parts:
        result.extend(PARTS[name](bench))
    if options.page_in:
        price = options.page_in / 1000 * settings.router.second_price
        result.notes.append(
            f"On this machine a page-in of {options.page_in} ms costs {price:.4f} of an answer's quality."
        )
        worlds = [replace(shape, name=f"here, {shape.name}", price=price) for shape in ways.OTHERS]
        result.rows += details(bench.play(worlds, ways.ELSEWHERE))
    return result


def notes_table(bench: Bench) -> Result:
    """The table of the notes: all with α = 1, as the simulation had it."""
    runs = bench.play(ways.NOTES, ways.TABLE)
    _plot_regret(bench, runs)
    pairs = [
        against(f"{ways.POLAR} / {ways.LRU}, {name}, α = 1", runs[name, ways.POLAR], runs[name, ways.LRU], target)
        for name, target in ((ways.CHEAP, 0.6), (ways.DEAR, 0.75))
    ]
    pairs += _no_worse_than(
        ways.LRU, runs, [shape for shape in ways.NOTES if shape.phases > 1], (ways.POLAR, ways.PLUS)
    )
    pairs += _better_than(ways.EDGELORA, runs, ways.NOTES, (ways.POLAR, ways.PLUS))
    return _result([*table("regret, α = 1", runs), *details(runs)], pairs)


def shipped(bench: Bench) -> Result:
    """POLAR with the α of the settings, against LRU at the best of several α."""
    runs = bench.play(ways.NOTES, ways.SHIPPED_WAYS)
    pairs: Pairs = []
    for shape, target in zip(ways.NOTES, (0.6, 1.0, 0.75, 1.0), strict=True):
        best = min((runs[shape.name, way.name] for way in ways.RIVALS), key=_loss)
        for polar in (ways.AS_SHIPPED, ways.PLUS_SHIPPED):
            name = f"{polar} / {ways.LRU} at its best α, {shape.name}"
            pairs.append(against(name, runs[shape.name, polar], best, target))
    return _result(table("regret, POLAR as shipped", runs), pairs)


def changes(bench: Bench) -> Result:
    """One change after the other."""
    return Result(table("what helped, and what did not", bench.play(ways.NOTES, ways.CHANGES)))


def others(bench: Bench) -> Result:
    """Other worlds."""
    runs = bench.play(ways.OTHERS, ways.ELSEWHERE)
    polars = (ways.AS_SHIPPED, ways.PLUS_SHIPPED)
    pairs = _better_than(ways.EDGELORA, runs, ways.OTHERS, polars) + _no_worse_than(ways.LRU, runs, ways.OTHERS, polars)
    return _result([*table("regret, other worlds", runs), *details(runs)], pairs)


def fading(bench: Bench) -> Result:
    """What it does that old rewards count less: where qualities stay, and where they change half-way."""
    return Result(table("fading", bench.play((ways.NOTES[0], ways.TURNED), ways.DISCOUNTS)))


def lock_in(bench: Bench) -> Result:
    """What is never tried stays unknown. Escaped has who uses more arms than fit into memory, and loses half."""
    shapes = [replace(shape, requests=SHORT) for shape in (ways.NOTES[0], ways.NOTES[2])]
    runs = bench.play(shapes, ways.LOCKED)
    locked, claims, pairs = f"{ways.LRU}, α = {ways.SHIPPED}", [], []
    for shape in shapes:
        free = runs[shape.name, ways.AS_SHIPPED]
        used = min(arms_used(run) for run in free)
        claims.append(above(f"arms used by {ways.AS_SHIPPED}, {shape.name}", used, shape.resident))
        pairs.append(against(f"{ways.AS_SHIPPED} / {locked}, {shape.name}", free, runs[shape.name, locked], 0.5))
    rows = [{**row, "table": f"lock-in {row['table']}"} for row in details(runs)]
    found = _result(rows, pairs)
    found.claims += claims
    return found


def scaling(bench: Bench) -> Result:
    """How regret grows with each measure of the world."""
    result = Result()
    measured: dict[str, dict[str, dict[int, Sequence[Run]]]] = {}
    for measure, sizes in ways.SCALES.items():
        shapes = {size: _scaled(measure, size) for size in (sizes[:3] if bench.quick else sizes)}
        runs = bench.play(list(shapes.values()), ways.SCALED)
        measured[measure] = {
            way.name: {size: runs[shape.name, way.name] for size, shape in shapes.items()} for way in ways.SCALED
        }
        result.rows += [_growth(measure, policy, by_size) for policy, by_size in measured[measure].items()]
    found = exponents(*zip(*measured["requests"][ways.PLUS_SHIPPED].items(), strict=True))
    result.claims.append(at_most(f"exponent of the regret of {ways.PLUS_SHIPPED} in requests", found.mean, PROMISED))
    if _can_plot():
        from tools.bench import router_plots

        router_plots.scaling(bench.plots / "router-scaling.png", measured)
    return result


def greedy(bench: Bench) -> Result:
    """The choice of the set against all sets there are."""
    shares = [share_of_best(seed) for seed in range(QUICK_INSTANCES if bench.quick else INSTANCES)]
    row: Row = {
        "table": "the set against the best of all sets",
        "instances": len(shares),
        "least": min(shares),
        "mean": mean(shares),
        "best found": mean([float(share >= 1 - 1e-9) for share in shares]),
    }
    return Result([row], [at_least(f"share of the best set, least of {len(shares)}", min(shares), NEARLY)])


PARTS: dict[str, Callable[[Bench], Result]] = {
    "greedy": greedy,
    "table": notes_table,
    "shipped": shipped,
    "changes": changes,
    "others": others,
    "fading": fading,
    "lockin": lock_in,
    "scaling": scaling,
}


def share_of_best(seed: int) -> float:
    """Of a random instance of up to 9 arms, what the chosen set is worth, as a share of the best one of all."""
    lift, sizes, tolls, budget = _instance(np.random.default_rng(seed), mixed=bool(seed % 2), tolled=seed % 3 == 0)
    sets = itertools.chain.from_iterable(itertools.combinations(range(len(sizes)), n) for n in range(1 + len(sizes)))
    best = max(worth(some, lift, tolls) for some in sets if sizes[list(some)].sum() <= budget)
    return worth(choose(lift, sizes, tolls, budget), lift, tolls) / best if best else 1.0


def _instance(rng: np.random.Generator, *, mixed: bool, tolled: bool) -> tuple[Array, Array, Array, float]:
    arms, requests = int(rng.integers(2, 10)), int(rng.integers(4, 40))
    lift = np.maximum(rng.normal(0, 1, (arms, requests)), 0)
    sizes = rng.uniform(4, 24, arms) if mixed else np.ones(arms)
    tolls = tolled * rng.uniform(0, 0.2 * requests, arms)
    return lift, sizes, tolls, float(rng.uniform(0.2, 0.8) * sizes.sum())


def _scaled(measure: str, size: int) -> Shape:
    """The cheap world of the notes with another measure; of arms there are as many topics as in it for each."""
    shape = replace(ways.SCALE, name=f"{measure}: {size}", **{measure: size})
    return replace(shape, topics=round(shape.topics * size / ways.SCALE.arms)) if measure == "arms" else shape


def _growth(measure: str, policy: str, by_size: dict[int, Sequence[Run]]) -> Row:
    found = exponents(list(by_size), list(by_size.values()))
    row: Row = {"table": f"regret in all, by {measure}", "policy": policy}
    row |= {str(size): _loss(runs) * len(runs[0].regret) for size, runs in by_size.items()}
    return row | {"exponent": found.mean, "low": found.low, "high": found.high}


def _loss(runs: Sequence[Run]) -> float:
    return mean([float(run.regret.mean()) for run in runs])


def _better_than(rival: str, runs: Runs, shapes: Iterable[Shape], policies: Sequence[str]) -> Pairs:
    return [
        against(f"{policy} / {rival}, {shape.name}", runs[shape.name, policy], runs[shape.name, rival], 1.0)
        for shape, policy in itertools.product(shapes, policies)
    ]


def _no_worse_than(rival: str, runs: Runs, shapes: Iterable[Shape], policies: Sequence[str]) -> Pairs:
    return [
        no_worse(f"{policy} / {rival}, {shape.name}", runs[shape.name, policy], runs[shape.name, rival])
        for shape, policy in itertools.product(shapes, policies)
    ]


def _result(rows: list[Row], pairs: Pairs) -> Result:
    return Result([*rows, *(row for row, _ in pairs)], [claim for _, claim in pairs])


def _can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _plot_regret(bench: Bench, runs: Runs) -> None:
    if _can_plot():
        from tools.bench import router_plots

        router_plots.over_time(bench.plots / "router-regret.png", runs)
