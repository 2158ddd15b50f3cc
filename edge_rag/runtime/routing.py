"""The router: which arm answers a question, learned from what answers were worth (after POLAR).

An arm is an adapter that covers some of the retrieved passages, or '' for reading them all. What each is expected to be
worth comes from a bandit (`policy.linucb`) that sees the question and what the adapter knows of it (`policy.features`);
of that the seconds that somebody would wait are subtracted, at a set price. A new arm starts with what its exam said.
Every decision is journalled with its contexts; what is learned from them is `runtime.experience`.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from edge_rag import config
from edge_rag.closing import Closing
from edge_rag.policy.covering import NONE, Chosen, Offer
from edge_rag.policy.demand import Means
from edge_rag.policy.features import CONSTANT, QUESTION, ArmView, Space, contexts
from edge_rag.policy.linucb import decide
from edge_rag.policy.residency import Residency
from edge_rag.records import Answer, Plan, Reward, Route, Weighed
from edge_rag.runtime.covering import Coverer, Waits, no_waits
from edge_rag.runtime.experience import PLAIN, Experience
from edge_rag.runtime.keeping import Keeper, as_request
from edge_rag.runtime.rewarding import Exam, reward_noted
from edge_rag.runtime.shelf import Shelf, Vector, known_of
from edge_rag.store import adapters, routes
from edge_rag.store.database import Connection
from edge_rag.store.routes import Routed, RoutedArm

PRIOR = 20  # observations of each kind that plain retrieval begins with


class Router(Coverer, Closing):
    """Learns which of a shelf's adapters to ask, in the library in `folder`. Any thread may ask and reward.

    `slowdown` predicts the seconds that an answer takes longer under an adapter; `drawn` gives uniform random numbers.
    """

    def __init__(
        self,
        shelf: Shelf,
        settings: config.Router,
        *,
        space: Space,
        folder: Path,
        rule: Callable[[Mapping[str, int], Means], Residency],
        slowdown: Callable[[], float] = lambda: 0.0,
        drawn: Callable[[], float] = random.random,
    ) -> None:
        super().__init__(shelf, least=0.0)
        self.space = space
        self._settings = settings
        self._slowdown = slowdown
        self._drawn = drawn
        database = shelf.database
        self.experience = Experience(database, folder, space, discount=settings.discount, exams=self.exam)
        self.experience.refresh(shelf.known)
        self.keeper = Keeper(rule(_Sizes(shelf), self.experience.means), shelf.pager)

    def close(self) -> None:
        """Keep what was learned. Idempotent."""
        self.experience.close()

    def refresh(self) -> None:
        """The registry or the documents have changed."""
        super().refresh()
        self.experience.refresh(self.shelf.known)

    def exam(self, connection: Connection, adapter: str) -> Exam:
        """What the exam of an adapter said, as if those questions had been asked with all of their passages covered.

        Plain retrieval begins as what reviews compare with: worth 1, whatever was asked.
        """
        if adapter == PLAIN:
            return plain_exam(self.space)
        if (known := known_of(connection, adapter)) is None:
            return []
        vectors, f1, _ = adapters.exam_of(connection, adapter)
        views = [_view(known.offer(adapter, vector), 1.0, 1.0) for vector in vectors]
        seen = [contexts(self.space, vector, [view])[0] for vector, view in zip(vectors, views, strict=True)]
        return list(zip(seen, map(float, f1), strict=True))

    # --- choosing ----------------------------------------------------------------------------------------------------

    def choose(
        self,
        asked: Vector,
        chunks: Sequence[int],
        scores: Sequence[float] = (),
        waits: Waits = no_waits,
        *,
        tries: bool = True,
    ) -> Chosen:
        """The arm for a question with this embedding, for which these chunks were retrieved with these scores.

        Arms are tried where their exams allow it. What lies farther off is taken when it is expected to be best, as
        idle trials and feedback tell; who waits is not used to find that out. Without `tries` nothing is tried.
        """
        if not self.shelf.known or not chunks:
            return NONE
        offers = self.shelf.offers(asked, chunks)
        wait = waits()
        while (chosen := self._weigh(asked, chunks, scores, wait, offers, tries)).adapter:
            if self.shelf.is_sound(chosen.adapter):
                break
            offers = [offer for offer in offers if offer.adapter != chosen.adapter]
        self.experience.was_decided()
        return chosen

    def _weigh(
        self,
        asked: Vector,
        chunks: Sequence[int],
        scores: Sequence[float],
        wait: Callable[[frozenset[int]], float],
        offers: Sequence[Offer],
        tries: bool,
    ) -> Chosen:
        covered = [frozenset[int](), *(offer.members & frozenset(chunks) for offer in offers)]
        names = [PLAIN, *(offer.adapter for offer in offers)]
        views = [ArmView(PLAIN), *(_view(*_shares(offer, chunks, scores)) for offer in offers)]
        seen = contexts(self.space, asked, views)
        slowdown, page_in = self._slowdown(), self.shelf.pager.page_in_time
        here = [wait(covered[0]), *(wait(each) + slowdown for each in covered[1:])]
        away = [here[0], *(time + page_in(offer.bytes) for time, offer in zip(here[1:], offers, strict=True))]
        resident = [True, *(offer.resident for offer in offers)]
        free = [tries, *(tries and offer.within for offer in offers)]
        index, route = self._decided(names, seen, here, away, resident, free)
        return Chosen(names[index], covered[index], route, seen)

    def _decided(
        self,
        names: Sequence[str],
        seen: npt.NDArray[np.float64],
        here: Sequence[float],
        away: Sequence[float],
        resident: Sequence[bool],
        free: Sequence[bool],
    ) -> tuple[int, Route]:
        """The place of the chosen arm. Those that are `free` may be tried."""
        settings = self._settings
        allowance = settings.second_price * settings.trial_wait
        estimates, pulls, clock = self.experience.estimate(names, seen)
        decision = decide(
            estimates,
            settings.second_price * np.where(resident, here, away),
            alpha=settings.alpha * np.asarray(free),
            resident=np.asarray(resident),
            pulls=np.asarray(pulls),
            allowance=allowance,
            explore=settings.explore if any(free) else 0.0,
            drawn=self._drawn(),
        )
        columns = (
            names,
            estimates.means,
            estimates.widths,
            here,
            away,
            decision.scores,
            decision.probabilities,
            resident,
        )
        weighed = tuple(
            Weighed(name, float(mean), float(width), near, far, float(score), float(odds), there)
            for name, mean, width, near, far, score, odds, there in zip(*columns, strict=True)
        )
        route = Route(clock, weighed, decision.explored)
        forced = self._forced(route, free, allowance)
        if forced in ("", names[decision.index]):
            return decision.index, route
        return names.index(forced), _forced(route, forced)

    def _forced(self, route: Route, free: Sequence[bool], allowance: float) -> str:
        """The arm that the rule wants to be tried, of those that may be; '' when there is none, or nothing is tried."""
        if not self._settings.alpha:
            return ""
        triable = tuple(arm for arm, each in zip(route.weighed, free, strict=True) if each)
        request = as_request(replace(route, weighed=triable), None, price=self._settings.second_price)
        return self.keeper.forced(request, allowance)

    def count(self, plan: Plan, chosen: Chosen) -> None:
        """A question was answered in this way, after this choice."""
        super().count(plan, chosen)
        if chosen.route:
            price = self._settings.second_price
            self.keeper.after(as_request(chosen.route, chosen.contexts, price=price, used=plan.adapter))

    def note(self, connection: Connection, answer: Answer, chosen: Chosen) -> None:
        """Journal a decision behind its answer."""
        if chosen.route is None or chosen.contexts is None or answer.plan.adapter != chosen.adapter:
            return  # an adapter that failed says nothing of the arm that took its place
        arms = tuple(
            RoutedArm(
                adapter=each.adapter,
                context=context,
                mean=each.mean,
                width=each.width,
                wait=each.here if each.resident else each.away,
                here=each.here,
                away=each.away,
                probability=each.probability,
                resident=each.resident,
            )
            for each, context in zip(chosen.route.weighed, chosen.contexts, strict=True)
        )
        route = chosen.route
        routes.put(connection, Routed(answer.id, route.clock, self.space.tag, chosen.adapter, route.explored, arms))
        self.experience.was_journalled()

    # --- learning ----------------------------------------------------------------------------------------------------

    def take(self, reward: Reward) -> None:
        """Learn from what was found while nobody asked. Raises StorageError as the disk."""
        self.experience.learn(lambda connection, clock: reward_noted(connection, replace(reward, clock=clock)))
        if reward.source == "trial":
            self.keeper.tried()

    def widths(self, routed: Routed) -> list[float]:
        """How unsure the arms of a decision are now, in their order."""
        names, seen = [arm.adapter for arm in routed.arms], np.stack([arm.context for arm in routed.arms])
        widths: list[float] = self.experience.estimate(names, seen)[0].widths.tolist()
        return widths


class _Sizes(Mapping[str, int]):
    """The bytes of every adapter on a shelf, as it is at that moment."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def __getitem__(self, name: str) -> int:
        return self._shelf.sizes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shelf.sizes)

    def __len__(self) -> int:
        return len(self._shelf.sizes)


