"""What came of policies in worlds, as rows and claims, with 95 % bootstrap intervals over seeds."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tools.bench.metrics import Interval, bootstrap, mean
from tools.bench.report import Claim, Row, at_most
from tools.bench.router_play import PLAIN, Run

Runs = Mapping[tuple[str, str], Sequence[Run]]  # (world, policy) -> a run for each seed


def regrets(runs: Sequence[Run]) -> list[float]:
    """The mean regret of a request, for each seed."""
    return [float(run.regret.mean()) for run in runs]


def ratio(runs: Sequence[Run], others: Sequence[Run]) -> Interval:
    """How many times the others' mean regret that of these runs is; seeds are drawn in pairs."""
    own, theirs = regrets(runs), regrets(others)

    def of(places: Sequence[float]) -> float:
        return sum(own[int(place)] for place in places) / sum(theirs[int(place)] for place in places)

    return bootstrap([float(place) for place in range(len(own))], statistic=of)


def table(title: str, runs: Runs) -> list[Row]:
    """A row for each policy, with the mean regret of a request in each world, as in the notes."""
    policies = dict.fromkeys(policy for _, policy in runs)
    worlds = dict.fromkeys(world for world, _ in runs)
    return [
        {"table": title, "policy": policy} | {world: mean(regrets(runs[world, policy])) for world in worlds}
        for policy in policies
    ]


def details(runs: Runs) -> list[Row]:
    """A row for each policy and world, with all that was counted."""
    return [_detail(f"in detail: {world}", policy, some) for (world, policy), some in runs.items()]


def _detail(title: str, policy: str, runs: Sequence[Run]) -> Row:
    interval = bootstrap(regrets(runs))
    half = len(runs[0].regret) // 2
    return {
        "table": title,
        "policy": policy,
        "regret": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "second half": mean([float(run.regret[half:].mean()) for run in runs]),
        "net utility": mean([run.gain for run in runs]),
        "hits": mean([run.hits for run in runs]),
        "page-ins": mean([float(run.page_ins) for run in runs]),
        "of them at epochs": mean([float(run.changes) for run in runs]),
        "forced": mean([float(run.forced) for run in runs]),
        "arms used": mean([float(arms_used(run)) for run in runs]),
    }


def arms_used(run: Run) -> int:
    """How many arms were used at all."""
    return int(np.unique(run.used[run.used != PLAIN]).size)


def against(name: str, runs: Sequence[Run], others: Sequence[Run], target: float) -> tuple[Row, Claim]:
    """The ratio of two policies as a row, and the claim that it is no more than `target`."""
    found = ratio(runs, others)
    return _row(name, found), at_most(f"regret of {name}", found.mean, target)


def no_worse(name: str, runs: Sequence[Run], others: Sequence[Run]) -> tuple[Row, Claim]:
    """The same, and the claim that it is at most 1 beyond noise: the interval's lower bound is."""
    found = ratio(runs, others)
    return _row(name, found), at_most(f"regret of {name}, beyond noise", found.low, 1.0)


def _row(name: str, found: Interval) -> Row:
    return {"table": "ratios of regret", "of": name, "ratio": found.mean, "low": found.low, "high": found.high}


def exponent(sizes: Sequence[int], totals: Sequence[float]) -> float:
    """The power of its size with which something grows: the slope of the logarithms, by least squares."""
    slope, _ = np.polyfit([math.log(size) for size in sizes], [math.log(total) for total in totals], 1)
    return float(slope)


def exponents(sizes: Sequence[int], runs: Sequence[Sequence[Run]]) -> Interval:
    """The exponent of the mean total regret, where `runs` are those of each size; seeds are drawn in pairs."""
    totals = [[float(run.regret.sum()) for run in some] for some in runs]

    def of(places: Sequence[float]) -> float:
        return exponent(sizes, [mean([some[int(place)] for place in places]) for some in totals])

    return bootstrap([float(place) for place in range(len(totals[0]))], statistic=of)
