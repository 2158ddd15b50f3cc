"""Text → token ids in the order of the layout, with the serving model's own template and tokenizer."""

import functools
from collections.abc import Sequence
from itertools import accumulate

from msgspec import Struct

from edge_rag.errors import ModelError
from edge_rag.native.chat_template import ChatTemplate
from edge_rag.native.llama import Model
from edge_rag.policy import prompt as layout
from edge_rag.records import Passage, Turn

Tokens = tuple[int, ...]


class Prompt(Struct, frozen=True):
    """Token ids in the order of the layout (`policy.prompt`), and the chunks that the passages are.

    Without `chunks`, passages belong to no document and their KV is not kept. With an `adapter` (its id), the tail and
    the answer are computed under it; prefix and passages never are, so that their KV serves every adapter.
    """

    prefix: Tokens
    passages: tuple[Tokens, ...]
    tail: Tokens
    chunks: tuple[int, ...] = ()
    adapter: str = ""

    def __len__(self) -> int:
        return len(self.prefix) + sum(map(len, self.passages)) + len(self.tail)

    @property
    def tokens(self) -> Tokens:
        """All of them, in order."""
        return (*self.prefix, *(token for passage in self.passages for token in passage), *self.tail)

    @property
    def seams(self) -> tuple[int, ...]:
        """Positions behind the prefix and behind each passage."""
        return tuple(accumulate(map(len, (self.prefix, *self.passages))))


class PromptBuilder:
    """Builds prompts for one model. Thread-safe. Raises ModelError when its chat template cannot be used."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._template = ChatTemplate(model.chat_template, bos=model.token_text("bos"), eos=model.token_text("eos"))
        self._system_role = self._has_system_role()
        self._segments = functools.lru_cache(maxsize=64)(self._render)
        self.prefix = self._prefix_tokens()

    def passage(self, passage: Passage) -> Tokens:
        """The tokens of a passage. They depend on nothing but the passage."""
        return tuple(self._model.tokenize(layout.passage_text(passage.heading, passage.text)))

    def tail(self, turns: Sequence[Turn], question: str, instructions: str = "") -> Tokens:
        """The tokens of everything behind the passages. `turns` must alternate, user first (`layout.alternating`)."""
        _, template = self._segments(len(turns) + 1)
        pieces = layout.tail_pieces(template, turns, question, instructions)
        return tuple(
            token for piece in pieces for token in self._model.tokenize(piece.text, special=piece.kind == "template")
        )

    def turn_size(self, turn: Turn) -> int:
        """About how many tokens a turn of the history takes."""
        return self._model.count_tokens(turn.content) + 8  # the template around it

    def _render(self, turns: int) -> tuple[str, tuple[str, ...]]:
        messages = layout.marked_messages(turns, system_role=self._system_role)
        return layout.cut_at_marks(self._template.render(messages), turns)

    def _has_system_role(self) -> bool:
        try:
            rendered = self._template.render(layout.marked_messages(1, system_role=True))
        except ModelError:
            return False
        return layout.INSTRUCTION in rendered

    def _prefix_tokens(self) -> Tokens:
        text, _ = self._segments(1)
        tokens = self._model.tokenize(text, special=True)
        bos = self._model.bos
        return tuple(tokens if bos is None or tokens[:1] == [bos] else [bos, *tokens])
