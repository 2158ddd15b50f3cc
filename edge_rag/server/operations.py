"""What each route takes and gives, by its handler: what the OpenAPI document cannot learn from the code itself."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from edge_rag.config import Models
from edge_rag.policy.hindsight import Comparison
from edge_rag.records import (
    Adapter,
    AddReport,
    Answer,
    Cited,
    Cluster,
    ClusterView,
    Delta,
    Document,
    LearningStatus,
    Lesson,
    Passage,
    Progress,
    RouterStatus,
    Sources,
    WarmReport,
)
from edge_rag.runtime.ingest import AddProgress
from edge_rag.runtime.status import Status
from edge_rag.runtime.warming import WarmProgress
from edge_rag.server import (
    bounds,
    document_routes,
    learning_routes,
    native_routes,
    openai_chat,
    openai_completions,
    openai_files,
    openai_models,
    openai_requests,
    openai_shapes,
    openai_stores,
)
from edge_rag.store.journal import Entry


class Operation(Struct, frozen=True, kw_only=True):
    """A route: the records of its body, query and reply, None where there is none.

    `upload`: a form with files may come as well, or must, when there is no `body`. `events` are those of its stream,
    by kind, '' for events without one. `names`: it names something that need not be there. `statuses` are replies
    other than 200, with their records.
    """

    body: Any = None
    upload: bool = False
    query: type[Struct] | None = None
    reply: Any = None
    text: bool = False
    events: Mapping[str, Any] = {}
    names: bool = False
    statuses: Mapping[int, Any] = {}


class DocumentsQuery(Struct, frozen=True):
    """Restricts the list; `document` and `kind` may be repeated."""

    document: bounds.Names = ()
    folder: str = ""
    kind: bounds.Names = ()


class JournalQuery(Struct, frozen=True):
    """How many entries."""

    limit: Annotated[int, Meta(ge=1, le=native_routes.MOST_ENTRIES)] = 20


class FilesQuery(Struct, frozen=True):
    """A part of the list; it begins behind `after`."""

    limit: Annotated[int, Meta(ge=1, le=openai_files.MOST_FILES)] = openai_files.MOST_FILES
    after: str | UnsetType = UNSET
    order: Literal["asc", "desc"] = "desc"
    purpose: str | UnsetType = UNSET


# Examples of what stands in paths.
PARTS = {
    "model": Models().llm,
    "file": openai_shapes.file_id(3),
    "store": openai_stores.STORE,
    "cluster": "1",
    "adapter": "0123456789ab",
}

ANSWERING = {"sources": Sources, "progress": Progress, "delta": Delta, "citation": Cited, "answer": Answer}

OPERATIONS: Mapping[Callable[..., Any], Operation] = {
    native_routes.search: Operation(body=native_routes.Search, reply=list[Passage]),
    native_routes.ask: Operation(body=native_routes.Ask, reply=Answer, events=ANSWERING),
    native_routes.feedback: Operation(body=native_routes.Feedback, names=True, statuses={204: None}),
    native_routes.journal: Operation(query=JournalQuery, reply=list[Entry]),
    native_routes.status: Operation(reply=Status),
    native_routes.health: Operation(reply=native_routes.Health, statuses={503: native_routes.NotYet}),
    native_routes.metrics: Operation(text=True),
    document_routes.documents: Operation(query=DocumentsQuery, reply=list[Document]),
    document_routes.add: Operation(
        body=document_routes.Add,
        upload=True,
        events={"progress": AddProgress, "report": AddReport, "warmed": WarmReport},
    ),
    document_routes.remove: Operation(body=document_routes.Paths, reply=list[Document], names=True),
    document_routes.warm: Operation(
        body=document_routes.Warm, names=True, events={"progress": WarmProgress, "report": WarmReport}
    ),
    document_routes.reembed: Operation(
        body=document_routes.Nothing,
        events={"progress": document_routes.ReembedProgress, "report": document_routes.Reembedded},
    ),
    learning_routes.clusters: Operation(reply=list[Cluster]),
    learning_routes.cluster: Operation(reply=ClusterView),
    learning_routes.adapters: Operation(reply=list[Adapter]),
    learning_routes.adapter: Operation(reply=Adapter),
    learning_routes.change: Operation(body=learning_routes.Change, reply=Adapter),
    learning_routes.delete: Operation(reply=Adapter),
    learning_routes.export: Operation(body=learning_routes.Place, reply=Adapter),
    learning_routes.import_: Operation(body=learning_routes.Place, reply=Adapter),
    learning_routes.router: Operation(reply=RouterStatus),
    learning_routes.replay: Operation(body=learning_routes.Replay, reply=Comparison),
    learning_routes.learn: Operation(
        body=learning_routes.Learn, events={"progress": LearningStatus, "report": list[Lesson]}
    ),
    learning_routes.idle: Operation(body=document_routes.Nothing, events={"report": learning_routes.Done}),
    openai_chat.chat: Operation(
        body=openai_requests.Chat, names=True, reply=openai_shapes.ChatReply, events={"": openai_shapes.ChatChunk}
    ),
    openai_completions.complete: Operation(
        body=openai_requests.Complete, names=True, reply=openai_shapes.TextReply, events={"": openai_shapes.TextReply}
    ),
    openai_models.models: Operation(reply=openai_models.ModelList),
    openai_models.model: Operation(reply=openai_models.ModelShape),
    openai_models.embed: Operation(body=openai_requests.Embed, names=True, reply=openai_models.EmbeddingReply),
    openai_files.upload: Operation(upload=True, reply=openai_files.FileShape),
    openai_files.files: Operation(query=FilesQuery, names=True, reply=openai_files.Page),
    openai_files.file: Operation(reply=openai_files.FileShape),
    openai_files.delete: Operation(reply=openai_files.Deleted),
    openai_stores.stores: Operation(reply=openai_stores.StorePage),
    openai_stores.store: Operation(reply=openai_stores.StoreShape),
    openai_stores.search: Operation(body=openai_stores.StoreSearch, reply=openai_stores.Hits),
}
