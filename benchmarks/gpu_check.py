"""make gpu-check: what only a GPU can show, offline, with the packages of the Python that runs this file.

    python benchmarks/gpu_check.py [OUT] [--part 1|2|3] [--step NAME ...] [--tar FILE] [--data DATA] [--wheels FOLDER]

Three parts, ordered by worth; each ends within nine minutes (16 cores) and is useful alone. Without ``--part`` all
three run. What a step left in OUT (default build/gpu-check) stays there: a later part adds to it, and the summary and
the tar file cover everything so far.

1. build for the card found; tests on CUDA (a skip is a failure; kernels emulated on the CPU are left out; inductor's
   cache is off); every op at the goal's sizes beside its peers and ceilings, and launches counted (studies.goal_sizes).
2. crossover of sampled and full negatives; a training step of PIRL on ResNet-50, the supervised one beside it, and
   beside the plain trainer; a learning run on the 50-class set named by ``--data`` (train/ and val/ of class folders);
   loaders; host overhead.
3. compute-sanitizer's tools on every kernel (benchmarks/sanitize_kernels.py); ``sslfast bench ops``; the other
   benchmarks.

OUT/summary.md lists the steps. ``--tar`` (default OUT/gpu-check.tar) packs at most 8 files, each below 16 MiB:
summary.md, results.json (every step's JSON), tables.md (every step's Markdown), logs.txt (the end of every log) and up
to four charts. ``--wheels`` names a folder of wheels that this Python lacks (tyro for bench, matplotlib for charts);
they are unpacked into OUT. ``--rehearse`` runs every step on the CPU at tiny sizes, without a GPU, nvcc or sanitizer:
a test of this script.

Exit code 0 if every step that was due ended well, else 1; 2 for wrong arguments.
"""

import argparse
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.rehearsal import run_in_fork

