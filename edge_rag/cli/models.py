"""models list, pull, verify, import."""

from pathlib import Path
from typing import Annotated

import typer

from edge_rag.cli import show
from edge_rag.cli.app import app, options, out
from edge_rag.cli.documents import Json
from edge_rag.config import models_folder
from edge_rag.store.manifest import bundled_manifest
from edge_rag.store.models import ModelFolder

models_app = typer.Typer(help="The model files: list, pull, verify, import.", no_args_is_help=True)
app.add_typer(models_app, name="models")

Names = Annotated[list[str] | None, typer.Argument(help="Model names, see `edge-rag models list`.")]


def folder() -> ModelFolder:
    """The model folder of this call's settings."""
    return ModelFolder(models_folder(options.settings()), bundled_manifest())


@models_app.command("list")
def list_(json: Json = False) -> None:
    """List the known models and what is on this machine of them."""
    models = folder()
    states = models.states()
    if json:
        show.as_json(states)
        return
    used = {options.settings().models.llm, options.settings().models.embedder}
    rows = [
        [
            ("* " if state.spec.name in used else "  ") + state.spec.name,
            state.spec.kind,
            show.size(state.spec.size),
            state.state,
            state.spec.licence,
        ]
        for state in states
    ]
    show.table(["  model", "kind", "size", "state", "licence"], rows, right=(2,))
    out.print(f"\n* in use; files are in {models.folder}")


@models_app.command()
def pull(
    names: Names = None, offline: Annotated[bool, typer.Option("--offline", help="Never touch the network.")] = False
) -> None:
    """Fetch models; without a name, those in use."""
    settings = options.settings().models
    offline = offline or settings.offline
    models = folder()
    with show.bar(bytes_=True) as bar:
        for name in names or [settings.llm, settings.embedder]:
            path = models.pull(name, offline=offline, progress=bar)
            out.print(f"{name}: {path}")


@models_app.command()
def verify(names: Names = None, json: Json = False) -> None:
    """Hash model files again and compare with the manifest."""
    models = folder()
    with show.bar(bytes_=True) as bar:
        states = [state for state in models.verify(names or (), bar) if names or state.state != "missing"]
    if json:
        show.as_json(states)
    else:
        show.table(["model", "state", "file"], [[s.spec.name, s.state, s.path] for s in states])
    if any(state.state != "ready" for state in states):
        raise typer.Exit(1)


@models_app.command("import")
def import_(
    path: Annotated[Path, typer.Argument(help="A GGUF file.")],
    name: Annotated[str | None, typer.Option(help="Its name; made of the file's name if not given.")] = None,
    licence: Annotated[str, typer.Option(help="Its licence.")] = "unknown",
) -> None:
    """Copy a model of your own into the model folder and record its hash."""
    from edge_rag.native.llama import Model

    with Model(path, vocab_only=True):
        pass  # a file that llama.cpp cannot read is refused before it is copied
    with show.bar(bytes_=True) as bar:
        spec = folder().import_file(path, name=name, licence=licence, progress=bar)
    out.print(f"{spec.name}: sha256 {spec.sha256}; use it with --model {spec.name}")
