from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.reading.markdown import cut_at_headings, headings, plain
from edge_rag.reading.readers import parse
from edge_rag.records import ParsedDocument


def read(source: str) -> ParsedDocument:
    return parse(Path("notes.md"), source.encode())


def outline(source: str) -> list[tuple[str, ...]]:
    return [section.headings for section in read(source).sections]


def test_headings_open_sections_and_stay_in_their_text() -> None:
    document = read("intro\n\n# One\n\ntext\n## Two ##\nmore\n# Three\n")
    assert document.title == "One"
    assert [(section.headings, section.text) for section in document.sections] == [
        ((), "intro\n\n"),
        (("One",), "# One\n\ntext\n"),
        (("One", "Two"), "## Two ##\nmore\n"),
        (("Three",), "# Three\n"),
    ]


def test_skipped_levels_and_returns_give_the_right_path() -> None:
    assert outline("### deep\n## b\n#### c\n### d\n# e") == [
        ("deep",),
        ("b",),
        ("b", "c"),
        ("b", "d"),
        ("e",),
    ]


def test_setext_headings_count_and_rules_do_not() -> None:
    assert outline("Title\n=====\n\nSub\n---\ntext\n\n---\n\n- item\n---\n\n> quote\n===\n\ntwo\nlines\n---\n") == [
        ("Title",),
        ("Title", "Sub"),
    ]


def test_hashes_in_code_fences_are_no_headings() -> None:
    source = (
        "# A\n```sh\n# no\n~~~\n# no\n```\n~~~~\n# no\n~~~\n# no\n~~~~\n# B\n``` `x` # inline\n# C\n```\n# unclosed"
    )
    assert outline(source) == [("A",), ("B",), ("C",)]


def test_what_only_looks_like_a_heading_is_text() -> None:
    assert outline("#tag\n    # code\n####### seven\n#\n# ##\n\\# no") == [()]


@pytest.mark.parametrize(
    ("source", "title"),
    [
        ("---\ntitle: 'A: b'\ntags: [x]\n---\n# H\n", "A: b"),
        ("---\nTitle: Plain title  \n...\ntext", "Plain title"),
        ("---\ntags: [x]\n---\n# H **bold**\n", "H bold"),
        ("## Only second level", "notes"),
    ],
)
def test_the_title_comes_from_front_matter_then_the_first_heading_then_the_name(source: str, title: str) -> None:
    document = read(source)
    assert document.title == title
    assert "tags" not in document.sections[0].text


def test_offsets_behind_front_matter_are_those_of_the_file() -> None:
    source = "---\nkey: value\n---\ntext\n# H\n"
    assert [(section.start, section.text) for section in read(source).sections] == [(19, "text\n"), (24, "# H\n")]


def test_what_only_looks_like_front_matter_is_text() -> None:
    for source in ("---\nno keys here\n---\ntext", "---\nkey: never closed\n", "---\nkey: value\n---\n"):
        assert "".join(section.text for section in read(source).sections) == source


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("**Bold** and _`code`_", "Bold and _code_"),
        ("[Link](http://x) to ![image][ref]", "Link to image"),
        ("snake_case_name * 2", "snake_case_name * 2"),
        ("Title {#anchor}", "Title"),
        ("~~old~~ ***new***", "old new"),
    ],
)
def test_titles_lose_their_markup(markup: str, text: str) -> None:
    assert plain(markup) == text


LINES = st.lists(
    st.sampled_from(["# A", "## B ##", "text", "", "---", "===", "```", "~~~", "    # x", "\u2028# y", "\x1c"])
)


@given(LINES)
def test_sections_cover_the_source_without_gaps(lines: list[str]) -> None:
    source = "\n".join(lines)
    sections = cut_at_headings(source, 0, list(headings(source)))
    assert all(source[section.start : section.start + len(section.text)] == section.text for section in sections)
    assert "".join(section.text for section in sections).strip() == source.strip()
