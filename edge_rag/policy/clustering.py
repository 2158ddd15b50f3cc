"""Which passages become one adapter: those that are asked for together, as many as one adapter can hold.

Only one adapter acts at a time, so a clustering is worth the share of a question's passages that ONE of its clusters
holds (`coverage`). Each question ties its passages to each other with 2 × weight / passages²; so the ties inside
clusters add up to the squared shares over clusters and questions, which are high when shares are large. New passages
are divided into communities by Louvain (Blondel et al., 2008; networkx), one that is too large for an adapter is
divided again at twice the resolution, and `packing` joins and improves them under the caps.

Clusters that were trained only grow, and their passages stay: an adapter would be lost else. So only those are to be
given as `old` ones (`settled`); `regroup` is for where starting anew pays all the same. With `overlap` a
second round does the same for what the first left uncovered: each passage may be in one more cluster, and the number of
clusters at most doubles.

Passages tied to nothing stay text, unless they alone are asked for often. One of more tokens than a cluster may have is
never in one.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import networkx as nx

from edge_rag.policy.packing import SLACK, Caps, Packing, Ties
from edge_rag.records import Asked, Cluster, Record

ALONE = 8.0  # questions for one passage alone that make it a cluster; the default of learning.least_questions
ROUNDS = 12  # of moving passages at most; they nearly always settle sooner
REGION = 4  # clusters that are regrouped together
REGIONS = 16  # tried at most

Question = tuple[frozenset[int], float]


class Coverage(Record, frozen=True):
    """How much of the questions' passages one cluster holds (0..1): the mean share, and the share of whole ones."""

    share: float
    whole: float


# --- how good a clustering is ----------------------------------------------------------------------------------------


def coverage(clusters: Sequence[Collection[int]], asked: Iterable[Asked]) -> Coverage:
    """Means over questions by weight; each counts with the cluster that holds most of it. Zeros without questions."""
    questions = _merged(asked)
    shares = _shares(clusters, questions)
    total = math.fsum(weight for _, weight in questions)
    if not total:
        return Coverage(share=0.0, whole=0.0)
    pairs = [(share, weight) for share, (_, weight) in zip(shares, questions, strict=True)]
    return Coverage(
        share=math.fsum(share * weight for share, weight in pairs) / total,
        whole=math.fsum(weight for share, weight in pairs if share == 1) / total,
    )


def weigh(clusters: Sequence[Collection[int]], asked: Iterable[Asked]) -> list[float]:
    """For each cluster the weight of the questions, each as far as the cluster holds its passages."""
    questions = _merged(asked)
    parts: dict[int, list[float]] = defaultdict(list)
    for held, (chunks, weight) in zip(_held(clusters, questions), questions, strict=True):
        for place, count in held.items():
            parts[place].append(weight * count / len(chunks))
    return [math.fsum(parts[place]) for place in range(len(clusters))]


def worth_training(cluster: Cluster, least: float) -> bool:
    """Whether its questions weigh at least `least`, and its passages are others than when it was last trained."""
    changed = cluster.trained_at is None or cluster.changed_at > cluster.trained_at
    return changed and cluster.weight >= least


def settled(clusters: Iterable[Cluster]) -> list[Cluster]:
    """Those that were trained, and not in vain: they are to stay as they are. The others may be clustered anew."""
    return [each for each in clusters if each.trained_at is not None and not each.failure]


def _merged(asked: Iterable[Asked]) -> list[Question]:
    """Questions with the same passages as one, in an order that does not depend on theirs."""
    weights: dict[frozenset[int], list[float]] = defaultdict(list)
    for question in asked:
        if question.chunks and question.weight > 0:
            weights[frozenset(question.chunks)].append(question.weight)
    return [(chunks, math.fsum(weights[chunks])) for chunks in sorted(weights, key=sorted)]


def _shares(clusters: Sequence[Collection[int]], questions: Sequence[Question]) -> list[float]:
    """For each question the largest share of its passages that one cluster holds."""
    held = _held(clusters, questions)
    return [max(counts.values(), default=0) / len(chunks) for counts, (chunks, _) in zip(held, questions, strict=True)]


def _held(clusters: Sequence[Collection[int]], questions: Iterable[Question]) -> Iterator[Counter[int]]:
    """For each question, how many of its passages each cluster holds that holds any, by the cluster's place."""
    places: dict[int, list[int]] = defaultdict(list)
    for place, members in enumerate(clusters):
        for member in members:
            places[member].append(place)
    for chunks, _ in questions:
        yield Counter(place for chunk in chunks for place in places.get(chunk, ()))


# --- making one ------------------------------------------------------------------------------------------------------


def cluster(
    asked: Iterable[Asked],
    tokens: Mapping[int, int],
    *,
    old: Sequence[frozenset[int]] = (),
    most: int,
    most_tokens: int,
    overlap: bool = False,
    alone: float = ALONE,
) -> list[frozenset[int]]:
    """Clusters of at most `most` passages and `most_tokens` tokens; `tokens` has those of each passage that exists.

    The first are the `old` ones in their order, each with all its members and perhaps new ones (one that is over a
    limit gets none); new clusters follow. A passage that at least `alone` questions by weight ask for alone may be one
    by itself. The same questions in any order give the same clusters.
    """
    caps = Caps(tokens=tokens, most=most, most_tokens=most_tokens)
    questions = _merged(_eligible(asked, caps))
    clusters = _grown(old, questions, _members(questions, old, times=0), caps)
    clusters += _alone(questions, _members(questions, clusters, times=0), alone)
    if not overlap:
        return clusters
    shares = _shares(clusters, questions)
    left = [
        (chunks, weight * (1 - share)) for share, (chunks, weight) in zip(shares, questions, strict=True) if share < 1
    ]
    more = _grown(clusters, left, _members(questions, clusters, times=1), caps)
    return more[: max(len(clusters), 2 * _firsts(clusters))]


