"""CUDA kernels on the CPU: compiles csrc/cuda/<op>.cu with g++ against `include/` and runs it on CPU tensors.

`include/` implements the needed part of CUDA on the host: the blocks of a launch run one after another, the threads of
a block as fibers whose order is drawn from a number. Missing barriers show as wrong results; divergence at barriers,
addresses outside of memory, misaligned vector accesses and writes outside of tensors are errors that name the thread.
Speed and memory ordering between running blocks are not emulated.
"""

import ctypes
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = Path(__file__).resolve().parent / "include"
CACHE = ROOT / "build" / "cuda_emulation"
KEPT_VERSIONS = 4
# Checked while a kernel runs, beside what the emulation checks itself; a failed check is an illegal instruction.
CHECKS = "alignment,bounds-strict,shift,integer-divide-by-zero,signed-integer-overflow"
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-w", "-fPIC", "-shared", "-fvisibility=hidden"),
    *(f"-fsanitize={CHECKS}", "-fsanitize-undefined-trap-on-error", "-ftrivial-auto-var-init=pattern"),
    *("-U_FORTIFY_SOURCE", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DSSLFAST_EMULATE_CUDA"),
]


def source_of(op: str) -> Path:
    return ROOT / "csrc" / ("library.cpp" if op == "library" else f"cuda/{op}.cu")


@cache
def compiler_version() -> str:
    if shutil.which("g++") is None:
        raise RuntimeError("running CUDA kernels on the CPU needs g++; install it (Debian and Ubuntu: g++)")
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def command_of(source: Path, target: Path) -> list[str]:
    """SSLFAST_EMULATION_FLAGS adds flags, "-O0 -g" for a debugger."""
    torch_dir = Path(torch.__file__).parent
    return [
        *("g++", *FLAGS, *os.environ.get("SSLFAST_EMULATION_FLAGS", "").split()),
        *("-I", str(INCLUDE), "-I", str(ROOT / "csrc"), "-isystem", str(torch_dir / "include")),
        *("-include", "registration.h", "-x", "c++", str(source), "-x", "none", "-o", str(target)),
        str(torch_dir / "lib" / "libtorch_cpu.so"),
    ]


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"


def find_compiled(source: Path, key: str) -> Path | None:
    """The cached library whose inputs, as listed by the compiler, are unchanged."""
    for listing in sorted(CACHE.glob(f"{source.stem}-*.json")):
        made_from = json.loads(listing.read_text())
        if made_from["key"] == key and all(digest_of(Path(path)) == sha for path, sha in made_from["files"].items()):
            return listing.with_suffix(".so")
    return None


def compile_source(source: Path) -> Path:
    """Compiles unless a cached library fits; one process at a time, since test runs may share the folder."""
    key = repr((compiler_version(), torch.__version__, command_of(source, Path("x"))))
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{source.stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if found := find_compiled(source, key):
            return found
        partial, listing = CACHE / f"{source.stem}.partial", CACHE / f"{source.stem}.d"
        done = subprocess.run(
            [*command_of(source, partial), "-MMD", "-MF", str(listing)], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile for the CPU emulation:\n{done.stderr}")
        # "target: file file \\ file": the listing leaves out what came with -isystem.
        paths = listing.read_text().replace("\\\n", " ").split(":", 1)[1].split()
        made_from = {"key": key, "files": {str(Path(path).resolve()): digest_of(Path(path)) for path in paths}}
        text = json.dumps(made_from, indent=1)
        target = CACHE / f"{source.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
        partial.rename(target)
        target.with_suffix(".json").write_text(text)
        versions = sorted(CACHE.glob(f"{source.stem}-*.so"), key=lambda path: path.stat().st_mtime)
        for old in versions[:-KEPT_VERSIONS]:
            old.with_suffix(".json").unlink(missing_ok=True)
            old.unlink()
    return target


_loaded: dict[Path, ctypes.CDLL] = {}


def load(sources: Sequence[Path]) -> list[ctypes.CDLL]:
    """Libraries of the sources, compiled side by side where needed, loaded once."""
    fresh = [source for source in sources if source not in _loaded]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for source, path in zip(fresh, pool.map(compile_source, fresh), strict=True):
            torch.ops.load_library(path)
            _loaded[source] = ctypes.CDLL(str(path))
    return [_loaded[source] for source in sources]


def configure(library: ctypes.CDLL, *, order: int = 0, multiprocessors: int = 2, compute_capability: int = 80) -> None:
    library.cuda_emulation_configure(ctypes.c_uint64(order), multiprocessors, compute_capability)


def emulate(op: str, *args: Any, **device: int) -> Any:
    """Runs csrc/cuda/<op>.cu on CPU tensors; arguments as in the schema.

    Args:
        device: `order` of threads and blocks (0: as numbered, 1: threads backwards, other numbers: seeds),
            `multiprocessors`, `compute_capability` (80 for 8.0).
    """
    _, library = load([source_of("library"), source_of(op)])
    configure(library, **device)
    return getattr(torch.ops.sslfast_emulated, op)(*args)


def fence(tensor: Tensor, *, at_end: bool = True) -> Tensor:
    """A copy whose last byte (or first, where not `at_end`) touches an inaccessible page."""
    page = mmap.PAGESIZE
    num_bytes = tensor.numel() * tensor.element_size()
    inner = (num_bytes + page - 1) // page * page
    memory = mmap.mmap(-1, inner + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for start in (address, address + page + inner):
        if libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    if num_bytes == 0:
        return tensor.clone()
    offset = page + (inner - num_bytes if at_end else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)
