"""A sharded bank as large as this machine's memory allows: start, steps, save, kill, resume with other processes.

    python -m benchmarks.studies.large_bank --rows 7e6 --processes 4 2 8 --output /tmp/large_bank

Every number of ``--processes`` is one start: the first begins the run, each other one resumes what the one before left
when it was killed (SIGKILL to all of its processes, the last one excepted). The images are synthetic, and the trunk is
small: what is measured is the bank. Writes OUTPUT.json and OUTPUT.md; the run itself goes to OUTPUT.run and is deleted.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.studies.plan_bank import Bank, quantity
from sslfast.config import to_dict
from sslfast.distributed import destroy_process_group, gather_objects, is_main, together
from sslfast.loaders import LoaderConfig
from sslfast.methods import PIRL
from sslfast.models import ResNetConfig
from sslfast.optim import OptimConfig
from sslfast.runs import stored_tensors
from sslfast.training import TrainConfig, Trainer
from sslfast.views import CropConfig, ViewConfig

BATCH, NEGATIVES, COLUMNS, STEPS = 32, 4096, 128, 4


def configuration() -> TrainConfig:
    """PIRL by rotations at 16 px on a quarter of a ResNet-18; InfoNCE over shared negatives and a sharded bf16 bank."""
    view = ViewConfig(crop=CropConfig(size=16))
    method = PIRL.Config(
        dimensions=COLUMNS, num_negatives=NEGATIVES, negatives="shared", loss="infonce", pretext="rotation",
        bank_dtype="bf16", bank_layout="sharded", image_view=view,
        rotation_view=ViewConfig(crop=CropConfig(size=16), rotation=True),
    )  # fmt: skip
    model = ResNetConfig(name="resnet18", stem="small", width=0.25)
    return TrainConfig(
        method=method, model=model, optim=OptimConfig(lr_per_256_images=0.03), loader=LoaderConfig(workers=0), epochs=1,
        batch_size=BATCH, checkpoint_every_steps=10**9, device="cpu", precision="fp32", tensorboard=False,
        progress="off", checkpoint_store="sharded",
    )  # fmt: skip


def memory(name: str) -> int:
    """Bytes of this process: VmRSS, or VmHWM since :func:`from_here`."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0])


def proportional() -> int:
    """Bytes resident of this process, pages shared by n processes counted as 1/n."""
    return 1024 * int(Path("/proc/self/smaps_rollup").read_text().partition("Pss:")[2].split()[0])


