"""serve."""

import os
from pathlib import Path
from typing import Annotated

import typer

from edge_rag.cli.app import app, options


@app.command()
def serve(
    uds: Annotated[
        Path | None, typer.Option(help="Path of the Unix socket; default: EDGE_RAG_UDS, else in your runtime folder.")
    ] = None,
    tcp: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Listen here too; loopback only, with a key.")
    ] = None,
    key_file: Annotated[Path | None, typer.Option(help="File (0600) with the key that TCP callers must send.")] = None,
) -> None:
    """Answer other programs over a socket, many at once, until stopped."""
    from edge_rag.runtime.rag import EdgeRAG
    from edge_rag.server.serve import serve as serve_library

    # Where the other commands look for a server, there it is.
    named = {
        "server.uds": uds or options.uds or os.environ.get("EDGE_RAG_UDS") or None,
        "server.tcp": tcp,
        "server.key_file": key_file,
    }
    options.flags |= {key: str(value) for key, value in named.items() if value is not None}
    with EdgeRAG.open(options.data, settings=options.settings()) as rag:
        raise typer.Exit(serve_library(rag))
