"""What `clustering` makes of logs and clusters, and that it runs."""

import argparse
import json
from pathlib import Path

import pytest
from rich.console import Console

from edge_rag.config import Settings
from tools.bench import clustering
from tools.bench.clustering import Made, World, held, kept, logs

WAYS = ["cold", "cold again", "grown", "grown, regrouped", "overlap", "overlap, grown"]


def made(before: list[set[int]], after: list[set[int]]) -> Made:
    return Made("", [frozenset(group) for group in before], [frozenset(group) for group in after], 0.0)


def test_the_longer_log_begins_with_the_first_and_unseen_questions_are_in_neither() -> None:
    drawn = logs(World([(name,) for name in range(200)], {}), 50, seed=1)
    assert (len(drawn.first), len(drawn.more), len(drawn.coming)) == (50, 60, 50)
    assert drawn.more[:50] == drawn.first
    asked = {question.chunks for question in drawn.more}
    assert [question for question in drawn.coming if question.chunks not in asked] == drawn.unseen
    assert drawn.unseen


def test_clusters_are_kept_when_most_of_them_is_there_again() -> None:
    changed = made([{1, 2, 3, 4}, {5, 6}], [{5, 6, 7}, {1, 2, 3, 4, 9}])
    assert kept(changed) == 0.5
    assert held(changed) == 0.0


def test_clusters_are_held_when_they_only_grew() -> None:
    grown = made([{1, 2}, {5, 6}], [{1, 2, 3}, {5, 6}, {7, 8}])
    assert held(grown) == 1.0
    assert kept(grown) == 0.5


def squad(file: Path) -> Path:
    """A data set of two articles, each of three paragraphs of a chunk's length, with a question to each."""
    data = []
    for topic, things in {"Pumps": ["valve", "rotor", "seal"], "Bees": ["queen", "drone", "hive"]}.items():
        contexts = [f"The {thing} of {topic} is number {len(thing)}. " * 30 for thing in things]
        paragraphs = [
            {
                "context": context,
                "qas": [{"question": f"Which {thing} of {topic}?", "answers": [{"text": thing, "answer_start": 4}]}],
            }
            for thing, context in zip(things, contexts, strict=True)
        ]
        data.append({"title": topic, "paragraphs": paragraphs})
    file.write_text(json.dumps({"data": data}))
    return file


def test_clusterings_of_a_small_corpus_are_measured(small_settings: Settings, tmp_path: Path) -> None:
    file = squad(tmp_path / "small.json")
    options = argparse.Namespace(data=[file], quick=True, caps=[4, 32], seed=0)
    result = clustering.run(options, small_settings, tmp_path, Console(quiet=True))
    assert [(row["cap"], row["way"]) for row in result.rows] == [(cap, way) for cap in (4, 32) for way in WAYS]
    assert all(0 < float(row["covered"] or 0) <= 1 for row in result.rows)
    grown = [row["held"] for row in result.rows if row["way"] in ("grown", "overlap, grown")]
    assert grown == [1.0] * 4
    assert [claim.target for claim in result.claims] == pytest.approx([0.68, 0.51, 1.0])
