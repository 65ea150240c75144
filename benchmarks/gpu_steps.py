"""The steps of ``make gpu-check``: commands with a time limit each, and what became of them."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.rehearsal import run_in_fork

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["tests/ops", "tests/adapters", "tests/benchmarks/test_peers.py", "tests/loaders/test_synthetic.py",
         "tests/training/test_cuda.py", "tests/training/test_trainer.py"]  # fmt: skip


@dataclass(kw_only=True)
class Check:
    """One run of this script."""

    out: Path
    rehearse: bool
    data: Path | None
    architecture: str
    """TORCH_CUDA_ARCH_LIST of the card; empty in a rehearsal."""
    environment: dict[str, str]
    missing: frozenset[str] = frozenset()
    """Packages of NEEDED that are not here."""
    ends: float = 0.0
    """When the part must be over, on time.monotonic's clock."""

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def run(self, name: str, command: list[str], *, seconds: float, environment: dict[str, str] | None = None) -> str:
        """Run a command, its output in OUT/NAME.log; returns "ok" or what went wrong.

        A rehearsal runs modules in forks of one process that has imported torch: the imports of ten processes take
        longer than what they do.
        """
        limit = min(seconds, self.ends - time.monotonic())
        if limit < 5:
            return "not run: the part's time was over"
        with (self.out / f"{name}.log").open("a") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            if self.rehearse and command[:2] == [sys.executable, "-m"]:
                return run_in_fork(
                    command[2], command[3:], Path(log.name), {**self.environment, **(environment or {})}, limit
                )
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**self.environment, **(environment or {})},
            )  # fmt: skip
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # the command's own session, workers included
                process.wait()
                return f"longer than {limit:.0f} s"
        return "ok" if code == 0 else f"exit code {code}"

    def python(self, name: str, *arguments: str, seconds: float, **environment: str) -> str:
        return self.run(name, [sys.executable, *arguments], seconds=seconds, environment=environment)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of a part."""

    name: str
    part: int
    seconds: float
    """At most."""
    function: Callable[[Check, float], tuple[str, str]]
    """(check, seconds) -> ("ok" or what went wrong, a line of detail)."""


def build(check: Check, seconds: float) -> tuple[str, str]:
    """Compile for the card; a rehearsal takes the build that is there."""
    if not check.rehearse:
        flags = {"SSLFAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": check.architecture, "SSLFAST_WERROR": "0"}
        end = check.python("build", "setup.py", "build_ext", "--inplace", seconds=seconds, **flags)
        if end != "ok":
            return end, last_line(check.out / "build.log")
    end = check.python("build", "-c", "from sslfast.ops import build_info; print(build_info())", seconds=seconds)
    return end, last_line(check.out / "build.log")


def run_tests(check: Check, seconds: float) -> tuple[str, str]:
    """Tests on the device, a few files at a time; a skipped test is a failure."""
    paths = ["tests/loaders/test_synthetic.py"] if check.rehearse else TESTS
    files = [
        str(file.relative_to(ROOT))
        for path in paths
        for file in ([ROOT / path] if path.endswith(".py") else sorted((ROOT / path).glob("test_*.py")))
        if not file.name.startswith("test_cuda_") or "training" in path
    ]
    began = time.monotonic()
    folder = check.out / "junit"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def one(file: str) -> str:
        report = folder / (file.replace("/", ".") + ".xml")
        # Not those that have cuda in the name of their file alone.
        keyword = "cpu" if check.rehearse else "cuda and not [cpu and not -cpu"
        if "faiss" in check.missing:
            keyword += " and not deepcluster"
        left = seconds - (time.monotonic() - began)
        return check.python(
            "tests", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", keyword, "-rs", "-o",
            "faulthandler_timeout=60", f"--junitxml={report}", file, seconds=left,
            TORCHINDUCTOR_FORCE_DISABLE_CACHES="1", OMP_NUM_THREADS="2",
        )  # fmt: skip

    with ThreadPoolExecutor(max(1, min(6, (os.cpu_count() or 1) // 2))) as pool:
        ends = dict(zip(files, pool.map(one, files), strict=True))
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for report in folder.glob("*.xml"):
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            for key in counts:
                counts[key] += int(suite.get(key, 0))
    # 5: no test of the file is for this device.
    bad = [f"{file}: {end}" for file, end in ends.items() if end not in ("ok", "exit code 5")]
    detail = ", ".join(f"{value} {key}" for key, value in counts.items())
    if bad:
        return "; ".join(bad)[:300], detail
    if counts["skipped"] or counts["tests"] == 0:
        return f"{counts['skipped']} skipped of {counts['tests']} tests", detail
    return "ok", detail


def module(name: str, *arguments: str, tiny: tuple[str, ...] = ()) -> Callable[[Check, float], tuple[str, str]]:
    """A step that is one module of this repository, writing OUT/<step>.*; ``{out}`` and ``{device}`` are filled in.

    Args:
        arguments: of the module. tiny: those of a rehearsal.
    """

    def function(check: Check, seconds: float) -> tuple[str, str]:
        step = next(step.name for step in STEPS if step.function is function)
        values = {"out": str(check.out / step), "device": check.device}
        given = [word.format(**values) for word in (tiny if check.rehearse else arguments)]
        end = check.python(step, "-m", name, *given, seconds=seconds)
        return end, last_line(check.out / f"{step}.log")

    return function


def goals(check: Check, seconds: float) -> tuple[str, str]:
    """The goal's sizes; a new process goes on behind a measurement that hung or lost the GPU."""
    began, report = time.monotonic(), check.out / "goals.json"
    words = ["-o", str(check.out / "goals"), "--device", check.device, *(["--tiny"] if check.rehearse else [])]
    undone: list[str] = []
    for resume in itertools.chain([[]], itertools.repeat(["--resume"])):
        rest = seconds - (time.monotonic() - began)
        end = check.python("goals", "-m", "benchmarks.studies.goal_sizes", *words, *resume, seconds=rest)
        before = undone
        undone = (read_json(report) or {"left": []})["left"]
        # Where one process measured nothing, another would not either.
        if end == "ok" or end.startswith(("longer", "not run")) or not undone or undone == before:
            break
    return end, last_line(check.out / "goals.log")


