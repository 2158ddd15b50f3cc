"""Nearest neighbours: against brute force in numpy, and through additions and removals."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rag.records import Chunk, Filter
from edge_rag.store import library, vectors
from edge_rag.store.database import Connection, Database
from edge_rag.store.library import NewDocument, Vectors

DIMENSIONS = 384
CLUSTERS = 40
PER_CLUSTER = 100


def unit(matrix: npt.NDArray[np.floating]) -> Vectors:
    return np.asarray(matrix / np.linalg.norm(matrix, axis=-1, keepdims=True), dtype=np.float32)


def around(centre: Vectors, count: int, rng: np.random.Generator, spread: float = 0.05) -> Vectors:
    """`count` unit vectors near `centre`, as the chunks of one subject are."""
    return unit(centre + rng.normal(scale=spread, size=(count, DIMENSIONS)))


def put(connection: Connection, path: str, matrix: Vectors, kind: str = "txt") -> int:
    chunks = tuple(
        Chunk(ordinal=n, text=f"{path} {n}", heading="", page=None, start=0, end=1, tokens=1)
        for n in range(len(matrix))
    )
    new = NewDocument(path=path, title=path, kind=kind, bytes=1, sha256="", recipe="", chunks=chunks)
    return library.put_document(connection, new, matrix, now=0.0)


class Clusters:
    """Forty documents of a hundred chunks, each about one subject, and all their vectors in memory."""

    def __init__(self, database: Database) -> None:
        rng = np.random.default_rng(1)
        self.database = database
        self.index = vectors.CoarseIndex()
        self.centres = unit(rng.normal(size=(CLUSTERS, DIMENSIONS)))
        parts = [around(centre, PER_CLUSTER, rng) for centre in self.centres]
        self.matrix = np.concatenate(parts)
        with database.write() as connection:
            for number, part in enumerate(parts):
                put(connection, f"/{number % 4}/{number}", part, kind="md" if number % 2 else "txt")
        self.queries = unit(self.centres[:30] + rng.normal(scale=0.08, size=(30, DIMENSIONS)))

    def nearest(self, query: Vectors, limit: int, allowed: npt.NDArray[np.bool_] | None = None) -> list[int]:
        """Brute force: the ids of chunks, which are numbered from 1 in the order of `matrix`."""
        cosines = self.matrix @ query
        if allowed is not None:
            cosines = np.where(allowed, cosines, -2)
        return [int(place) + 1 for place in np.argsort(-cosines, kind="stable")[:limit]]

    def search(self, query: Vectors, limit: int, *, exact_limit: int, where: Filter | None = None) -> vectors.Hits:
        with self.database.read() as connection:
            return vectors.search(
                connection, self.index, query, limit=limit, exact_limit=exact_limit, rescore=300, where=where
            )


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clusters]:
    with Database(tmp_path_factory.mktemp("clusters")) as database:
        yield Clusters(database)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with Database(tmp_path) as opened:
        yield opened


def test_the_exact_search_agrees_with_brute_force(clusters: Clusters) -> None:
    for query in clusters.queries:
        hits = clusters.search(query, 10, exact_limit=1_000_000)
        assert [chunk_id for chunk_id, _ in hits] == clusters.nearest(query, 10)
        cosines = [clusters.matrix[chunk_id - 1] @ query for chunk_id, _ in hits]
        assert [score for _, score in hits] == pytest.approx(cosines, abs=1e-5)


def test_the_coarse_search_finds_the_exact_neighbours_in_their_order(clusters: Clusters) -> None:
    found = 0
    for query in clusters.queries:
        hits = clusters.search(query, 10, exact_limit=0)
        assert len(hits) == 10
        assert [score for _, score in hits] == sorted((score for _, score in hits), reverse=True)
        assert [score for _, score in hits] == pytest.approx(
            [clusters.matrix[chunk_id - 1] @ query for chunk_id, _ in hits], abs=1e-5
        )
        found += len({chunk_id for chunk_id, _ in hits} & set(clusters.nearest(query, 10)))
    assert found >= 0.98 * 10 * len(clusters.queries)


@pytest.mark.parametrize(
    ("where", "allowed"),
    [
        pytest.param(Filter(folder="/1"), lambda number: number % 4 == 1, id="folder"),
        pytest.param(Filter(kinds=("md",)), lambda number: number % 2 == 1, id="kind"),
        pytest.param(Filter(documents=("/3/7",)), lambda number: number == 7, id="document"),
    ],
)
def test_the_coarse_search_with_a_filter_finds_the_nearest_that_pass(
    clusters: Clusters, where: Filter, allowed: Callable[[int], bool]
) -> None:
    passing = np.repeat([allowed(number) for number in range(CLUSTERS)], PER_CLUSTER)
    queries = [query for number, query in enumerate(clusters.queries) if allowed(number)]
    found = 0
    for query in queries:
        hits = clusters.search(query, 10, exact_limit=0, where=where)
        assert all(passing[chunk_id - 1] for chunk_id, _ in hits)
        found += len({chunk_id for chunk_id, _ in hits} & set(clusters.nearest(query, 10, passing)))
    assert found >= 0.98 * 10 * len(queries)


def test_a_filter_that_nothing_passes_finds_nothing(clusters: Clusters) -> None:
    for exact_limit in (0, 1_000_000):
        assert clusters.search(clusters.queries[0], 10, exact_limit=exact_limit, where=Filter(folder="/no")) == []


def test_an_empty_library_has_no_neighbours(database: Database) -> None:
    index = vectors.CoarseIndex()
    query = unit(np.ones(DIMENSIONS))
    with database.read() as connection:
        for exact_limit in (0, -1):
            assert vectors.search(connection, index, query, limit=5, exact_limit=exact_limit, rescore=10) == []


# --- the index follows the library -----------------------------------------------------------------------------------


class Followed:
    """A library with one index that is asked after every change; a few neighbours are rescored."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.index = vectors.CoarseIndex()
        self.rng = np.random.default_rng(2)

    def put(self, path: str, centre: Vectors, count: int) -> None:
        with self.database.write() as connection:
            put(connection, path, around(centre, count, self.rng))

    def remove(self, path: str) -> None:
        with self.database.write() as connection:
            document = library.find_document(connection, path)
            assert document is not None
            library.remove_document(connection, document.id)

    def paths(self, query: Vectors, limit: int) -> list[str]:
        with self.database.read() as connection:
            hits = vectors.search(connection, self.index, query, limit=limit, exact_limit=-1, rescore=limit)
            found = library.passages(connection, [chunk_id for chunk_id, _ in hits])
            return [found[chunk_id].path for chunk_id, _ in hits]


