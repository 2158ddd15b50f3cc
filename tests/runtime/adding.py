"""`python -m tests.runtime.adding DATA FOLDER MODELS`: add FOLDER to the library DATA, telling each file stored.

A process of its own, so that tests can kill it, interrupt it and run it twice at once.
"""

import sys

from edge_rag.runtime.ingest import AddProgress
from edge_rag.runtime.rag import EdgeRAG


def tell(progress: AddProgress) -> None:
    """One line a file; flushed, because the reader acts on it."""
    print(progress.done, progress.current, flush=True)


def main() -> None:
    """Open, say so, add."""
    data, folder, models = sys.argv[1:]
    settings = {"models.llm": "smollm2-135m", "models.folder": models, "ingest.chunk_tokens": 32}
    with EdgeRAG.open(data, settings=settings) as rag:
        print("ready", flush=True)
        report = rag.add(folder, progress=tell)
        print("failed", len(report.failed), flush=True)


if __name__ == "__main__":
    main()
