"""The binary finds the functions of libtorch_cuda that it needs without linking it; no GPU needed."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCE = """
#include "common/torch_cuda.h"
extern "C" bool has(const char* name) { return sslfast::torch_cuda_symbol(name) != nullptr; }
"""


def test_torch_functions_are_found(tmp_path: Path) -> None:
    """Like the extension: linked to libtorch_cpu only, loaded after torch with local visibility."""
    assert shutil.which("g++"), "install g++"
    (tmp_path / "symbol.cpp").write_text(SOURCE)
    torch_cpu = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    library = tmp_path / "symbol.so"
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-I", str(ROOT / "csrc"), str(tmp_path / "symbol.cpp")]
    subprocess.run([*command, "-o", str(library), "-Wl,--no-as-needed", str(torch_cpu)], check=True)
    has = ctypes.CDLL(str(library)).has
    has.restype = ctypes.c_bool
    assert has(b"aoti_torch_get_current_cuda_stream") == (torch.version.cuda is not None)
    assert not has(b"aoti_torch_no_such_function")
