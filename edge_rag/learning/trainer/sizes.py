"""What fits into the memory: estimated from the model's shapes before anything is loaded, so that it can be refused.

float32 throughout. A token that is trained on leaves in each layer what its gradient needs: normed inputs, projections,
turned copies, and the feed-forward's gate, up, activation and product; adapted projections keep their sums besides.
These factors are estimates on the safe side. With `recompute` only the
inputs of each layer stay, and one layer at a time is computed again (gradient checkpointing, Chen et al.,
arXiv 1604.06174).
"""

from msgspec import Struct
from msgspec.structs import replace

from edge_rag.errors import MachineError
from edge_rag.learning.job import Job
from edge_rag.records import Record

FLOAT = 4
BATCH, LEAST = 16, 4  # examples of one update: what is learned must not depend on the memory
UPDATES = 8  # of an epoch at least, as long as each has `LEAST` examples
SHARE = 0.8  # of what is free; the rest is for the libraries, and for being wrong
OVERHEAD = 300 << 20  # torch and transformers themselves
HIDDEN_COPIES, FORWARD_COPIES = 14, 8  # vectors of these sizes that a token leaves in a layer
LOGITS = 3  # rows of the vocabulary for each answer token: logits, their exponentials, their gradient
COPIES = 5  # of the adapter: itself, its gradient, AdamW's two, the best one so far


class Facts(Record, frozen=True):
    """Shapes of a model. `parameters` counts numbers, `head` is the size of one attention head."""

    architecture: str
    parameters: int
    layers: int
    hidden: int
    forward: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int


class Room(Struct, frozen=True):
    """What is decided: bytes for one micro-batch, bytes for kept contexts, and whether layers are computed again."""

    batch: int
    contexts: int
    recompute: bool = False

    def halved(self) -> "Room":
        """After the device had less memory than was thought."""
        return replace(self, batch=self.batch // 2, contexts=self.contexts // 2)


class Shape(Struct, frozen=True):
    """A micro-batch, padded: rows × (context tokens | tokens that are trained on), and answer tokens in all."""

    rows: int
    context: int
    tokens: int
    answers: int


def per_update(examples: int) -> int:
    """Examples of one update, of so many in an epoch.

    The loss is a mean, so a small update moves the adapter as far as a large one and costs less. A handful of questions
    needs that: in a dozen updates of all that there was, nothing was learned (docs/log.md).
    """
    return max(LEAST, min(BATCH, examples // UPDATES))


def kv_bytes(facts: Facts) -> int:
    """Of one context token: its keys and values in all layers."""
    return 2 * facts.layers * facts.kv_heads * facts.head * FLOAT


def reading(facts: Facts) -> int:
    """Bytes that one token takes while a context is computed: no gradient, one layer at a time."""
    return (6 * facts.hidden + 4 * facts.forward) * FLOAT


def need(facts: Facts, shape: Shape, *, recompute: bool) -> int:
    """Bytes that a micro-batch takes while it is computed."""
    attention = facts.heads * facts.head
    token = (HIDDEN_COPIES * max(facts.hidden, attention) + FORWARD_COPIES * facts.forward) * FLOAT
    context = 2 * attention * FLOAT  # repeated for each head
    scores = 2 * facts.heads * (shape.context + shape.tokens) * FLOAT  # of each token, where attention is not fused
    layer = shape.rows * (shape.tokens * (token + scores) + shape.context * context)
    inputs = shape.rows * shape.tokens * facts.hidden * FLOAT * facts.layers
    kept = shape.rows * shape.context * kv_bytes(facts)
    logits = shape.answers * facts.vocabulary * FLOAT * LOGITS
    return kept + logits + (inputs + layer if recompute else facts.layers * layer)


def fixed(facts: Facts, adapter: int, *, converting: bool) -> int:
    """Bytes that are taken whatever the batch: weights, the adapter (`adapter` numbers) and its optimiser.

    Dequantising (`converting`) holds the weights twice.
    """
    return (facts.parameters * (2 if converting else 1) + adapter * COPIES) * FLOAT + OVERHEAD


def adapter_numbers(facts: Facts, job: Job, layers: int) -> int:
    """Numbers of the adapter: rank × (inputs + outputs) of each adapted product in each of `layers` layers."""
    queries, keys = facts.heads * facts.head, facts.kv_heads * facts.head
    down = facts.hidden + facts.forward
    sides = {"down": down, "ffn": 3 * down, "all": 3 * down + 4 * facts.hidden + 2 * queries + 2 * keys}
    return job.rank * sides[job.targets] * layers


def plan(facts: Facts, job: Job, taken: int, free: int, largest: Shape) -> Room:
    """How the free memory is used beside what is `taken`. `largest` is the dearest example alone.

    Raises MachineError when not even that one fits.
    """
    free = min(free, job.memory) if job.memory else free
    room = int((free - taken) * SHARE)
    least = need(facts, largest, recompute=True) + largest.context * reading(facts)
    if room < least:
        raise MachineError(
            f"training needs {(taken + least / SHARE) / 1e6:,.0f} MB of memory, {free / 1e6:,.0f} MB may be used",
            field="learning.memory_mb",
            remedy="free some, set learning.targets to down, or take a smaller model",
        )
    # Computing layers again costs a third more time; doing two examples at once saves less than that.
    recompute = room < 2 * (need(facts, largest, recompute=False) + largest.context * reading(facts))
    batch = _wished(facts, job, recompute) or room
    batch = max(least, min(batch, int(room * (0.75 if room > 2 * least else 1))))
    return Room(batch, max(0, room - batch), recompute)


def _wished(facts: Facts, job: Job, recompute: bool) -> int:
    """Bytes of `batch_tokens`, 0 when that is not set."""
    return need(facts, Shape(1, 0, job.batch_tokens, 0), recompute=recompute) if job.batch_tokens else 0
