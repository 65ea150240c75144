"""The search of test_fuzz.py under AddressSanitizer and UndefinedBehaviorSanitizer.

The CPU core is compiled with both into a temporary folder, which shows the rest of the tree through links. A read or
write outside of a tensor, a freed one, an overflow or an impossible cast ends the run with the line that did it.
``SSLFAST_SANITIZED_FUZZ=10000`` searches longer (calls of each op, through its public function and as registered).
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = int(os.environ.get("SSLFAST_SANITIZED_FUZZ", "150"))
SANITIZE = "-fsanitize=address,undefined,float-cast-overflow"


def run(*command: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # cmake and ninja of this environment
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
    assert done.returncode == 0, f"{' '.join(command[:3])} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


def link_tree(folder: Path) -> None:
    """The package without its compiled core, and the tests."""
    (folder / "sslfast").mkdir()
    for path in (ROOT / "sslfast").iterdir():
        if path.suffix != ".so" and path.name != "__pycache__":
            (folder / "sslfast" / path.name).symlink_to(path)
    (folder / "tests").symlink_to(ROOT / "tests")


def compile_core(folder: Path) -> None:
    """As setup.py does, with other flags."""
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_FLAGS": f"{SANITIZE} -fno-sanitize=vptr -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -w",
        "CMAKE_CXX_FLAGS_RELEASE": "-O1",
        "CMAKE_MODULE_LINKER_FLAGS": SANITIZE,
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": folder / "sslfast",
        "SSLFAST_TORCH_DIR": Path(torch.__file__).parent,
    }
    build = str(folder / "build")
    run("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", build, *(f"-D{name}={value}" for name, value in options.items()))
    run("cmake", "--build", build)


def test_search_under_sanitizers(tmp_path: Path) -> None:
    # libstdc++ too: the sanitizer looks for its exceptions when the process starts.
    libraries = [run("g++", f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so.6")]
    assert all(map(os.path.isabs, libraries)), "g++ has no sanitizers; install them (Debian and Ubuntu: libasan8)"
    link_tree(tmp_path)
    compile_core(tmp_path)
    trace = tmp_path / "call"
    environment = os.environ | {
        "SSLFAST_FUZZ": str(EXAMPLES),
        "LD_PRELOAD": " ".join(libraries),
        # Python and torch keep memory until the end; huge results are refused by the ops, not by the sanitizer.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:abort_on_error=1:detect_odr_violation=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
        "PYTHONPATH": str(tmp_path),
    }
    command = [sys.executable, "-m", "tests.ops.test_fuzz", str(trace)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    call = trace.read_text() if trace.exists() else "no call"
    assert done.returncode == 0, f"ended with {done.returncode} in {call}\n{done.stdout}\n{done.stderr[-6000:]}"
