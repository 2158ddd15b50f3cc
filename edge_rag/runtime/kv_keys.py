"""Names of KV: everything that the content of a passage's KV depends on, hashed.

Nothing else is checked when a state is put into llama.cpp, so whatever is left out here would be a wrong answer
one day: model content, versions, layout and type of the cache, rotation, prompt layout, the prefix and the passage's
own tokens.
"""

import hashlib
from collections.abc import Sequence

import msgspec
import numpy as np
from msgspec import Struct

from edge_rag.native.kv_blob import LAYOUT
from edge_rag.native.llama.geometry import Geometry
from edge_rag.policy.prompt import LAYOUT_VERSION


class Space(Struct, frozen=True):
    """What all KV of one model have in common. `model` is the sha256 of its file, `engine` llama.cpp's version.

    `geometry` None: its passages cannot be moved, and only whole states are kept, in memory.
    """

    model: str
    engine: str
    geometry: Geometry | None

    @property
    def generation(self) -> str:
        """What must be the same for a file to be readable at all."""
        return f"{self.engine}, state {LAYOUT}, prompt {LAYOUT_VERSION}"

    @property
    def name(self) -> str:
        """sha256 of all of it."""
        return hashlib.sha256(self.generation.encode() + msgspec.json.encode(self)).hexdigest()

    def key(self, prefix: Sequence[int], passage: Sequence[int] = (), *, kind: str = "passage") -> str:
        """The key of a passage (or another kind of text) behind `prefix`; of the prefix when there is no passage."""
        digest = hashlib.sha256(f"{self.name} {kind}".encode())
        for tokens in (prefix, passage):
            digest.update(len(tokens).to_bytes(8, "little"))
            digest.update(np.asarray(tokens, dtype="<i4").tobytes())
        return digest.hexdigest()
