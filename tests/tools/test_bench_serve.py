"""What `serve` and `soak` make of replies: rates, fairness, and what is promised of them."""

from collections import defaultdict

import pytest

from tools.bench.load import Reply
from tools.bench.serve import client_claims, decode_rate, told, unfairness
from tools.bench.soak import Deeds, mixed_result

ENGINE = {"active": 0, "waiting": 0, "cells_used": 0}


def reply(client: int = 0, *, first: float = 1.0, total: float = 3.0, tokens: int = 21, error: str = "") -> Reply:
    return Reply(client, first=first, total=total, tokens=tokens, error=error)


def test_decoding_is_counted_from_the_first_token_on_and_for_all_clients() -> None:
    assert decode_rate([reply(), reply(1)], 2) == 2 * 20 / 2.0
    assert decode_rate([reply(tokens=1)], 1) == 0.0


def test_the_slowest_client_is_compared_with_the_middle_one() -> None:
    replies = [reply(0, total=1.0), reply(1, total=1.0), reply(2, total=2.0), reply(2, total=4.0)]
    assert unfairness(replies) == 3.0


def test_a_lost_request_ends_the_measurement() -> None:
    assert told([reply()]) == [reply()]
    with pytest.raises(RuntimeError, match="1 of 2 requests were lost: gone"):
        told([reply(), reply(error="gone")])


def test_several_clients_are_held_to_two_streams_or_to_what_the_bare_loop_can_do() -> None:
    served = {
        n: {"decode tokens/s": rate, "slowest client ÷ median": 1.0} for n, rate in ((1, 9.6), (4, 16.0), (16, 20.0))
    }
    one, four, *fair = client_claims(served, {1: 10.0, 4: 17.0, 16: 20.0})  # type: ignore[arg-type]
    assert (one.value, one.holds) == (0.96, True)
    assert four.target == pytest.approx(0.9 * 1.7)
    assert four.holds
    assert [claim.holds for claim in fair] == [True] * 3


@pytest.mark.parametrize(
    ("errors", "grown", "left", "holding"),
    [
        pytest.param(0, 1.0, 0, [True, True, True], id="all well"),
        pytest.param(1, 1.0, 0, [False, True, True], id="an error"),
        pytest.param(0, 1.1, 0, [True, False, True], id="memory grows"),
        pytest.param(0, 1.0, 7, [True, True, False], id="cells are left over"),
    ],
)
def test_a_soak_is_held_to_no_errors_flat_memory_and_nothing_left(
    errors: int, grown: float, left: int, holding: list[bool]
) -> None:
    deeds = Deeds(defaultdict(list, {"ask": [1.0, 2.0]}), ["wrong"] * errors)
    samples = [500] * 20 + [1000] * 40 + [int(1000 * grown)] * 40
    result = mixed_result(deeds, samples, ENGINE | {"cells_used": left}, files=9)
    assert [claim.holds for claim in result.claims] == holding
