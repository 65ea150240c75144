"""Compiles the kernels of csrc/cuda for a GPU that need not be there: cubins, registers, shared memory, SASS.

Needs nvcc, and cuobjdump (of the CUDA toolkit, or the one that ships inside triton).
"""

import importlib.util
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.sass import Instruction, disassemble

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90a", "100")
_MAX_THREADS = 5  # EIATTR_MAX_THREADS of a kernel's .nv.info: its launch bounds


def ops() -> list[str]:
    """The sources of csrc/cuda."""
    return sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))


@dataclass(frozen=True, kw_only=True)
class Tools:
    """The compiler and the disassembler."""

    nvcc: str
    cuobjdump: str

    @classmethod
    def find(cls) -> "Tools":
        """SystemExit where one is missing."""
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            raise SystemExit("sslfast: nvcc was not found; put the CUDA toolkit's bin folder on PATH")
        beside = Path(nvcc).resolve().parent / "cuobjdump"
        found = str(beside) if beside.is_file() else shutil.which("cuobjdump")
        spec = importlib.util.find_spec("triton")
        if found is None and spec is not None and spec.submodule_search_locations:
            inside = Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
            found = str(inside) if inside.is_file() else None
        if found is None:
            raise SystemExit(
                "sslfast: cuobjdump was not found; it comes with the CUDA toolkit, or with pip install triton"
            )
        return cls(nvcc=nvcc, cuobjdump=found)

    def version(self) -> str:
        """nvcc's, as 13.0.88."""
        release = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        return re.findall(r"V([\d.]+)", release)[0]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel as compiled for one architecture."""

    op: str
    arch: str
    name: str
    """Readable, with template arguments, without namespaces."""
    registers: int
    shared_bytes: int
    """Static; tiles of the dense kernels are dynamic."""
    spill_bytes: int
    threads: int | None
    """Of a block, from its launch bounds; None where it has none."""
    code: list[Instruction]


def compile_kernels(tools: Tools, op: str, arch: str, folder: Path) -> list[Kernel]:
    """Every kernel of a source.

    Raises:
        SystemExit: it does not compile, or warpgroup products run one after the other (the compiler only advises).
    """
    cubin = folder / f"{op}_{arch}.cubin"
    source = ROOT / "csrc" / "cuda" / f"{op}.cu"
    log = _run(
        [
            *_command(tools, ROOT / "csrc", arch),
            "-Werror=all-warnings",
            "-cubin",
            "-Xptxas=-v",
            str(source),
            "-o",
            str(cubin),
        ],
        op,
    )
    return list(_kernels(tools, op, arch, cubin, log))


def compile_named(tools: Tools, op: str, arch: str, names: list[str], folder: Path) -> list[Kernel]:
    """Only the kernels of these readable names: much faster than all.

    The sources are copied with a dispatch over dtypes that instantiates nothing, and functions that refer to the
    kernels.

    Raises:
        SystemExit: there is no such kernel.
    """
    tree = folder / f"{op}_{arch}"
    shutil.copytree(ROOT / "csrc", tree)
    dispatch, source = tree / "common" / "dispatch.h", tree / "cuda" / f"{op}.cu"
    text, changed = re.subn(
        r"#define SSLFAST_DISPATCH_FLOAT(?:.*\\\n)*.*\n",
        "#define SSLFAST_DISPATCH_FLOAT(TYPE, NAME, ...) (void)0\n",
        dispatch.read_text(),
    )
    if changed != 1:
        raise SystemExit(f"sslfast: {dispatch} does not define SSLFAST_DISPATCH_FLOAT as expected; see compile_named")
    dispatch.write_text(text)
    types = {"bf16": "c10::BFloat16", "fp16": "c10::Half", "fp32": "float", "fp64": "double"}
    wanted = [re.sub(r"\b(bf16|fp16|fp32|fp64)\b", lambda match: types[match[1]], name) for name in names]
    uses = "\n".join(f"void* probe_{i}() {{ return (void*)({name}); }}" for i, name in enumerate(wanted))
    source.write_text(f"{source.read_text()}\nnamespace sslfast {{ namespace {{\n{uses}\n}} }}\n")
    cubin = folder / f"{op}_{arch}.cubin"
    log = _run([*_command(tools, tree, arch), "-w", "-cubin", "-Xptxas=-v", str(source), "-o", str(cubin)], op)
    return [kernel for kernel in _kernels(tools, op, arch, cubin, log) if kernel.name in names]


def _command(tools: Tools, csrc: Path, arch: str) -> list[str]:
    include = Path(torch.__file__).parent / "include"
    return [
        tools.nvcc, "-std=c++17", "-O3", "-DNDEBUG", "-DUSE_CUDA", "-DSSLFAST_SM90A",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{csrc}", "-isystem", str(include), f"-arch=sm_{arch}",
    ]  # fmt: skip


def _run(command: list[str], op: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    log = done.stderr + done.stdout
    if done.returncode != 0:
        raise SystemExit(f"sslfast: {op}.cu does not compile: {' '.join(command)}\n{log[-3000:]}")
    if "serialized" in log:
        raise SystemExit(f"sslfast: {op}.cu: warpgroup products are serialized:\n{log[-3000:]}")
    return log


def _kernels(tools: Tools, op: str, arch: str, cubin: Path, log: str) -> Iterator[Kernel]:
    facts, code, threads = _resources(log), disassemble(tools.cuobjdump, cubin), _launch_bounds(cubin)
    names = readable(list(facts))
    for mangled, fact in facts.items():
        if fact["registers"] >= 8 and mangled in code:  # else empty on this architecture
            yield Kernel(
                op=op, arch=arch, name=names[mangled], **fact, threads=threads.get(mangled), code=code[mangled]
            )


def _resources(log: str) -> dict[str, dict[str, int]]:
    """Mangled name -> registers, shared bytes and spilled bytes, from ``ptxas -v``."""
    found: dict[str, dict[str, int]] = {}
    current = None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            current = found[match[1]] = {"registers": 0, "shared_bytes": 0, "spill_bytes": 0}
        elif current is not None:
            if match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
                current["spill_bytes"] = int(match[1]) + int(match[2])
            if match := re.search(r"Used (\d+) registers", line):
                current["registers"] = int(match[1])
                shared = re.search(r"(\d+) bytes smem", line)
                current["shared_bytes"] = int(shared[1]) if shared else 0
                current = None
    return found


def _launch_bounds(cubin: Path) -> dict[str, int]:
    """Mangled name -> threads of a block, from the sections ``.nv.info.<kernel>`` of the ELF file."""
    data = cubin.read_bytes()
    start, size, count, names_index = *struct.unpack_from("<Q", data, 40), *struct.unpack_from("<3H", data, 58)
    headers = [struct.unpack_from("<2I4Q", data, start + size * i) for i in range(count)]
    names = headers[names_index][4]
    bounds = {}
    for name_at, _type, _flags, _address, offset, length in headers:
        name = data[names + name_at : data.index(b"\0", names + name_at)].decode()
        if not name.startswith(".nv.info."):
            continue
        at = offset
        while at < offset + length:
            form, attribute, value = struct.unpack_from("<2BH", data, at)
            if form == 4 and attribute == _MAX_THREADS:
                x, y, z = struct.unpack_from("<3I", data, at + 4)
                bounds[name.removeprefix(".nv.info.")] = x * y * z
            at += 4 + (value if form == 4 else 0)
    return bounds


def readable(mangled: list[str]) -> dict[str, str]:
    """Demangled kernel names without namespaces of the library and without arguments."""
    out = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True).stdout.splitlines()
    short = {}
    for name, demangled in zip(mangled, out, strict=True):
        demangled = re.sub(r"\(anonymous namespace\)::|sslfast::|c10::|^void ", "", demangled)
        demangled = demangled.replace("BFloat16", "bf16").replace("Half", "fp16").replace("double", "fp64")
        demangled = re.sub(r"\bfloat\b", "fp32", demangled)
        demangled = re.sub(r"\((bool|int|unsigned int)\)", "", demangled)
        demangled = re.sub(r"\((?:\w+::)*([A-Z]\w*)\)(\d+)", r"\1(\2)", demangled)  # an enumerator, as C++ takes it
        kernel, closed, _ = demangled.partition(">(")
        short[name] = kernel + ">" if closed else demangled.partition("(")[0].rstrip()
    return short
