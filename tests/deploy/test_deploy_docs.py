"""docs/deploy.md names only what is there, and says the same as the files that it describes."""

import re
from pathlib import Path

import pytest
import typer.main

from edge_rag.cli import asking, documents, house, models, serving
from edge_rag.cli.app import app
from edge_rag.config import describe_settings, load_settings

REGISTERED = (asking, documents, house, models, serving)


@pytest.fixture(scope="module")
def text(repository: Path) -> str:
    return (repository / "docs" / "deploy.md").read_text()


def test_every_file_it_links_or_names_is_there(repository: Path, text: str) -> None:
    linked = re.findall(r"\]\(([^)]+)\)", text)
    named = re.findall(r"\b((?:deploy|tools|tests)/[\w./-]*\w)", text)
    assert linked
    assert named
    assert [name for name in linked if not (repository / "docs" / name).exists()] == []
    assert [name for name in named if not (repository / name).exists()] == []


def test_every_command_it_names_exists(text: str) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    used = re.findall(r"(?:^|[\s/`])edge-rag(?: --uds \S+)? (ask|add|models|doctor|serve|search|status)\b", text)
    assert set(used) == {"ask", "add", "models", "doctor"}
    assert set(used) <= set(known)


def test_every_setting_it_names_exists(text: str) -> None:
    known = {key for key, _, _ in describe_settings(load_settings(environment={}))}
    assert set(re.findall(r"`((?:server|memory)\.\w+)`", text)) <= known
    variables = dict(found.split("=") for found in re.findall(r"EDGE_RAG_(?:SERVER|MODELS)__[A-Z_]+=[\w/]+", text))
    assert len(variables) >= 2
    load_settings(environment=variables)


def test_paths_and_limits_are_those_of_the_unit(repository: Path, text: str) -> None:
    unit = (repository / "deploy" / "edge-rag.service").read_text().replace("%t", "/run").replace("%S", "/var/lib")
    for path in re.findall(r"/(?:var/lib|run|opt)/edge_rag(?:/[\w./-]*\w)?", text):
        assert path in unit or path == "/opt/edge_rag/bin/pip", path
    (limit,) = re.findall(r"`(MemoryMax=\S+)`", text)
    assert limit in unit


def test_exit_codes_are_treated_as_it_says(repository: Path, text: str) -> None:
    unit = (repository / "deploy" / "edge-rag.service").read_text()
    (final,) = re.findall(r"^RestartPreventExitStatus=(.+)$", unit, re.MULTILINE)
    said = " ".join(text.split())
    assert f"A wrong setting ({final}) is not tried again." in said
    assert "SuccessExitStatus=1" in unit
    assert "Exit code 1 after a stop says that answers had to be cancelled; the unit counts as stopped" in said


def test_the_socket_it_names_is_the_one_of_the_socket_unit(repository: Path, text: str) -> None:
    unit = (repository / "deploy" / "edge-rag.socket").read_text().replace("%t", "/run")
    (listening,) = re.findall(r"^ListenStream=(.+)$", unit, re.MULTILINE)
    assert f"--uds {listening} " in text


def test_what_docker_is_told_to_mount_is_what_the_image_has(repository: Path, text: str) -> None:
    image = (repository / "Dockerfile.jetson").read_text()
    for path in re.findall(r"-v ~/edge_rag/\w+:(\S+)", text):
        assert path in image
    assert re.search(r"--build-arg (\w+)=", text)
    for name in re.findall(r"--build-arg (\w+)=", text):
        assert f"ARG {name}=" in image
