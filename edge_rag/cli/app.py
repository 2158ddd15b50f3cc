"""The command's root: global options, errors as one clear line, exit codes, and who does the work.

A running server does it when `--uds` (or EDGE_RAG_UDS) names one, or when one answers on the default socket and this
call has no data folder and no settings of its own; else this process does. Several processes may use one data folder,
so neither can be wrong. Commands import an engine where they need it: over the socket they start without one.

Exit codes: 0 done, 1 done in part (some files failed, a check failed), 2 wrong use, 3 the machine must be repaired
first, 70 a fault of ours, 75 the server has too much to do just now, 130 stopped by the user.
"""

import contextlib
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

import edge_rag
from edge_rag.client import Client, default_socket, is_alive
from edge_rag.config import ENVIRONMENT_PREFIX, Settings, load_settings
from edge_rag.errors import ConfigError, EdgeRAGError, UsageError

if TYPE_CHECKING:
    from edge_rag.runtime.rag import EdgeRAG

ABOUT = """Ask questions over your own documents, on your own machine.

A running server (edge-rag serve) does the work when --uds or EDGE_RAG_UDS names its socket. Without them, one that
answers on the default socket does, unless this call has --data, --set, --model, --offline or --memory-limit, or the
environment has settings (EDGE_RAG_…): then, and when nobody answers, this process does the work itself.
"""
app = typer.Typer(
    name="edge-rag",
    help=ABOUT,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
STOPPED = 130
# On a pipe nothing is folded: lines are for programs then.
out = Console(highlight=False, soft_wrap=True, markup=False, width=None if sys.stdout.isatty() else 10_000)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


class Options:
    """The global options of this call. `own`: those on the command line that a running server would not heed."""

    data: Path | None = None
    flags: dict[str, str] = {}  # noqa: RUF012 — replaced as a whole, never changed
    uds: Path | None = None
    own: tuple[str, ...] = ()

    def settings(self) -> Settings:
        """Settings with the command line's on top."""
        return load_settings(self.flags)

    def open(self) -> "EdgeRAG | Client":
        """The library these options name, in a server or in this process. Raises UsageError when they name both."""
        socket = self.server()
        if socket is not None:
            return Client(socket)
        from edge_rag.runtime.rag import EdgeRAG

        return EdgeRAG.open(self.data, settings=self.settings())

    def socket(self) -> Path:
        """Where a server would be, for this call."""
        return self.uds or default_socket()

    def server(self) -> Path | None:
        """The socket of the server that does the work of this call; None when this process does."""
        if self.uds and self.own:
            leave = " and ".join(self.own)
            raise UsageError("names a server, which has its own settings", field="--uds", remedy=f"leave out {leave}")
        if self.own:
            return None
        if self.uds or os.environ.get("EDGE_RAG_UDS"):
            return self.socket()
        return None if _environment_has_settings() else _default_server()


def _default_server() -> Path | None:
    """The default socket, when a server answers there."""
    with contextlib.suppress(ConfigError):  # none that may be asked unbidden; whoever needs the settings tells of them
        path = default_socket()
        return path if is_alive(path) else None
    return None


def _environment_has_settings() -> bool:
    """Whether settings stand in the environment; those about where the server is count for nothing."""
    where = ("EDGE_RAG_UDS", f"{ENVIRONMENT_PREFIX}SERVER__")
    return any(name.startswith(ENVIRONMENT_PREFIX) and not name.startswith(where) for name in os.environ)


options = Options()


@app.callback()
def root(
    context: typer.Context,
    data: Annotated[Path | None, typer.Option(help="Data folder.", envvar="EDGE_RAG_DATA")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting, as in retrieval.top_k=8.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Language model; short for --set models.llm=NAME.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never touch the network.")] = False,
    uds: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Have the server on this socket do the work.")
    ] = None,
    memory_limit: Annotated[
        int | None,
        typer.Option(metavar="MB", min=1, help="Memory to use at most; short for --set memory.limit_mb=MB."),
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False,
) -> None:
    """Ask questions over your own documents, on your own machine."""
    if version:
        out.print(edge_rag.__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        out.print(context.get_help())
        raise typer.Exit
    flags = dict(_pair(text) for text in set_ or [])
    if model:
        flags["models.llm"] = model
    if offline:
        flags["models.offline"] = "true"
    if memory_limit is not None:
        flags["memory.limit_mb"] = str(memory_limit)
    options.data, options.flags, options.uds = data, flags, uds
    options.own = tuple(
        f"--{name.rstrip('_').replace('_', '-')}"
        for name in ("data", "set_", "model", "offline", "memory_limit")
        if _on_command_line(context, name)
    )


def _on_command_line(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError("is not KEY=VALUE", field=f"--set {text}", remedy="as in --set retrieval.top_k=8")
    return key.strip(), value


def main() -> None:
    """Run the command; map our errors to one line and an exit code."""
    logging.basicConfig(format="edge-rag: %(message)s", level=logging.WARNING)
    # A file name may hold bytes that are not UTF-8, and the terminal may not speak UTF-8 at all.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        # They register their commands.
        from edge_rag.cli import asking, documents, house, learned, learning, models, routing, serving  # noqa: F401

        app()
    except EdgeRAGError as error:
        err.print(f"edge-rag: {error}")
        sys.exit(error.exit_code)
    except SystemExit as end:
        if end.code == STOPPED:  # typer maps Ctrl-C to it, without a word
            err.print("\nedge-rag: stopped")
        raise
    except KeyboardInterrupt:  # while modules were loaded
        sys.exit(STOPPED)
    except Exception:
        traceback.print_exc()
        err.print("edge-rag: this is a fault of ours; please report it with the lines above")
        sys.exit(70)
