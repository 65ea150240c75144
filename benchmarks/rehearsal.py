"""Runs modules in forks of one process that has imported torch: the rehearsal of benchmarks/gpu_check.py."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = ["torch", "pytest", "matplotlib.pyplot", "sslfast.training", "sslfast.evaluation", "sslfast.recipes",
             "sslfast.loaders", "sslfast.bench", "tensorboard"]  # fmt: skip


def run_in_fork(module: str, arguments: list[str], log: Path, environment: dict[str, str], limit: float) -> str:
    """``python -m module arguments`` in a fork of a server that has imported ``PRELOADED``; as :meth:`Check.run`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run_module, args=(module, arguments, log, environment))
    before = dict(os.environ)
    os.environ.update(environment)  # of the server too: OpenMP reads its variables when it is loaded
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    process.join(limit)
    if process.exitcode is None:
        with contextlib.suppress(ProcessLookupError):  # before it has a session
            os.killpg(process.pid or 0, signal.SIGKILL)  # the module's own session, workers included
        process.kill()
        process.join()
        return f"longer than {limit:.0f} s"
    return "ok" if process.exitcode == 0 else f"exit code {process.exitcode}"


def _run_module(module: str, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    named = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [*(path for path in named if path not in ("", *sys.path)), *sys.path]
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
