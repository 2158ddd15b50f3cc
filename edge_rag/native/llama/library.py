"""The llama.cpp library: loaded once, its log kept instead of printed, its last complaints put into our errors."""

import ctypes
import functools
import logging
from collections import deque

import llama_cpp
import llama_cpp.llama_cpp as lib

logger = logging.getLogger(__name__)

_recent: deque[str] = deque(maxlen=64)


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_log(_level: int, text: bytes | None, _user_data: object) -> None:
    line = (text or b"").decode("utf-8", "replace").rstrip()
    if line and line != ".":
        _recent.append(line)
        logger.debug("%s", line)  # what matters of it becomes part of an error of ours


@functools.cache
def start() -> None:
    """Initialise the backends and take over the log. Idempotent."""
    lib.llama_log_set(_keep_log, ctypes.c_void_p(0))
    lib.llama_backend_init()


def clear_log() -> None:
    """Forget recent log lines, so that the next complaint belongs to the next call."""
    _recent.clear()


def complaints() -> str:
    """Recent log lines that tell of a failure, joined; '' when there are none."""
    words = ("error", "fail", "unable", "invalid", "unknown", "magic", "unsupported", "corrupt")
    lines = [line for line in _recent if any(word in line.lower() for word in words)]
    return "; ".join(dict.fromkeys(lines[-3:]))


def versions() -> dict[str, str]:
    """Versions of the binding and whether the library can use a GPU."""
    start()
    return {
        "llama_cpp_python": llama_cpp.__version__,
        "gpu_offload": "yes" if has_gpu() else "no",
    }


def has_gpu() -> bool:
    """Whether this build can compute on a GPU."""
    start()
    return bool(lib.llama_supports_gpu_offload())


@functools.cache
def amx_is_broken() -> bool:
    """Whether repacked weight buffers must stay off, because this build would die by SIGILL on the first decode.

    ggml's AMX kernels load their tile configuration from a stack object that gcc optimises away, so a build with
    -march=native on an AMX machine crashes (llama.cpp pull request 26954, open for the pinned version). AMX cannot be
    switched off alone at run time; without it and its fellow layouts prefill is slower but right. `tools/demo` builds
    without AMX in the first place.
    """
    start()
    return b"AMX_INT8 = 1" in lib.llama_print_system_info()