def plain_exam(space: Space) -> list[tuple[npt.NDArray[np.float64], float]]:
    """What plain retrieval begins with: worth 1 as such, to which no direction of a question adds anything."""
    constant = np.sqrt(CONSTANT) * np.eye(space.size)[0]
    directions = np.sqrt(QUESTION) * np.eye(space.size)[1 : 1 + space.projected]
    return [(constant, 1.0), *((direction, 0.0) for direction in directions)] * PRIOR


def _forced(route: Route, adapter: str) -> Route:
    """The same decision when an arm had to be tried."""
    weighed = tuple(replace(each, probability=float(each.adapter == adapter)) for each in route.weighed)
    return replace(route, weighed=weighed, explored=True)


def _view(offer: Offer, share: float, scores: float) -> ArmView:
    return ArmView(offer.adapter, share, scores, offer.closeness, offer.within, offer.gate)


def _shares(offer: Offer, chunks: Sequence[int], scores: Sequence[float]) -> tuple[Offer, float, float]:
    """The shares of the retrieved passages, and of their scores, that an adapter covers."""
    covered = [chunk in offer.members for chunk in chunks]
    total = sum(scores)
    of_scores = sum(score for score, hit in zip(scores, covered, strict=False) if hit)
    return offer, sum(covered) / len(chunks), of_scores / total if total > 0 else sum(covered) / len(chunks)
