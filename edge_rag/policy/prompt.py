"""The prompt's layout, decided once (version 1):

    prefix · passage 1 … passage n · [earlier turns] · question · assistant header

The prefix (template header and one fixed instruction) is constant, so its state is computed once per model. Passages
follow at once, so the state of the first is exact after the prefix. Everything that varies (a user's instructions,
history, the question) comes behind them. A passage carries no number: its tokens must not depend on its rank, or its
state could not be reused at another one; citations are found by alignment afterwards (`policy.citations`).

The model's own chat template is rendered with marks in place of the contents and cut at them. Template text may hold
special tokens; contents never do: they are tokenised apart, with special-token parsing off, so a document that
contains '<|im_end|>' stays plain text.
"""

import re
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct

from edge_rag.errors import ModelError
from edge_rag.records import Message, Turn

LAYOUT_VERSION = 1
_MARK = re.compile(r" ?\[\d{1,3}\]")

INSTRUCTION = (
    "You answer questions about the user's documents. Use only the passages below. "
    "Answer briefly and precisely. If the passages do not contain the answer, say that you cannot find it."
)


class Piece(Struct, frozen=True):
    """A stretch of the prompt: template text (special tokens allowed) or content (never)."""

    text: str
    kind: Literal["template", "content"]


def passages_mark() -> str:
    """The mark that stands for all passages."""
    return "EDGERAGPASSAGESMARK"


def turn_mark(index: int) -> str:
    """The mark that stands for the text of turn `index`."""
    return f"EDGERAGTURN{index}MARK"


def marked_messages(turns: int, *, system_role: bool) -> list[Message]:
    """The conversation with marks: `turns` messages, user first, alternating, the last one the question.

    A template without a system role gets the instruction at the head of the first user message.
    """
    head = "" if system_role else INSTRUCTION + "\n\n"
    first = head + passages_mark() + turn_mark(0)
    messages = [Message(role="system", content=INSTRUCTION)] if system_role else []
    for index in range(turns):
        role = "user" if index % 2 == 0 else "assistant"
        messages.append(Message(role=role, content=first if index == 0 else turn_mark(index)))
    return messages


def cut_at_marks(rendered: str, turns: int) -> tuple[str, tuple[str, ...]]:
    """Cut a rendered conversation into its prefix and the template texts after each turn.

    Returns (prefix, one text behind each turn). Raises ModelError when the template lost, repeated or moved a mark.
    """
    marks = [passages_mark() + turn_mark(0), *(turn_mark(index) for index in range(1, turns))]
    parts: list[str] = []
    rest = rendered
    for mark in marks:
        before, found, rest = rest.partition(mark)
        if not found or rendered.count(mark) > 1:
            raise ModelError(
                "the model's chat template does not keep messages whole and in order",
                field="tokenizer.chat_template",
                remedy="use a model whose template renders each message once",
            )
        parts.append(before)
    return parts[0], (*parts[1:], rest)


def passage_text(heading: str, text: str) -> str:
    """A passage as the model reads it: where it is from, its text, an empty line. Independent of its rank."""
    return f"[{heading}]\n{text.strip()}\n\n" if heading else f"{text.strip()}\n\n"


def question_text(question: str, instructions: str) -> str:
    """The question with the user's own instructions before it."""
    return (
        f"{instructions.strip()}\n\nQuestion: {question.strip()}"
        if instructions.strip()
        else (f"Question: {question.strip()}")
    )


def tail_pieces(template: Sequence[str], turns: Sequence[Turn], question: str, instructions: str) -> list[Piece]:
    """Everything behind the passages: earlier turns, the question, the assistant header.

    `template` has one text behind each turn, as `cut_at_marks` returns it for len(turns) + 1 turns.
    """
    contents = [turn.content.strip() for turn in turns] + [question_text(question, instructions)]
    pieces: list[Piece] = []
    for content, behind in zip(contents, template, strict=True):
        pieces.append(Piece(content, "content"))
        pieces.append(Piece(behind, "template"))
    return [piece for piece in pieces if piece.text]


def alternating(turns: Sequence[Turn]) -> list[Turn]:
    """History as templates demand it: user first, roles alternating, ending with the assistant.

    Citation marks are taken out of answers, or the model would learn to write marks of its own.

    Neighbouring messages of one role are joined; what does not fit the pattern at either end is left out.
    """
    joined: list[Turn] = []
    for given in turns:
        turn = Turn(role=given.role, content=_MARK.sub("", given.content)) if given.role == "assistant" else given
        if joined and joined[-1].role == turn.role:
            joined[-1] = Turn(role=turn.role, content=f"{joined[-1].content}\n\n{turn.content}")
        elif joined or turn.role == "user":
            joined.append(turn)
    return joined[:-1] if joined and joined[-1].role == "user" else joined
