"""A wheel of this checkout, built as `make wheel` does, audited, and tried where there is no compiler."""

import os
import subprocess
import sys
from pathlib import Path

from tests import wheel_check


def test_a_wheel_runs_without_a_compiler(tmp_path: Path) -> None:
    build = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "base")]
    command = [*build, "bdist_wheel", "--dist-dir", str(tmp_path)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # cmake and ninja of this environment
    environment = os.environ | {"PATH": path, "SSLFAST_CUDA": "0"}  # the CUDA side takes minutes
    done = subprocess.run(command, capture_output=True, text=True, cwd=wheel_check.ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp_path.glob("*.whl")
    wheel = wheel_check.repair(built, tmp_path / "dist")
    wheel_check.audit(wheel)
    output = wheel_check.try_out(wheel)
    assert "19 passed, 0 failed" in output
    version = output.splitlines()[-1].removeprefix("sslfast ")
    assert wheel.name.startswith(f"sslfast-{version}-py3-none-manylinux")
