"""What `tools/demo --learn` shows: questions are asked, their passages become an adapter, and it answers without them.

A prepared short run. Clusters, study questions, teacher, trainer, proof and exam are those of every library, and so are
the bounds that an adapter must keep. It is short because there is little to learn: a few questions about one bulletin,
and `learning.study_questions` written ones about each of its passages in place of 24. So few are gone through more
often than hundreds would be, in larger steps. What a machine learns while it is idle takes hours on two cores; how
good that is stands in docs/log.md.
"""

import argparse
import itertools
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from edge_rag import Answer, EdgeRAG
from edge_rag.cli import show
from edge_rag.cli.app import out
from edge_rag.records import LearningStatus, Lesson
from tools.demo_tour import add_documents

# About one bulletin. The last one is never trained on: it is the newest, or what it finds is in no cluster.
QUESTIONS = (
    "Until when is the divert valve work free of charge?",
    "Who wrote the bulletin about the divert valve that sticks?",
    "When was the bulletin about the sticking divert valve written?",
    "Which code do workshops use for the work on the divert valve that sticks?",
    "How often does the divert valve that sticks click?",
    "Which code do workshops use for the divert valve?",
)
OTHERS = (  # what must stay as it is
    "Who first reported air at the intake coupling?",
    "From which serial number on are units built with the long-life membrane KS-4412?",
)
MEANWHILE = "Until when can the old membrane KS-4410 be ordered?"
SETTINGS: dict[str, object] = {
    "retrieval.top_k": 2,
    "answering.max_tokens": 48,
    "answering.instructions": "Answer in a few words.",
    "kv.idle": False,
    "learning.idle": False,
    "learning.on_battery": True,
    "learning.most_passages": 2,
    "learning.least_questions": 3,
    "learning.study_questions": 2,
    "learning.rank": 8,
    "learning.epochs": 8,
    "learning.learning_rate": 1.5e-3,
}
WAYS: dict[str, dict[str, object]] = {  # how a question may be answered, and the settings that have it answered so
    "passages read": {"router.mode": "off", "kv.enabled": False},
    "passages kept as KV": {"router.mode": "off"},
    "from memory": {"router.mode": "coverage"},
}
MOST_JUDGED, STAYED = 16, 2  # answers to one question, and such from memory in a row, which are enough
COMPARED = (*QUESTIONS[1:3], QUESTIONS[-1])