def axes() -> Vectors:
    return unit(np.random.default_rng(3).normal(size=(4, DIMENSIONS)))


def test_what_is_added_after_the_index_was_read_is_found(database: Database) -> None:
    followed, centres = Followed(database), axes()
    followed.put("/a", centres[0], 50)
    assert followed.paths(centres[1], 5) == ["/a"] * 5
    followed.put("/b", centres[1], 50)
    assert followed.paths(centres[1], 5) == ["/b"] * 5


def test_what_was_removed_does_not_come_back_and_leaves_its_place_to_others(database: Database) -> None:
    followed, centres = Followed(database), axes()
    followed.put("/far", centres[0], 400)
    followed.put("/near", centres[1], 40)
    assert followed.paths(centres[1], 10) == ["/near"] * 10
    followed.remove("/near")
    assert followed.paths(centres[1], 10) == ["/far"] * 10


def test_what_was_replaced_is_found_once_and_in_its_new_form(database: Database) -> None:
    followed, centres = Followed(database), axes()
    followed.put("/a", centres[0], 300)
    followed.put("/b", centres[1], 20)
    assert followed.paths(centres[1], 20) == ["/b"] * 20
    followed.put("/b", centres[1], 20)
    assert followed.paths(centres[1], 20) == ["/b"] * 20
    followed.put("/b", centres[2], 20)
    assert followed.paths(centres[1], 20).count("/b") < 20
    assert followed.paths(centres[2], 20) == ["/b"] * 20


