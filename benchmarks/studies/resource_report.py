"""Resources that every CUDA kernel takes of a multiprocessor, from the compiler, and its matrix instructions.

    python -m benchmarks.studies.resource_report -o OUT [--arch 80 90a 100] [--op bank_nce_dense]

Needs nvcc, and cuobjdump (of the CUDA toolkit, or the one that ships inside triton); no GPU. Writes OUT.md and
OUT.json: registers, static shared memory, spills and instruction counts of each kernel for each architecture. Exit code
1 if a kernel spills or its warpgroup products run one after the other.
"""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
# What the columns count. Blackwell's tcgen05 family would show as UTC*MMA.
INSTRUCTIONS = {
    "mma.sync": r"\bHMMA\b",
    "wgmma": r"\bHGMMA\b",
    "ldmatrix": r"\bLDSM\b",
    "cp.async": r"\bLDGSTS\b",
    "TMA": r"\bUTMALDG\b",
}


def find_cuobjdump(nvcc: str) -> str:
    """The toolkit's, else triton's; SystemExit if there is none."""
    beside = Path(nvcc).resolve().parent / "cuobjdump"
    found = str(beside) if beside.is_file() else shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.submodule_search_locations:
        inside = Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(inside) if inside.is_file() else None
    if found is None:
        raise SystemExit("sslfast: cuobjdump was not found; it comes with the CUDA toolkit, or with pip install triton")
    return found


def readable(mangled: list[str]) -> dict[str, str]:
    """Demangled kernel names without namespaces and arguments."""
    out = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True).stdout.splitlines()
    short = {}
    for name, demangled in zip(mangled, out, strict=True):
        demangled = re.sub(r"\(anonymous namespace\)::|sslfast::|c10::|^void ", "", demangled)
        demangled = demangled.replace("BFloat16", "bf16").replace("Half", "fp16").replace("double", "fp64")
        demangled = re.sub(r"\bfloat\b", "fp32", demangled)
        demangled = re.sub(r"\((bool|int|unsigned int)\)", "", demangled)
        short[name] = re.sub(r"\s*\(.*$", "", demangled)
    return short


def compile_one(nvcc: str, source: Path, arch: str, folder: Path) -> tuple[Path, str]:
    """The cubin of a source for one architecture, and the output of ptxas."""
    cubin = folder / f"{source.stem}_{arch}.cubin"
    include = Path(torch.__file__).parent / "include"
    command = [
        nvcc, "-std=c++17", "-O3", "-DNDEBUG", "-DUSE_CUDA", "-DSSLFAST_SM90A",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}", "-isystem", str(include), "-cubin",
        f"-arch=sm_{arch}", "-Werror=all-warnings", "-Xptxas=-v", str(source), "-o", str(cubin),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"sslfast: {source.name} does not compile for {arch}:\n{done.stderr[-3000:]}")
    if "serialized" in done.stderr:  # ptxas cannot keep accumulators in place; it gives advice, not a warning
        raise SystemExit(f"sslfast: {source.name}, {arch}: products are serialized:\n{done.stderr[-3000:]}")
    return cubin, done.stderr + done.stdout


def kernels_of(log: str) -> dict[str, dict[str, int]]:
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


def instructions_of(cuobjdump: str, cubin: Path) -> dict[str, Counter[str]]:
    """Mangled name -> number of each of INSTRUCTIONS in its code."""
    text = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    counts: dict[str, Counter[str]] = {}
    for part in text.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        counts[name.strip()] = Counter({label: len(re.findall(p, body)) for label, p in INSTRUCTIONS.items()})
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="without suffix")
    parser.add_argument("--arch", nargs="+", default=["80", "90a", "100"])
    parser.add_argument("--op", nargs="+", default=sorted(p.stem for p in (ROOT / "csrc" / "cuda").glob("*.cu")))
    options = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("sslfast: nvcc was not found; put the CUDA toolkit's bin folder on PATH")
    cuobjdump = find_cuobjdump(nvcc)
    release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for op in options.op:
            for arch in options.arch:
                cubin, log = compile_one(nvcc, ROOT / "csrc" / "cuda" / f"{op}.cu", arch, Path(folder))
                kernels, code = kernels_of(log), instructions_of(cuobjdump, cubin)
                names = readable(list(kernels))
                for name, facts in kernels.items():
                    if facts["registers"] < 8:
                        continue  # empty on this architecture
                    rows.append({"op": op, "arch": arch, "kernel": names[name], **facts, **code[name]})
                print(f"{op} {arch}: {len(kernels)} kernels", flush=True)
    report = {"nvcc": re.findall(r"V([\d.]+)", release)[0], "torch": torch.__version__, "kernels": rows}
    options.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(markdown(report))
    spilled = sorted({f"{row['kernel']} ({row['arch']})" for row in rows if row["spill_bytes"]})
    if spilled:
        print("sslfast: registers spill in " + ", ".join(spilled), file=sys.stderr)
    return 1 if spilled else 0


def markdown(report: dict[str, Any]) -> str:
    """One table, a row for each kernel and architecture."""
    head = ["op", "arch", "kernel", "registers", "shared bytes", "spill bytes", *INSTRUCTIONS]
    lines = [
        "# What the CUDA kernels take",
        "",
        f"`python -m benchmarks.studies.resource_report`, nvcc {report['nvcc']}, headers of torch {report['torch']}.",
        "Registers of a thread, static shared memory (tiles are dynamic), spilled bytes, matrix and copy instructions.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for row in report["kernels"]:
        cells = [
            row["op"],
            row["arch"],
            f"`{row['kernel']}`",
            row["registers"],
            row["shared_bytes"],
            row["spill_bytes"],
        ]
        lines.append("| " + " | ".join(str(cell) for cell in (*cells, *(row[name] for name in INSTRUCTIONS))) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