def training_step(check: Check, seconds: float) -> tuple[str, str]:
    """``sslfast bench step`` with its supervised yardstick, then beside the plain trainer."""
    options = ["--recipe", "pirl-paper", "--batch-size", "256", "--steps", "20"]
    tiny = ["--recipe", "demo", "--batch-size", "2", "--steps", "1", "--rounds", "1", "--workers", "0"]
    data = [f"synthetic:{64 if check.rehearse else 100_000}"] if check.data is None else [str(check.data / "train")]
    files = ["--json", str(check.out / "step.json"), "--chart", str(check.out / "step.png")]
    beside = check.data is not None and not check.rehearse
    end = check.python(
        "step", "-m", "sslfast", "bench", "step", *data, *(tiny if check.rehearse else options), "--device",
        check.device, *files, seconds=seconds / 2 if beside else seconds,
    )  # fmt: skip
    if end == "ok" and beside:
        end = check.python(
            "step", "-m", "benchmarks.studies.step_beside_eager", str(check.data / "train"), "-o",
            str(check.out / "step_beside_eager"), "--batch-size", "128", "--workers", str(os.cpu_count() or 1),
            "--seconds", "15", "--device", "cuda", seconds=seconds / 2,
        )  # fmt: skip
        copy_results(check.out / "step_beside_eager" / "step", check.out / "step_beside_eager")
    return end, "without --data: not beside the plain trainer" if check.data is None else ""


LEARN = ["--epochs", "20", "--batch-size", "64", "--adamw", "1e-3", "--width", "0.25", "--stem", "small",
         "--per-class", "200", "--pretrain-per-class", "80"]  # fmt: skip
"""The budget of benchmarks/results/tiny50_cpu_202611.md, whose numbers a GPU's should equal."""


def learn(check: Check, seconds: float) -> tuple[str, str]:
    """PIRL on the labelled set with the budget of a CPU's table, evaluated beside untrained and raw pixels."""
    if check.data is None:
        return "ok", "left out: needs --data"
    size = ["--epochs", "1", "--batch-size", "4", "--workers", "0", "--width", "0.125", "--stem", "imagenet",
            "--per-class", "12", "--pretrain-per-class", "4"] if check.rehearse else LEARN  # fmt: skip
    end = check.python(
        "learn", "-m", "benchmarks.studies.methods", str(check.data), "-o", str(check.out / "learn_runs"), "--methods",
        "rotation" if check.rehearse else "pirl", *size, seconds=seconds,
    )  # fmt: skip
    copy_results(check.out / "learn_runs" / "methods", check.out / "learn")
    return end, last_line(check.out / "learn.log")


def loaders(check: Check, seconds: float) -> tuple[str, str]:
    """Every loader beside its library's plain pipeline, on the cores and the device that training has."""
    data = [] if check.data is None else [str(check.data / "train")]
    few = ["--cores", "1", "--seconds", "0", "--libraries", "pillow", "--kinds", "crop"]
    some = ["--cores", str(os.cpu_count() or 1), "--seconds", "3"]
    if check.rehearse and not data:
        return "ok", "left out: needs --data"
    end = check.python(
        "loaders", "-m", "benchmarks.studies.loaders_beside_plain", *data, "-o", str(check.out / "loaders_runs"),
        "--device", check.device, *(few if check.rehearse else some), seconds=seconds,
    )  # fmt: skip
    copy_results(check.out / "loaders_runs" / "loaders", check.out / "loaders", ".json", ".md", ".png")
    return end, last_line(check.out / "loaders.log")


