"""Finding the stored state that shares the longest beginning with a prompt."""

from hypothesis import given
from hypothesis import strategies as st

from edge_rag.policy.prefix_tree import Path, PrefixTree

paths = st.lists(st.sampled_from("abc"), max_size=4).map(tuple)
names = st.sampled_from(["one", "two", "three", "four"])
steps = st.lists(st.tuples(st.sampled_from(["add", "add", "remove"]), paths, names), max_size=12)


def shared(one: Path, other: Path) -> int:
    """Leading segments that both have."""
    end = 0
    while end < min(len(one), len(other)) and one[end] == other[end]:
        end += 1
    return end


def brute_force(states: dict[str, Path], path: Path) -> tuple[int, str | None]:
    """`states` by name, the newest last."""
    best = max((shared(state, path) for state in states.values()), default=0)
    if not best:
        return 0, None
    able = [name for name, state in states.items() if shared(state, path) == best]
    exact = [name for name in able if len(states[name]) == best]
    return best, (exact or able)[-1]


@given(steps, paths)
def test_agrees_with_looking_at_every_state(steps: list[tuple[str, Path, str]], wanted: Path) -> None:
    tree, states = PrefixTree(), dict[str, Path]()
    for step, path, name in steps:
        states.pop(name, None)
        if step == "add":
            tree.add(path, name)
            states[name] = path
        else:
            tree.remove(name)
        assert tree.longest(wanted) == brute_force(states, wanted)
        assert len(tree) == len(states)


def test_an_empty_tree_knows_nothing() -> None:
    assert PrefixTree().longest(("a",)) == (0, None)


def test_a_longer_state_serves_with_its_leading_part() -> None:
    tree = PrefixTree()
    tree.add(("a", "b", "c"), "long")
    assert tree.longest(("a", "b", "x")) == (2, "long")


def test_segments_that_come_later_in_a_state_do_not_serve() -> None:
    tree = PrefixTree()
    tree.add(("a", "b"), "state")
    assert tree.longest(("b",)) == (0, None)


def test_a_state_that_ends_there_is_preferred_to_a_newer_one_that_must_be_cut() -> None:
    tree = PrefixTree()
    tree.add(("a", "b"), "exact")
    tree.add(("a", "b", "c"), "longer")
    assert tree.longest(("a", "b")) == (2, "exact")
    assert tree.longest(("a",)) == (1, "longer")


def test_adding_a_name_again_moves_it() -> None:
    tree = PrefixTree()
    tree.add(("a",), "state")
    tree.add(("b",), "state")
    assert tree.longest(("a",)) == (0, None)
    assert tree.longest(("b",)) == (1, "state")
    assert len(tree) == 1


def test_removing_forgets_every_leading_part_and_may_be_repeated() -> None:
    tree = PrefixTree()
    tree.add(("a", "b"), "one")
    tree.add(("a",), "two")
    tree.remove("one")
    tree.remove("one")
    assert tree.longest(("a", "b")) == (1, "two")
    tree.remove("two")
    assert tree.longest(("a", "b")) == (0, None)
    assert len(tree) == 0
    assert not tree._names  # a tree that lives long must not keep what it forgot


def test_a_state_of_nothing_covers_nothing() -> None:
    tree = PrefixTree()
    tree.add((), "empty")
    assert tree.longest(()) == (0, None)
    assert len(tree) == 1
