"""Groups under caps: they join, passages move and change places, and each step ties more together than before."""

import itertools
from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from edge_rag.policy.packing import Caps, Packing, Ties

passages = st.integers(1, 12)
drawn_ties = st.dictionaries(st.tuples(passages, passages), st.floats(0.1, 5), max_size=40)


def ties(pairs: dict[tuple[int, int], float]) -> Ties:
    """Symmetric ties over the passages 1 to 12."""
    found: dict[int, dict[int, float]] = {passage: {} for passage in range(1, 13)}
    for (one, other), tie in pairs.items():
        if one != other:
            found[one][other] = found[other][one] = tie
    return found


def caps(most: int = 12, most_tokens: int = 10_000, **tokens: int) -> Caps:
    """Passages of 10 tokens; others as `_1=20`."""
    sizes = {passage: tokens.get(f"_{passage}", 10) for passage in range(1, 13)}
    return Caps(tokens=sizes, most=most, most_tokens=most_tokens)


def tied(packing: Packing, between: Ties) -> float:
    """All ties inside groups."""
    pairs = itertools.chain.from_iterable(itertools.combinations(sorted(group), 2) for group in packing.groups)
    return sum(between[one].get(other, 0.0) for one, other in pairs)


def test_a_group_joins_the_one_that_it_is_tied_to_most() -> None:
    packing = Packing(caps(most=4), [], ties({(1, 2): 1.0, (1, 3): 2.0}))
    packing.pack([{1}, {2, 4, 5}, {3, 6, 7}])
    packing.join()
    assert packing.groups == [set(), {2, 4, 5}, {1, 3, 6, 7}]


def test_groups_without_a_tie_do_not_join() -> None:
    packing = Packing(caps(), [{3}], ties({}))
    packing.pack([{1}, {2}])
    packing.join()
    assert packing.groups == [{3}, {1}, {2}]


def test_a_group_joins_the_next_best_when_the_best_is_full() -> None:
    packing = Packing(caps(most=3), [{3, 6, 7}, {2, 4}], ties({(1, 2): 1.0, (1, 3): 2.0}))
    packing.pack([{1}])
    packing.join()
    assert packing.groups == [{3, 6, 7}, {1, 2, 4}, set()]


def test_tokens_are_a_cap_as_hard_as_passages() -> None:
    packing = Packing(caps(most_tokens=29), [{2, 3}], ties({(1, 2): 1.0}))
    packing.pack([{1}])
    packing.join()
    assert not packing.improve()
    assert packing.groups == [{2, 3}, {1}]


def test_a_passage_moves_to_where_it_is_tied_more() -> None:
    packing = Packing(caps(), [], ties({(1, 2): 1.0, (1, 3): 2.0}))
    packing.pack([{1, 2}, {3, 4}])
    assert packing.improve()
    assert packing.groups[1] >= {1, 3, 4}


def test_passages_change_places_between_full_groups() -> None:
    between = ties({(1, 2): 1.0, (3, 4): 1.0})
    packing = Packing(caps(most=2), [], between)
    packing.pack([{1, 3}, {2, 4}])
    assert packing.improve()
    assert sorted(map(sorted, packing.groups)) == [[1, 2], [3, 4]]
    assert not packing.improve()


def test_passages_that_are_tied_to_each_other_do_not_change_places_for_that() -> None:
    packing = Packing(caps(most=1), [], ties({(1, 2): 5.0}))
    packing.pack([{1}, {2}])
    assert not packing.improve()


def test_passages_change_places_only_where_the_tokens_allow_it() -> None:
    packing = Packing(caps(most=2, most_tokens=25, _1=15), [], ties({(1, 2): 1.0, (3, 4): 1.0}))
    packing.pack([{1, 3}, {2, 4}])
    assert packing.improve()
    assert sorted(map(sorted, packing.groups)) == [[1, 2], [3, 4]]
    tight = Packing(caps(most=2, most_tokens=25, _1=15, _2=15), [], ties({(1, 2): 1.0}))
    tight.pack([{1, 3}, {2, 4}])
    assert not tight.improve()


def test_what_a_fixed_group_began_with_is_not_moved_for_others() -> None:
    packing = Packing(caps(most=2), [{2, 4}], ties({(1, 2): 1.0, (3, 4): 1.0}))
    packing.pack([{1, 3}])
    assert not packing.improve()
    assert packing.groups == [{2, 4}, {1, 3}]


def test_a_passage_does_not_come_twice_into_a_group() -> None:
    packing = Packing(caps(), [{1, 2}], ties({(1, 2): 1.0, (1, 3): 0.5}))
    packing.pack([{1, 3}])
    packing.join()
    assert not packing.improve()
    assert packing.groups == [{1, 2}, {1, 3}]


def test_passages_do_not_change_places_into_a_group_that_has_one_of_them() -> None:
    packing = Packing(caps(most=2), [{4}], ties({(2, 4): 1.0, (2, 3): 3.0}))
    packing.pack([{2}, {3, 4}])
    assert packing.improve()
    assert not packing.improve()
    assert packing.groups == [{2, 4}, set(), {3, 4}]


def test_bonds_are_what_packed_passages_are_tied_with_to_all_of_their_group() -> None:
    packing = Packing(caps(), [{1}], ties({(1, 2): 1.0, (2, 3): 4.0}))
    packing.pack([{2, 3}])
    assert packing.bonds(1) == 8.0
    assert packing.bonds(0) == 0.0


@given(drawn_ties, st.integers(1, 5), st.integers(1, 6), st.lists(passages, unique=True, max_size=4))
def test_every_step_ties_more_and_keeps_the_caps(
    pairs: dict[tuple[int, int], float], most: int, tens: int, fixed: list[int]
) -> None:
    between, limits = ties(pairs), caps(most=most, most_tokens=10 * tens, _5=20)
    begun = [{passage} for passage in fixed]
    packing = Packing(limits, begun, between)
    loose = [{passage} for passage in range(1, 13) if passage not in fixed and limits.fit([passage])]
    packing.pack(loose)
    before = tied(packing, between)
    packing.join()
    for _ in range(20):
        after = tied(packing, between)
        assert after >= before - 1e-6
        before = after
        if not packing.improve():
            break
    assert all(limits.fit(group) for group in packing.groups[len(fixed) :])
    assert all(begun[place] <= packing.groups[place] for place in range(len(fixed)))
    counts: dict[int, int] = defaultdict(int)
    for passage in itertools.chain.from_iterable(packing.groups):
        counts[passage] += 1
    assert set(counts.values()) <= {1}
    assert len(counts) == len(fixed) + len(loose)
