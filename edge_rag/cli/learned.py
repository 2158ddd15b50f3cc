"""clusters, adapters: what was learned from questions, and how to undo it."""

import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from edge_rag.cli import show
from edge_rag.cli.app import app, err, options, out
from edge_rag.cli.documents import Json
from edge_rag.records import Adapter, Cluster, ClusterView, GateReport, Item

SHOWN = 12  # digits of an adapter's id
LARGEST = 2**63 - 1  # number of a row in SQLite

clusters_app = typer.Typer(help="Passages that are asked for together: list, show.")
adapters_app = typer.Typer(
    help="What was learned of them: list, show, pin, unpin, disable, enable, delete, export, import."
)
app.add_typer(clusters_app, name="clusters")
app.add_typer(adapters_app, name="adapters")

ClusterId = Annotated[int, typer.Argument(metavar="ID", min=1, max=LARGEST, help="Its number in the list.")]
AdapterId = Annotated[str, typer.Argument(metavar="ID", help="An adapter's id, or its beginning.")]


# --- clusters --------------------------------------------------------------------------------------------------------


@clusters_app.callback(invoke_without_command=True)
def clusters(context: typer.Context, json: Json = False) -> None:
    """List the passages that are asked for together; they become one adapter."""
    if context.invoked_subcommand is None:
        list_clusters(json)


@clusters_app.command("list")
def list_clusters(json: Json = False) -> None:
    """List them, the most asked for first."""
    with options.open() as rag:
        found = rag.clusters()
    if json:
        show.as_json(found)
    elif found:
        rows = [
            [str(each.id), str(len(each.members)), str(each.tokens), f"{each.weight:.1f}", _trained(each)]
            for each in found
        ]
        show.table(["cluster", "passages", "tokens", "weight", "trained"], rows, right=(0, 1, 2, 3))
    else:
        err.print("no clusters yet: they are made of the questions that are asked, while nobody asks")


@clusters_app.command("show")
def show_cluster(cluster_id: ClusterId, json: Json = False) -> None:
    """Show a cluster's passages, and the questions that are learned or examined."""
    with options.open() as rag:
        view = rag.cluster(cluster_id)
    if json:
        show.as_json(view)
    else:
        _print_cluster(view)


def _trained(cluster: Cluster) -> str:
    if cluster.trained_at is None:
        return "not yet"
    return f"{day(cluster.trained_at)}: {line(cluster.failure)}" if cluster.failure else day(cluster.trained_at)


def _print_cluster(view: ClusterView) -> None:
    cluster = view.cluster
    out.print(
        f"cluster {cluster.id}: {len(cluster.members)} passages of {cluster.tokens} tokens, "
        f"weight {cluster.weight:.1f}, changed {day(cluster.changed_at)}"
    )
    out.print(Text(f"trained: {_trained(cluster)}"))
    out.print("\nPassages")
    for passage in view.passages:
        out.print(Text(f"  {show.where(passage)}  ({passage.tokens} tokens)"))
    out.print("\nQuestions")
    rows = [["  " + item.kind, _use(item), line(item.question), line(item.answer or "")] for item in view.items]
    if rows:
        show.table(["  kind", "use", "question", "answer"], rows)
    else:
        out.print("  none yet")


def _use(item: Item) -> str:
    if item.refused:
        return "unanswered"
    if item.answer is None:
        return "to be answered"
    return "exam" if item.held_out else "training"


# --- adapters --------------------------------------------------------------------------------------------------------


@adapters_app.callback(invoke_without_command=True)
def adapters(context: typer.Context, json: Json = False) -> None:
    """List the adapters: what was learned, each for the passages of one cluster."""
    if context.invoked_subcommand is None:
        list_adapters(json)


@adapters_app.command("list")
def list_adapters(json: Json = False) -> None:
    """List them, the oldest first."""
    with options.open() as rag:
        found = rag.adapters()
    if json:
        show.as_json(found)
    elif found:
        columns = ["adapter", "cluster", "passages", "size", "seen", "unseen", "made", "state"]
        show.table(columns, [_row(each) for each in found], right=(1, 2, 3, 4, 5))
    else:
        err.print("no adapters yet: `edge-rag train` makes them, and so does an idle machine")


def _row(adapter: Adapter) -> list[str]:
    cluster = "" if adapter.cluster_id is None else str(adapter.cluster_id)
    size, made = show.size(adapter.bytes), day(adapter.made_at)
    return [short(adapter.id), cluster, str(len(adapter.members)), size, *kept(adapter.gate), made, _state(adapter)]


@adapters_app.command("show")
def show_adapter(adapter_id: AdapterId, json: Json = False) -> None:
    """Show how an adapter was trained and how it did in its exam."""
    with options.open() as rag:
        adapter = rag.adapter(adapter_id)
    if json:
        show.as_json(adapter)
    else:
        show.table(["", ""], [*_about(adapter), *_recipe(adapter), *_exam(adapter.gate)])


@adapters_app.command()
def pin(adapter_id: AdapterId, json: Json = False) -> None:
    """Keep an adapter in fast memory as long as possible."""
    with options.open() as rag:
        changed = rag.pin_adapter(adapter_id)
    _tell("pinned", changed, json)


