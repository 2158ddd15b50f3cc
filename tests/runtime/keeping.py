"""`python -m tests.runtime.keeping MODEL DATA SEED`: ask questions over the library DATA for ever, telling each answer.

A process of its own, so that tests can kill it while it computes, keeps, evicts and writes.
"""

import random
import sys
from pathlib import Path

from tests.runtime.serving import SAMPLING, Toy, running, toy_prompt

CHUNKS = 40
TOKENS = 200  # a passage; all of them take more than the quota
FLAGS = {"engine.n_ctx": 1024, "kv.disk_mb": 1, "kv.ram_mb": 1}


def main() -> None:
    """Ask about three random chunks again and again."""
    model, data, seed = sys.argv[1:]
    chance = random.Random(seed)
    with Toy(Path(model), gpu_layers=0) as loaded, running(loaded, Path(data), FLAGS) as started:
        print("ready", flush=True)
        while True:
            asked = toy_prompt(chance.sample(range(1, CHUNKS + 1), 3), tokens=TOKENS)
            list(started.engine.submit(asked, SAMPLING))
            print("answered", flush=True)


if __name__ == "__main__":
    main()
