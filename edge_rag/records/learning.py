"""What is learned: clusters of passages, the questions about them, the adapters trained from both, and their exams."""

from typing import Literal

from edge_rag.records.answers import Passage
from edge_rag.records.base import Record

AdapterState = Literal["ready", "disabled", "failed"]
ItemKind = Literal["logged", "study"]
Targets = Literal["down", "ffn", "all"]


class Cluster(Record, frozen=True):
    """Passages that are asked for together, to become one adapter. `members` are chunk ids in order.

    `weight` is the number of logged questions that it covers wholly or in part, each counted by its age and its covered
    share. `changed_at` moves when members come or go; `trained_at` is None until an adapter was tried for it, and
    `failure` says why that came to nothing ('' when it did not).
    """

    id: int
    members: tuple[int, ...]
    tokens: int
    weight: float
    created_at: float
    changed_at: float
    trained_at: float | None = None
    failure: str = ""


class Asked(Record, frozen=True):
    """The passages of a logged question, as chunk ids; it counts `weight`, less with age."""

    weight: float
    chunks: tuple[int, ...]


class Item(Record, frozen=True):
    """A question to learn from, with the passages that answer it (best first).

    `logged`: from the journal, asked at `made_at`; `study`: written by the model about one passage. `held_out` items
    are for exams only. `answer` is the teacher's, None until it was asked; `refused` says that it could not answer.
    """

    id: int
    kind: ItemKind
    question: str
    chunks: tuple[int, ...]
    made_at: float
    held_out: bool = False
    answer: str | None = None
    refused: bool = False


class ClusterView(Record, frozen=True):
    """A cluster with its passages, and the questions about them that it is learned from or examined with."""

    cluster: Cluster
    passages: tuple[Passage, ...]
    items: tuple[Item, ...]


class Recipe(Record, frozen=True):
    """How an adapter was trained: what is adapted, its rank, and how much it has seen."""

    targets: Targets
    layers: Literal["all", "last_half"]
    rank: int
    epochs: int
    examples: int
    tokens: int
    seconds: float
    peak_bytes: int
    loss: float
    device: str


class Kept(Record, frozen=True):
    """Of `questions`, the mean F1 between answers from memory and the teacher's answers from the passages."""

    questions: int
    f1: float


class GateReport(Record, frozen=True):
    """The exam of an adapter: `seen` questions it was trained on, `unseen` ones are held out.

    `used`: those of the seen ones that it will be used for, because it answered them well. `bare`: the seen ones
    without passages and without the adapter. `reach`: the least cosine to a trained question at which unseen ones still
    kept enough; 1: only the questions it was trained on. `drift`: how much answers to questions of other clusters
    change (1 − F1), as far as it would be used for them. `reason` says why it failed, '' when it passed.
    """

    seen: Kept
    used: Kept
    unseen: Kept
    bare: Kept
    reach: float
    drift: float
    passed: bool
    reason: str = ""


class Adapter(Record, frozen=True):
    """A LoRA in a file. `id` is the sha256 of that file; `base` of the model it belongs to; `layout` of its prompts.

    `members` are the chunk ids that it covers. `cluster_id` is None for an imported one. `failed`: its file is damaged
    or foreign, it failed its proof or its gate, and `reason` says which.
    """

    id: str
    cluster_id: int | None
    members: tuple[int, ...]
    bytes: int
    base: str
    layout: int
    recipe: Recipe
    gate: GateReport | None
    state: AdapterState
    reason: str
    pinned: bool
    made_at: float


class PagerStatus(Record, frozen=True):
    """Adapters in fast memory (`resident`, by id), which take `used` of `budget` bytes.

    `page_ins` are loads from disk, which took `page_in_seconds` together.
    """

    resident: tuple[str, ...]
    used: int
    budget: int
    page_ins: int = 0
    page_in_seconds: float = 0.0


class AdapterStatus(Record, frozen=True):
    """Adapters as a whole: `ready` ones, those in fast memory, and what has come of them since the start.

    `answers` were given under an adapter, `remembered` passages stayed out of prompts because it covered them; an
    adapter that failed while it answered was replaced by the passages `fallbacks` times.
    """

    ready: int
    pager: PagerStatus
    answers: int = 0
    remembered: int = 0
    fallbacks: int = 0


class LearningStatus(Record, frozen=True):
    """What the idle machine is doing: `doing` in words ('' = nothing), `done` of `total` of it, and why it waits."""

    doing: str
    done: int
    total: int
    waiting: str
    clusters: int
    items: int
    taught: int
    last_failure: str = ""


class Lesson(Record, frozen=True):
    """What became of one cluster: `adapter` is the new one's id, '' when there is none, and `reason` says why.

    `seconds` are those of writing questions, teaching, training and examining, waits for requests left out.
    """

    cluster_id: int
    passages: int
    items: int
    adapter: str
    gate: GateReport | None
    seconds: float
    reason: str = ""


class Power(Record, frozen=True):
    """How the device is: the hottest of its sensors in °C (None: it has none), and whether it runs on battery."""

    celsius: float | None = None
    on_battery: bool = False
