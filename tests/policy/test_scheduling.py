"""Which request is taken next and what goes into the next batch: whatever comes, everybody gets on."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from edge_rag.policy.scheduling import LEAST_PIECE, OVERTAKEN, SMALLER, Job, Reading, admit, next_step, shared
from edge_rag.records import Step

CELLS = 100  # of the engine of the state machine

lanes = st.sampled_from(["", "law", "tales"])
keys = st.lists(st.sampled_from("abc"), max_size=4).map(tuple)
sizes = st.integers(1, CELLS)


def jobs(most: int = 8, *, overtaken: int = 0) -> st.SearchStrategy[list[Job]]:
    """Requests numbered in the order of their arrival, overtaken up to so many times."""
    drawn = st.lists(st.builds(Job, st.just(0), sizes, lanes, keys, st.integers(0, overtaken)), max_size=most)
    return drawn.map(lambda some: [replace(job, id=number) for number, job in enumerate(some)])


def in_order(some: list[Job]) -> list[Job]:
    """The same, overtaken as often as can be: the earlier, the more often."""
    counts = sorted((job.overtaken for job in some), reverse=True)
    return [replace(job, overtaken=count) for job, count in zip(some, counts, strict=True)]


waiting = jobs(overtaken=OVERTAKEN).map(in_order)


def job(number: int, keys: str = "", *, lane: str = "", cells: int = 10, overtaken: int = 0) -> Job:
    return Job(number, cells, lane, tuple(keys), overtaken)


# --- who is taken ----------------------------------------------------------------------------------------------------


@given(waiting, jobs(), st.integers(0, CELLS))
def test_whoever_is_taken_waits_and_fits(some, active, free) -> None:
    chosen = admit(some, active, free_cells=free)
    assert chosen is None or (chosen in some and chosen.cells <= free)


@given(waiting, jobs(), st.integers(0, CELLS))
def test_somebody_is_taken_when_anybody_fits_unless_the_oldest_has_waited_enough(some, active, free) -> None:
    fits = [job for job in some if job.cells <= free]
    if some and some[0].overtaken >= OVERTAKEN:
        fits = [job for job in fits if job is some[0]]
    assert (admit(some, active, free_cells=free) is not None) == bool(fits)


@given(jobs(), st.integers(0, CELLS))
def test_without_anything_to_share_the_first_that_fits_is_taken(some, free) -> None:
    first = next((job for job in some if job.cells <= free), None)
    assert admit(some, [], free_cells=free) is first


@given(st.builds(Job, st.just(0), st.integers(1, 9), lanes, keys), st.integers(1, 6), jobs())
def test_equals_are_taken_in_the_order_of_their_arrival(one, count, active) -> None:
    some = [replace(one, id=number) for number in range(count)]
    assert admit(some, active, free_cells=9) is some[0]


@given(waiting, jobs(), st.integers(0, CELLS))
def test_a_request_without_a_lane_that_is_served_is_only_taken_when_no_other_may_be(some, active, free) -> None:
    chosen = admit(some, active, free_cells=free)
    served = {job.lane for job in active}
    if chosen and chosen.lane not in served and chosen.overtaken < OVERTAKEN:
        assert all(job.lane not in served for job in some if job.cells <= free)


@pytest.mark.parametrize(
    ("waiting", "active", "expected"),
    [
        pytest.param([job(1, "x"), job(2, "ab")], [job(9, "abc")], 2, id="passages that are there"),
        pytest.param([job(1, "a"), job(2, "ab")], [job(9, "abc")], 2, id="more passages that are there"),
        pytest.param([job(1, "ba"), job(2, "bc")], [job(9, "abc")], 1, id="the same passages in another order"),
        pytest.param([job(1, "a"), job(2, "b")], [job(8, "bx"), job(9, "ax")], 1, id="as much with either"),
        pytest.param([job(1, lane="law"), job(2)], [job(9)], 2, id="a lane that is served"),
        pytest.param([job(1, "x"), job(2, "ab", lane="law")], [job(9, "ab")], 1, id="a lane before passages"),
        pytest.param([job(1, cells=99), job(2)], [], 2, id="one that fits"),
        pytest.param([job(1, cells=99, overtaken=OVERTAKEN), job(2)], [], None, id="nobody before him any more"),
        pytest.param([job(1, "x", overtaken=OVERTAKEN), job(2, "a")], [job(9, "a")], 1, id="now it is his turn"),
        pytest.param([job(1, "x", overtaken=OVERTAKEN - 1), job(2, "a")], [job(9, "a")], 2, id="a last time"),
        pytest.param([], [job(9)], None, id="nobody waits"),
    ],
)
def test_who_is_taken_next(waiting: list[Job], active: list[Job], expected: int | None) -> None:
    chosen = admit(waiting, active, free_cells=50)
    assert (chosen and chosen.id) == expected


@given(keys, keys)
def test_what_is_shared_is_the_common_beginning(some, others) -> None:
    same = [end for end in range(len(some) + 1) if some[:end] == others[:end]]
    assert shared(some, others) == shared(others, some) == max(same)


class Waiting(RuleBasedStateMachine):
    """Requests come, are taken and go, in any order: nobody is overtaken too often, and nobody waits for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Job] = []
        self.active: list[Job] = []
        self.came = 0
        self.passed: dict[int, int] = {}  # how often later ones were taken before each

    @property
    def free(self) -> int:
        return CELLS - sum(job.cells for job in self.active)

    @rule(cells=sizes, lane=lanes, keys=keys)
    def come(self, cells: int, lane: str, keys: tuple[str, ...]) -> None:
        self.came += 1
        self.waiting.append(Job(self.came, cells, lane, keys))

    @rule()
    def take(self) -> None:
        chosen = admit(self.waiting, self.active, free_cells=self.free)
        if chosen is None:
            return
        place = self.waiting.index(chosen)
        for number, earlier in enumerate(self.waiting[:place]):
            self.passed[earlier.id] = self.passed.get(earlier.id, 0) + 1
            self.waiting[number] = replace(earlier, overtaken=earlier.overtaken + 1)
        del self.waiting[place]
        self.active.append(chosen)

    @precondition(lambda self: self.active)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        self.active.remove(data.draw(st.sampled_from(self.active)))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        self.waiting.remove(data.draw(st.sampled_from(self.waiting)))

    @invariant()
    def nobody_is_overtaken_too_often(self) -> None:
        assert max(self.passed.values(), default=0) <= OVERTAKEN

    @invariant()
    def what_is_taken_fits(self) -> None:
        assert self.free >= 0

    def teardown(self) -> None:
        """Whoever waits is taken once those before have gone."""
        while self.waiting:
            before = len(self.waiting)
            self.take()
            if len(self.waiting) == before:
                self.active.pop(0)


