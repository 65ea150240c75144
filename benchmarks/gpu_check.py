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
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file

from benchmarks.gpu_steps import NEEDED, ROOT, STEPS, Check, read_json

PART_SECONDS = 535.0
CHARTS = ("goals", "crossover", "step", "loaders")
MOST_BYTES = 15 * 2**20


def forget(out: Path, step: str) -> None:
    """Remove what an earlier run of a step left in OUT: its results must not be taken for those of this one."""
    for path in [*out.glob(f"{step}.*"), *out.glob(f"{step}_*")]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def missing_packages(environment: dict[str, str]) -> frozenset[str]:
    """Those of NEEDED that the steps would not find."""
    code = f"import importlib.util as u; print(*(name for name in {list(NEEDED)} if u.find_spec(name) is None))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return frozenset(done.stdout.split())


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
    read = {name: read_json(out / f"{name}.json") for name in names}
    found = {name: values for name, values in read.items() if values is not None}
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
    if chosen.wheels is None and (ROOT / ".whl").is_dir():
        chosen.wheels = ROOT / ".whl"
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
    missing = missing_packages(environment)
    gaps = ", ".join(f"{name} for {NEEDED[name]}" for name in sorted(missing)) or "none"
    if missing:
        print(f"sslfast: missing packages: {gaps}; give wheels of them with --wheels FOLDER", flush=True)
    state = State.load(out)
    if chosen.rehearse:
        architecture, facts = "", {"card": "none: a rehearsal on the CPU"}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}
    else:
        architecture, facts = card()
        environment["SSLFAST_REQUIRE_CUDA"] = "1"
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    facts["missing packages"] = gaps
    state.facts = {**facts, "python": platform.python_version(), "commit": commit or "unknown"}
    check = Check(
        out=out, rehearse=chosen.rehearse, data=chosen.data and chosen.data.resolve(), architecture=architecture,
        environment=environment, missing=missing,
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
            forget(out, step.name)
            began = time.monotonic()
            try:
                end, detail = step.function(check, step.seconds)
            except Exception as error:  # the later steps are worth as much
                end, detail = f"{type(error).__name__}: {error}"[:300], ""
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
