"""Builds sslfast/_C.so with CMake and ninja. Metadata lives in pyproject.toml.

Environment:
    SSLFAST_CORE=1|0            0: install without the compiled core; ops then run as their references in torch
    SSLFAST_CUDA=auto|0|1       auto (default): compile csrc/cuda when nvcc is found and torch is a CUDA build;
                                0: CPU only; 1: CUDA or fail (also with a CPU build of torch)
    TORCH_CUDA_ARCH_LIST        for example "8.0;9.0a;10.0+PTX", the default
    SSLFAST_BUILD_DIR           CMake's folder, kept for incremental builds (default build/<processor>-<cpu|cuda>)
    SSLFAST_TORCH_DIR           the torch package to build against, where it is not the installed one
    SSLFAST_CROSS               compile for another processor: aarch64, with aarch64-linux-gnu-g++ (CPU alone)
    SSLFAST_LOCAL_VERSION       ends the version of a wheel, as +cu130 ends torch's
    SSLFAST_WERROR=0            warnings of the compiler are no errors
    MAX_JOBS                    parallel compile jobs
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ModuleNotFoundError:  # setuptools before 70.1, which `setup.py build_ext --inplace` is content with
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "8.0;9.0a;10.0+PTX"
MINIMUM_TORCH = (2, 10)
CROSS = os.environ.get("SSLFAST_CROSS", "")
PROCESSOR = CROSS or platform.machine()


def stop(message: str) -> None:
    raise SystemExit(f"sslfast: {message}")


def find_torch() -> Path:
    """The torch package of the environment that pip installs into, also from inside an isolated build."""
    if given := os.environ.get("SSLFAST_TORCH_DIR"):
        return Path(given)
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    # An isolated build hides site-packages from sys.path, but sysconfig still names it.
    for key in ("platlib", "purelib"):
        candidate = Path(sysconfig.get_path(key)) / "torch"
        if (candidate / "version.py").is_file():
            return candidate
    stop("building needs an installed torch >= 2.10; run `pip install torch==2.11.0` first, then install sslfast again")
    raise AssertionError


def torch_facts(torch_dir: Path) -> tuple[str, str | None]:
    """(version, CUDA version or None) read from torch/version.py without importing torch."""
    text = (torch_dir / "version.py").read_text()
    version = re.search(r"^__version__ = '([^']+)'", text, re.M)
    cuda = re.search(r"^cuda: .*= '([^']+)'", text, re.M)
    if version is None:
        stop(f"cannot read torch's version from {torch_dir / 'version.py'}; reinstall torch")
        raise AssertionError
    return version.group(1), cuda.group(1) if cuda else None


def find_nvcc() -> str | None:
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        if value := os.environ.get(name):
            candidate = Path(value) if name == "CUDACXX" else Path(value) / "bin" / "nvcc"
            if candidate.is_file():
                return str(candidate)
    found = shutil.which("nvcc")
    return found or ("/usr/local/cuda/bin/nvcc" if Path("/usr/local/cuda/bin/nvcc").is_file() else None)


def cmake_archs(arch_list: str) -> str:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0a;10.0+PTX") as CMake spells it ("80-real;90a-real;100")."""
    archs = []
    for item in re.split(r"[;, ]+", arch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", item)
        if match is None:
            stop(f"TORCH_CUDA_ARCH_LIST has {item!r}; write numbers such as 8.0;9.0a;10.0+PTX")
            raise AssertionError
        major, minor, suffix, ptx = match.groups()
        archs.append(f"{major}{minor}{suffix}" + ("" if ptx else "-real"))
    return ";".join(archs)


def plan_cuda(torch_cuda: str | None) -> tuple[str | None, str]:
    """(nvcc or None, the reason as text)."""
    choice = os.environ.get("SSLFAST_CUDA", "0" if CROSS else "auto")
    if choice not in ("auto", "0", "1"):
        stop(f"SSLFAST_CUDA must be auto, 0 or 1, got {choice!r}")
    nvcc = find_nvcc()
    if choice == "0":
        return None, "CPU build: SSLFAST_CUDA=0"
    if nvcc is None:
        if choice == "1":
            stop("SSLFAST_CUDA=1, but nvcc was not found; put it on PATH or set CUDA_HOME")
        return None, "CPU build: no CUDA compiler (nvcc) found"
    if choice == "auto" and torch_cuda is None:
        return None, "CPU build: the installed torch has no CUDA (SSLFAST_CUDA=1 compiles the kernels all the same)"
    return nvcc, f"CUDA build: nvcc found, torch has CUDA {torch_cuda or 'no runtime'}"


def find_compiler() -> str:
    if CROSS not in ("", "aarch64"):
        stop(f"SSLFAST_CROSS must be aarch64, got {CROSS!r}")
    compiler = f"{CROSS}-linux-gnu-g++" if CROSS else os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        package = f"g++-{CROSS}-linux-gnu" if CROSS else "g++"
        stop(
            f"no C++ compiler {compiler} found; install it (Debian and Ubuntu: {package}), install a wheel, or install "
            "without the compiled core, with slower ops: SSLFAST_CORE=0"
        )
    return compiler


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        """No tag of a Python version: the library uses none of its symbols."""
        return f"{fullname.replace('.', os.sep)}.so"

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        torch_dir = find_torch()
        torch_version, torch_cuda = torch_facts(torch_dir)
        if tuple(int(x) for x in torch_version.split(".")[:2]) < MINIMUM_TORCH:
            stop(f"torch {torch_version} is too old, sslfast needs >= 2.10; run `pip install torch==2.11.0`")
        nvcc, note = plan_cuda(torch_cuda)
        arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS) if nvcc else ""
        tag = f"{PROCESSOR}-{'cuda' if nvcc else 'cpu'}"
        build_dir = Path(os.environ.get("SSLFAST_BUILD_DIR", ROOT / "build" / tag)).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()

        options = {
            "CMAKE_BUILD_TYPE": "Release",
            # Set each time: an isolated build has its own ninja at another path than the cached one.
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja") or "ninja",
            "SSLFAST_TORCH_DIR": torch_dir,
            "SSLFAST_VERSION": self.distribution.get_version(),
            "SSLFAST_BUILD_NOTE": note,  # no semicolon: CMake would take it for a list
            "SSLFAST_WITH_CUDA": "ON" if nvcc else "OFF",
        }
        if CROSS:
            options |= {
                "CMAKE_SYSTEM_NAME": "Linux",
                "CMAKE_SYSTEM_PROCESSOR": CROSS,
                "CMAKE_CXX_COMPILER": compiler,
            }
        if nvcc:
            options |= {
                "CMAKE_CUDA_COMPILER": nvcc,
                "CMAKE_CUDA_ARCHITECTURES": cmake_archs(arch_list),
                "SSLFAST_CUDA_ARCHS": arch_list.replace(";", " "),
            }
        print(f"sslfast: {note}")
        print(f"sslfast: torch {torch_version}" + (f"; architectures {arch_list}" if nvcc else ""), flush=True)

        cmake = shutil.which("cmake") or "cmake"
        command = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build_dir)]
        subprocess.run([*command, *(f"-D{key}={value}" for key, value in options.items())], check=True)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([cmake, "--build", str(build_dir), *jobs], check=True)

        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        shutil.copyfile(build_dir / "_C.so", partial)
        os.replace(partial, target)


class Wheel(bdist_wheel):
    def finalize_options(self) -> None:
        if CROSS:
            self.plat_name = f"linux_{CROSS}"
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        """Any Python 3, this processor."""
        return "py3", "none", super().get_tag()[2]


WITH_CORE = os.environ.get("SSLFAST_CORE", "1") != "0"
if LOCAL_VERSION := os.environ.get("SSLFAST_LOCAL_VERSION"):
    from setuptools_scm import get_version

    version = get_version(str(ROOT), fallback_version="0.1.0")
    os.environ["SETUPTOOLS_SCM_PRETEND_VERSION_FOR_SSLFAST"] = (
        f"{version}{'.' if '+' in version else '+'}{LOCAL_VERSION}"
    )
setup(
    ext_modules=[Extension("sslfast._C", sources=[])] if WITH_CORE else [],
    cmdclass={"build_ext": CMakeBuild} | ({"bdist_wheel": Wheel} if WITH_CORE else {}),
)
