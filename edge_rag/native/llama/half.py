"""Between float16 and float32 at memory speed: llama.cpp's own vectorised loops, or numpy where they are missing.

numpy converts value by value (.4 G values/s measured against 8.5); the loops are exported by ggml's CPU backend, which
the llama library has already loaded. Numbers that fill no vector are looked up in a table which is all zeros until the
backend is initialised, so it is initialised here, and the loops are taken only after they agreed with numpy. Both round
to the nearest even, and both turn what is past 65504 into an infinity.
"""

import ctypes
import functools
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
import numpy.typing as npt

from edge_rag.errors import EngineError

Half = npt.NDArray[np.float16]
Single = npt.NDArray[np.float32]

_Nothing = ctypes.c_char * 0


def to_half(values: Single, out: Half) -> None:
    """Write `values` into `out`, an array of the same shape. Raises EngineError unless both are C-contiguous."""
    _check(values, np.float32, out, np.float16)
    loop = _loops()[0]
    if loop:
        loop(_address(values), _address(out), values.size)
    else:
        with np.errstate(over="ignore"):
            out[...] = values


def to_single(values: Half, out: Single) -> None:
    """Write `values` into `out`, an array of the same shape. Raises EngineError unless both are C-contiguous."""
    _check(values, np.float16, out, np.float32)
    loop = _loops()[1]
    if loop:
        loop(_address(values), _address(out), values.size)
    else:
        out[...] = values


def _check(values: npt.NDArray[Any], source: type, out: npt.NDArray[Any], target: type) -> None:
    """The loops follow pointers: a wrong shape or type would overrun memory."""
    if values.shape != out.shape or values.dtype != source or out.dtype != target:
        raise EngineError(f"cannot convert {values.dtype} {values.shape} into {out.dtype} {out.shape}")
    if not (values.flags.c_contiguous and out.flags.c_contiguous and out.flags.writeable):
        raise EngineError("float16 conversion needs contiguous arrays and a writeable target")


def _address(array: npt.NDArray[Any]) -> int:
    """Where the numbers of a contiguous array lie. `array.ctypes` costs as much as converting 15,000 of them."""
    return ctypes.addressof(_Nothing.from_buffer(array.data)) if array.flags.writeable else array.ctypes.data


@functools.cache
def _loops() -> tuple[Any, Any]:
    """ggml's loops to float16 and to float32, or (None, None) when they are missing or wrong here."""
    try:
        loops = lib._lib.ggml_cpu_fp32_to_fp16, lib._lib.ggml_cpu_fp16_to_fp32
        lib._lib.ggml_cpu_init()
    except AttributeError:
        return None, None
    for loop in loops:
        loop.argtypes, loop.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    return loops if _agree(*loops) else (None, None)


def _agree(narrow: Any, widen: Any) -> bool:
    """Whether every float16 is widened, and narrowed again, as numpy does it: by the vector, and one here and there."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    return all(_returns(narrow, widen, part) for part in (halves, *halves[::1021, None]))


def _returns(narrow: Any, widen: Any, halves: Half) -> bool:
    singles, back = np.empty(halves.size, dtype=np.float32), np.empty_like(halves)
    widen(halves.ctypes.data, singles.ctypes.data, halves.size)
    narrow(singles.ctypes.data, back.ctypes.data, halves.size)
    return np.array_equal(singles, halves, equal_nan=True) and np.array_equal(back, halves, equal_nan=True)
