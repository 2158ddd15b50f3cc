"""Spliced answers asked again with full prefill: which are, what is written of it, and what follows.

With the real small model; where many audits are needed, rows are forged.
"""

import contextlib
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from edge_rag.config import Settings
from edge_rag.policy.audit import ENOUGH, OFF
from edge_rag.records import Answer, PassagePlan, Plan, Timings, Usage
from edge_rag.runtime import auditing
from edge_rag.runtime.auditing import WAITING, Auditor, decided_link
from edge_rag.runtime.prompting import Prompt
from edge_rag.runtime.rag import EdgeRAG
from edge_rag.store.kv_audits import KVAudit, put_audit, recent_audits
from tests.conftest import SMALL_LLM
from tests.runtime.serving import Opened, add_files, small_library

TEXTS = {
    "hose.txt": "The hose of the Marlin unit is two metres long and must not be bent. It is joined to the pump with a "
    "clamp, and to the tank with another one. Both are made of steel and fit any older hose.",
    "pump.md": "# Pump\n\nThe pump of the Marlin unit must be oiled every 12 weeks. It hums all night. A pump that "
    "rattles has air in its hose: open the valve for a moment, and close it when water comes.",
}
OILED = "How often must the pump be oiled?"
LINK = 4
PROMPT = Prompt((1,), ((2,), (3,)), (4,))


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing the first few tokens of two answers takes less time."""
    monkeypatch.setattr(auditing, "TOKENS", 6)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, small_settings: Settings) -> Path:
    """A data folder with two documents and their KV; its files are beside it."""
    folder = tmp_path_factory.mktemp("auditing")
    with small_library(folder / "data", small_settings) as rag:
        add_files(rag, folder / "files", TEXTS)
        assert rag.warm().computed == 2
    return folder


@pytest.fixture
def opened(tmp_path: Path, prepared: Path, small_settings: Settings) -> Opened:
    """Opens a data folder of the test's own, each time the same one."""
    shutil.copytree(prepared / "data", tmp_path / "data")
    return partial(audited_library, tmp_path / "data", small_settings)


@contextlib.contextmanager
def audited_library(data: Path, settings: Settings, **changes: Any) -> Iterator[EdgeRAG]:
    """A library whose answers go to an auditor that nothing but the test sets going."""
    flags = {"kv__link_tokens": LINK, "kv__audit_share": 1, "kv__audit_floor": 1}
    with small_library(data, settings, **(flags | changes)) as rag:
        made = Auditor(rag._database, rag._house.engine(), rag.settings.kv, model=SMALL_LLM)
        rag._house.made["auditor"] = made
        yield rag


def auditor(rag: EdgeRAG) -> Auditor:
    made: Auditor = rag._house.made["auditor"]
    return made


def audits(rag: EdgeRAG, link: int = LINK) -> list[KVAudit]:
    with rag._database.read() as connection:
        return recent_audits(connection, SMALL_LLM, link, 100)


def forge(rag: EdgeRAG, answer: Answer, count: int, *, link: int = LINK, model: str = SMALL_LLM) -> None:
    """As if so many audits had found nothing in common."""
    with rag._database.write() as connection:
        for _ in range(count):
            assert put_audit(connection, KVAudit(answer.id, 1.0, model, link, 3.0, 0.0))


def link(rag: EdgeRAG) -> int:
    return rag._house.engine().assembler.link


def ask(rag: EdgeRAG, question: str = OILED) -> Answer:
    """An answer with a moved passage."""
    answer = rag.ask(question)
    assert [plan.how for plan in answer.plan.passages] == ["exact", "splice"]
    return answer


# --- the sample ------------------------------------------------------------------------------------------------------


def forged_answer(number: int, *how: str) -> Answer:
    plans = tuple(PassagePlan(1, 20, how=kind, source="ram") for kind in how)  # type: ignore[arg-type]
    return Answer(
        f"{number:032x}", "?", "!", (), (), Usage(), Timings(), "stop", Plan(passages=plans), SMALL_LLM
    )  # fmt: skip


def taken(answers: list[Answer], share: float) -> list[Answer]:
    """Those that come into the sample, each by an auditor of its own, since one keeps only the last."""
    settings = replace(Settings().kv, audit_share=share)
    found = []
    for answer in answers:
        made = Auditor(None, None, settings, model=SMALL_LLM)  # type: ignore[arg-type]
        made.sample(answer, PROMPT)
        found += [answer] * len(made._waiting)
    return found


def test_about_the_share_asked_for_is_taken_and_the_same_answers_each_time() -> None:
    chance = random.Random(1)
    answers = [forged_answer(chance.getrandbits(128), "exact", "splice") for _ in range(1000)]
    assert taken(answers, 1) == answers
    assert taken(answers, 0) == []
    some = taken(answers, 0.25)
    assert 200 < len(some) < 300
    assert some == taken(answers, 0.25)
    assert len(taken(answers, 0.05)) < 100


