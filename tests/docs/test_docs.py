"""Documentation that fails the build when it drifts."""

import inspect
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer.main

from edge_rag import EdgeRAG
from edge_rag.cli import asking, documents, house, learned, learning, models, routing, serving
from edge_rag.cli.app import app

REGISTERED = (asking, documents, house, learned, learning, models, routing, serving)


def tracked(repository: Path) -> list[Path]:
    names = subprocess.run(["git", "ls-files"], cwd=repository, capture_output=True, text=True, check=True).stdout
    return [repository / name for name in names.splitlines() if (repository / name).is_file()]


def test_the_architecture_names_every_module_and_no_other(repository: Path) -> None:
    text = (repository / "docs" / "architecture.md").read_text()
    tree = text[text.index("```\nedge_rag/") : text.index("```\n\nImports go")]
    package = repository / "edge_rag"
    there = {path.stem for path in package.rglob("*.py") if path.stem not in ("__init__", "__main__")}
    there -= {path.stem for path in (package / "cli").glob("*.py")} | {"kinds"}
    words = set(re.findall(r"[a-z_]+", tree))
    assert there <= words, f"missing in docs/architecture.md: {sorted(there - words)}"


def test_readme_commands_exist(repository: Path) -> None:
    readme = (repository / "README.md").read_text()
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    used = set(re.findall(r"edge-rag (?:--\S+ \S+ )*([a-z]+)", readme)) - {"is"}
    assert used <= set(known), used - set(known)


def test_readme_shows_every_call_of_the_python_interface(repository: Path) -> None:
    readme = (repository / "README.md").read_text()
    calls = [name for name, _ in inspect.getmembers(EdgeRAG, inspect.isfunction) if not name.startswith("_")]
    assert [name for name in calls if f"{name}(" not in readme] == []


def test_ci_calls_the_readme_test_command(repository: Path) -> None:
    assert (repository / ".ci" / "run").read_text().splitlines()[-1] == "exec tools/check"
    assert "\ntools/check\n" in (repository / "README.md").read_text()


def test_the_pinned_llama_is_the_same_everywhere(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    pinned = next(name for name in project["dependencies"] if name.startswith("llama-cpp-python"))
    assert f'LLAMA = "{pinned}"' in (repository / "tools" / "environment.py").read_text()


@pytest.mark.parametrize("forbidden", [r"https?://[^\s)\"']*(?:pypi|npmjs|debian)", r"(?<![\w.])/work/"])
def test_no_file_names_a_registry_or_a_path_of_one_machine(repository: Path, forbidden: str) -> None:
    found = [
        str(path)
        for path in tracked(repository)
        if path != Path(__file__) and re.search(forbidden, path.read_text(errors="replace"))
    ]
    assert found == []


def test_no_weights_or_large_files_are_tracked(repository: Path) -> None:
    assert [path for path in tracked(repository) if path.stat().st_size > 500_000] == []