ROOT = Path(__file__).resolve().parents[1]
PART_SECONDS = 535.0
CHARTS = ("goals", "crossover", "step", "loaders")
MOST_BYTES = 15 * 2**20
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
        flags = {"SSLFAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": check.architecture}
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
        keyword = "cpu" if check.rehearse else "cuda"
        left = seconds - (time.monotonic() - began)
        return check.python(
            "tests", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", keyword, "-rs", f"--junitxml={report}", file,
            seconds=left, TORCHINDUCTOR_FORCE_DISABLE_CACHES="1", OMP_NUM_THREADS="2",
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
        inner = check.out / "step_beside_eager"
        for suffix in (".json", ".md"):
            if (inner / f"step{suffix}").is_file():
                shutil.copy(inner / f"step{suffix}", check.out / f"step_beside_eager{suffix}")
    return end, "without --data: not beside the plain trainer" if check.data is None else ""


def learn(check: Check, seconds: float) -> tuple[str, str]:
    """PIRL for some minutes on the labelled set, evaluated beside untrained and raw pixels."""
    if check.data is None:
        return "ok", "left out: needs --data"
    size = ["--epochs", "1", "--batch-size", "4", "--workers", "0", "--width", "0.125", "--stem", "imagenet",
            "--per-class", "12", "--pretrain-per-class", "4"] if check.rehearse else ["--epochs", "30"]  # fmt: skip
    end = check.python(
        "learn", "-m", "benchmarks.studies.methods", str(check.data), "-o", str(check.out / "learn_runs"), "--methods",
        "rotation" if check.rehearse else "pirl", *size, seconds=seconds,
    )  # fmt: skip
    for suffix in (".json", ".md"):
        if (check.out / "learn_runs" / f"methods{suffix}").is_file():
            shutil.copy(check.out / "learn_runs" / f"methods{suffix}", check.out / f"learn{suffix}")
    return end, last_line(check.out / "learn.log")


def loaders(check: Check, seconds: float) -> tuple[str, str]:
    """Every loader beside its library's plain pipeline, on the cores and the device that training has."""
    data = [] if check.data is None else [str(check.data / "train")]
    few = ["--cores", "1", "--seconds", "0", "--libraries", "pillow", "--kinds", "crop"]
    some = ["--cores", str(os.cpu_count() or 1), "--seconds", "3"]
    if check.rehearse and not data:
        return "ok", "left out: needs --data"
    end = check.python(
        "loaders", "-m", "benchmarks.studies.loaders_beside_plain", *data, "-o", str(check.out / "loader_runs"),
        "--device", check.device, *(few if check.rehearse else some), seconds=seconds,
    )  # fmt: skip
    for suffix in (".json", ".md", ".png"):
        if (check.out / "loader_runs" / f"loaders{suffix}").is_file():
            shutil.copy(check.out / "loader_runs" / f"loaders{suffix}", check.out / f"loaders{suffix}")
    return end, last_line(check.out / "loaders.log")


def sanitizer(tool: str) -> Callable[[Check, float], tuple[str, str]]:
    """A tool of compute-sanitizer on every kernel; a rehearsal runs the calls without it."""

    def function(check: Check, seconds: float) -> tuple[str, str]:
        command = [sys.executable, "-m", "benchmarks.sanitize_kernels", "--device", check.device]
        if check.rehearse and tool != "memcheck":
            return "ok", "left out of a rehearsal: the calls are those of memcheck"
        if not check.rehearse:
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command]
            if shutil.which("compute-sanitizer") is None:
                return "compute-sanitizer was not found; put the CUDA toolkit's bin folder on PATH", ""
        # Without torch's caching allocator every tensor is an allocation of its own: accesses past its end are seen.
        end = check.run(tool, command, seconds=seconds, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        return end, last_line(check.out / f"{tool}.log")

    return function


CROSSOVER = ("--batch", "64", "256", "1024", "--rows", "1e5", "1281167", "--rounds", "5", "--limit", "0.5",
             "--without", "compiled", "--device", "{device}", "-o", "{out}")  # fmt: skip
TINY_CROSSOVER = ("--batch", "2", "--rows", "50", "--negatives", "8", "--rounds", "1", "--without", "compiled",
                  "--device", "cpu", "-o", "{out}")  # fmt: skip
STEPS = [
    Step(name="build", part=0, seconds=240, function=build),
    Step(name="tests", part=1, seconds=240, function=run_tests),
    Step(
        name="goals", part=1, seconds=200,
        function=module(
            "benchmarks.studies.goal_sizes", "-o", "{out}", "--device", "{device}",
            tiny=("-o", "{out}", "--device", "cpu", "--tiny"),
        ),
    ),
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
            "pytest", "benchmarks", "--benchmark-enable", "--benchmark-json={out}.json",
            tiny=("benchmarks/bench_rotate90.py", "-q", "-k", "uint8 and sslfast and 64-255"),
        ),
    ),
]  # fmt: skip
"""The build comes before every part; it takes seconds where nothing has changed."""


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    lines = (
        [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    )
    return lines[-1].replace("|", "/")[:160] if lines else ""


def card() -> tuple[str, dict[str, str]]:
    """(architecture for the build, facts); SystemExit without a GPU."""
    code = (
        "import json, torch; p = torch.cuda.get_device_properties(0); print(json.dumps({'arch': "
        "f'{p.major}.{p.minor}' + ('a' if (p.major, p.minor) in ((9, 0),) else ''), 'card': p.name, 'devices': "
        "torch.cuda.device_count(), 'torch': torch.__version__, 'cuda': torch.version.cuda}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit("sslfast: gpu-check needs a CUDA device that torch can see; --rehearse runs it on the CPU")
    facts = json.loads(done.stdout)
    driver = ""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return facts.pop("arch"), {key: str(value) for key, value in {**facts, "driver": driver or "unknown"}.items()}


@dataclass(kw_only=True)
class State:
    """What has been done in OUT, kept in OUT/state.json."""

    facts: dict[str, str] = field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, out: Path) -> "State":
        path = out / "state.json"
        return cls(**json.loads(path.read_text())) if path.is_file() else cls()

    def save(self, out: Path) -> None:
        (out / "state.json").write_text(json.dumps({"facts": self.facts, "steps": self.steps}, indent=1) + "\n")
        lines = ["# make gpu-check", "", *(f"- {key}: {value}" for key, value in self.facts.items())]
        lines += ["", "| step | end | seconds | detail |", "|---|---|---|---|"]
        for step in STEPS:
            if step.name in self.steps:
                row = self.steps[step.name]
                lines.append(f"| {step.name} | {row['end']} | {row['seconds']:.0f} | {row['detail']} |")
            else:
                lines.append(f"| {step.name} | not run yet | | |")
        (out / "summary.md").write_text("\n".join(lines) + "\n")


def pack(out: Path, target: Path) -> None:
    """At most 8 files, each below 16 MiB."""
    names = [step.name for step in STEPS] + ["step_beside_eager"]
    found = {name: json.loads(path.read_text()) for name in names for path in [out / f"{name}.json"] if path.is_file()}
    if "benchmarks" in found:
        for row in found["benchmarks"]["benchmarks"]:
            row["stats"].pop("data", None)  # every single time
    tables = "\n\n".join((out / f"{name}.md").read_text() for name in names if (out / f"{name}.md").is_file())
    share = MOST_BYTES // len(names)
    logs = "\n\n".join(
        f"==== {name}\n{(out / f'{name}.log').read_text(errors='replace')[-share:]}"
        for name in names
        if (out / f"{name}.log").is_file()
    )
    texts = {
        "summary.md": (out / "summary.md").read_text(),
        "results.json": json.dumps({"state": json.loads((out / "state.json").read_text()), **found}),
        "tables.md": tables,
        "logs.txt": logs,
    }
    with tarfile.open(target, "w") as tar:
        for name, text in texts.items():
            data = text.encode()[-MOST_BYTES:]
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), int(time.time())
            tar.addfile(member, io.BytesIO(data))
        for name in CHARTS:
            if (out / f"{name}.png").is_file():
                tar.add(out / f"{name}.png", arcname=f"{name}.png")


