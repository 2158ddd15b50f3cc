"""tools/check_jetson: what it asks of pip, what it makes of the answers, and with a network the real answer."""

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Stands in for Python with pip: finds a wheel for each name in catalog.json, and writes what it was asked.
PIP = """#!{python} -IS
import json, pathlib, re, sys
here = pathlib.Path(__file__).parent
with (here / "asked.jsonl").open("a") as asked:
    asked.write(json.dumps(sys.argv[1:]) + "\\n")
catalog = json.loads((here / "catalog.json").read_text())
wanted = [found for word in sys.argv[1:] if (found := re.match(r"([A-Za-z0-9_.-]+)(\\[.*\\])?[>=]=", word))]
names = [found[1] for found in wanted]
if catalog["fault"] and (len(names) > 1 or not catalog["together"]):
    sys.exit(catalog["fault"])
for name in names:
    if name not in catalog["names"]:
        sys.exit(f"ERROR: No matching distribution found for {{name}}")
print(json.dumps({{"install": [
    {{"metadata": {{"name": name, "version": "1.2"}},
     "download_info": {{"url": f"file:///index/{{name}}/{{name}}-1.2-py3-none-any.whl"}}}}
    for name in names
]}}))
"""


class Index:
    """A package index as the fake pip sees it."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder = folder
        self.python = folder / "python"
        self.python.write_text(PIP.format(python=sys.executable))
        self.python.chmod(0o755)
        self.holds(names)

    def holds(self, names: list[str], *, fault: str = "", together: bool = False) -> None:
        """Hold `names`; answer with `fault`, if `together` only when more than one is asked for."""
        said = {"names": names, "fault": fault, "together": together}
        (self.folder / "catalog.json").write_text(json.dumps(said))

    def asked(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "asked.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tool(repository: Path) -> ModuleType:
    loader = SourceFileLoader("check_jetson", str(repository / "tools" / "check_jetson"))
    spec = importlib.util.spec_from_loader("check_jetson", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def names(repository: Path, tool: ModuleType) -> list[str]:
    """Every package that should be looked for."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = [name for extra in tool.EXTRAS for name in project["optional-dependencies"][extra]]
    bare = [re.split(r"[\[>=]", name)[0] for name in [*project["dependencies"], *tool.BUILT_NEEDS, *extras]]
    return sorted(set(bare) - {"llama-cpp-python"})


@pytest.fixture
def index(tmp_path: Path, names: list[str], monkeypatch: pytest.MonkeyPatch) -> Index:
    index = Index(tmp_path, names)
    monkeypatch.setattr(sys, "executable", str(index.python))
    return index


