"""The bounds of what callers may send, one type a thing. The settings' own bounds hold for sampling as well."""

from typing import Annotated

from msgspec import Meta

from edge_rag.runtime.answering import MAX_QUESTION, MAX_TOP_K

Question = Annotated[str, Meta(min_length=1, max_length=MAX_QUESTION)]
Content = Annotated[str, Meta(max_length=200_000)]  # one message of a conversation, or instructions
Comment = Annotated[str, Meta(max_length=10_000)]
Name = Annotated[str, Meta(min_length=1, max_length=4096)]  # a path, a pattern, an id
TopK = Annotated[int, Meta(ge=1, le=MAX_TOP_K)]
MaxTokens = Annotated[int, Meta(ge=1, le=32_768)]
Temperature = Annotated[float, Meta(ge=0, le=5)]
TopP = Annotated[float, Meta(gt=0, le=1)]
MinP = Annotated[float, Meta(ge=0, le=1)]
Seed = Annotated[int, Meta(ge=0, le=4_294_967_294)]
StopString = Annotated[str, Meta(min_length=1, max_length=200)]
Stop = StopString | Annotated[tuple[StopString, ...], Meta(max_length=16)]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Score = Annotated[float, Meta(ge=0, le=1)]
Hot = Annotated[int, Meta(ge=1, le=1_000_000_000)]

MOST_TURNS = 200
MOST_NAMES = 30_000  # a statement of SQLite takes 32,766 values, and a shell hardly more paths
SomeNames = Annotated[tuple[Name, ...], Meta(min_length=1, max_length=MOST_NAMES)]
Names = Annotated[tuple[Name, ...], Meta(max_length=MOST_NAMES)]
