"""How records look in a terminal."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from edge_rag.cli.app import err, out
from edge_rag.reading.kinds import printable
from edge_rag.records import Passage


def as_json(record: Any) -> None:
    """Print a record as one line of JSON."""
    sys.stdout.write(msgspec.json.encode(record).decode() + "\n")


def path(name: str | Path) -> str:
    """A path on one line, whatever it holds, relative to the current folder when below it."""
    shown = Path(name)
    if shown.is_absolute() and shown.is_relative_to(Path.cwd()):
        shown = shown.relative_to(Path.cwd())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in printable(shown))


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def seconds(value: float) -> str:
    """A duration for people."""
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def where(passage: Passage) -> str:
    """Document, heading below its title, page."""
    heading = passage.heading.removeprefix(passage.title).removeprefix(" › ")
    page = f", page {passage.page}" if passage.page else ""
    return path(passage.path) + (f" › {heading}" if heading else "") + page


def passages(found: tuple[Passage, ...] | list[Passage], *, cited: set[int], texts: bool = False) -> None:
    """Numbered passages; the cited ones are marked."""
    for n, passage in enumerate(found, start=1):
        mark = "*" if n in cited else " "
        out.print(Text(f"{mark}[{n}] {where(passage)}  ({passage.score:.2f})"))
        if texts:
            out.print(Text("     " + " ".join(passage.text.split()), style="dim"))


def table(columns: list[str], rows: list[list[str]], *, right: tuple[int, ...] = ()) -> None:
    """A plain table; columns in `right` are aligned to the right."""
    grid = Table(box=None, pad_edge=False, show_header=bool(any(columns)))
    for place, column in enumerate(columns):
        grid.add_column(column, justify="right" if place in right else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    out.print(grid, soft_wrap=False)


@contextmanager
def bar(*, bytes_: bool = False) -> Iterator["Bar"]:
    """A progress bar on standard error; on a pipe nothing is drawn."""
    amount = DownloadColumn() if bytes_ else TextColumn("{task.completed:.0f}/{task.total:.0f}")
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        yield Bar(progress)


class Bar:
    """Progress of one thing after another, told apart by their labels."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, label: str, done: int, total: int, current: str = "") -> None:
        """`done` of `total` of `label`; `current` is what is being worked on."""
        if label not in self._tasks:
            for old in self._tasks.values():
                self._progress.update(old, visible=False)
            self._tasks[label] = self._progress.add_task(label, total=total)
        shown = f"{label} {path(current)[-50:]}" if current else label
        self._progress.update(self._tasks[label], completed=done, total=total, description=shown)
