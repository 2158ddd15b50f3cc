"""docs/server.md: its examples are run, in their order, against one server, and its tables are those of the code.

A block of bash is a shell of its own, blocks of Python share their names. What a block must say stands in the block
behind it. `json`: the shape of what comes, with the same fields (more may come) and kinds of values, any for null.
`text`: lines that come in this order, others between them; '…' stands for anything. curl fails on refusals, unless the
block shows one.
"""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import Struct

from edge_rag.config import Settings, load_settings
from edge_rag.errors import EdgeRAGError
from edge_rag.runtime.rag import EdgeRAG
from edge_rag.server import bodies, bounds, forms, openai_requests, protocol, service
from edge_rag.server.app import ROUTES
from edge_rag.server.errors import CLIENT_GONE, Loading, code_of, status_of
from edge_rag.server.metrics import Metrics
from tests.runtime.serving import small_library
from tests.server.fakes import FakeRAG, answer
from tests.server.harness import served

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "server.md").read_text()
CURLRC = "silent\nshow-error\nfail-with-body\nmax-time = 60\n"
REFUSED = 22  # curl's exit code for a status of 400 and more


class Example(Struct, frozen=True):
    """A block and what it must say: the kind of that ('' for nothing) and its text."""

    line: int
    language: str
    code: str
    kind: str
    expected: str

    @property
    def runs_curl(self) -> bool:
        return "curl" in self.code


def examples() -> list[Example]:
    pattern = r"^```(bash|python)\n(.*?)^```\n(?:```(json|text)\n(.*?)^```\n)?"
    return [
        Example(TEXT.count("\n", 0, found.start()) + 1, found[1], found[2], found[3] or "", found[4] or "")
        for found in re.finditer(pattern, TEXT, re.MULTILINE | re.DOTALL)
    ]


EXAMPLES = examples()


class Reader:
    """Who tries the examples, in a folder of its own."""

    def __init__(self, folder: Path, path: Path) -> None:
        (folder / ".curlrc").write_text(CURLRC)
        self._folder = folder
        self._environment = {"PATH": os.environ["PATH"], "CURL_HOME": str(folder), "EDGE_RAG_UDS": str(path)}
        self._names: dict[str, Any] = {}

    def close(self) -> None:
        for name in self._names.values():
            if isinstance(name, httpx.Client):
                name.close()

    def run(self, example: Example) -> str:
        return self._bash(example) if example.language == "bash" else self._python(example)

    def _bash(self, example: Example) -> str:
        command = ["bash", "-euo", "pipefail", "-c", example.code]
        done = subprocess.run(command, cwd=self._folder, env=self._environment, capture_output=True, text=True)
        refusal = example.kind == "json" and "error" in json.loads(example.expected)
        assert done.returncode == (REFUSED if refusal else 0), done.stdout + done.stderr
        return done.stdout

    def _python(self, example: Example) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(example.code, f"docs/server.md:{example.line}", "exec"), self._names)
        return out.getvalue()


def library(folder: Path, settings: Settings) -> contextlib.AbstractContextManager[EdgeRAG]:
    changes = {"engine__n_ctx": 1024, "retrieval__top_k": 3, "server__roots": (str(folder),)}
    return small_library(folder / "data", settings, **changes)


@pytest.fixture(scope="module")
def reader(small_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    folder = tmp_path_factory.mktemp("reader")
    path = tmp_path_factory.mktemp("s") / "e.sock"
    with pytest.MonkeyPatch.context() as patch, library(folder, small_settings) as rag, served(rag, path):
        patch.setenv("EDGE_RAG_UDS", str(path))
        with contextlib.closing(Reader(folder, path)) as reader:
            yield reader


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"line {example.line}")
def test_an_example_does_what_the_document_shows(example: Example, reader: Reader) -> None:
    if example.runs_curl and not shutil.which("curl"):
        pytest.skip("curl is not installed, and the document's examples call it")
    said = reader.run(example)
    if example.kind == "json":
        agree(json.loads(said), json.loads(example.expected))
    else:
        agree_by_line(said, example.expected)


def agree(value: Any, shape: Any, place: str = "$") -> None:
    """Fail where a value has not the shape of another one."""
    if isinstance(shape, dict):
        assert isinstance(value, dict), place
        assert shape.keys() <= value.keys(), place
        for name, inner in shape.items():
            agree(value[name], inner, f"{place}.{name}")
    elif isinstance(shape, list):
        assert isinstance(value, list), place
        assert value or not shape, f"{place} is empty"
        for each in value if shape else ():
            agree(each, shape[0], f"{place}[]")
    elif shape is not None:
        kinds = (int, float) if isinstance(shape, int | float) else type(shape)
        assert isinstance(value, kinds), place


def agree_by_line(said: str, expected: str) -> None:
    """Fail when a line that is expected does not come behind those before it."""
    lines = iter(said.splitlines())
    for line in expected.splitlines():
        pattern = re.escape(line).replace("…", ".*")
        assert any(re.fullmatch(pattern, told) for told in lines), f"{line!r} is not in its place in:\n{said}"


# --- the examples as such --------------------------------------------------------------------------------------------


