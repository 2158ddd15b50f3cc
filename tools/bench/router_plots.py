"""The plots of `router`: regret over time, and how it grows with the measures of the world. Needs the `bench` extra."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from tools.bench.metrics import mean
from tools.bench.router_play import Run
from tools.bench.router_rows import Runs, exponent

POINTS = 200  # of a curve
INCHES = 4.2
LINES = ("-", "--", ":", "-.")

mpl.use("Agg")


def over_time(file: Path, runs: Runs) -> None:
    """Cumulated regret, the mean over seeds, of each policy; a panel for each world."""
    worlds = list(dict.fromkeys(world for world, _ in runs))
    figure = Figure(figsize=(INCHES * len(worlds), INCHES + 1.5), layout="constrained")
    panels = figure.subplots(1, len(worlds), squeeze=False)[0]
    for world, panel in zip(worlds, panels, strict=True):
        policies = [policy for each, policy in runs if each == world]
        for place, policy in enumerate(policies):
            total = np.mean([run.regret.cumsum() for run in runs[world, policy]], axis=0)
            shown = np.linspace(0, len(total) - 1, POINTS).astype(int)
            panel.plot(shown, total[shown], LINES[place % len(LINES)], label=policy, linewidth=1.2)
        panel.set_title(world)
        panel.set_xlabel("requests")
    panels[0].set_ylabel("regret so far")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    _save(figure, file)


def scaling(file: Path, measured: Mapping[str, Mapping[str, Mapping[int, Sequence[Run]]]]) -> None:
    """Total regret against each measure of the world (measure → policy → size → runs), both logarithmic."""
    figure = Figure(figsize=(INCHES * len(measured), INCHES), layout="constrained")
    panels = figure.subplots(1, len(measured), squeeze=False)[0]
    for (measure, policies), panel in zip(measured.items(), panels, strict=True):
        for place, (policy, by_size) in enumerate(policies.items()):
            totals = [mean([float(run.regret.sum()) for run in runs]) for runs in by_size.values()]
            label = f"{policy}: {exponent(list(by_size), totals):.2f}"
            panel.loglog(list(by_size), totals, LINES[place % len(LINES)], marker="o", label=label)
        panel.set_xlabel(measure)
        panel.legend(fontsize="small")
    panels[0].set_ylabel("regret in all")
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