def test_an_emptied_library_can_be_filled_again(database: Database) -> None:
    followed, centres = Followed(database), axes()
    followed.put("/a", centres[0], 30)
    assert followed.paths(centres[0], 3) == ["/a"] * 3
    followed.remove("/a")
    assert followed.paths(centres[0], 3) == []
    followed.put("/b", centres[1], 30)
    assert followed.paths(centres[1], 3) == ["/b"] * 3


def test_a_cleared_index_is_read_anew(database: Database) -> None:
    followed, centres = Followed(database), axes()
    followed.put("/a", centres[0], 30)
    followed.paths(centres[0], 3)
    assert followed.index.bytes == 30 * (DIMENSIONS // 8 + 8)
    followed.index.clear()
    assert followed.index.bytes == 0
    assert followed.paths(centres[0], 3) == ["/a"] * 3


def test_the_index_forgets_what_is_gone(database: Database) -> None:
    followed, centres = Followed(database), axes()
    for number in range(10):
        followed.put("/a", centres[0], 30)
        assert followed.paths(centres[0], 3) == ["/a"] * 3, number
    assert followed.index.bytes == 30 * (DIMENSIONS // 8 + 8)


def test_a_reader_of_an_older_state_does_not_spoil_the_index_for_the_others(database: Database) -> None:
    followed, centres = Followed(database), axes()
    followed.put("/old", centres[0], 30)
    with database.read() as earlier:
        assert library.counts(earlier).chunks == 30
        followed.put("/new", centres[1], 300)
        assert followed.paths(centres[1], 5) == ["/new"] * 5
        hits = vectors.search(earlier, followed.index, centres[0], limit=5, exact_limit=-1, rescore=5)
        assert {passage.path for passage in library.passages(earlier, [hit[0] for hit in hits]).values()} == {"/old"}
        assert followed.paths(centres[1], 5) == ["/new"] * 5
    assert followed.paths(centres[0], 5) == ["/old"] * 5


def test_many_threads_may_search_while_documents_come_and_go(database: Database) -> None:
    followed, centres = Followed(database), axes()
    followed.put("/stays", centres[0], 50)
    wrong: list[object] = []
    done = threading.Event()

    def look() -> None:
        try:
            while not done.is_set():
                if (found := followed.paths(centres[0], 5)) != ["/stays"] * 5:
                    wrong.append(found)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        followed.put("/comes", centres[1], 40)
        followed.remove("/comes")
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- codes -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(min_size=16, max_size=16), min_size=2, max_size=20))
def test_hamming_counts_the_differing_signs(rows: list[bytes]) -> None:
    signs = np.unpackbits(np.array([list(row) for row in rows], dtype=np.uint8), axis=1).astype(bool)
    values = np.where(signs, 1.0, -1.0).astype(np.float32)
    codes = np.stack([np.frombuffer(library.sign_code(row), dtype=np.uint64) for row in values])
    distances = vectors.hamming(np.ascontiguousarray(codes[1:].T), codes[0])
    assert distances.tolist() == (signs[1:] != signs[0]).sum(axis=1).tolist()


@pytest.mark.parametrize("dimensions", [1, 63, 64, 65, 384])
def test_a_sign_code_fills_whole_words(dimensions: int) -> None:
    code = library.sign_code(np.ones(dimensions, dtype=np.float32))
    assert len(code) % 8 == 0
    assert sum(byte.bit_count() for byte in code) == dimensions


def test_hamming_is_the_same_across_its_blocks() -> None:
    codes = np.random.default_rng(0).integers(0, 2**63, size=(2, vectors.BLOCK + 3), dtype=np.uint64)
    query = codes[:, 0].copy()
    distances = vectors.hamming(codes, query)
    assert distances[0] == 0
    assert np.array_equal(distances[-5:], vectors.hamming(np.ascontiguousarray(codes[:, -5:]), query))
