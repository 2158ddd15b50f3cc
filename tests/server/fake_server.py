"""`python -m tests.server.fake_server FOLDER SOCKET DRAIN`: `serve` over a fake library, as a process of its own.

Each line on stdin opens a gate: "load" lets the models be loaded, others let the question of that name be answered.
"No model" makes loading fail, "Engine" the engine. The last line on stdout says whether the library was closed.
"""

import sys
import threading
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from edge_rag.errors import EdgeRAGError, ModelMissing
from edge_rag.records import Passage
from edge_rag.server import serve as serving
from tests.server.fakes import ENGINE, FakeRAG


class Gated(FakeRAG):
    """Its models load when they are let."""

    def __init__(self, folder: Path, **flags: object) -> None:
        super().__init__(folder, **flags)
        self.gates = {name: threading.Event() for name in ("load", "slow?")}
        self.no_model = False

    def load(self) -> None:
        self.gates["load"].wait()
        if self.no_model:
            raise ModelMissing("is not on this machine", field="fake", remedy="run `edge-rag models pull`")

    def search(self, query: str, **options: Any) -> list[Passage]:
        if query in self.gates:
            self.gates[query].wait()
        return super().search(query, **options)

    def listen(self) -> None:
        """Open the gates that stdin names."""
        for line in sys.stdin:
            name = line.strip()
            if name == "Engine":
                self.engine = replace(ENGINE, failure="the engine failed: a bug")
                continue
            self.no_model = name == "No model"
            self.gates["load" if self.no_model else name].set()


def main() -> int:
    """Serve."""
    folder, socket, drain = sys.argv[1:]
    rag = Gated(Path(folder), server__uds=socket, server__drain=drain)
    threading.Thread(target=rag.listen, daemon=True).start()
    serving.LAST_WORDS = 1.0
    try:
        code = serving.serve(rag)  # type: ignore[arg-type]
    except EdgeRAGError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    print("closed" if rag.is_closed else "open")
    return code


if __name__ == "__main__":
    sys.exit(main())