def sanitizer(tool: str) -> Callable[[Check, float], tuple[str, str]]:
    """A tool of compute-sanitizer on every kernel; a rehearsal runs the calls without it."""

    def function(check: Check, seconds: float) -> tuple[str, str]:
        command = [sys.executable, "-m", "benchmarks.sanitize_kernels", "--device", check.device]
        if check.rehearse and tool != "memcheck":
            return "ok", "left out of a rehearsal: the calls are those of memcheck"
        if not check.rehearse:
            found = find_sanitizer()
            if found is None:
                return "compute-sanitizer was not found; put the CUDA toolkit's bin folder on PATH", ""
            # Most of what runs are torch's kernels, of which initcheck alone must know: they write what ours read.
            only = [] if tool == "initcheck" else ["--kernel-regex", "kns=sslfast"]
            command = [found, "--tool", tool, *only, "--error-exitcode", "9", *command]
        # Without torch's caching allocator every tensor is an allocation of its own: accesses past its end are seen.
        end = check.run(tool, command, seconds=seconds, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        return end, last_line(check.out / f"{tool}.log")

    return function


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, or beside the nvcc that is."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(Path(nvcc).resolve().parent))


CROSSOVER = ("--batch", "64", "256", "1024", "--rows", "1e5", "1281167", "--rounds", "5", "--limit", "0.5",
             "--without", "compiled", "--device", "{device}", "-o", "{out}")  # fmt: skip
TINY_CROSSOVER = ("--batch", "2", "--rows", "50", "--negatives", "8", "--rounds", "1", "--without", "compiled",
                  "--device", "cpu", "-o", "{out}")  # fmt: skip
NEEDED = {
    "tyro": "step, ops", "docstring_parser": "step, ops", "typeguard": "step, ops", "pytest": "tests, benchmarks",
    "pytest_benchmark": "tests, benchmarks", "hypothesis": "tests", "torchvision": "goals, step, learn, loaders",
    "faiss": "tests (deepcluster, left out)", "matplotlib": "goals, crossover, step, learn, loaders",
    "setuptools": "build",
}  # fmt: skip
"""Package -> steps that fail without it."""
STEPS = [
    Step(name="build", part=0, seconds=240, function=build),
    Step(name="tests", part=1, seconds=240, function=run_tests),
    Step(name="goals", part=1, seconds=200, function=goals),
    Step(
        name="crossover", part=2, seconds=100,
        function=module("benchmarks.studies.crossover", *CROSSOVER, tiny=TINY_CROSSOVER),
    ),
    Step(name="step", part=2, seconds=150, function=training_step),
    Step(name="learn", part=2, seconds=140, function=learn),
    Step(
        name="overhead", part=2, seconds=40,
        function=module(
            "benchmarks.host_overhead", "-o", "{out}", "--device", "{device}",
            tiny=("-o", "{out}", "--device", "cpu", "--turns", "2"),
        ),
    ),
    Step(name="loaders", part=2, seconds=100, function=loaders),
    *(
        Step(name=tool, part=3, seconds=limit, function=sanitizer(tool))
        for tool, limit in (("memcheck", 130), ("racecheck", 120), ("initcheck", 70), ("synccheck", 70))
    ),
    Step(
        name="ops", part=3, seconds=50,
        function=module(
            "sslfast", "bench", "ops", "--device", "{device}", "--json", "{out}.json", tiny=("bench", "ops", "--help")
        ),
    ),
    Step(
        name="benchmarks", part=3, seconds=90,
        function=module(
            "pytest", "benchmarks", "--benchmark-enable", "--benchmark-json={out}.json", "-k",
            "not torchvision",
            tiny=("benchmarks/bench_rotate90.py", "-q", "-k", "uint8 and sslfast and 64-255"),
        ),
    ),
]  # fmt: skip
"""The build comes before every part; it takes seconds where nothing has changed."""


def copy_results(source: Path, target: Path, *suffixes: str) -> None:
    """Copy the files SOURCE.json and SOURCE.md, or those of other suffixes, as far as they are there."""
    for suffix in suffixes or (".json", ".md"):
        file = source.with_name(source.name + suffix)
        if file.is_file():
            shutil.copy(file, target.with_name(target.name + suffix))


def read_json(path: Path) -> Any:
    """What a file holds; None where there is none, or half of one: its process was ended while it wrote."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    lines = (
        [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    )
    return lines[-1].replace("|", "/")[:160] if lines else ""
