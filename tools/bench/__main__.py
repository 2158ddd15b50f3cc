"""`python -m tools.bench NAME [--model M] [--data FILE ...] [--quick] [--json OUT]`.

The exit code is 0 also when a claim does not hold: this measures, it does not judge.
"""

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

from rich.console import Console

from edge_rag.config import load_settings
from tools.bench import (
    adapters,
    answers,
    clustering,
    codec,
    overhead,
    report,
    retrieval,
    router,
    serve,
    soak,
    splicing,
    throughput,
    ttft,
)
from tools.bench.libraries import model_folder

BENCHMARKS: dict[str, ModuleType] = {
    "retrieval": retrieval,
    "overhead": overhead,
    "answers": answers,
    "ttft": ttft,
    "codec": codec,
    "throughput": throughput,
    "splicing": splicing,
    "serve": serve,
    "soak": soak,
    "clustering": clustering,
    "adapters": adapters,
    "router": router,
}
OUTPUT = Path("build") / "bench"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m tools.bench", description="Measure what edge_rag promises.")
    names = top.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, module in BENCHMARKS.items():
        summary = (module.__doc__ or "").partition(": ")[2].split("\n")[0]
        sub = names.add_parser(name, help=summary, description=module.__doc__)
        sub.add_argument("--model", help="manifest name of the language model (default: the settings')")
        sub.add_argument("--data", type=Path, nargs="+", default=[], help="SQuAD files, folders (default: demo corpus)")
        sub.add_argument("--quick", action="store_true", help="a smoke run of about a minute; its numbers mean little")
        sub.add_argument("--json", type=Path, help=f"where the JSON goes (default: {OUTPUT}/NAME-MODEL.json)")
        module.add_options(sub)
    return top


def main() -> None:
    """Run one benchmark in a temporary folder, show it and write it."""
    options = parser().parse_args()
    settings = load_settings({"models.llm": options.model} if options.model else None)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a log file has room for whole rows
    # As Ctrl-C does: the temporary folder, which may hold gigabytes, is removed on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="edge_rag_bench_") as work:
        result = BENCHMARKS[options.name].run(options, settings, Path(work), console)
    report.show(console, options.name, result)
    target = options.json or OUTPUT / f"{options.name}-{settings.models.llm}.json"
    report.write(
        target,
        options.name,
        result,
        models=model_folder(settings),
        used={"llm": settings.models.llm, "embedder": settings.models.embedder},
        seconds=time.perf_counter() - started,
    )
    console.print(f"written: {target}")


if __name__ == "__main__":
    main()
