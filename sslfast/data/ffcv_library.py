"""FFCV's compiled JPEG decoder, without FFCV's Python side."""

import ctypes
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path

HEADERS = "apt-get install -y libturbojpeg0-dev libopencv-dev pkg-config g++"
PINS = "pip install ffcv==1.0.2 opencv-python==5.0.0.93 numba==0.68.1 llvmlite==0.50.0"

Decode = Callable[[int, int, int, int, int, int], int]
"""``decode(source, bytes, height, width, target, factor)`` decodes a whole JPEG to RGB at 1 / factor of its size.
``source`` and ``target`` are addresses; ``factor`` is 1, 2, 4 or 8. Returns 0 on success; anything else is an error or
a warning of the decoder. Runs without the interpreter lock."""


@functools.cache
def find_library() -> Path | None:
    """The shared library inside the installed package ``ffcv``, which is not imported."""
    spec = importlib.util.find_spec("ffcv")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(folder).glob("_libffcv*.so")):
            return path
    return None


@functools.cache
def load_decoder() -> Decode:
    """The decoder; ImportError with the remedy if it cannot be loaded."""
    usable, reason, remedy = status()
    if not usable:
        raise ImportError(f"{reason}; {remedy}")
    call = ctypes.CDLL(str(find_library())).imdecode
    call.restype = ctypes.c_int
    call.argtypes = [ctypes.c_void_p, ctypes.c_uint64, *2 * [ctypes.c_uint32], ctypes.c_void_p]
    call.argtypes += [*6 * [ctypes.c_uint32], ctypes.c_bool, ctypes.c_bool]

    def decode(source: int, size: int, height: int, width: int, target: int, factor: int) -> int:
        return int(call(source, size, height, width, target, height, width, 0, 0, 1, factor, False, False))

    return decode


def status() -> tuple[bool, str, str]:
    """Usable, reason, remedy: see :func:`sslfast.loaders.loader_status`."""
    path = find_library()
    if path is None:
        return False, "Python package 'ffcv' is not installed", f"{HEADERS} && {PINS}"
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        # "libopencv_core.so.406: cannot open shared object file: ..."
        missing = " ".join(str(error).split())
        return False, f"ffcv's compiled part cannot be loaded ({missing})", f"{HEADERS} && {PINS} --force-reinstall"
    return True, f"ffcv {importlib.metadata.version('ffcv')}", ""