@adapters_app.command()
def unpin(adapter_id: AdapterId, json: Json = False) -> None:
    """Let an adapter leave fast memory when others need the room."""
    with options.open() as rag:
        changed = rag.pin_adapter(adapter_id, False)
    _tell("unpinned", changed, json)


@adapters_app.command()
def disable(adapter_id: AdapterId, json: Json = False) -> None:
    """Use an adapter no longer: its passages are read as text."""
    with options.open() as rag:
        changed = rag.disable_adapter(adapter_id)
    _tell("disabled", changed, json)


@adapters_app.command()
def enable(adapter_id: AdapterId, json: Json = False) -> None:
    """Use a disabled adapter again."""
    with options.open() as rag:
        changed = rag.enable_adapter(adapter_id)
    _tell("enabled", changed, json)


@adapters_app.command()
def delete(adapter_id: AdapterId, json: Json = False) -> None:
    """Delete an adapter and its file. It is trained anew only when its cluster has changed."""
    with options.open() as rag:
        gone = rag.delete_adapter(adapter_id)
    _tell("deleted", gone, json)


@adapters_app.command()
def export(
    adapter_id: AdapterId,
    path: Annotated[Path, typer.Argument(help="The file that is written; it must not exist.")],
    json: Json = False,
) -> None:
    """Write an adapter into a file, for another library with the same passages. It is as private as they are."""
    with options.open() as rag:
        exported = rag.export_adapter(adapter_id, path)
    _tell("exported", exported, json)


@adapters_app.command("import")
def import_(path: Annotated[Path, typer.Argument(help="A file that was exported.")], json: Json = False) -> None:
    """Take in an adapter that was exported elsewhere; its passages and its model must be here."""
    with options.open() as rag:
        new = rag.import_adapter(path)
    _tell("imported", new, json)


def _tell(what: str, adapter: Adapter, json: bool) -> None:
    if json:
        show.as_json(adapter)
    else:
        out.print(Text(f"{what} {short(adapter.id)}: {len(adapter.members)} passages, {_state(adapter)}"))


def _state(adapter: Adapter) -> str:
    pinned = ", pinned" if adapter.pinned else ""
    return adapter.state + pinned + (f": {line(adapter.reason)}" if adapter.reason else "")


def _about(adapter: Adapter) -> list[list[str]]:
    origin = "imported" if adapter.cluster_id is None else f"cluster {adapter.cluster_id}"
    return [
        ["adapter", adapter.id],
        ["state", _state(adapter)],
        ["covers", f"{len(adapter.members)} passages ({origin})"],
        ["file", f"{show.size(adapter.bytes)}, made {day(adapter.made_at)}"],
        ["model", f"sha256 {short(adapter.base)}, prompts of layout {adapter.layout}"],
    ]


def _recipe(adapter: Adapter) -> list[list[str]]:
    recipe = adapter.recipe
    what = {"down": "down projections", "ffn": "feed-forward layers", "all": "all linear layers"}[recipe.targets]
    where = "" if recipe.layers == "all" else " of the last half"
    return [
        ["adapts", f"{what}{where}, rank {recipe.rank}"],
        ["learned from", f"{recipe.examples} examples, {recipe.tokens} tokens, in {recipe.epochs} epochs"],
        [
            "training",
            f"{show.seconds(recipe.seconds)} on {recipe.device}, {show.size(recipe.peak_bytes)} of memory, "
            f"last loss {recipe.loss:.2f}",
        ],
    ]


def _exam(gate: GateReport | None) -> list[list[str]]:
    """The gate's report in words; F1 is between answers from memory and answers from the passages."""
    if gate is None:
        return [["exam", "none: it is not used"]]
    seen, used, unseen, bare = gate.seen, gate.used, gate.unseen, gate.bare
    reach = f"at least {gate.reach:.2f} similar to one of them" if gate.reach < 1 else "none but those"
    return [
        ["exam", "passed" if gate.passed else f"failed: {line(gate.reason)}"],
        ["learned questions", f"{seen.f1:.2f} F1 to the answers from the passages ({seen.questions} asked)"],
        ["those answered well", f"{used.f1:.2f} F1: it is used for these ({used.questions} of them)"],
        ["without the adapter", f"{bare.f1:.2f} F1: what the model knew anyway ({bare.questions} asked)"],
        ["other questions", f"{unseen.f1:.2f} F1, about the same passages ({unseen.questions} asked)"],
        ["used for questions", reach],
        ["drift", f"{gate.drift:.2f}: how much answers about other passages change"],
    ]


# --- words -----------------------------------------------------------------------------------------------------------


def short(id: str) -> str:
    """An adapter's id as people see it; commands take it so."""
    return id[:SHOWN]


def day(at: float) -> str:
    """A time (seconds since the epoch) on the local clock."""
    return datetime.datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M")


def kept(gate: GateReport | None) -> list[str]:
    """What it kept of answers to seen and to unseen questions."""
    return [f"{gate.seen.f1:.2f}", f"{gate.unseen.f1:.2f}"] if gate else ["", ""]


def line(text: str) -> str:
    """A text on one line, without what could move a terminal's cursor."""
    return "".join(filter(str.isprintable, " ".join(text.split())))
