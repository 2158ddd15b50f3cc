"""status, doctor, settings."""

from typing import TYPE_CHECKING

import typer

from edge_rag.cli import show
from edge_rag.cli.app import app, options, out
from edge_rag.cli.documents import Json
from edge_rag.client import is_alive
from edge_rag.config import config_file, describe_settings
from edge_rag.errors import ConfigError

if TYPE_CHECKING:
    from edge_rag.runtime.doctor import Check
    from edge_rag.runtime.status import Status


@app.command()
def status(json: Json = False) -> None:
    """Show what is stored, what is loaded, and how long the last answer took."""
    with options.open() as rag:
        now = rag.status()
    if json:
        show.as_json(now)
        return
    parts = (_stored, _loaded, _engine, _learning, _adapters, _router, _budget, _last)
    show.table(["", ""], [row for part in parts for row in part(now)])


def _stored(now: "Status") -> list[list[str]]:
    return [
        ["data folder", now.data],
        ["documents", f"{now.documents} ({now.chunks} chunks, {now.tokens} tokens)"],
        ["database", show.size(now.database_bytes)],
        ["passages as KV", f"{now.kv_files} on disk, {show.size(now.kv_bytes)} of {show.size(now.kv_quota)}"],
        ["questions asked", str(now.questions)],
    ]


def _loaded(now: "Status") -> list[list[str]]:
    return [
        ["language model", f"{now.llm} (context {now.n_ctx} tokens)"],
        ["embedding model", now.embedder],
        ["loaded", ", ".join(f"{part.what} {show.size(part.bytes)}" for part in now.loaded) or "nothing yet"],
        ["memory", f"{show.size(now.memory_used)} used, {show.size(now.memory_available)} available"],
        ["machine", f"{now.machine['cpu']}, {now.machine['cores']} cores, {now.machine['memory']}"],
    ]


def _engine(now: "Status") -> list[list[str]]:
    """What the loaded engine does, and what has gone wrong with it."""
    if now.engine is None:
        return []
    engine = now.engine
    doing = f"{engine.active} of {engine.slots} answers being written, {engine.waiting} waiting"
    rows = [
        ["engine", f"{doing}, {engine.cells_used} of {engine.cells} tokens taken"],
        ["served", f"{engine.served}, and {engine.joined} along with an equal one, in {engine.steps} steps"],
    ]
    if engine.restarts:
        rows.append(["restarted", f"{engine.restarts} time(s) after a fault of ours; see the log"])
    if engine.failure:
        rows.append(["ended", engine.failure])
    return rows


def _learning(now: "Status") -> list[list[str]]:
    """What the idle machine is doing, or why it does not, and what there is to learn."""
    if now.learning is None:
        return []
    learning = now.learning
    doing = learning.doing + (f" ({learning.done} of {learning.total})" if learning.total else "")
    waiting = f"waits: {learning.waiting}" if learning.waiting else ""
    rows = [
        ["learning", "; ".join(filter(None, [doing, waiting])) or "nothing at the moment"],
        ["learns from", f"{learning.clusters} clusters, {learning.items} questions, {learning.taught} with answers"],
    ]
    return [*rows, ["failed last", learning.last_failure]] if learning.last_failure else rows


def _adapters(now: "Status") -> list[list[str]]:
    """Which adapters there are, and what has come of them."""
    if now.adapters is None:
        return []
    adapters, pager = now.adapters, now.adapters.pager
    held = f"{len(pager.resident)} in memory, {show.size(pager.used)} of {show.size(pager.budget)}"
    remembered = f"{adapters.remembered} passages remembered in {adapters.answers} answers"
    return [
        ["adapters", f"{adapters.ready} ready, {held}"],
        ["from memory", remembered + (f", {adapters.fallbacks} answers fell back" if adapters.fallbacks else "")],
    ]


def _router(now: "Status") -> list[list[str]]:
    """How questions were routed."""
    if now.router is None:
        return []
    router = now.router
    tried = f"{router.hits} without loading, {router.explored} to try something"
    return [["router", f"{router.mode}, {router.residency}: {router.decisions} decisions, {tried}"]]


def _last(now: "Status") -> list[list[str]]:
    """How audits and the last answer came out."""
    rows = []
    if seen := now.kv_audits:
        rows.append(["audits", f"{seen.audits}: agreement {seen.agreement:.2f}, KL {seen.kl:.2f} to full prefill"])
    if last := now.last_timings:
        rows.append(["last answer", f"first word {show.seconds(last.first_token)}, total {show.seconds(last.total)}"])
    return rows


def _budget(now: "Status") -> list[list[str]]:
    """What was claimed of which memory, what the engine was given for it, and the threads."""
    rows = [
        [account.memory, f"{show.size(sum(account.claims.values()))} of {show.size(account.capacity)} claimed"]
        for account in now.accounts
    ]
    if now.budget:
        budget = now.budget
        rows.append(["budget", f"{budget.slots} at once in {budget.cells} tokens, RAM tier {show.size(budget.ram)}"])
        rows += [["less than set", reason] for reason in budget.reasons]
    threads = now.threads
    rows.append(["threads", f"{threads.engine} engine, {threads.embedder} embedder, {threads.background} background"])
    return rows


@app.command()
def doctor(json: Json = False) -> None:
    """Check the installation, the models and the library here; say what to do about each fault."""
    from edge_rag.runtime.doctor import examine

    checks = [*examine(options.data, options.settings()), _server()]
    if json:
        show.as_json(checks)
    else:
        rows = [
            [check.result, check.what, check.found + (f" — {check.remedy}" if check.remedy else "")] for check in checks
        ]
        show.table(["", "", ""], rows)
    if any(check.result == "fault" for check in checks):
        raise typer.Exit(1)


def _server() -> "Check":
    """Whether one answers; none is no fault, because every command can do its work itself."""
    from edge_rag.runtime.doctor import Check

    try:
        path = options.socket()
    except ConfigError as error:
        return Check(what="server", result="note", found=error.message, remedy=error.remedy)
    found = f"answers on {path}" if is_alive(path) else f"nobody answers on {path}; `edge-rag serve` would"
    return Check(what="server", result="ok", found=found)


@app.command()
def settings() -> None:
    """List all settings, their values here and their meaning."""
    rows = [[key, str(value), text] for key, value, text in describe_settings(options.settings())]
    show.table(["setting", "value", "meaning"], rows)
    out.print(f"\nSet them in {config_file()}, as EDGE_RAG_GROUP__KEY, or with --set KEY=VALUE.")
