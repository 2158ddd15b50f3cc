"""The made-up worlds of `router`, what policies make of them, and that it runs."""

import argparse
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from rich.console import Console

from edge_rag.config import Settings
from edge_rag.policy.residency import Pace, fixed
from tools.bench import router
from tools.bench.router_play import Run, Way, play
from tools.bench.router_rows import exponent, ratio
from tools.bench.router_runs import Bench
from tools.bench.router_world import Shape, World, exams, observed, world

SMALL = Shape(arms=6, dimensions=5, resident=2, requests=300, topics=4)
ALL = replace(SMALL, resident=6)


def run_of(*regrets: float) -> Run:
    return Run(np.array(regrets), np.zeros(len(regrets), np.int16), gain=0, hits=0, page_ins=0, changes=0, forced=0)


# --- worlds ----------------------------------------------------------------------------------------------------------


def test_a_seed_is_a_world() -> None:
    made, again, other = world(SMALL, 1), world(SMALL, 1), world(SMALL, 2)
    assert np.array_equal(made.qualities, again.qualities)
    assert not np.array_equal(made.qualities, other.qualities)


def test_qualities_are_linear_in_contexts_of_unit_length() -> None:
    made = world(SMALL, 1)
    assert np.linalg.norm(made.contexts, axis=1) == pytest.approx(np.ones(300))
    found, *_ = np.linalg.lstsq(made.contexts, made.qualities, rcond=None)
    assert made.contexts @ found == pytest.approx(made.qualities)
    assert made.qualities.min() >= 0
    assert made.qualities.max() <= 1


def test_what_is_observed_stays_within_bounds_and_is_right_in_the_mean() -> None:
    made = world(replace(SMALL, requests=4000), 1)
    for quality in (0.0, 0.05, 0.5, 1.0):
        seen = [observed(made, number, quality) for number in range(4000)]
        assert min(seen) >= 0
        assert max(seen) <= 1
        assert np.mean(seen) == pytest.approx(quality, abs=0.01)


def test_popularity_changes_with_the_phase_and_qualities_do_when_they_turn() -> None:
    one, two = world(SMALL, 1), world(replace(SMALL, phases=2), 1)
    assert np.array_equal(one.directions, two.directions)
    assert np.array_equal(one.contexts[:150], two.contexts[:150])
    assert not np.array_equal(one.contexts[150:], two.contexts[150:])
    still, turned = world(SMALL, 1), world(replace(SMALL, turned=True), 1)
    assert np.array_equal(still.contexts, turned.contexts)
    assert np.array_equal(still.qualities[:150], turned.qualities[:150])
    assert not np.isclose(still.qualities[150:], turned.qualities[150:]).any(axis=1).all()


def test_a_topic_has_its_candidates_and_its_own_arm_is_among_them() -> None:
    made = world(replace(SMALL, candidates=3, skill=1.0), 1)
    assert {len(places) for places in made.offered} <= {2, 3}
    best = made.qualities.argmax(axis=1)
    assert np.mean([place in places for place, places in zip(best, made.offered, strict=True)]) > 0.9


def test_mixed_sizes_cost_in_proportion() -> None:
    made = world(replace(SMALL, mixed=True), 1)
    sizes = np.array(list(made.sizes.values()))
    assert len(set(sizes.tolist())) == 6
    assert made.prices / sizes == pytest.approx(np.full(6, SMALL.price / sizes.mean()))
    assert made.budget == int(2 * sizes.mean())


def test_the_clairvoyant_has_the_best_arm_when_all_are_resident_or_plain_retrieval_when_that_is_better() -> None:
    made = world(ALL, 1)
    assert made.best == pytest.approx(made.qualities.max(axis=1))
    plain = world(replace(ALL, plain=0.9, plain_price=0.25), 1)
    assert plain.best == pytest.approx(np.maximum(plain.qualities.max(axis=1), 0.65))


def test_the_clairvoyant_pays_for_what_is_not_in_the_best_set() -> None:
    made = world(SMALL, 1)
    best = made.qualities.max(axis=1)
    assert (made.best <= best + 1e-12).all()
    assert (made.best >= best - SMALL.price - 1e-12).all()
    assert 0 < np.isclose(made.best, best).mean() < 1


def test_exams_ask_what_an_arm_does_better_than_others_do() -> None:
    made = world(replace(SMALL, skill=0.9), 1)
    contexts, qualities = exams(made)
    assert contexts.shape == (6, 16, 5)
    assert qualities.shape == (6, 16)
    assert (qualities.mean(axis=1) > made.qualities.mean(axis=0)).all()
    at_exams = 0.5 + np.einsum("aed,ad->ae", contexts[..., 1:], made.directions) / np.sqrt(2)
    assert at_exams == pytest.approx(qualities)


# --- playing ---------------------------------------------------------------------------------------------------------


def test_regret_is_what_the_clairvoyant_gains_more() -> None:
    made = world(SMALL, 1)
    found = play(made, Way("", "lru"))
    quality = made.qualities[np.arange(300), found.used]
    recent: list[int] = []  # the last used two are resident
    missed = []
    for place in found.used.tolist():
        missed.append(place not in recent[-2:])
        recent = [*(other for other in recent if other != place), place]
    assert found.regret == pytest.approx(made.best - quality + SMALL.price * np.array(missed))
    assert found.page_ins == sum(missed)
    assert found.hits == pytest.approx(1 - sum(missed) / 300)
    assert found.gain == pytest.approx(float((made.best - found.regret).mean()))


