"""What a bundle says of its adapter: `adapter.json`, version 1. It comes from strangers, so every value is bounded."""

import hashlib
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from edge_rag.errors import InputError
from edge_rag.records import GateReport, Recipe

FORMAT = 1
WEIGHTS, SHEET = "adapter.gguf", "adapter.json"
MOST_BYTES = {WEIGHTS: 1 << 30, SHEET: 32 << 20}

Sha256 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Share = Annotated[float, Meta(ge=0, le=1)]


class Member(Struct, frozen=True):
    """A passage that the adapter covers: its content's hash, and where it stood, for people."""

    sha256: Sha256
    place: Annotated[str, Meta(max_length=1000)] = ""


class Question(Struct, frozen=True):
    """A question that it was trained on, and its F1 in the exam; None: it was not asked there."""

    question: Annotated[str, Meta(max_length=20_000)]
    f1: Share | None = None


class _Version(Struct, frozen=True):
    format: int


class Sheet(Struct, frozen=True):
    """`adapter.json`. Of the fields that `Adapter` has too: see there; `sha256` is its id."""

    format: int
    sha256: Sha256
    bytes: Annotated[int, Meta(ge=1, le=MOST_BYTES[WEIGHTS])]
    base: Sha256
    layout: Annotated[int, Meta(ge=0, le=1_000_000)]
    recipe: Recipe
    gate: GateReport | None
    made_at: Annotated[float, Meta(ge=0, le=1e12)]
    members: Annotated[tuple[Member, ...], Meta(min_length=1, max_length=100_000)]
    questions: Annotated[tuple[Question, ...], Meta(max_length=100_000)]


def content_hash(heading: str, text: str) -> str:
    """The sha256 that names a passage wherever it is: of its heading, a zero byte and its text, in UTF-8."""
    return hashlib.sha256(f"{heading}\0{text}".encode()).hexdigest()


def parse_sheet(content: bytes) -> Sheet:
    """The sheet in these bytes. Raises InputError when they are none, of another format, or out of range."""
    try:
        version = msgspec.json.decode(content, type=_Version).format
        if version != FORMAT:
            raise InputError(f"it has format {version}, this program knows {FORMAT}", field="path")
        return _checked(msgspec.json.decode(content, type=Sheet))
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InputError(f"its {SHEET} is not as it should be: {error}", field="path") from error


def _checked(sheet: Sheet) -> Sheet:
    """The sheet, if the numbers of its exam can be ones. Raises InputError."""
    if gate := sheet.gate:
        kept = (gate.seen, gate.unseen, gate.bare)
        shares = [gate.drift, *(each.f1 for each in kept)]
        counts = [each.questions for each in kept]
        if not (all(0 <= share <= 1 for share in shares) and min(counts) >= 0 and -1 <= gate.reach <= 2):
            raise InputError("the numbers of its exam are out of range", field="path")
    return sheet
