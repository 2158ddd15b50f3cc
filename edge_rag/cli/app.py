"""The command's root: global options, errors as one clear line, exit codes.

Exit codes: 0 done, 1 done in part (some files failed, a check failed), 2 wrong use, 3 the machine must be repaired
first, 70 a fault of ours, 130 stopped by the user.
"""

import logging
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import edge_rag
from edge_rag.config import Settings, load_settings
from edge_rag.errors import ConfigError, EdgeRAGError
from edge_rag.runtime.rag import EdgeRAG

app = typer.Typer(
    name="edge-rag",
    help="Ask questions over your own documents, on your own machine.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
STOPPED = 130
# On a pipe nothing is folded: lines are for programs then.
out = Console(highlight=False, soft_wrap=True, markup=False, width=None if sys.stdout.isatty() else 10_000)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


class Options:
    """The global options of this call."""

    data: Path | None = None
    flags: dict[str, str] = {}  # noqa: RUF012 — replaced as a whole, never changed

    def settings(self) -> Settings:
        """Settings with the command line's on top."""
        return load_settings(self.flags)

    def open(self) -> EdgeRAG:
        """The library these options name."""
        return EdgeRAG.open(self.data, settings=self.settings())


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
    options.data, options.flags = data, flags


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
        from edge_rag.cli import asking, documents, house, models  # noqa: F401 — they register their commands

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
