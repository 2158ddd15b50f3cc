"""What `tools/demo` and `tools/check` share: the virtual environment, the native build, models, timed stages.

Standard library only: this runs before anything is installed.
"""

import contextlib
import hashlib
import os
import platform
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOG = VENV / "install.log"
LLAMA = "llama-cpp-python==0.3.36"

# Parts of llama.cpp that are not used: without them the build is a quarter shorter.
UNUSED = ("LLAVA_BUILD", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_SERVER")
# What -march=native would enable, named one by one so that AMX can be left out (see `build_flags`).
CPU_FLAGS = {
    "avx": "AVX",
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "bmi2": "BMI2",
    "avx_vnni": "AVX_VNNI",
    "avx512bw": "AVX512",
    "avx512vbmi": "AVX512_VBMI",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
}


class Failure(Exception):
    """A stage did not succeed; the message says why and what to do."""


class Stages:
    """Times stages and reports them at the end. A failing stage ends the program unless told to go on."""

    def __init__(self) -> None:
        self._times: list[tuple[str, float, bool]] = []

    @property
    def failed(self) -> list[str]:
        """Names of the stages that failed."""
        return [name for name, _, fine in self._times if not fine]

    @contextlib.contextmanager
    def stage(self, name: str, *, go_on: bool = False) -> Iterator[None]:
        """Run the block as a stage."""
        say(f"\n== {name}")
        start, fine = time.monotonic(), False
        try:
            yield
            fine = True
        except Failure as failure:
            say(f"{name} failed: {failure}")
            if not go_on:
                raise SystemExit(1) from failure
        except KeyboardInterrupt:
            say("stopped; run the same command again to go on")
            raise SystemExit(130) from None
        finally:
            self._times.append((name, time.monotonic() - start, fine))

    def report(self) -> None:
        """Say how long each stage took."""
        say("\n== time")
        for name, seconds, fine in self._times:
            say(f"  {name:<26} {minutes(seconds):>8}{'' if fine else '   FAILED'}")


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def minutes(seconds: float) -> str:
    """A duration as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def python() -> str:
    """The environment's Python."""
    return binary("python")


def binary(name: str) -> str:
    """A command of the environment."""
    return str(VENV / "bin" / name)


def run(command: Sequence[str]) -> None:
    """Run a command from the root of the repository, its output shown."""
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        raise Failure(f"`{' '.join(Path(part).name for part in command[:3])}` ended with code {code}")


def prepare(extras: Sequence[str] = ()) -> None:
    """Make or complete the environment; done at once when nothing has changed since."""
    stamp = VENV / f"{'-'.join(('installed', *extras))}.stamp"
    if stamp.is_file() and stamp.read_text() == _digest():
        say("ready")
        return
    if not Path(python()).is_file():
        say("making .venv")
        venv.create(VENV, with_pip=True, clear=VENV.exists())
    if not _has_llama():
        _install(
            [LLAMA],
            "building llama.cpp: 4 to 8 minutes on two cores (seconds when pip has it cached)",
            {"CMAKE_ARGS": build_flags()},
        )
    target = f".[{','.join(extras)}]" if extras else "."
    _install(["-e", target], "installing edge_rag and its packages", {})
    stamp.write_text(_digest())


def pull_models(llm: str) -> None:
    """Fetch the language model and the embedder; at once when they are here."""
    run([binary("edge-rag"), "models", "pull", llm, "all-minilm-l6-v2"])


def build_flags() -> str:
    """CMake arguments for llama.cpp; the user's own CMAKE_ARGS (for CUDA, say) win.

    ggml's AMX kernels, which -march=native turns on, die by an illegal instruction when built with gcc (llama.cpp pull
    request 26954). On a processor with AMX everything else is therefore turned on by name.
    """
    if own := os.environ.get("CMAKE_ARGS"):
        return own
    flags = [f"-D{part}=OFF" for part in UNUSED]
    features = _cpu_features()
    if "amx_tile" in features:
        flags.append("-DGGML_NATIVE=OFF")
        flags += [f"-DGGML_{name}=ON" for feature, name in CPU_FLAGS.items() if feature in features]
    return " ".join(flags)


def _cpu_features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def _has_llama() -> bool:
    """Whether the pinned llama.cpp is installed; asked of the metadata, without loading it."""
    question = "import importlib.metadata as m; print(m.version('llama-cpp-python'))"
    told = subprocess.run([python(), "-c", question], capture_output=True, text=True, check=False)
    return told.stdout.strip() == LLAMA.partition("==")[2]


def _install(packages: Sequence[str], what: str, environment: dict[str, str]) -> None:
    """pip install, its output in a log, a clock on the terminal."""
    say(what)
    command = [python(), "-m", "pip", "install", "--disable-pip-version-check", *packages]
    with LOG.open("ab") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment
        )
        try:
            _wait(process)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        raise Failure(_why())


def _wait(process: "subprocess.Popen[bytes]") -> None:
    start, interactive = time.monotonic(), sys.stdout.isatty()
    step = 1 if interactive else 30
    while True:
        try:
            process.wait(timeout=step)
            break
        except subprocess.TimeoutExpired:
            passed = minutes(time.monotonic() - start)
            print(f"\r  {passed}" if interactive else f"  still at it after {passed}", end="" if interactive else "\n")
            sys.stdout.flush()
    say(("\r" if interactive else "") + f"  done in {minutes(time.monotonic() - start)}")


def _why() -> str:
    """The end of the log, and what to do in the usual cases."""
    text = LOG.read_text(errors="replace")
    tail = "\n".join("  | " + line for line in text.splitlines()[-12:])
    remedies = (
        ("CMAKE_C_COMPILER", "a C++ compiler is missing: install build-essential (or gcc and g++)"),
        ("CMAKE_CXX_COMPILER", "a C++ compiler is missing: install build-essential (or gcc and g++)"),
        ("Python.h", "Python's headers are missing: install python3-dev"),
        ("No space left", "the disk is full"),
        ("Temporary failure in name resolution", "there is no network"),
        ("Could not find a version", "a package was not found: is there a network?"),
    )
    remedy = next((words for sign, words in remedies if sign in text), "the log tells more")
    return f"{remedy}\n{tail}\n  whole log: {LOG}"


def _digest() -> str:
    """Changes when the environment has to be made anew."""
    parts = [(ROOT / "pyproject.toml").read_bytes(), platform.python_version().encode(), str(ROOT).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