def test_arms_that_are_loaded_at_an_epochs_end_are_paid_for() -> None:
    made = world(SMALL, 1)
    found = play(made, Way("", pace=Pace(first=50, longest=50, window=50, scouting=0, pulls=0), trials=0))
    assert found.changes > 0
    misses = round(300 * (1 - found.hits))
    assert found.page_ins == misses + found.changes
    quality = made.qualities[np.arange(300), found.used]
    assert float((made.best - found.regret).sum()) == pytest.approx(quality.sum() - SMALL.price * found.page_ins)


def test_who_looks_at_no_price_uses_the_same_arms_whatever_is_resident_and_belady_has_the_fewest_page_ins() -> None:
    made = world(SMALL, 1)
    runs = {name: play(made, Way("", name, priced=False)) for name in ("lru", "fifo", "lfu", "belady")}
    assert all(np.array_equal(some.used, runs["lru"].used) for some in runs.values())
    assert runs["belady"].page_ins < min(runs[name].page_ins for name in ("lru", "fifo", "lfu"))


def test_plain_trials_are_made_of_each_arm_in_each_epoch() -> None:
    made = world(SMALL, 1)
    found = play(made, Way("", pace=Pace(first=100, longest=100, window=100, scouting=0, pulls=0), trials=2))
    assert found.forced == 3 * 2 * 6
    assert [np.unique(found.used[start : start + 12], return_counts=True)[1].tolist() for start in (0, 100, 200)] == [
        [2] * 6
    ] * 3


def test_one_more_resident_arm_costs_fewer_page_ins() -> None:
    made = world(SMALL, 1)
    assert play(made, Way("", "lru", priced=False, more=1)).page_ins < play(made, Way("", "lru", priced=False)).page_ins


def test_exams_spare_much_regret() -> None:
    made = world(replace(SMALL, dimensions=9), 3)
    plain, seeded = (play(made, Way("", "lru", alpha=0.25, seeded=number)) for number in (0, 16))
    assert seeded.regret.sum() < 0.5 * plain.regret.sum()


def test_plain_retrieval_is_used_where_it_is_best() -> None:
    made = world(replace(SMALL, plain=1.0, plain_price=0.0), 1)
    found = play(made, Way("", "lru"))
    assert (found.used[150:] == -1).mean() > 0.5
    assert found.regret.mean() < 0.2


def lost(made: World, *policies: Way) -> list[float]:
    return [float(play(made, way).regret.sum()) for way in policies]


def test_scouting_escapes_what_little_optimism_is_locked_in_by() -> None:
    made = world(replace(SMALL, dimensions=9, requests=1000, price=0.4), 1)
    locked, free = lost(made, Way("", "lru", alpha=0.1), Way("", pace=fixed(100), alpha=0.1))
    assert free < 0.5 * locked


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_a_ratio_is_that_of_sums_and_has_no_width_when_all_seeds_agree() -> None:
    runs, others = [run_of(1, 1), run_of(3, 3)], [run_of(2, 2), run_of(6, 6)]
    assert ratio(runs, others) == pytest.approx((0.5, 0.5, 0.5))


def test_the_exponent_of_a_power_is_its_own() -> None:
    assert exponent([10, 20, 40], [3 * size**0.6 for size in (10, 20, 40)]) == pytest.approx(0.6)


def test_the_chosen_set_is_nearly_the_best_one() -> None:
    assert min(router.share_of_best(seed) for seed in range(60)) >= 0.9


# --- the whole -------------------------------------------------------------------------------------------------------


def options(folder: Path, *parts: str, **more: float) -> argparse.Namespace:
    asked = {"quick": True, "seeds": 2, "jobs": 1, "requests": 40, "page_in": 0.0} | more
    return argparse.Namespace(parts=parts, plots=folder, **asked)


def test_several_processes_find_the_same(tmp_path: Path) -> None:
    found = [
        Bench(options(tmp_path, jobs=jobs), Console(quiet=True)).play([replace(SMALL, name="small")], [Way("l", "lru")])
        for jobs in (1, 2)
    ]
    one, two = (runs["small", "l"] for runs in found)
    assert len(one) == len(two) == 2
    assert all(np.array_equal(run.regret, other.regret) for run, other in zip(one, two, strict=True))


def test_the_tables_of_a_short_run(tmp_path: Path) -> None:
    result = router.run(options(tmp_path, "greedy", "table"), Settings(), tmp_path, Console(quiet=True))
    shown = [row for row in result.rows if row["table"] == "regret, α = 1"]
    assert len(shown) == 14
    assert all(isinstance(row["c = .4, drift"], float) for row in shown)
    targets = {claim.name: claim.target for claim in result.claims}
    assert targets["regret of POLAR / cost-aware LinUCB + LRU, c = .1, α = 1"] == 0.6
    assert targets["share of the best set, least of 100"] == 0.9


def test_other_parts_run_and_prices_of_this_machine_may_be_told(tmp_path: Path) -> None:
    asked = options(tmp_path, "shipped", "lockin", "scaling", requests=20, page_in=200.0)
    result = router.run(asked, Settings(), tmp_path, Console(quiet=True))
    tables = {str(row["table"]) for row in result.rows}
    assert {"regret, POLAR as shipped", "regret in all, by arms", "in detail: here, mixed sizes, c = .2"} <= tables
    assert "On this machine a page-in of 200.0 ms costs 0.0100 of an answer's quality." in result.notes
    assert any(claim.name.startswith("exponent of the regret of POLAR+") for claim in result.claims)


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    router.run(options(tmp_path, "table", "scaling", requests=10), Settings(), tmp_path, Console(quiet=True))
    drawn = {file.name: file.read_bytes()[:4] for file in tmp_path.glob("*.png")}
    assert drawn == dict.fromkeys(("router-regret.png", "router-scaling.png"), b"\x89PNG")
