"""What all records are."""

from msgspec import Struct


class Record(Struct, frozen=True):
    """Base of all records: immutable, comparable, serialisable to JSON by msgspec."""
