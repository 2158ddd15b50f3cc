"""The bytes of a KV file, version 1: preamble, header, sections. docs/format.md describes them for other programs.

Everything here is about bytes in memory; `kv_files` moves them to and from the disk. Checksums are xxh3 (64 bits): they
find damage, not forgery. Keys are sha256: they say which content a file holds.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import xxhash
import zstandard
from msgspec import Meta, Struct

from edge_rag.records import Record

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

MAGIC = b"EDGERAGK"
VERSION = 1
ALIGNMENT = 64  # a cache line, and enough for any vector load
PREAMBLE = struct.Struct("<8sIIQ")  # magic, version, length of the header, xxh3 of the header
PIECE = 32 * 1024  # a section larger than four of them is compressed only when four of them promise a gain
WORTH = 0.9  # of the size: compressed sections must be at most so large, else reading them costs more than it saves

Natural = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Sections = Mapping[str, "ReadableBuffer"]


class NotOurs(Exception):
    """The bytes are no KV file that we can use; the text says why. To the rest of the program this is a miss."""


class KVFields(Record, frozen=True, kw_only=True):
    """What the caller says about a file. `key` is the sha256, in hex, of everything that its content depends on.

    chunk_id: the chunk it was computed for; 0 for the prompt's constant prefix, which belongs to no document.
    space: names the model and its settings. seconds: what computing it took. tokens, layers, k_width and v_width
    (values a token and layer) give the shape of the decoded keys and values; codec says how sections encode them.
    """

    key: str
    chunk_id: Natural
    space: str
    tokens: Natural
    layers: Natural
    k_width: Natural
    v_width: Natural
    codec: str
    seconds: float


class KVSection(Record, frozen=True):
    """A stretch of the file: `stored` bytes from `offset` on (xxh3 of them, in hex); `size` bytes once decompressed."""

    name: str
    offset: Natural
    stored: Natural
    size: Natural
    compression: Literal["none", "zstd"]
    xxh3: str


class KVHeader(KVFields, frozen=True, kw_only=True):
    """The header of a file: the caller's fields, whose it is, and where its sections are.

    library: the id of the library it belongs to. generation: names what makes states unusable for ever when it changes.
    """

    library: str
    generation: str
    sections: Annotated[tuple[KVSection, ...], Meta(min_length=1)]

    @property
    def start(self) -> int:
        """Where the sections begin."""
        return self.sections[0].offset

    @property
    def size(self) -> int:
        """Bytes of the whole file: it ends with its last section."""
        return self.sections[-1].offset + self.sections[-1].stored


class Packed(Struct, frozen=True):
    """A section as it will be stored; its place is not known yet."""

    name: str
    data: memoryview
    size: int
    compression: Literal["none", "zstd"]


# --- writing ---------------------------------------------------------------------------------------------------------


def pack(name: str, content: "ReadableBuffer", level: int) -> Packed:
    """A section of `content` (C-contiguous, any shape), compressed with zstd when that saves a tenth or more.

    Level 0 never compresses.
    """
    view = memoryview(content)
    data = view.cast("B") if view.nbytes else memoryview(b"")
    if not level:
        return Packed(name, data, len(data), "none")
    # The context is made anew each time: it must not be shared by threads.
    compressor = zstandard.ZstdCompressor(level=level)
    if _pays(compressor.compress(_sample(data)), min(len(data), 4 * PIECE)):
        packed = compressor.compress(data)
        if _pays(packed, len(data)):
            return Packed(name, memoryview(packed), len(data), "zstd")
    return Packed(name, data, len(data), "none")


def _pays(packed: bytes, size: int) -> bool:
    return len(packed) <= WORTH * size


def _sample(data: memoryview) -> bytes | memoryview:
    """Four pieces from all over the section, or all of a small one."""
    if len(data) <= 4 * PIECE:
        return data
    starts = [n * (len(data) - PIECE) // 3 for n in range(4)]
    return b"".join(data[start : start + PIECE] for start in starts)


def lay_out(fields: KVFields, library: str, generation: str, packed: Sequence[Packed]) -> tuple[KVHeader, bytes]:
    """The header of a file with these sections, and all bytes before the first of them.

    Offsets count from the start of the file, behind a header whose length depends on them: they are found by trying
    again from the header's new end, which only grows, until it stays.
    """
    checksums = [xxhash.xxh3_64_hexdigest(section.data) for section in packed]
    start = 0
    while True:
        header = KVHeader(
            **msgspec.structs.asdict(fields),
            library=library,
            generation=generation,
            sections=tuple(_placed(packed, checksums, start)),
        )
        text = msgspec.json.encode(header)
        end = aligned(PREAMBLE.size + len(text))
        if end == start:
            preamble = PREAMBLE.pack(MAGIC, VERSION, len(text), xxhash.xxh3_64_intdigest(text))
            return header, (preamble + text).ljust(start, b"\0")
        start = end


def _placed(packed: Sequence[Packed], checksums: Sequence[str], start: int) -> Iterator[KVSection]:
    offset = start
    for section, checksum in zip(packed, checksums, strict=True):
        stored = len(section.data)
        yield KVSection(section.name, offset, stored, section.size, section.compression, checksum)
        offset = aligned(offset + stored)


def aligned(offset: int) -> int:
    """The first multiple of ALIGNMENT that is not before `offset`."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


# --- reading ---------------------------------------------------------------------------------------------------------


def header_end(head: bytes) -> int:
    """Where the header ends, from the first bytes of a file. Raises NotOurs."""
    if len(head) < PREAMBLE.size:
        raise NotOurs("it ends before its header")
    magic, version, length, _ = PREAMBLE.unpack_from(head)
    if magic != MAGIC:
        raise NotOurs("it is no KV file")
    if version != VERSION:
        raise NotOurs(f"it has version {version} of the format")
    return PREAMBLE.size + int(length)


def parse_header(head: bytes) -> KVHeader:
    """The header that stands in the first bytes of a file, of which there must be enough. Raises NotOurs."""
    text = head[PREAMBLE.size : header_end(head)]
    if xxhash.xxh3_64_intdigest(text) != PREAMBLE.unpack_from(head)[3]:
        raise NotOurs("its header is damaged")
    try:
        header = msgspec.json.decode(text, type=KVHeader)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NotOurs(f"its header cannot be understood ({error})") from error
    _check_places(header, PREAMBLE.size + len(text))
    return header


def _check_places(header: KVHeader, end: int) -> None:
    """Raise NotOurs unless the sections are aligned, in order, behind the header, and have names of their own."""
    for section in header.sections:
        if section.offset != aligned(end) or (section.compression == "none" and section.stored != section.size):
            raise NotOurs("its sections are misplaced")
        end = section.offset + section.stored
    if len({section.name for section in header.sections}) < len(header.sections):
        raise NotOurs("two of its sections have one name")


def unpack(section: KVSection, data: memoryview) -> memoryview:
    """The content of a section from its stored bytes, read-only: a view of `data` unless it was compressed.

    Raises NotOurs when the checksum is wrong.
    """
    if xxhash.xxh3_64_hexdigest(data) != section.xxh3:
        raise NotOurs(f"section {section.name!r} is damaged")
    if section.compression == "none":
        return data.toreadonly()
    try:
        content = zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise NotOurs(f"section {section.name!r} cannot be decompressed ({error})") from error
    if len(content) != section.size:
        raise NotOurs(f"section {section.name!r} has another size than its header says")
    return memoryview(content)