def test_with_all_wheels_there_the_table_names_each(
    tool: ModuleType, index: Index, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main() == 0
    printed = capsys.readouterr().out
    assert "MISSING" not in printed
    for name in names:
        assert re.search(rf"^  {name} +1\.2 +{name}-1\.2-py3-none-any\.whl$", printed, re.MULTILINE), name


def test_llama_is_not_looked_for_but_what_it_needs_is(tool: ModuleType, index: Index) -> None:
    tool.main()
    words = {word for call in index.asked() for word in call}
    assert not any(word.startswith("llama") for word in words)
    assert set(tool.BUILT_NEEDS) <= words


def test_the_pinned_llama_needs_what_the_tool_says(tool: ModuleType) -> None:
    needed = importlib.metadata.requires("llama-cpp-python") or []
    assert {name for name in needed if "extra ==" not in name} == set(tool.BUILT_NEEDS)


def test_wheels_for_the_board_are_asked_for_and_nothing_is_built(tool: ModuleType, index: Index) -> None:
    tool.main()
    for call in index.asked():
        asked = " ".join(call)
        assert "--dry-run --ignore-installed" in asked
        assert "--only-binary :all: --implementation cp --python-version 3.12 --abi cp312" in asked
        platforms = {call[n + 1] for n, word in enumerate(call) if word == "--platform"}
        assert {"manylinux2014_aarch64", "manylinux_2_17_aarch64", "manylinux_2_39_aarch64"} <= platforms
        assert "manylinux_2_40_aarch64" not in platforms  # Ubuntu 24.04 has glibc 2.39


def test_a_missing_wheel_is_named_and_the_others_are_still_shown(
    tool: ModuleType, index: Index, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    index.holds([name for name in names if name != "tokenizers"])
    assert tool.main() == 1
    printed = capsys.readouterr().out
    assert "MISSING tokenizers>=" in printed
    assert "No matching distribution found for tokenizers" in printed
    assert re.search(r"^  onnxruntime ", printed, re.MULTILINE)


def test_wheels_that_do_not_go_together_are_a_fault(
    tool: ModuleType, index: Index, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    index.holds(names, fault="ERROR: ResolutionImpossible", together=True)
    assert tool.main() == 1
    assert "MISSING not together: ERROR: ResolutionImpossible" in capsys.readouterr().out


def test_without_an_index_the_tool_says_so_and_finds_nothing_missing(
    tool: ModuleType, index: Index, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = "WARNING: Retrying after connection broken by 'NewConnectionError: Failed to establish a new connection'"
    index.holds(names, fault=f"{broken}\nERROR: No matching distribution found for numpy")
    assert tool.main() == 3
    printed = capsys.readouterr()
    assert "MISSING" not in printed.out
    assert "no package index answers" in printed.err


def test_the_tool_needs_nothing_but_the_standard_library(repository: Path) -> None:
    code = "from runpy import run_path; run_path('tools/check_jetson', run_name='imported')"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=repository, check=True)


# --- the real answer -------------------------------------------------------------------------------------------------

BOARD = {
    "platform_machine": "aarch64",
    "sys_platform": "linux",
    "python_version": "3.12",
    "python_full_version": "3.12.3",
}


def needed(requirements: Iterable[str], extras: frozenset[str] = frozenset()) -> Iterator[Requirement]:
    """Those of the requirements that count on the board."""
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is None or any(marker.evaluate(BOARD | {"extra": extra}) for extra in (extras or {""})):
            yield requirement


def closure(requirements: Iterable[str]) -> set[str]:
    """The names of all packages that these need on the board, as far as they are installed here."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = list(needed(requirements))
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) not in found:
            found.add((name, extras))
            try:
                waiting += needed(importlib.metadata.requires(name) or [], extras)
            except importlib.metadata.PackageNotFoundError:
                continue  # it is needed there only
    return {name for name, _ in found}


def wanted(name: str) -> str | None:
    """What to look for: the version that is tested here; None for a package whose wheel fits every machine."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return name
    tags = re.findall(r"^Tag: (\S+)$", found.read_text("WHEEL") or "", re.MULTILINE)
    return None if tags and all(tag.endswith("-none-any") for tag in tags) else f"{name}=={found.version}"


def test_every_compiled_package_of_the_server_has_a_wheel_for_the_board(repository: Path, tool: ModuleType) -> None:
    # Those versions that are installed here go together, so pip need not find that out again: it takes minutes where
    # an index has no descriptions, and pip has to read whole wheels.
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    names = closure(project["dependencies"]) - {tool.BUILT}
    compiled = [pinned for name in sorted(names) if (pinned := wanted(name))]
    assert {"numpy", "onnxruntime", "tokenizers", "markupsafe"} <= {pinned.split("==")[0] for pinned in compiled}
    with ThreadPoolExecutor(2) as pool:  # pip is busy with the index's long lists rather than waiting for them
        try:
            halves = list(pool.map(lambda half: tool.look_for(half, "--no-deps"), (compiled[::2], compiled[1::2])))
        except tool.Unresolved as error:
            pytest.skip(f"no package index answers: {str(error).splitlines()[-1]}")
    found = [entry for half in halves for entry in half]
    assert [entry for entry in found if isinstance(entry, str)] == []
    assert {entry.name for entry in found} == {pinned.split("==")[0] for pinned in compiled}
    assert [entry.file for entry in found if not re.search(r"aarch64\.whl$", entry.file)] == []
