"""``sslfast launch slurm``: a run as a Slurm job that saves and requeues itself before its time limit, by submitit."""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import tyro

from sslfast.cli.exit_codes import EXIT_INTERRUPTED
from sslfast.cli.main import main
from sslfast.cli.usage import parse

_SEPARATOR = "--"


@dataclass(kw_only=True)
class Slurm:
    """Submit `sslfast pretrain` as a Slurm job, one process per GPU.

    Behind `--` stand the arguments of `sslfast pretrain`; they are checked before the job is submitted. Before the time
    limit all processes save a checkpoint and the job is requeued; it continues behind the last step.

    Example: sslfast launch slurm --nodes 4 --hours 24 -- IN/train --recipe pirl-paper -o runs/pirl"""

    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs of a machine, each with a process of its own; 0 for runs on CPUs."""
    processes_per_node: int | None = None
    """Processes of a machine, for runs on CPUs."""
    cpus_per_process: int = 8
    """Cores for each process: its loader workers and itself."""
    memory_gb: float | None = None
    """Host memory of a machine; default: the cluster's."""
    hours: float = 24.0
    """Time limit of the job; every continuation has as much."""
    save_seconds: int = 180
    """How long before the time limit processes are told to save: a step and a checkpoint must fit into it."""
    requeues: int = 100
    """Time limits after which the job is requeued; the next one ends it, with its checkpoint."""
    partition: str | None = None
    """Partition of the cluster."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that machines must have."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch, as NAME=VALUE (mail-type=END), NAME alone for a flag."""
    name: str = "sslfast"
    """Name of the job."""
    folder: Path = Path("slurm")
    """Where the job's output and submitit's files go; on a file system that all machines share."""
    cluster: Literal["slurm", "local"] = "slurm"
    """local: processes of this machine instead of a job, to try the command."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the batch script and submit nothing."""

    def processes(self) -> int:
        """Processes of a machine; ValueError where the options contradict each other."""
        seconds = 3600 * self.hours
        if self.save_seconds >= seconds:
            raise ValueError(f"--save-seconds must be less than the {seconds:g} of --hours, got {self.save_seconds}")
        if self.gpus_per_node and self.processes_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"--processes-per-node {self.processes_per_node} differs from --gpus-per-node {self.gpus_per_node}; "
                "leave it out, or pass --gpus-per-node 0 for a run on CPUs"
            )
        return self.gpus_per_node or self.processes_per_node or 1


class PretrainJob:
    """``sslfast pretrain`` in one process of a submitit job."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)

    def __call__(self) -> int:
        """Trains; requeues the job where its time limit stopped the run, else exits with the run's exit code."""
        import submitit

        ranks = submitit.helpers.TorchDistributedEnvironment()
        if ranks.local_world_size == ranks.world_size:
            ranks.master_addr = "127.0.0.1"
        ranks.export(set_cuda_visible_devices=False, overwrite=True)
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun: one pool of threads per process, else all wait
        timed_out = False
        # submitit's handler would requeue in the middle of a step. It is called below, when the run has been saved.
        requeue: Any = signal.getsignal(signal.SIGUSR2)

        def stop(number: int, frame: FrameType | None) -> None:
            nonlocal timed_out
            timed_out = True
            os.kill(os.getpid(), signal.SIGTERM)

        signal.signal(signal.SIGUSR2, stop)
        code = main(["pretrain", *self.arguments])
        if code == EXIT_INTERRUPTED and timed_out and callable(requeue):
            requeue(signal.SIGUSR2, None)  # rank 0: ends the process
        if code:
            sys.exit(code)
        return 0

    def checkpoint(self) -> Any:
        """What a requeued job runs: the same command, which resumes by itself."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def slurm(arguments: list[str]) -> int:
    """Run ``sslfast launch slurm``; returns the exit code."""
    place = arguments.index(_SEPARATOR) if _SEPARATOR in arguments else len(arguments)
    chosen = parse(Slurm, arguments[:place], prog="sslfast launch slurm")
    if isinstance(chosen, int):
        return chosen
    processes, command = chosen.processes(), arguments[place + 1 :]
    if command[:1] == ["pretrain"]:
        command = command[1:]
    if not command:
        raise ValueError("what is to run is missing; append -- and the arguments of sslfast pretrain")
    local = chosen.cluster == "local"
    if local and chosen.dry_run:
        raise ValueError("--dry-run prints a batch script, which --cluster local has none of; leave one out")
    more = dict(_sbatch_option(text) for text in chosen.sbatch)
    if (code := _check(command)) is not None:
        return code
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise ImportError("sslfast launch needs submitit; pip install 'sslfast[slurm]'") from error

    class Script(submitit.SlurmExecutor):
        """Writes the batch script where there is no Slurm."""

        @classmethod
        def affinity(cls) -> int:
            return 1

    kind = submitit.LocalExecutor if local else Script if chosen.dry_run else submitit.SlurmExecutor
    try:
        executor = kind(folder=chosen.folder / "%j", max_num_timeout=chosen.requeues)
    except RuntimeError as error:
        raise ValueError(
            "there is no srun here: submit from a machine of a Slurm cluster, or look with --dry-run, or try with "
            "--cluster local"
        ) from error
    if local:
        executor.update_parameters(
            timeout_min=60 * chosen.hours,
            signal_delay_s=chosen.save_seconds,
            gpus_per_node=chosen.gpus_per_node,
            tasks_per_node=processes,
            nodes=chosen.nodes,
        )
    else:
        options = {
            "job_name": chosen.name,
            "time": max(1, round(60 * chosen.hours)),
            "nodes": chosen.nodes,
            "ntasks_per_node": processes,
            "cpus_per_task": chosen.cpus_per_process,
            "gpus_per_node": chosen.gpus_per_node or None,
            "mem": None if chosen.memory_gb is None else f"{round(1024 * chosen.memory_gb)}M",
            "partition": chosen.partition,
            "account": chosen.account,
            "qos": chosen.qos,
            "constraint": chosen.constraint,
            "signal_delay_s": chosen.save_seconds,
            # A lost process ends the others, which would wait for it.
            "srun_args": ["--kill-on-bad-exit=1"],
            "additional_parameters": {"requeue": True, **more},
        }
        executor.update_parameters(**{name: value for name, value in options.items() if value is not None})
    if chosen.dry_run:
        print(executor._make_submission_file_text(executor._submitit_command_str, "job"))
        return 0
    job = executor.submit(PretrainJob(command))
    print(f"job {job.job_id}; output in {job.paths.stdout} and {job.paths.stderr}")
    if local:
        job.wait()
        failed = job.exception()  # also where a process ended without a result
        return 0 if failed is None else 1
    return 0


def _sbatch_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.removeprefix("--").partition("=")
    if not name or any(character.isspace() for character in name):
        raise ValueError(f"--sbatch takes options of sbatch as NAME=VALUE, got {text!r}")
    return name, value if equals else True


def _check(command: list[str]) -> int | None:
    """Errors of the command now and not when the job starts; the exit code where help was asked for."""
    from sslfast.cli.options import parse_recipe
    from sslfast.cli.plugins import import_plugins
    from sslfast.cli.pretrain import Pretrain

    chosen = parse_recipe(Pretrain, import_plugins(command), command="pretrain")
    return chosen if isinstance(chosen, int) else None
