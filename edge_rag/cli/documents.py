"""add, ls, rm, search, reembed."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from edge_rag.cli import show
from edge_rag.cli.app import app, err, options, out
from edge_rag.client import Client
from edge_rag.reading.walk import stored_name
from edge_rag.records import AddReport, FileReport, Filter, WarmReport

if TYPE_CHECKING:
    from edge_rag.runtime.ingest import AddProgress
    from edge_rag.runtime.rag import EdgeRAG
    from edge_rag.runtime.warming import WarmProgress

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Folder = Annotated[Path | None, typer.Option("--in", help="Only documents below this folder.")]
Kind = Annotated[list[str] | None, typer.Option("--type", help="Only this kind: md, txt, html, pdf, office.")]
Doc = Annotated[list[Path] | None, typer.Option("--document", help="Only this document; may be repeated.")]


def chosen(folder: Path | None, kinds: list[str] | None, documents: list[Path] | None) -> Filter | None:
    """The filter options as a record; None when none was given."""
    if not (folder or kinds or documents):
        return None
    return Filter(
        documents=tuple(str(stored_name(path)) for path in documents or ()),
        folder=str(folder.resolve()) if folder else "",
        kinds=tuple(kinds or ()),
    )


@app.command()
def add(
    paths: Annotated[list[Path], typer.Argument(help="Files and folders (read with all below them).")],
    include: Annotated[list[str] | None, typer.Option(help="Only files matching this glob.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Skip files matching this glob.")] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove documents whose file has vanished.")] = False,
    warm: Annotated[bool, typer.Option("--warm", help="Compute their KV too: the first answer is quick then.")] = False,
    json: Json = False,
) -> None:
    """Add documents, or bring them up to date. Reads md, txt, html, pdf; office files with the 'office' extra."""
    with options.open() as rag, show.bar() as bar:

        def progress(step: "AddProgress") -> None:
            bar("adding", step.done, step.total, step.current)

        report = rag.add(*paths, include=include or (), exclude=exclude or (), prune=prune, progress=progress)
        # Without paths all would be warmed.
        kept = _warm(rag, readable, None, bar) if warm and (readable := _readable(report)) else None
    if json:
        show.as_json(report)
    else:
        _print_report(report)
        if kept:
            _print_warm(kept)
    if report.failed:
        raise typer.Exit(1)


def _print_report(report: AddReport) -> None:
    for file in report.files:
        for line in _remarks(file):
            err.print(Text(line))
    counts = [
        f"{number} {outcome}"
        for outcome in ("added", "replaced", "unchanged", "removed", "failed")
        if (number := report.count(outcome))
    ]
    chunks = sum(file.chunks for file in report.files if file.outcome in ("added", "replaced"))
    out.print(f"{', '.join(counts) or 'nothing to do'}; {chunks} chunks in {show.seconds(report.seconds)}")
    if gone := report.count("vanished"):
        out.print(f"{gone} vanished from disk: --prune removes them, or `edge-rag rm` when the whole folder is gone")


def _remarks(file: FileReport) -> list[str]:
    name = show.path(file.path)
    if file.outcome == "failed":
        return [f"failed: {name}: {file.reason}"]
    if file.outcome == "vanished":
        return [f"vanished: {name}"]
    return [f"note: {name}: {warning}" for warning in file.warnings]


@app.command()
def ls(in_: Folder = None, kind: Kind = None, json: Json = False) -> None:
    """List the documents."""
    with options.open() as rag:
        documents = rag.documents(chosen(in_, kind, None))
    if json:
        show.as_json(documents)
        return
    rows = [
        [show.path(document.path), document.kind, str(document.chunks), show.size(document.bytes)]
        for document in documents
    ]
    show.table(["document", "type", "chunks", "size"], rows, right=(2, 3))


@app.command()
def rm(paths: Annotated[list[Path], typer.Argument(help="Documents, or folders of documents.")]) -> None:
    """Remove documents, with all that was derived from them. The files themselves are not touched."""
    with options.open() as rag:
        removed = rag.remove(*paths)
    for document in removed:
        out.print(Text(f"removed {show.path(document.path)}"))


@app.command()
def search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    top_k: Annotated[int | None, typer.Option("--top-k", "-k", help="How many passages.")] = None,
    in_: Folder = None,
    kind: Kind = None,
    document: Doc = None,
    json: Json = False,
) -> None:
    """Show the passages that a question would be answered from."""
    with options.open() as rag:
        found = rag.search(query, top_k=top_k, where=chosen(in_, kind, document))
    if json:
        show.as_json(found)
    elif found:
        show.passages(found, cited=set(), texts=True)
    else:
        err.print("nothing found")


@app.command()
def warm(
    paths: Annotated[list[Path] | None, typer.Argument(help="Documents or folders of documents; default: all.")] = None,
    hot: Annotated[int | None, typer.Option(min=1, help="At most so many passages, the most used first.")] = None,
    json: Json = False,
) -> None:
    """Compute passages' KV before anybody asks, so that it is loaded instead of the passages being read again."""
    with options.open() as rag, show.bar() as bar:
        report = _warm(rag, paths or [], hot, bar)
    if json:
        show.as_json(report)
    else:
        _print_warm(report)


def _warm(rag: "EdgeRAG | Client", paths: list[Path], hot: int | None, bar: show.Bar) -> WarmReport:
    def progress(step: "WarmProgress") -> None:
        bar("warming", step.done, step.total, step.current)

    return rag.warm(*paths, hot=hot, progress=progress)


def _readable(report: AddReport) -> list[Path]:
    """The documents that are in the library now."""
    return [Path(file.path) for file in report.files if file.outcome in ("added", "replaced", "unchanged")]


def _print_warm(report: WarmReport) -> None:
    full = "; the quota (kv.disk_mb) is used up" if report.full else ""
    out.print(
        f"{report.computed} passages computed, {report.present} had their KV, of {report.passages}, "
        f"in {show.seconds(report.seconds)}{full}"
    )


@app.command()
def reembed() -> None:
    """Compute all vectors anew, after another embedding model was chosen."""
    with options.open() as rag, show.bar() as bar:
        count = rag.reembed(lambda done, total: bar("embedding", done, total))
    out.print(f"{count} chunks embedded")
