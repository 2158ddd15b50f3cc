"""What a benchmark hands back: rows and claims, shown as tables and kept as JSON with all that explains them."""

import importlib.metadata
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import edge_rag
from edge_rag.native import device
from edge_rag.store.models import ModelFolder

PACKAGES = ("llama-cpp-python", "onnxruntime", "tokenizers", "numpy", "apsw", "sqlite-vec", "semchunk")

Value = str | int | float | bool | None
Row = dict[str, Value]


class Claim(Struct, frozen=True):
    """A number that is promised: `value` should be at least, above or at most `target`, as `sense` says."""

    name: str
    value: float
    unit: str
    target: float
    holds: bool
    sense: str = "≥"


def at_least(name: str, value: float, target: float, unit: str = "") -> Claim:
    """The claim that `value` is `target` or more."""
    return Claim(name, value, unit, target, value >= target)


def above(name: str, value: float, target: float, unit: str = "") -> Claim:
    """The claim that `value` is more than `target`."""
    return Claim(name, value, unit, target, value > target, ">")


def at_most(name: str, value: float, target: float, unit: str = "") -> Claim:
    """The claim that `value` is `target` or less."""
    return Claim(name, value, unit, target, value <= target, "≤")


class Result(Struct):
    """What one benchmark measured. `notes` say in words how, and what to keep in mind."""

    rows: list[Row] = []
    claims: list[Claim] = []
    notes: list[str] = []

    def extend(self, other: "Result") -> None:
        """Append what another part measured."""
        self.rows += other.rows
        self.claims += other.claims
        self.notes += other.notes


def show(console: Console, name: str, result: Result) -> None:
    """Print a table a kind of row (their `table` field), the claims and the notes."""
    kinds = dict.fromkeys(str(row.get("table", "")) for row in result.rows)
    for kind in kinds:
        rows = [row for row in result.rows if str(row.get("table", "")) == kind]
        console.print(_table(f"{name}: {kind}" if kind else name, rows))
    if result.claims:
        console.print(_claims_table(result.claims))
    for note in result.notes:
        console.print(f"[dim]{escape(note)}[/dim]")


def _table(title: str, rows: Sequence[Row]) -> Table:
    columns = [column for column in dict.fromkeys(key for row in rows for key in row) if column != "table"]
    table = Table(title=title, title_justify="left")
    for column in columns:
        text = all(isinstance(row.get(column, ""), str) for row in rows)
        table.add_column(column, justify="left" if text else "right")
    for row in rows:
        table.add_row(*(_shown(row.get(column)) for column in columns))
    return table


def _claims_table(claims: Sequence[Claim]) -> Table:
    table = Table(title="claims", title_justify="left")
    for column in ("claim", "measured", "target", ""):
        table.add_column(column, justify="right" if column in ("measured", "target") else "left")
    for claim in claims:
        verdict = "[green]holds[/green]" if claim.holds else "[bold red]DOES NOT HOLD[/bold red]"
        target = f"{claim.sense} {_shown(claim.target, claim.unit)}"
        table.add_row(claim.name, _shown(claim.value, claim.unit), target, verdict)
    return table


def _shown(value: Value, unit: str = "") -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        digits = 4 if abs(value) < 10 else 1
        return f"{value:.{digits}f} {unit}".rstrip()
    return escape(f"{value} {unit}".rstrip())


def write(
    path: Path, name: str, result: Result, *, models: ModelFolder, used: Mapping[str, str], seconds: float
) -> None:
    """Write the result as JSON, with all that explains it; `used` maps roles to manifest names of models."""
    content = {
        "benchmark": name,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": ["python", "-m", "tools.bench", *sys.argv[1:]],
        "seconds": round(seconds, 1),
        "machine": device.describe(),
        "models": {role: {"name": model, "sha256": models.spec(model).sha256} for role, model in used.items()},
        "versions": versions(),
        "claims": result.claims,
        "notes": result.notes,
        "rows": result.rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")


def versions() -> dict[str, str]:
    """Versions of edge_rag and of the packages that do the work."""
    return {"edge_rag": edge_rag.__version__} | {name: importlib.metadata.version(name) for name in PACKAGES}
