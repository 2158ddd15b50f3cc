"""ask, chat, feedback, journal."""

import contextlib
import datetime
import sys
from collections.abc import Generator, Iterator
from typing import Annotated

import typer
from rich.text import Text

from edge_rag.cli import show
from edge_rag.cli.app import app, err, options, out
from edge_rag.cli.documents import Doc, Folder, Json, Kind, chosen
from edge_rag.errors import Busy, UsageError
from edge_rag.records import Answer, Delta, Event, Progress, Turn

TopK = Annotated[int | None, typer.Option("--top-k", "-k", help="How many passages to read.")]
KEPT_TURNS = 100  # of a chat; more than a context holds, and no more than a server takes
MaxTokens = Annotated[int | None, typer.Option(help="Longest answer in tokens.")]


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    top_k: TopK = None,
    max_tokens: MaxTokens = None,
    temperature: Annotated[float | None, typer.Option(help="0 = always the most likely word.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Least share of the best token.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the answer; may be repeated.")] = None,
    instructions: Annotated[str | None, typer.Option(help="Your own instructions.")] = None,
    in_: Folder = None,
    kind: Kind = None,
    document: Doc = None,
    private: Annotated[bool, typer.Option("--private", help="Keep nothing of it, and learn nothing from it.")] = False,
    json: Json = False,
) -> None:
    """Answer a question from the documents, with sources."""
    with options.open() as rag:
        events = rag.stream(
            question,
            where=chosen(in_, kind, document),
            top_k=top_k,
            instructions=instructions,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
            private=private,
        )
        answer = _finished(events) if json else print_stream(events)
    if json:
        show.as_json(answer)
    else:
        print_sources(answer)


@app.command()
def chat(top_k: TopK = None, max_tokens: MaxTokens = None) -> None:
    """Talk about the documents: each question may lean on the ones before. /new forgets, /quit ends."""
    with options.open() as rag:
        err.print("Ask away. /new starts over, /quit (or Ctrl-D) ends, Ctrl-C stops an answer.")
        turns: list[Turn] = []
        for question in _questions():
            if question == "/new":
                turns = []
                continue
            try:
                answer = print_stream(rag.stream(question, history=turns, top_k=top_k, max_tokens=max_tokens))
            except KeyboardInterrupt:
                err.print("\n(stopped)")
                continue
            except (UsageError, Busy) as error:  # one bad question must not end the conversation
                err.print(f"edge-rag: {error}")
                continue
            print_sources(answer)
            turns += [Turn(role="user", content=question), Turn(role="assistant", content=answer.text)]
            turns = turns[-KEPT_TURNS:]


@app.command()
def feedback(
    answer_id: Annotated[str, typer.Argument(help="The id under an answer.")],
    score: Annotated[float, typer.Argument(help="From 0 (bad) to 1 (good).")],
    comment: Annotated[str, typer.Option(help="A word about why.")] = "",
) -> None:
    """Say how good an answer was."""
    with options.open() as rag:
        rag.feedback(answer_id, score, comment)
    out.print("thank you")


@app.command()
def journal(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many.")] = 20,
    json: Json = False,
) -> None:
    """List the last questions and their answers."""
    with options.open() as rag:
        entries = rag.journal(limit)
    if json:
        show.as_json(entries)
        return
    rows = [
        [
            entry.id,
            datetime.datetime.fromtimestamp(entry.asked_at).strftime("%Y-%m-%d %H:%M"),
            "" if entry.feedback is None else f"{entry.feedback:.2f}",
            show.seconds(entry.timings.total),
            " ".join(entry.question.split())[:60],
        ]
        for entry in entries
    ]
    show.table(["id", "asked", "score", "took", "question"], rows, right=(2, 3))


def print_stream(events: Generator[Event, None, None]) -> Answer:
    """Print the answer as it comes; while the prompt is read, say so."""
    # Closed at once when interrupted, so that what was said is journalled while the library is still open.
    with err.status("searching") as waiting, contextlib.closing(events):
        for event in events:
            if isinstance(event, Progress):
                waiting.update(f"reading {event.done} of {event.total} tokens")
            elif isinstance(event, Delta):
                waiting.stop()
                sys.stdout.write(event.text)
                sys.stdout.flush()
            elif isinstance(event, Answer):
                sys.stdout.write("\n")
                return event
    raise AssertionError("a stream ends with its answer")


def print_sources(answer: Answer) -> None:
    """What stands under an answer: sources (the cited ones marked), what was left out, timings, id."""
    if answer.passages:
        out.print("\nSources (* cited)")
        show.passages(answer.passages, cited={citation.n for citation in answer.citations})
    if answer.plan.dropped:
        out.print(f"{answer.plan.dropped} more passages did not fit the context (engine.n_ctx)")
    if answer.plan.adapter:
        remembered = len(answer.plan.passages) - len(answer.plan.read)
        out.print(f"{remembered} of them from memory (adapter {answer.plan.adapter[:12]}), not read again")
    usage, timings = answer.usage, answer.timings
    line = (
        f"\nfirst word {show.seconds(timings.first_token)}, total {show.seconds(timings.total)}, "
        f"{usage.prompt_tokens} tokens read ({usage.cached_tokens} from cache), {usage.completion_tokens} written, "
        f"{answer.finish_reason}  [{answer.id}]"
    )
    out.print(Text(line, style="dim"))


def _finished(events: Generator[Event, None, None]) -> Answer:
    for event in events:
        if isinstance(event, Answer):
            return event
    raise AssertionError("a stream ends with its answer")


def _questions() -> Iterator[str]:
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line:
            yield line
