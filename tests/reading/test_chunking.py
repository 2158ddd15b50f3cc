import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.errors import InputError
from edge_rag.reading.chunking import make_chunks
from edge_rag.reading.readers import parse
from edge_rag.records import Chunk, ParsedDocument, Section


def words(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


def quarters(text: str) -> int:
    """Like a tokenizer that counts white space, and to which joined texts cost more than their parts."""
    return -(-len(text.encode()) // 4) + text.count("\n\n")


def markdown(source: str, limit: int = 40) -> tuple[Chunk, ...]:
    return make_chunks(parse(Path("notes.md"), source.encode()), count_tokens=words, chunk_tokens=limit)


def prose(count: int, name: str = "word") -> str:
    """Sentences of ten words, `count` words in all."""
    return " ".join(f"{name}{n}." if n % 10 == 9 else f"{name}{n}" for n in range(count))


def test_a_short_document_is_one_chunk_with_its_place() -> None:
    (chunk,) = markdown("# Title\n\nSome text.\n")
    expected = Chunk(ordinal=0, text="# Title\n\nSome text.", heading="Title", page=None, start=0, end=19, tokens=5)
    assert chunk == expected


def test_the_heading_is_the_path_below_the_title() -> None:
    source = f"---\ntitle: Book\n---\n# Part\n\n{prose(30)}\n\n## Chapter\n\n{prose(30)}\n"
    assert [chunk.heading for chunk in markdown(source)] == ["Book › Part", "Book › Part › Chapter"]
    assert [chunk.heading for chunk in markdown(source.replace("Book", "Part"))] == ["Part", "Part › Chapter"]


def test_sections_of_good_size_stay_apart_and_small_ones_are_joined() -> None:
    large = [f"# H{n}\n\n{prose(18)}\n\n" for n in range(3)]
    assert [chunk.text for chunk in markdown("".join(large))] == [section.strip() for section in large]
    small = "".join(f"# H{n}\n\ntext\n\n" for n in range(3))
    assert [chunk.text for chunk in markdown(small)] == [small.strip()]


def test_a_heading_stays_with_the_text_below_it() -> None:
    # The paragraph alone fills a chunk, so that its heading only fits if the paragraph is cut.
    chunks = markdown(f"# One\n\n{prose(25)}\n\n## Two\n\n{prose(35)}\n")
    assert [chunk.heading for chunk in chunks] == ["One", "One › Two", "One › Two"]
    assert chunks[1].text.startswith("## Two\n\nword0 ")
    assert chunks[1].text.endswith(".")
    assert min(chunk.tokens for chunk in chunks) >= 10


def test_a_heading_is_not_left_at_the_end_of_a_chunk() -> None:
    source = f"# One\n\n{prose(5)}\n\n## Two and a few more words\n\n{prose(36)}\n"
    assert not any(chunk.text.endswith("more words") for chunk in markdown(source))
    source = f"# One\n\n{prose(20)}\n\n## Two\n\n{prose(20)}\n"
    assert [chunk.text.startswith("## Two") for chunk in markdown(source)] == [False, True]


def test_a_small_end_takes_something_from_the_chunk_before() -> None:
    chunks = markdown(f"# H\n\n{prose(34)}\n\nThe end.\n")
    assert len(chunks) == 2
    assert chunks[1].text.endswith("The end.")
    assert min(chunk.tokens for chunk in chunks) >= 10


def test_chunks_do_not_cross_pages_or_gaps() -> None:
    sections = (
        Section(text="one", start=0, page=1),
        Section(text="two", start=3, page=2),
        Section(text="three", start=10, page=2),
    )
    document = ParsedDocument(title="T", kind="pdf", sections=sections)
    chunks = make_chunks(document, count_tokens=words)
    assert [(chunk.text, chunk.page, chunk.start, chunk.end) for chunk in chunks] == [
        ("one", 1, 0, 3),
        ("two", 2, 3, 6),
        ("three", 2, 10, 15),
    ]


def test_joined_pieces_that_count_more_than_their_sum_are_taken_apart() -> None:
    def jealous(text: str) -> int:
        return words(text) + (100 if "one" in text and "two" in text else 0)

    source = "# A\n\none\n\n# B\n\ntwo\n"
    document = parse(Path("a.md"), source.encode())
    chunks = make_chunks(document, count_tokens=jealous, chunk_tokens=40)
    assert [chunk.text for chunk in chunks] == ["# A\n\none", "# B\n\ntwo"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("some words and, well, commas. " * 33_000, id="prose"),
        pytest.param("abcdef0123" * 100_000, id="no spaces"),
        pytest.param("".join("x" + " " * n for n in range(1400)), id="gaps of all lengths"),
        pytest.param(" " * 1_000_000 + "end", id="spaces"),
        pytest.param("a line\n" * 140_000, id="short lines"),
    ],
)
@pytest.mark.parametrize("count", [words, quarters])
def test_a_megabyte_without_structure_is_cut_with_bounded_work(text: str, count: Callable[[str], int]) -> None:
    counted = 0

    def counting(piece: str) -> int:
        nonlocal counted
        counted += len(piece)
        return count(piece)

    document = ParsedDocument(title="T", kind="txt", sections=(Section(text=text, start=0),))
    chunks = make_chunks(document, count_tokens=counting)
    check(document, chunks, 256)
    assert max(len(chunk.text) for chunk in chunks) <= 20_000
    assert counted < 16 * len(text)


def test_a_limit_too_small_for_single_characters_is_refused() -> None:
    with pytest.raises(InputError, match="chunk_tokens"):
        markdown("text", limit=15)


def check(document: ParsedDocument, chunks: tuple[Chunk, ...], limit: int) -> None:
    """Chunks are ordered, disjoint, exact slices within the limit, and leave out nothing but white space."""
    source = {section.start + offset: char for section in document.sections for offset, char in enumerate(section.text)}
    covered = -1
    for ordinal, chunk in enumerate(chunks):
        assert chunk.ordinal == ordinal
        assert covered < chunk.start + 1
        assert 0 < chunk.tokens <= limit
        assert chunk.text == chunk.text.strip() != ""
        for offset, char in zip(range(chunk.start, chunk.end), chunk.text, strict=True):
            assert source.pop(offset) == char
        covered = chunk.end
    assert not "".join(source.values()).strip()


ALPHABET = "ab.,;:-()\"' \n\t#é€😀\u3000\x85\u2028"
TEXTS = st.one_of(
    st.text(ALPHABET, max_size=400),
    st.text(max_size=60),
    st.integers(0, 90).map(prose),
    st.sampled_from(["# Heading\n\n", "\n\n", " ", "word\n", "x" * 300]),
)
SECTIONS = st.lists(
    st.tuples(
        TEXTS, st.lists(st.sampled_from("ABC"), max_size=3), st.sampled_from([0, 0, 0, 2]), st.sampled_from([1, 1, 2])
    ),
    max_size=12,
)


@given(SECTIONS, st.sampled_from([words, quarters]), st.integers(16, 64))
def test_chunks_hold_all_of_any_document_once(
    parts: list[tuple[str, list[str], int, int]], count: Callable[[str], int], limit: int
) -> None:
    sections: list[Section] = []
    end = page = 0
    for text, path, gap, pages in parts:
        page += pages - 1
        sections.append(Section(text=text, start=end + gap, headings=tuple(path), page=page))
        end += gap + len(text)
    document = ParsedDocument(title="A", kind="pdf", sections=tuple(sections))
    check(document, make_chunks(document, count_tokens=count, chunk_tokens=limit), limit)