@pytest.mark.parametrize("how", [(), ("exact",), ("exact", "recompute"), ("recompute",)])
def test_answers_without_a_moved_passage_are_not_taken(how: tuple[str, ...]) -> None:
    assert taken([forged_answer(7, *how)], 1) == []


def test_of_too_many_the_oldest_are_dropped() -> None:
    made = Auditor(None, None, replace(Settings().kv, audit_share=1), model=SMALL_LLM)  # type: ignore[arg-type]
    answers = [forged_answer(number, "splice") for number in range(WAITING + 3)]
    for answer in answers:
        made.sample(answer, PROMPT)
    assert [name for name, _ in made._waiting] == [answer.id for answer in answers[3:]]


# --- audits ----------------------------------------------------------------------------------------------------------


def test_an_audit_is_written_once_and_goes_with_its_question(opened: Opened, prepared: Path) -> None:
    with opened() as rag:
        assert auditor(rag).next() is False
        assert rag.status().kv_audits is None
        first, second = ask(rag), ask(rag, "How long is the hose of the pump?")
        assert auditor(rag).next() is True
        [audit] = audits(rag)
        assert (audit.question_id, audit.model, audit.link_tokens) == (first.id, SMALL_LLM, LINK)
        assert audit.audited_at > 0
        assert 0 <= audit.agreement <= 1
        assert audit.kl > 0  # moved passages are not just what prefill would have made of them
        shown = rag.status().kv_audits
        assert shown is not None
        assert (shown.audits, shown.agreement, shown.kl) == (1, audit.agreement, audit.kl)
        assert link(rag) == LINK  # one says nothing yet
        assert second.plan.passages[1].how == "splice"
        rag.remove(prepared / "files" / "pump.md")
        assert audits(rag) == []
        assert auditor(rag).next() is True  # its question is gone: there is nothing to write it to
        assert auditor(rag).next() is False
        assert audits(rag) == []
        assert rag.status().kv_audits is None


def test_a_prompt_read_in_full_agrees_with_itself(opened: Opened) -> None:
    """What is compared is the way the prompt came to be, and nothing else."""
    with opened() as rag:
        answer = ask(rag)
        rag._house.cache()._memory.put_state = lambda *_, **__: None  # type: ignore[method-assign]
        [(_, prompt)] = auditor(rag)._waiting
        apart = Prompt(prompt.prefix, (), (*prompt.passages[0], *prompt.passages[1], *prompt.tail))
        auditor(rag)._waiting[0] = (answer.id, apart)
        assert auditor(rag).next() is True
        [audit] = audits(rag)
        assert audit.agreement > 0.3  # one near tie that falls otherwise
        assert audit.kl == pytest.approx(0, abs=0.02)


# --- what follows ----------------------------------------------------------------------------------------------------


def test_too_little_agreement_raises_the_link_for_good_until_the_setting_changes(opened: Opened) -> None:
    with opened() as rag:
        answer = ask(rag)
        forge(rag, answer, ENOUGH - 1)
        assert link(rag) == LINK
        assert auditor(rag).next() is True
        assert link(rag) == 8
        kv = rag.status().kv
        assert kv is not None
        assert kv.link_tokens == 8
        assert decided_link(rag._database, SMALL_LLM, LINK) == 8
        assert decided_link(rag._database, SMALL_LLM, 5) == 5
        assert decided_link(rag._database, "another", LINK) == LINK
    with opened() as rag:
        assert link(rag) == 8
        assert ask(rag).plan.passages[1].link == 8
    with opened(kv__link_tokens=16) as rag:
        assert link(rag) == 16
    with opened(kv__link_tokens=OFF) as rag:
        assert link(rag) == OFF


def test_good_agreement_changes_nothing_nor_do_audits_of_other_models_and_links(opened: Opened) -> None:
    with opened(kv__audit_floor=0.001) as rag:
        answer = ask(rag)
        forge(rag, answer, ENOUGH, model="another")
        forge(rag, answer, ENOUGH, link=16)
        forge(rag, answer, ENOUGH - 2)
        assert auditor(rag).next() is True
        assert link(rag) == LINK
        assert decided_link(rag._database, SMALL_LLM, LINK) == LINK


def test_when_the_longest_link_is_not_enough_passages_are_no_longer_moved(opened: Opened) -> None:
    with opened(kv__link_tokens=32) as rag:
        answer = ask(rag)
        forge(rag, answer, ENOUGH, link=32)
        assert auditor(rag).next() is True
        assert link(rag) == OFF
        other = rag.ask("How long is the hose of the pump?")
        assert {plan.how for plan in other.plan.passages} == {"exact", "recompute"}
        assert auditor(rag).next() is False  # it was not taken
    with opened(kv__link_tokens=32) as rag:
        assert link(rag) == OFF
        kv = rag.status().kv
        assert kv is not None
        assert kv.link_tokens == OFF
    with opened(kv__link_tokens=8) as rag:
        assert link(rag) == 8
