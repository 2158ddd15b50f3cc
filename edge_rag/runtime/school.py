"""What learns in one open library: the adapters, what chooses among them, and what trains them.

A part of the house (`runtime.house`) with rooms of its own; each is made once, when it is first needed.
"""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edge_rag.config import models_folder
from edge_rag.native.device import memory_available
from edge_rag.policy.caching_rules import rule
from edge_rag.policy.covering import Chosen
from edge_rag.policy.demand import Means
from edge_rag.policy.features import Space
from edge_rag.policy.ledger import Claim
from edge_rag.policy.residency import Residency
from edge_rag.policy.reward import Allowance
from edge_rag.records import Answer, ArmStatus, RouterStatus
from edge_rag.runtime.covering import Coverer
from edge_rag.runtime.idle import Step
from edge_rag.runtime.learner import Learner
from edge_rag.runtime.parts import MEGABYTE
from edge_rag.runtime.reviewing import Materials, Reviewer
from edge_rag.runtime.rewarding import Noted, feedback, reward_noted
from edge_rag.runtime.routing import Router
from edge_rag.runtime.shelf import Shelf
from edge_rag.runtime.teaching import Teacher
from edge_rag.runtime.training import Training, why_no_training
from edge_rag.runtime.workshop import Tools
from edge_rag.store import journal, routes
from edge_rag.store.adapters import AdapterFolder, sweep
from edge_rag.store.database import Connection
from edge_rag.store.route_totals import totals

if TYPE_CHECKING:
    from edge_rag.runtime.house import House

ADAPTER_FOLDER, JOB_FOLDER = "adapters", "training"
ALLOWED = 120  # feedbacks a minute that are learned from
DEQUANTISED = "dequantised"  # weights as the trainer loads them, beside the models' files


