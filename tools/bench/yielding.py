"""How soon idle work makes way: a request arrives while a passage's KV is being computed, at random moments."""

import random
import threading
import time
from statistics import median

from edge_rag.records import Sampling
from edge_rag.runtime.generations import Finished
from edge_rag.runtime.requests import Desk
from tools.bench.kv import AMPLE_MB, Bench, Serving
from tools.bench.metrics import percentile
from tools.bench.report import Row

ARRIVALS, QUICK_ARRIVALS = 20, 4
LATEST = 0.5  # seconds into the idle work


def yield_row(bench: Bench, arrivals: int) -> Row:
    """Milliseconds from `submit` to the start of a request that interrupts idle work, of so many."""
    rng = random.Random(0)
    with bench.serving(ram_mb=AMPLE_MB) as serving:
        waits = [_wait(bench, serving, rng.uniform(0, LATEST)) for _ in range(arrivals)]
    return {
        "table": "a request during idle work",
        "arrivals": arrivals,
        "median ms": 1000 * median(waits),
        "95 % ms": 1000 * percentile(waits, 0.95),
        "most ms": 1000 * max(waits),
    }


def _wait(bench: Bench, serving: Serving, moment: float) -> float:
    begun, enough = threading.Event(), threading.Event()
    prompt = bench.prompt([0])

    def work(desk: Desk) -> None:
        while not enough.is_set():
            begun.set()
            desk.assembler.compute(prompt.prefix, prompt.passages[0], 0, desk.decode)

    done = serving.engine.when_idle(work)
    begun.wait()
    time.sleep(moment)  # the arrival is to be random
    enough.set()
    steps = serving.engine.submit(prompt, Sampling(max_tokens=1))
    queued = next(step.queued for step in steps if isinstance(step, Finished))
    done.result()
    return queued
