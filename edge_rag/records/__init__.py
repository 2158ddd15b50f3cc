"""The vocabulary: frozen records that rooms pass to each other. They hold values and next to no behaviour.

Durations are seconds, sizes bytes, times seconds since the epoch (UTC). Positions in texts count Unicode code points.
Import them from here.
"""

from edge_rag.records.answers import (
    Answer,
    Citation,
    Cited,
    Delta,
    Event,
    Filter,
    FinishReason,
    Message,
    Passage,
    Plan,
    Progress,
    Sampling,
    Sources,
    Timings,
    Turn,
    Usage,
)
from edge_rag.records.base import Record
from edge_rag.records.documents import (
    AddReport,
    Chunk,
    Document,
    FileReport,
    ParsedDocument,
    Section,
)
from edge_rag.records.engine import (
    EngineStatus,
    Step,
)
from edge_rag.records.kv import (
    KVCounters,
    KVSource,
    KVStatus,
    PassagePlan,
    WarmReport,
)
from edge_rag.records.models import (
    FileSource,
    ModelKind,
    ModelSpec,
    ModelState,
    Source,
    UrlSource,
    WheelSource,
)

__all__ = [
    "AddReport",
    "Answer",
    "Chunk",
    "Citation",
    "Cited",
    "Delta",
    "Document",
    "EngineStatus",
    "Event",
    "FileReport",
    "FileSource",
    "Filter",
    "FinishReason",
    "KVCounters",
    "KVSource",
    "KVStatus",
    "Message",
    "ModelKind",
    "ModelSpec",
    "ModelState",
    "ParsedDocument",
    "Passage",
    "PassagePlan",
    "Plan",
    "Progress",
    "Record",
    "Sampling",
    "Section",
    "Source",
    "Sources",
    "Step",
    "Timings",
    "Turn",
    "UrlSource",
    "Usage",
    "WarmReport",
    "WheelSource",
]