TestWaiting = Waiting.TestCase
TestWaiting.settings = settings(max_examples=40)


# --- what goes into a batch ------------------------------------------------------------------------------------------

readings = st.none() | st.builds(Reading, st.integers(1, 3000), lanes)
batches = st.integers(13, 600)  # tokens: more than there are writers
served_lanes = st.lists(lanes, max_size=12)


@given(readings, jobs(12), batches, served_lanes)
def test_a_batch_is_not_too_large_has_one_lane_and_is_not_empty(reading, writers, n_batch, served) -> None:
    step = next_step(reading, writers, n_batch=n_batch, served=served)
    assert (step is None) == (reading is None and not writers)
    if step is None:
        return
    assert 0 < step.reading + len(step.writers) <= n_batch
    lane_of = {job.id: job.lane for job in writers}
    assert {lane_of[number] for number in step.writers} <= {step.lane}
    if reading is None or reading.lane != step.lane:
        assert step.reading == 0
    else:
        assert step.reading <= reading.tokens


@given(readings, jobs(12), batches, served_lanes)
def test_all_of_a_lane_get_on_in_its_step(reading, writers, n_batch, served) -> None:
    step = next_step(reading, writers, n_batch=n_batch, served=served)
    if step is None:
        return
    assert step.writers == tuple(job.id for job in writers if job.lane == step.lane)
    assert (step.reading > 0) == (reading is not None and reading.lane == step.lane)


@given(readings, jobs(12), batches, served_lanes)
def test_lanes_take_turns(reading, writers, n_batch, served) -> None:
    present = {job.lane for job in writers} | ({reading.lane} if reading else set())
    history = list(served)
    for _ in present:
        step = next_step(reading, writers, n_batch=n_batch, served=history)
        assert step is not None
        history.append(step.lane)
    assert set(history[len(served) :]) == present


@given(st.integers(1, 3000), st.integers(1, 600), lanes, served_lanes)
def test_a_prompt_alone_is_read_in_whole_batches(tokens, n_batch, lane, served) -> None:
    step = next_step(Reading(tokens, lane), [], n_batch=n_batch, served=served)
    assert step == Step(lane, min(tokens, n_batch), ())


@given(st.integers(1, 3000), jobs(12).filter(bool), batches)
def test_a_prompt_is_read_in_smaller_pieces_while_answers_are_written(tokens, writers, n_batch) -> None:
    step = next_step(Reading(tokens, writers[0].lane), writers, n_batch=n_batch)
    assert step is not None
    assert step.reading <= max(LEAST_PIECE, n_batch // SMALLER)


def test_a_prompt_and_answers_of_other_lanes_take_turns() -> None:
    reading, writers, served = Reading(100, "law"), [job(1), job(2), job(3, lane="tales")], list[str]()
    steps = []
    for _ in range(4):
        step = next_step(reading, writers, n_batch=64, served=served)
        assert step is not None
        steps.append(step)
        served.append(step.lane)
    assert steps == [Step("law", 16, ()), Step("", 0, (1, 2)), Step("tales", 0, (3,)), Step("law", 16, ())]