class School:
    """What learns in the library of `house`. Thread-safe."""

    def __init__(self, house: "House") -> None:
        self._house = house
        self.folder = AdapterFolder(house.folder / ADAPTER_FOLDER)
        self._allowance = Allowance(ALLOWED)  # used inside transactions only, which wait for each other

    def refresh(self) -> None:
        """The registry of adapters has changed."""
        coverer: Coverer | None = self._house.made.get("coverer")
        if coverer:
            coverer.refresh()

    def sweep(self) -> None:
        """Remove the files of adapters that are gone."""
        with self._house.database.write() as connection:
            sweep(connection, self.folder)
        self.refresh()

    def coverer(self) -> Coverer | None:
        """What chooses adapters, by rule or learned; None when there is no room for any, or they are switched off."""
        house, pager = self._house, self._house.engine().pager
        if pager is None:
            return None

        def make() -> Coverer:
            shelf, settings = Shelf(house.database, pager, base=house.base()), house.settings
            if settings.router.mode == "coverage":
                return Coverer(shelf, least=settings.adapters.least_coverage)
            return house.closing.enter_context(self._router(shelf))

        coverer: Coverer = house.part("coverer", make)
        return coverer

    def _router(self, shelf: Shelf) -> Router:
        house, settings = self._house, self._house.settings.router
        assembler = house.engine().assembler
        with house.database.read() as connection:
            served = routes.decisions(connection)

        def made(sizes: Mapping[str, int], means: Means) -> Residency:
            budget, epoch, hope = shelf.pager.budget, settings.epoch, settings.alpha
            return rule(settings.residency, sizes, budget, epoch=epoch, hope=hope, means=means, served=served)

        return Router(
            shelf,
            settings,
            space=self.space(),
            folder=house.folder,
            rule=made,
            slowdown=lambda: assembler.costs.slowdown,
        )

    def space(self) -> Space:
        """What the router's contexts are made of."""
        house = self._house
        return Space(house.embedder_identity(house.embedder()), house.settings.router.projected)

    def router_status(self) -> RouterStatus:
        """What the journal tells of the router, and of a loaded one what it keeps in fast memory."""
        house, settings = self._house, self._house.settings.router
        with house.database.read() as connection:
            known = totals(connection)
        coverer: Coverer | None = house.made.get("coverer")
        pager = coverer.shelf.pager.status() if coverer else None
        resident = frozenset(pager.resident) if pager else frozenset()
        keeper = coverer.keeper if isinstance(coverer, Router) else None
        return RouterStatus(
            mode=settings.mode,
            residency=settings.residency if settings.mode == "linucb" else "lru",
            decisions=known.decisions,
            hits=known.hits,
            explored=known.explored,
            arms=tuple(
                ArmStatus(name, arm.chosen, arm.rewards, arm.mean, arm.width, name in resident)
                for name, arm in sorted(known.arms.items())
            ),
            wanted=keeper.wanted if keeper else (),
            epochs=keeper.epochs if keeper else 0,
            page_ins=pager.page_ins if pager else 0,
        )

    def note(self, connection: Connection, answer: Answer, chosen: Chosen) -> None:
        """Journal how an answer was routed, in the transaction that journals the answer."""
        coverer = self._house.made.get("coverer")
        if isinstance(coverer, Router) and chosen.route:
            coverer.note(connection, answer, chosen)

    def feedback(self, question_id: str, score: float, comment: str) -> None:
        """Journal what somebody said of an answer, and learn from it, now or when a router is next made.

        Of a flood only so many a minute are learned from. Raises as `journal.add_feedback`.
        """

        def journalled(connection: Connection, clock: int) -> Noted | None:
            now = time.time()
            journal.add_feedback(connection, question_id, score, comment, now=now)
            reward = feedback(connection, question_id, score, clock=clock, now=now)
            return reward_noted(connection, reward) if reward and self._allowance.take(now) else None

        coverer = self._house.made.get("coverer")
        if isinstance(coverer, Router):
            coverer.experience.learn(journalled)
            return
        with self._house.database.write() as connection:
            journalled(connection, routes.clock(connection))

    def learner(self) -> Learner | None:
        """What learns; None when no adapters are used."""
        house, coverer = self._house, self.coverer()
        if coverer is None:
            return None

        def make() -> Learner:
            return house.closing.enter_context(Learner(self.tools(coverer), trains=why_no_training()))

        learner: Learner = house.part("learner", make)
        return learner

    def idle_steps(self) -> list[tuple[str, Step]]:
        """What is done about adapters while nobody asks, in words and as a step, the most important first."""
        coverer, steps = self.coverer(), list[tuple[str, Step]]()
        if isinstance(coverer, Router):
            steps = [("loaded an adapter", partial(coverer.keeper.load_next, self._house.engine()))]
            steps += [("reviewed an answer", self._reviewer(coverer).next)]
        learner = self.learner() if self._house.settings.learning.idle else None
        return [*steps, ("learned", learner.next)] if learner else steps

    def _reviewer(self, router: Router) -> Reviewer:
        house = self._house
        materials = Materials(
            engine=house.engine(),
            builder=house.builder(),
            embedder=house.embedder(),
            shelf=router.shelf,
            settings=house.settings,
            space=router.space.tag,
        )
        return Reviewer(materials, learn=router.take, widths=router.widths)

    def tools(self, coverer: Coverer) -> Tools:
        """What a course works with."""
        house, settings, engine = self._house, self._house.settings, self._house.engine()
        instructions, free = settings.answering.instructions, house.memory().accounts.host.free
        room = settings.learning.memory_mb * MEGABYTE or free
        return Tools(
            database=house.database,
            engine=engine,
            teacher=Teacher(house.database, engine, house.builder(), instructions=instructions),
            embedder=house.embedder(),
            builder=house.builder(),
            coverer=coverer,
            folder=self.folder,
            settings=settings.learning,
            instructions=instructions,
            model=house.llm_file(),
            base=house.base(),
            jobs=house.folder / JOB_FOLDER,
            cache=models_folder(settings) / DEQUANTISED,
            memory=room,
            train=partial(self._training, Claim("training", min(room, free))),
        )

    def _training(self, claim: Claim, folder: Path) -> Training:
        """A training of the job in `folder`, which has `claim` of the memory until it ends."""
        house, engine, accounts = self._house, self._house.engine(), self._house.memory().accounts
        accounts.release([claim])  # of the training before
        accounts.admit([claim])
        return Training(
            folder,
            freed=lambda: accounts.release([claim]),
            busy=lambda: engine.busy,
            short=lambda: memory_available() < house.settings.memory.reserve_mb * MEGABYTE // 2,
            threads=house.threads().engine,
        )
