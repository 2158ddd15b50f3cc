"""router: which adapter answers which question, what came of it, and what would have come of other rules."""

from typing import TYPE_CHECKING, Annotated

import typer

from edge_rag.cli import show
from edge_rag.cli.app import app, err, options, out
from edge_rag.cli.documents import Json
from edge_rag.cli.learned import SHOWN
from edge_rag.records import ArmStatus, RouterStatus

if TYPE_CHECKING:
    from edge_rag.policy.hindsight import Comparison

router_app = typer.Typer(help="Which adapter answers which question, and what came of it: status, replay.")
app.add_typer(router_app, name="router")

Rules = Annotated[list[str] | None, typer.Option("--policy", "-p", help="A residency rule; may be repeated.")]


@router_app.callback(invoke_without_command=True)
def router(context: typer.Context, json: Json = False) -> None:
    """Show how questions were routed, and which adapters are to stay in fast memory."""
    if context.invoked_subcommand is None:
        status(json)


@router_app.command("status")
def status(json: Json = False) -> None:
    """Show how questions were routed, and which adapters are to stay in fast memory."""
    with options.open() as rag:
        now = rag.router()
    if json:
        show.as_json(now)
        return
    _print_sums(now)
    if now.arms:
        rows = [_row(arm, now) for arm in now.arms]
        show.table(["arm", "chosen", "rewards", "mean", "unsure", "in memory"], rows, right=(1, 2, 3, 4))
    else:
        err.print("nothing was routed yet: questions are, as soon as there are adapters")


def _print_sums(now: RouterStatus) -> None:
    out.print(
        f"mode {now.mode}, residency {now.residency}: {now.decisions} decisions, {now.hits} without loading, "
        f"{now.explored} to try something; {now.epochs} epochs, {now.page_ins} loads since the start"
    )


def _row(arm: ArmStatus, now: RouterStatus) -> list[str]:
    mean = "" if arm.mean is None else f"{arm.mean:.2f}"
    there = "yes" if arm.resident else "wanted" if arm.adapter in now.wanted else ""
    name = arm.adapter[:SHOWN] or "(passages)"
    return [name, str(arm.chosen), str(arm.rewards), mean, f"{arm.width:.2f}", there if arm.adapter else ""]


@router_app.command("replay")
def replay(policy: Rules = None, json: Json = False) -> None:
    """Ask whether other rules for what stays in fast memory would have done better on the questions so far."""
    with options.open() as rag:
        found = rag.replay_router(policy or ("polar", "lru"))
    if json:
        show.as_json(found)
        return
    rows = [
        [
            way.policy,
            f"{way.utility / max(1, way.decisions):.3f}",
            f"{way.quality:.3f}",
            str(way.used),
            str(way.hits),
            str(way.page_ins),
        ]
        for way in found.ways
    ]
    left_out = f"; of {found.left_out} others the adapter is gone" if found.left_out else ""
    out.print(f"{found.decisions} decisions{left_out}. Utility is quality less the price of waiting, of one question.")
    show.table(["rule", "utility", "quality", "by adapters", "in memory", "loads"], rows, right=(1, 2, 3, 4, 5))
    _print_notes(found)


def _print_notes(found: "Comparison") -> None:
    for note in dict.fromkeys(way.rewards.note for way in found.ways if way.rewards.note):
        err.print(f"what answers were worth: {note}")