def test_every_block_of_code_is_an_example_or_names_no_language() -> None:
    fences = re.findall(r"^```(\w*)$", TEXT, re.MULTILINE)
    opening = fences[::2]
    assert set(fences[1::2]) == {""}
    assert [name for name in opening if name in ("bash", "python")] == [example.language for example in EXAMPLES]
    assert set(opening) == {"bash", "python", "json", "text", ""}
    assert sum(name in ("json", "text") for name in opening) == sum(bool(example.kind) for example in EXAMPLES)


def test_every_example_shows_what_it_says() -> None:
    assert [example.line for example in EXAMPLES if not example.expected] == []


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        ({}, {"a": 1}),
        ({"a": "1"}, {"a": 1}),
        ([], [1]),
        ([1, "2"], [1]),
        ({"a": {"b": None}}, {"a": {"b": 1}}),
        (1, {}),
    ],
)
def test_what_has_another_shape_does_not_agree(value: Any, shape: Any) -> None:
    with pytest.raises(AssertionError):
        agree(value, shape)


def test_lines_agree_in_their_order_only() -> None:
    agree_by_line("a\nb\nc 1 d\n", "a\nc … d\n")
    for expected in ("b\na\n", "c … e\n", "c\n"):
        with pytest.raises(AssertionError):
            agree_by_line("a\nb\nc 1 d\n", expected)


# --- the tables ------------------------------------------------------------------------------------------------------


def test_the_routes_are_those_of_the_server() -> None:
    told = re.findall(r"^\| `([A-Z]+) (/\S*)` \|", TEXT, re.MULTILINE)
    served = [(method, route.path.replace(":path", "")) for route in ROUTES for method in route.methods or ()]
    assert sorted(told) == sorted(pair for pair in served if pair[0] != "HEAD")


def test_the_codes_are_those_of_the_errors() -> None:
    told = {(code, int(row[1])) for row in rows("code") for code in re.findall(r"`(\w+)`", row[0])}
    classes = [kind for kind in descendants(EdgeRAGError) if kind.__module__ == "edge_rag.errors"]
    ours = {(code_of(kind("")), status_of(kind(""))) for kind in classes}
    code = "".join(path.read_text() for path in (ROOT / "edge_rag" / "server").glob("*.py"))
    refusals = {(name, int(status)) for status, name in re.findall(r"Refused\(\s*(\d{3}),\s*\"(\w+)\"", code)}
    others = {("loading", status_of(Loading())), ("method_not_allowed", 405)}
    assert told == (ours | refusals | others) - {("cancelled", CLIENT_GONE)}  # which only the log sees


def rows(first: str) -> list[list[str]]:
    """The rows of the table whose first column has this title."""
    table = TEXT[TEXT.index(f"| {first} |") :].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def descendants(kind: type[EdgeRAGError]) -> Iterator[type[EdgeRAGError]]:
    for child in kind.__subclasses__():
        yield child
        yield from descendants(child)


def test_settings_have_the_defaults_that_are_told() -> None:
    settings = load_settings(environment={})
    told = re.findall(r"`(\w+)\.(\w+)` \(([\d.]+)\)", TEXT)
    assert told
    for group, name, value in told:
        assert float(value) == getattr(getattr(settings, group), name), f"{group}.{name}"


def test_limits_are_those_of_the_code() -> None:
    limits = {
        "a request": (bodies.JSON_MB, bodies.AT_ONCE),
        "time for a request's head, a JSON body": (protocol.PATIENCE, bodies.PATIENCE),
        "short calls": (service.CALLS, service.CALLS_WAITING, service.JOBS),
        "a reader": (protocol.READER_PATIENCE,),
        "connections": (protocol.CONNECTIONS,),
        "a question": (bounds.MAX_QUESTION, most(bounds.Content), bounds.MOST_TURNS, openai_requests.MOST_MESSAGES),
        "files in a form": (forms.MOST_FILES, bounds.MOST_NAMES),
        "`top_k`": (1, most(bounds.TopK), 1, most(bounds.MaxTokens), 0, most(bounds.Temperature)),
    }
    for row in rows("what"):
        numbers = [
            int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", re.sub(r"`\S+` \(.*?\)", "", row[1]))
        ]
        wanted = [limit for what, values in limits.items() if row[0].startswith(what) for limit in values]
        assert numbers[: len(wanted)] == wanted, row


def most(kind: Any) -> int:
    """The upper bound in an annotated type."""
    [meta] = kind.__metadata__
    return int(meta.le or meta.max_length)


def test_the_metrics_are_those_of_the_server(tmp_path: Path) -> None:
    metrics = Metrics(FakeRAG(tmp_path).status)
    metrics.answered(answer("?"))
    metrics.requested("/ask", 200)
    families = re.findall(r"^# TYPE edge_rag_(\w+) (\w+)", metrics.text().decode(), re.MULTILINE)
    named = {name for name, kind in families if not name.endswith("_created")}
    section = TEXT[TEXT.index("## Metrics and log") :]
    assert {name for name in re.findall(r"`(\w+)`", section) if not name.startswith("edge_rag")} == named
