"""Trains prepared jobs where there is a GPU and little else: `python -m tools.bench.train_jobs SITE MODEL CACHE`.

SITE is the folder of `adapters` after its part `jobs`: all job folders below it are done, one after the other, with the
model's file at MODEL. Needs torch and the trainer's libraries, neither llama.cpp nor a library of documents. With
--minutes it ends in time; checkpoints are kept, and the same call goes on. What comes back to the machine that prepared
the jobs are the files adapter.gguf, proof.npz and result.json of each folder.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from msgspec.structs import replace

from edge_rag.learning.child import Child
from edge_rag.learning.events import Failed, Step
from edge_rag.learning.job import JOB, RESULT, read_job

PRAG, SEQUENCES = "prag", "sequences.npz"  # the folder of P-RAG's job, and what it learns from
ENDING = 60.0  # seconds that a checkpoint may take


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m tools.bench.train_jobs", description=__doc__)
    made.add_argument("site", type=Path)
    made.add_argument("model", type=Path)
    made.add_argument("cache", type=Path, help="for dequantised weights")
    made.add_argument("--minutes", type=float, default=float("inf"))
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--only", default="*/*", help="glob of folders below SITE (default: all)")
    return made


def move_job(folder: Path, model: Path, cache: Path, device: str) -> None:
    """Make a job one of this machine: its model, cache and memory are here."""
    job = replace(read_job(folder), model=str(model.absolute()), cache=str(cache.absolute()), memory=0, device=device)
    (folder / JOB).write_bytes(msgspec.json.encode(job))


def train(folder: Path, until: float) -> str:
    """Do one job, as far as time allows; what became of it."""
    if folder.name == PRAG:
        made = subprocess.run([sys.executable, "-m", "tools.bench.prag", str(folder)], check=False)
        return "done" if made.returncode == 0 else "failed"
    last = ""
    with Child(folder) as child:
        child.start()
        for event in child.events():
            if isinstance(event, Failed):
                return f"failed: {event.reason} ({event.remedy})"
            if isinstance(event, Step):
                last = f"step {event.step} of {event.steps}, loss {event.loss:.3f}, {event.seconds:.0f} s"
                if time.monotonic() >= until:
                    child.stop()
        child.wait(ENDING)
    return last


def main() -> None:
    """Do all jobs."""
    options = parser().parse_args()
    until = time.monotonic() + 60 * options.minutes
    files = [file for depth in ("", "*/") for file in sorted(options.site.glob(f"{options.only}/{depth}{JOB}"))]
    for file in files:
        folder = file.parent
        if time.monotonic() < until and not (folder / RESULT).exists():
            move_job(folder, options.model, options.cache, options.device)
            print(f"{folder}: {train(folder, until)}", flush=True)


if __name__ == "__main__":
    main()
