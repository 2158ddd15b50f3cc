"""What tests of kept KV share: keys, and what is said of a small passage."""

from typing import Any

from edge_rag.store.kv_format import KVFields


def key(number: int) -> str:
    return f"{number:064x}"


def fields(number: int = 1, chunk_id: int = 7, **changes: Any) -> KVFields:
    values: dict[str, Any] = {
        "key": key(number),
        "chunk_id": chunk_id,
        "space": "model",
        "tokens": 3,
        "layers": 2,
        "k_width": 64,
        "v_width": 32,
        "codec": "q8",
        "seconds": 0.25,
    }
    return KVFields(**values | changes)
