"""Text in, events out: marks of the model's own never show, ours stand behind supported sentences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.records import Cited, Delta
from edge_rag.runtime.drafting import Draft


def drafted(pieces: list[str], support: tuple[int, float] | None) -> Draft:
    draft = Draft(lambda sentence: support)
    said = [event for piece in pieces for event in draft.feed(piece)] + list(draft.finish())
    assert "".join(event.text for event in said if isinstance(event, Delta)) == draft.text
    assert [event.citation for event in said if isinstance(event, Cited)] == draft.citations
    return draft


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param(["The rent is 77 dollars [1] [2]."], id="in one piece"),
        pytest.param(["The rent is 77 dollars", " [", "1", "] [2", "]", "."], id="in many"),
    ],
)
def test_marks_of_the_model_are_taken_out(pieces: list[str]) -> None:
    draft = drafted(pieces, None)
    assert draft.text == "The rent is 77 dollars."
    assert draft.citations == []


def test_a_supported_sentence_is_marked_and_located() -> None:
    draft = drafted(["It rains. ", "[3] Bring a coat."], (1, 0.7))
    assert draft.text == "It rains. [2] Bring a coat. [2]"
    assert [draft.text[c.start : c.end] for c in draft.citations] == ["It rains.", "Bring a coat."]


def test_brackets_that_are_no_marks_stay() -> None:
    assert drafted(["a[i] = [x", ", y] [2031"], None).text == "a[i] = [x, y] [2031"


@given(st.text(st.sampled_from("a .[]1\n")), st.data())
def test_how_the_text_is_cut_into_pieces_does_not_matter(text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert drafted(pieces, None).text.split() == drafted([text], None).text.split()