def main() -> None:
    """Ask, learn, and ask again, in `.demo/<model>-learn`, which is made anew each time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    model = parser.parse_args().model
    folder, settings = Path(".demo") / f"{model}-learn", {"models.llm": model} | SETTINGS
    shutil.rmtree(folder, ignore_errors=True)
    out.print(
        f"A prepared short run: {len(QUESTIONS)} questions about one bulletin, and "
        f"{SETTINGS['learning.study_questions']} written ones about each of its passages instead of 24."
    )
    command = [str(Path(sys.executable).with_name("edge-rag")), "--data", str(folder), "--model", model]
    with EdgeRAG.open(folder, settings=settings) as rag:
        add_documents(rag)
        rag.load()
        ask(rag)
        lessons = learn(rag)
        if not lessons:
            out.print(f"\nNothing was learned: {why_not(rag)}")
    for lesson in lessons:
        tell(lesson, command)
    if any(lesson.adapter for lesson in lessons):
        compare(lambda way: EdgeRAG.open(folder, settings=settings | way))
        with EdgeRAG.open(folder, settings=settings) as rag:
            route(rag)
        run([*command, "router"])
    print_undoing(lessons, command)


def ask(rag: EdgeRAG) -> None:
    """Fill the journal: that is all that is learned from."""
    out.print("\nQuestions, answered from two passages each")
    rows = [
        [answer.question, said(answer), show.seconds(answer.timings.total)]
        for answer in map(rag.ask, (*OTHERS, *QUESTIONS))
    ]
    show.table(["question", "answer", "total"], rows, right=(2,))


def said(answer: Answer) -> str:
    """What was answered, in one line."""
    return " ".join(answer.text.split())


# --- learning --------------------------------------------------------------------------------------------------------


def learn(rag: EdgeRAG) -> list[Lesson]:
    """Learn what enough was asked about; meanwhile somebody asks something else."""
    out.print("\nLearning, as an idle machine does")
    asked: list[Future[Answer]] = []
    with ThreadPoolExecutor(1) as somebody, show.bar() as bar:
        diary = Diary(bar)

        def progress(now: LearningStatus) -> None:
            diary.tell(now)
            if not asked and now.doing.endswith("training") and now.done:
                asked.append(somebody.submit(interrupt, rag, now))

        lessons = rag.learn(least=rag.settings.learning.least_questions, progress=progress)
        diary.end()
    return lessons


class Diary:
    """Says which work was done, and how long it took. `bar` shows how far the present one is."""

    def __init__(self, bar: Callable[[str, int, int], None], clock: Callable[[], float] = time.perf_counter) -> None:
        self._bar = bar
        self._clock = clock
        self._what = ""
        self._began = self._last = clock()

    def tell(self, now: LearningStatus) -> None:
        """A piece of work is done; when nothing is said of it, it was the end of the one before."""
        what = now.doing.partition(": ")[2] or self._what
        if what != self._what:
            self.end()
            self._what, self._began = what, self._last
        self._last = self._clock()
        if now.total:
            self._bar(what, now.done, now.total)

    def end(self) -> None:
        """The work that was told of last is over."""
        if self._what:
            out.print(f"  {self._what}: {show.seconds(self._last - self._began)}")


def interrupt(rag: EdgeRAG, now: LearningStatus) -> Answer:
    """Ask something while there is training: it stands still until the answer is written."""
    time.sleep(1)  # until the trainer is at work again
    answer = rag.ask(MEANWHILE)
    out.print(
        f"  (training, about update {now.done} of {now.total}) > {answer.question}\n"
        f"    {said(answer)}   first word {show.seconds(answer.timings.first_token)}, "
        f"total {show.seconds(answer.timings.total)}"
    )
    return answer


def why_not(rag: EdgeRAG) -> str:
    """Why nothing was learned at all."""
    learning = rag.status().learning
    return (learning and learning.waiting) or "no cluster has questions enough"


def tell(lesson: Lesson, command: Sequence[str]) -> None:
    """What a cluster was learned from, and what became of it, in the words of `edge-rag`."""
    run([*command, "clusters", "show", str(lesson.cluster_id)])
    if lesson.adapter:
        run([*command, "adapters", "show", lesson.adapter[:12]])
    else:
        out.print(f"\nNo adapter is used, so all answers stay as they were: {lesson.reason}")


def run(command: Sequence[str]) -> None:
    """Show a command and what it says."""
    out.print(f"\n$ {line(command)}")
    subprocess.run(command, check=True)


def line(command: Sequence[str]) -> str:
    """A command as it is typed from here."""
    return " ".join((show.path(command[0]), *command[1:]))


# --- what it is worth ------------------------------------------------------------------------------------------------


def compare(opened: Callable[[dict[str, object]], EdgeRAG]) -> None:
    """Answer some questions in each way, each time with models that were loaded anew."""
    out.print(
        "\nQuestions in three ways. The adapter was not trained on the last one, so that is read as text in any case."
    )
    answers: dict[str, list[Answer]] = {}
    for way, settings in WAYS.items():
        with opened(settings) as rag:
            rag.load()
            rag.ask(QUESTIONS[0], max_tokens=1)  # whatever is loaded at the first question
            answers[way] = [rag.ask(question) for question in COMPARED]
    for place, question in enumerate(COMPARED):
        out.print(f"\n> {question}")
        rows = [compared(way, given[place]) for way, given in answers.items()]
        show.table(["", "prompt", "computed", "first word", "total", "answer"], rows, right=(1, 2, 3, 4))


def compared(way: str, answer: Answer) -> list[str]:
    """A row: what was in the prompt, what of it was computed, and how long that took."""
    usage, timings = answer.usage, answer.timings
    how = f"{way}: not for this one" if way == "from memory" and not answer.plan.adapter else way
    numbers = [str(usage.prompt_tokens), str(usage.prompt_tokens - usage.cached_tokens)]
    return [how, *numbers, show.seconds(timings.first_token), show.seconds(timings.total), said(answer)]


def route(rag: EdgeRAG) -> None:
    """Judge answers to a question as somebody in a hurry would, until the router has moved to the adapter."""
    out.print(
        "\nThe router goes by what answers are worth. No exam speaks for the adapter at this question, so passages are "
        "read.\nSomebody in a hurry gives 0 to answers that were read, and 1 to those from memory:"
    )
    rag.load()
    rows, stayed = [], 0
    for question in itertools.repeat(COMPARED[-1], MOST_JUDGED):
        answer = rag.ask(question)
        worth = 1.0 if answer.plan.adapter else 0.0
        rows.append([question, *expected(answer), "memory" if answer.plan.adapter else "passages", f"{worth:g}"])
        rag.feedback(answer.id, worth)
        stayed = stayed + 1 if answer.plan.adapter else 0
        if stayed == STAYED:
            break
    show.table(["question", "passages", "memory", "answered from", "feedback"], rows, right=(1, 2, 4))


def expected(answer: Answer) -> list[str]:
    """The scores of reading the passages and of the adapter, when that was decided."""
    scores = {arm.adapter != "": arm.score for arm in answer.plan.route.weighed} if answer.plan.route else {}
    return [f"{scores[arm]:.2f}" if arm in scores else "" for arm in (False, True)]


def print_undoing(lessons: Sequence[Lesson], command: Sequence[str]) -> None:
    """How to get rid of what was learned."""
    made = [lesson.adapter[:12] for lesson in lessons if lesson.adapter]
    out.print("\nTo undo it (docs/learning.md has more):")
    for adapter in made:
        out.print(f"  {line([*command, 'adapters', 'disable', adapter])}   # not used; `enable` takes it back")
        out.print(f"  {line([*command, 'adapters', 'delete', adapter])}    # gone with its file")
    out.print(f"  rm -r {command[2]}   # the whole library of this run")


if __name__ == "__main__":
    main()