def from_here() -> int:
    """Begin a peak; what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def count_sent(counted: dict[str, int]) -> None:
    """Count the bytes of the tensors that collectives are about while ``counted["on"]``."""
    gather, reduce, scatter = dist.all_gather, dist.all_reduce, dist.reduce_scatter_tensor

    def all_gather(parts: list[torch.Tensor], own: torch.Tensor) -> None:
        counted["gather"] += counted["on"] * sum(part.nbytes for part in parts)
        gather(parts, own)

    def all_reduce(x: torch.Tensor, **options: Any) -> None:
        counted["reduce"] += counted["on"] * x.nbytes
        reduce(x, **options)

    def reduce_scatter_tensor(own: torch.Tensor, x: torch.Tensor) -> None:
        counted["scatter"] += counted["on"] * x.nbytes
        scatter(own, x)

    dist.all_gather, dist.all_reduce, dist.reduce_scatter_tensor = all_gather, all_reduce, reduce_scatter_tensor


def rank_of_a_start(rows: int, output: Path, report: Path, *, is_last: bool) -> None:
    """What one process does."""
    torch.set_num_threads(1)
    sent = {"on": 0, "gather": 0, "reduce": 0, "scatter": 0}
    count_sent(sent)
    read_bytes = [0]
    read = stored_tensors.StoredBlock.read

    def counting(self: stored_tensors.StoredBlock, dtype: torch.dtype) -> torch.Tensor:
        read_bytes[0] += self.count * dtype.itemsize
        return read(self, dtype)

    stored_tensors.StoredBlock.read = counting  # type: ignore[method-assign]
    begin = time.perf_counter()
    trainer = Trainer(configuration(), rows, output, report=lambda line: print(line, flush=True))
    together(trainer.run.create, only_main=True)
    bank = trainer.method.bank
    assert isinstance(bank, torch.nn.Module)
    vectors: torch.Tensor = bank.vectors  # type: ignore[assignment]
    facts: dict[str, float] = {"start, s": time.perf_counter() - begin, "bank held, B": vectors.nbytes}

    def timed(name: str, action: Any) -> None:
        before, since = from_here(), time.perf_counter()
        action()
        facts[f"{name}, s"] = time.perf_counter() - since
        facts[f"{name}, B above"] = max(0, memory("VmHWM") - before)

    timed("resume", trainer._resume)
    facts["resume, B read"] = read_bytes[0]
    first_step = facts["first step"] = trainer.step
    trainer._set_rates()
    batches = trainer.loader.epoch(0, first_step)
    timed("first batch, epoch order", lambda: trainer.samples.prepare(batches))

    for name in ("score", "update_"):
        whole = getattr(bank, name)

        def counted(*arguments: Any, whole: Any = whole, **options: Any) -> Any:
            sent["on"] = 1
            result = whole(*arguments, **options)
            sent["on"] = 0
            return result

        setattr(bank, name, counted)
    trainer.method.train()

    def steps() -> None:
        for _ in range(STEPS):
            trainer.train_step(batches)

    timed("steps", steps)
    facts |= {f"sent a step: {name}, B": sent[name] / STEPS for name in ("gather", "reduce", "scatter")}
    begin_write = trainer.store.start  # type: ignore[attr-defined]
    trainer.store.start = lambda *given: timed("of which the copy to host memory", lambda: begin_write(*given))  # type: ignore[attr-defined]
    timed("save, until the next step", trainer._save)
    trainer.store.start = begin_write  # type: ignore[attr-defined]
    timed("steps while it is written", steps)
    timed("save, the rest", lambda: trainer.saver.settle(wait=True))
    timed("save without a copy", lambda: trainer._save(must=True))
    facts["resident with shared pages divided, B"] = proportional()
    found = gather_objects(facts)
    if is_main():
        report.write_text(json.dumps(found))
    if not is_last:
        trainer._save()  # the kill comes while this one is written
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    trainer.close()
    destroy_process_group()


def start(rows: int, ranks: int, output: Path, *, is_last: bool) -> dict[str, Any]:
    """One start of ``ranks`` processes; facts by name, the largest of any rank, and the sum of what was resident."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    report = output.with_suffix(".start.json")
    command = [sys.executable, "-m", "benchmarks.studies.large_bank", "--rows", str(rows), "--output", str(output)]
    command += ["--rank-of", str(report), *(["--last"] if is_last else [])]
    environment = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"MALLOC_ARENA_MAX": "2"}
    children = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    codes = [child.wait() for child in children]
    if codes != [0 if is_last else -signal.SIGKILL] * ranks:
        raise SystemExit(f"the processes of {ranks} ended with {codes}")
    found: list[dict[str, float]] = json.loads(report.read_text())
    report.unlink()
    facts = {name: max(one[name] for one in found) for name in found[0]}
    run = output.with_suffix(".run") / "checkpoints"
    return {
        "processes": ranks,
        **facts,
        "resident of all, B": sum(one["resident with shared pages divided, B"] for one in found),
        "left by the kill": sorted(path.name for path in run.iterdir()),
    }


def table(starts: list[dict[str, Any]], rows: int) -> str:
    """Markdown: a column for each start, the largest of any of its processes; the plan's numbers beside."""
    plans = [
        Bank(rows=rows, batch=BATCH, ranks=s["processes"], negatives="shared", num_negatives=NEGATIVES, columns=COLUMNS,
             element=2, layout="sharded")
        for s in starts
    ]  # fmt: skip
    lines = [f"| largest of any process | {' | '.join(str(s['processes']) + ' processes' for s in starts)} |"]
    lines.append("|---|" + "---|" * len(starts))
    for name in starts[0]:
        if name in ("processes", "left by the kill"):
            continue
        what, _, unit = name.rpartition(", ")
        cells = [quantity(s[name], unit.split()[0]) if what else str(s[name]) for s in starts]
        if name == "bank held, B":
            cells = [f"{cell} (plan {quantity(plan.held(), 'B')})" for cell, plan in zip(cells, plans, strict=True)]
        if name.startswith("sent a step: "):
            kind = what.removeprefix("sent a step: ")
            cells = [f"{int(s[name])} B (plan {plan.payloads()[kind]})" for s, plan in zip(starts, plans, strict=True)]
        label = f"{what}{unit[1:].replace(' above', ': memory above what was there')}" if what else name
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the study, or one process of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, default=7e6)
    parser.add_argument("--processes", type=int, nargs="+", default=[4, 2, 8])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--last", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    rows, run = int(chosen.rows), chosen.output.with_suffix(".run")
    if chosen.rank_of:
        return rank_of_a_start(rows, run, chosen.rank_of, is_last=chosen.last)
    shutil.rmtree(run, ignore_errors=True)
    starts = []
    for position, ranks in enumerate(chosen.processes):
        starts.append(start(rows, ranks, chosen.output, is_last=position == len(chosen.processes) - 1))
        print(json.dumps(starts[-1]), flush=True)
    facts = {
        "command": f"python -m benchmarks.studies.large_bank --rows {chosen.rows:g} --processes "
        + " ".join(map(str, chosen.processes)),
        "rows": rows,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "config": to_dict(configuration()),
        "starts": starts,
    }
    shutil.rmtree(run)
    chosen.output.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    chosen.output.with_suffix(".md").write_text(table(starts, rows))
    print(table(starts, rows))


if __name__ == "__main__":
    main()