def main(argv: list[str] | None = None) -> int:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=ROOT / "build" / "gpu-check")
    parser.add_argument("--part", type=int, choices=(1, 2, 3))
    parser.add_argument("--step", nargs="+", choices=[step.name for step in STEPS], default=[])
    parser.add_argument("--tar", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    chosen = parser.parse_args(argv)
    if chosen.data is not None and not all((chosen.data / split).is_dir() for split in ("train", "val")):
        parser.error(f"--data {chosen.data} must hold train/ and val/, folders of class folders")
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT)]
    if chosen.wheels is not None:
        wheels = sorted(map(str, chosen.wheels.glob("*.whl")))
        if not wheels:
            parser.error(f"--wheels {chosen.wheels} holds no .whl file")
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
        if subprocess.run([*install, "--target", str(out / "site"), *wheels]).returncode != 0:
            return 1
    if (out / "site").is_dir():
        paths.append(str(out / "site"))
    paths += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    state = State.load(out)
    if chosen.rehearse:
        architecture, facts = "", {"card": "none: a rehearsal on the CPU"}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}
    else:
        architecture, facts = card()
        environment["SSLFAST_REQUIRE_CUDA"] = "1"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    state.facts = {**facts, "python": platform.python_version(), "commit": commit or "unknown"}
    check = Check(
        out=out, rehearse=chosen.rehearse, data=chosen.data and chosen.data.resolve(), architecture=architecture,
        environment=environment,
    )  # fmt: skip
    due: list[str] = []
    for part in (chosen.part,) if chosen.part else (1, 2, 3):
        check.ends = time.monotonic() + PART_SECONDS
        for step in STEPS:
            if step.part not in (0, part) or (chosen.step and step.name not in chosen.step):
                continue
            due.append(step.name)
            if step.part == 0 and step.name in due[:-1] and state.steps[step.name]["end"] == "ok":
                continue  # built a part ago
            (out / f"{step.name}.log").unlink(missing_ok=True)
            began = time.monotonic()
            end, detail = step.function(check, step.seconds)
            took = round(time.monotonic() - began, 1)
            state.steps[step.name] = {
                "end": end if end == "ok" else f"FAILED: {end}",
                "seconds": took,
                "detail": detail,
            }
            state.save(out)
            print(f"{step.name:11} {state.steps[step.name]['end']} ({took:.0f} s) {detail}", flush=True)
            pack(out, chosen.tar or out / "gpu-check.tar")
            if step.name == "build" and end != "ok":
                return 1
    return 0 if all(state.steps[name]["end"] == "ok" for name in due) else 1


if __name__ == "__main__":
    sys.exit(main())
