"""Which adapter answers."""

from hypothesis import given
from hypothesis import strategies as st

from edge_rag.policy.covering import NONE, Chosen, Offer, choose

chunks = st.lists(st.integers(0, 9), unique=True, max_size=6)
offers = st.lists(
    st.builds(Offer, st.sampled_from("abcdef"), st.frozensets(st.integers(0, 9), max_size=6), st.booleans()),
    unique_by=lambda offer: offer.adapter,
    max_size=5,
)
shares = st.floats(0, 1)


@given(chunks, offers, shares)
def test_what_is_chosen_covers_what_it_says_and_enough(chunks: list[int], offers: list[Offer], least: float) -> None:
    chosen = choose(chunks, offers, least=least)
    if chosen == NONE:
        assert all(len(offer.members & set(chunks)) < max(1, least * len(chunks)) for offer in offers)
        return
    [offer] = [offer for offer in offers if offer.adapter == chosen.adapter]
    assert chosen.covered == offer.members & set(chunks)
    assert len(chosen.covered) >= max(1, least * len(chunks))


@given(chunks, offers, shares)
def test_none_covers_more_than_the_chosen_one(chunks: list[int], offers: list[Offer], least: float) -> None:
    chosen = choose(chunks, offers, least=least)
    if chosen != NONE:
        assert all(len(offer.members & set(chunks)) <= len(chosen.covered) for offer in offers)


@given(chunks, offers, shares)
def test_the_order_of_offers_does_not_matter(chunks: list[int], offers: list[Offer], least: float) -> None:
    assert choose(chunks, offers[::-1], least=least) == choose(chunks, offers, least=least)


def test_of_equals_the_resident_one_is_chosen_then_the_smaller() -> None:
    wide, narrow = Offer("wide", frozenset({1, 2, 3})), Offer("narrow", frozenset({1, 2}))
    resident = Offer("resident", frozenset({1, 2, 4, 5}), resident=True)
    assert choose([1, 2], [wide, narrow, resident], least=0) == Chosen("resident", frozenset({1, 2}))
    assert choose([1, 2], [wide, narrow], least=0) == Chosen("narrow", frozenset({1, 2}))


def test_half_of_the_passages_is_not_two_thirds() -> None:
    offer = Offer("a", frozenset({1, 2}))
    assert choose([1, 2, 3, 4], [offer], least=0.5).adapter == "a"
    assert choose([1, 2, 3, 4], [offer], least=0.67) == NONE