def _eligible(asked: Iterable[Asked], caps: Caps) -> Iterator[Asked]:
    """The questions with only those passages that exist and that a cluster can hold at all."""
    for question in asked:
        chunks = (chunk for chunk in question.chunks if chunk in caps.tokens and caps.fit([chunk]))
        yield Asked(weight=question.weight, chunks=tuple(chunks))


def _members(questions: Iterable[Question], clusters: Iterable[Collection[int]], *, times: int) -> set[int]:
    """Passages that are asked for and in so many clusters."""
    counts = Counter(itertools.chain.from_iterable(clusters))
    return {chunk for chunks, _ in questions for chunk in chunks if counts[chunk] == times}


def _grown(
    clusters: Sequence[frozenset[int]], questions: Sequence[Question], loose: set[int], caps: Caps
) -> list[frozenset[int]]:
    """The clusters, in order, with loose passages that came to them, then new ones, the most tied first."""
    ties = _ties(questions)
    packing = Packing(caps, clusters, ties)
    packing.pack(_communities(ties, loose, caps))
    packing.join()
    any(not packing.improve() for _ in range(ROUNDS))
    new = [(packing.bonds(place), place) for place in range(len(clusters), len(packing.groups))]
    kept = [place for bonds, place in sorted(new, key=lambda pair: (-pair[0], pair[1])) if bonds > SLACK]
    return [frozenset(packing.groups[place]) for place in (*range(len(clusters)), *kept)]


def _ties(questions: Iterable[Question]) -> Ties:
    """How strongly each two passages are asked for together."""
    ties: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for chunks, weight in questions:
        for chunk, other in itertools.permutations(sorted(chunks), 2):
            ties[chunk][other] += 2 * weight / len(chunks) ** 2
    return ties


def _communities(ties: Ties, passages: Collection[int], caps: Caps, resolution: float = 1.0) -> Iterator[set[int]]:
    """The passages in communities that each fit into a cluster."""
    graph = nx.Graph()
    graph.add_nodes_from(sorted(passages))
    for passage in sorted(passages):
        near = sorted(ties[passage].items())
        graph.add_weighted_edges_from((passage, other, tie) for other, tie in near if other in graph)
    for community in nx.community.louvain_communities(graph, resolution=resolution, seed=0):
        if caps.fit(community):
            yield community
        else:
            yield from _communities(ties, community, caps, 2 * resolution)


def _alone(questions: Iterable[Question], loose: set[int], least: float) -> list[frozenset[int]]:
    """Clusters of one for loose passages that enough questions ask for alone."""
    return [chunks for chunks, weight in questions if len(chunks) == 1 and weight >= least and chunks <= loose]


def _firsts(clusters: Iterable[frozenset[int]]) -> int:
    """How many clusters have at least half of their members in none before them: the others are second memberships."""
    seen: set[int] = set()
    firsts = 0
    for members in clusters:
        firsts += 2 * len(members - seen) >= len(members)
        seen |= members
    return firsts


# --- starting anew where that pays -----------------------------------------------------------------------------------


def regroup(
    asked: Iterable[Asked],
    tokens: Mapping[int, int],
    old: Sequence[frozenset[int]],
    *,
    most: int,
    most_tokens: int,
    gain: float,
) -> list[frozenset[int]] | None:
    """The clusters with one region made anew: clusters that share questions. None when no region gains enough.

    `gain` is the least growth of `coverage().share` over the questions that ask for a passage of the region. Clusters
    outside come first, in order and unchanged. The most torn regions are tried, then all clusters as one, and what
    gains most is taken. Clusters that were trained on a short log can be so scattered that only the last helps.
    """
    questions = _merged(asked)
    loose = _members(questions, old, times=0)
    best, chosen = max(gain, SLACK), None
    for region in _regions(old, questions):
        inside = frozenset[int]().union(*(old[place] for place in region))
        kept = [members for place, members in enumerate(old) if place not in region]
        about = [Asked(weight=weight, chunks=tuple(chunks)) for chunks, weight in questions if chunks & inside]
        within = [Asked(weight=item.weight, chunks=tuple((inside | loose) & {*item.chunks})) for item in about]
        made = [*kept, *cluster(within, tokens, most=most, most_tokens=most_tokens)]
        gained = coverage(made, about).share - coverage(old, about).share
        if gained >= best:
            best, chosen = gained, made
    return chosen


def _regions(clusters: Sequence[frozenset[int]], questions: Sequence[Question]) -> list[frozenset[int]]:
    """Places of clusters that share most questions with one of them, the most shared first; at last those of all."""
    shared: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for held, (chunks, weight) in zip(_held(clusters, questions), questions, strict=True):
        for one, other in itertools.permutations(sorted(held), 2):
            shared[one][other] += weight * held[one] * held[other] / len(chunks) ** 2
    torn = sorted(shared, key=lambda place: (-math.fsum(shared[place].values()), place))
    nearest = {place: sorted(shared[place], key=lambda other: (-shared[place][other], other)) for place in torn}
    near = dict.fromkeys(frozenset({place, *nearest[place][: REGION - 1]}) for place in torn)
    return [*list(near)[:REGIONS], frozenset(range(len(clusters)))]
