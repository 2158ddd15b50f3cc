"""KV on the SSD: files and their rows under one quota. Reading is for any thread, all else for one.

The quota is shared by all processes on a data folder. Each keeps its own account of what is there
(`policy.eviction`), made from the rows, and makes it anew when the rows say that others have written too. What hits
have taught is written back now and then and at the end; losing it costs a few wrong victims.
"""

from collections.abc import Collection, Sequence
from typing import cast

from edge_rag.native.kv_blob import KVShape
from edge_rag.native.kv_codec import CODECS, Codec
from edge_rag.policy.eviction import Entry, StoredEntry, Tier
from edge_rag.runtime.kv_memory import Held
from edge_rag.store import kv_rows
from edge_rag.store.database import Database
from edge_rag.store.kv_files import KVFolder
from edge_rag.store.kv_format import KVFields

HEADER_BYTES = 2048  # about what a header takes: what a file really takes is known when it is written
TOUCHES = 64  # uses are written to the rows in batches


class KVDisk:
    """The SSD tier: files of one model (`space`) beside those of others."""

    def __init__(self, database: Database, folder: KVFolder, *, space: str, shape: KVShape, quota: int) -> None:
        self._database = database
        self._folder = folder
        self._space = space
        self._shape = shape
        self.tier = Tier(quota)
        self._touched: set[str] = set()

    def start(self) -> None:
        """Make rows and files agree and keep the quota. Raises StorageError."""
        with self._database.write() as connection:
            kv_rows.reconcile(connection, self._folder)
        self.take_stock()

    def size(self, key: str) -> int:
        """Bytes of a file, 0 when there is none. Does not read it."""
        try:
            return self._folder.path(key).stat().st_size
        except OSError:
            return 0

    def read(self, key: str) -> tuple[Held, int] | None:
        """A passage and the bytes of its file, or None: a miss."""
        stored = self._folder.read(key)
        if stored is None or stored.header.codec not in CODECS:
            return None
        header = stored.header
        return Held(cast(Codec, header.codec), header.tokens, stored.sections, header.seconds), header.size

    def write(self, key: str, chunk_id: int, held: Held, *, keep: Collection[str]) -> int:
        """Keep a passage; the bytes of its file, 0 when the quota has no room for it. Raises StorageError."""
        entry = Entry(key, held.bytes + HEADER_BYTES, held.seconds)
        offer = self.tier.offer(entry, keep=keep)
        if not offer.admitted:
            return 0
        try:
            self._remove(offer.victims)
            return self._write(key, chunk_id, held)
        finally:
            if not self.size(key):
                self.tier.remove(key)

    def _write(self, key: str, chunk_id: int, held: Held) -> int:
        fields = KVFields(
            key=key,
            chunk_id=chunk_id,
            space=self._space,
            tokens=held.tokens,
            layers=self._shape.layers,
            k_width=self._shape.k_width,
            v_width=self._shape.v_width,
            codec=held.codec,
            seconds=held.seconds,
        )
        size = self._folder.write(fields, held.sections)
        uses, priority = self.tier.stored(key)
        row = kv_rows.new_row(fields, generation=self._folder.generation, bytes=size, uses=uses, priority=priority)
        try:
            with self._database.write() as connection:
                kv_rows.put_row(connection, row)
                known = kv_rows.find(connection, key)
                total = kv_rows.totals(connection).bytes
        except BaseException:
            self._folder.remove(key)  # without a row it would stay when its document goes
            raise
        if not known:  # its document was removed while it was computed, and no other has the same text
            self._folder.remove(key)
            return 0
        if total > self.tier.capacity:  # other processes write here too, or headers took more than was thought
            self.take_stock()
        return size

    def used(self, keys: Sequence[str]) -> None:
        """Count a hit of each."""
        for key in keys:
            self.tier.use(key)
        self._touched.update(keys)
        if len(self._touched) >= TOUCHES:
            self.flush()

    def discard(self, key: str) -> None:
        """Remove a file that cannot be used, and its row."""
        self.tier.remove(key)
        self._remove([key])
        self._folder.remove(key)

    def flush(self) -> None:
        """Write what hits have taught to the rows. Raises StorageError."""
        values = {key: self.tier.stored(key) for key in self._touched if key in self.tier}
        self._touched.clear()
        if values:
            with self._database.write() as connection:
                kv_rows.touch(connection, values)

    def take_stock(self, keep: Collection[str] = ()) -> None:
        """Make the account anew from the rows, and keep the quota. Raises StorageError."""
        self.flush()
        with self._database.read() as connection:
            rows = kv_rows.rows(connection)
        entries = [
            # A file of another model saves nothing here, but does when that model is chosen again.
            StoredEntry(row.key, max(1, row.bytes), max(row.seconds, 1e-3), row.uses, row.priority)
            for row in rows
        ]
        self.tier = Tier(self.tier.capacity, entries=entries, memory=self.tier.memory())
        self._remove(self.tier.resize(self.tier.capacity, keep=keep))

    def _remove(self, keys: Collection[str]) -> None:
        """Rows first, files after the commit."""
        if keys:
            with self._database.write() as connection:
                kv_rows.remove_rows(connection, keys)
            with self._database.write() as connection:
                kv_rows.unlink_removed(connection, self._folder)

    def check(self) -> None:
        """Raise AssertionError unless the account is right and says what the rows say."""
        self.tier.check()
        with self._database.read() as connection:
            rows = {row.key for row in kv_rows.rows(connection)}
        assert rows == set(self.tier.keys()), "the SSD tier holds other files than its rows say"

    def faults(self) -> list[str]:
        """Disagreements between files and rows, in words."""
        with self._database.read() as connection:
            return list(kv_rows.check(connection, self._folder))
