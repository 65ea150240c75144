"""What the machine has left: memory, descriptors, processes. Checked before workers start, for all ranks that torchrun
has started here."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from sslfast.distributed import local_world_size

_SPARE_DESCRIPTORS = 48  # images, logs, checkpoints and sockets that are open at a time
_CGROUPS = Path("/sys/fs/cgroup")


def check_limits(*, memory: int, processes: int, descriptors: int, what: str) -> None:
    """Raises ValueError unless the machine has what each rank on it is about to take.

    Args:
        memory: bytes of each rank.
        processes: processes or threads of each rank.
        descriptors: descriptors of each rank.
        what: takes them, for the message.
    """
    ranks = local_world_size()
    of = f"{what}, {ranks} ranks on this machine," if ranks > 1 else what
    free = free_memory()
    if free is not None and memory * ranks > free:
        raise ValueError(
            f"{of} need {memory * ranks / 2**20:.0f} MiB of memory for batches, and {free / 2**20:.0f} MiB are free: "
            "use fewer workers (--loader.workers), a smaller batch, fewer ranks, or more memory"
        )
    left = free_descriptors()
    if left is not None and descriptors + _SPARE_DESCRIPTORS > left:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        higher = "" if hard == soft else f" (up to {'any number' if hard == resource.RLIM_INFINITY else hard})"
        raise ValueError(
            f"{what} need {descriptors} file descriptors and about {_SPARE_DESCRIPTORS} to spare, and {left} of {soft} "
            f"are free: use fewer workers (--loader.workers), or raise the limit with ulimit -n{higher}"
        )
    startable = free_processes()
    if startable is not None and processes * ranks > startable:
        raise ValueError(
            f"{of} need {processes * ranks} processes or threads, and {startable} more are allowed: use fewer workers "
            "(--loader.workers), fewer ranks, or raise the limit (ulimit -u; docker: --pids-limit)"
        )


def free_memory() -> int | None:
    """Bytes that can be taken: of the machine, and of the control groups of this process. None: unknown."""
    found = []
    for line in _read(Path("/proc/meminfo")).splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            found.append(int(value.split()[0]) * 1024)
    for folder, version in _groups("memory"):
        names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit, used = (_number(folder / name) for name in names)
        if limit is not None and used is not None and limit < 1 << 60:
            cached = next(
                (int(s.split()[1]) for s in _read(folder / "memory.stat").splitlines() if "inactive_file " in s), 0
            )
            found.append(max(0, limit - max(0, used - cached)))
    return min(found, default=None)


def free_descriptors() -> int | None:
    """Descriptors that this process may still open. None: unlimited or unknown."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir("/proc/self/fd")) - 1
    except OSError:
        return None
    return None if soft == resource.RLIM_INFINITY else max(0, soft - used)


def free_processes() -> int | None:
    """Processes and threads that may still be started here. None: unlimited or unknown."""
    found = []
    for folder, _ in _groups("pids"):
        limit, used = _number(folder / "pids.max"), _number(folder / "pids.current")
        if limit is not None and used is not None:
            found.append(max(0, limit - used))
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and os.geteuid() != 0:  # the superuser is exempt
        found.append(max(0, soft - sum(_threads_of(os.geteuid()))))
    return min(found, default=None)


def _threads_of(user: int) -> Iterator[int]:
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{name}").st_uid == user:
                yield len(os.listdir(f"/proc/{name}/task"))
        except OSError:  # it has ended
            continue


def _groups(controller: str) -> Iterator[tuple[Path, int]]:
    """The control group of this process and those around it, with their version."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            root, version = _CGROUPS, 2
        elif controller in controllers.split(","):
            root, version = _CGROUPS / controller, 1
        else:
            continue
        folder = root / path.lstrip("/")
        while folder != root:
            yield folder, version
            folder = folder.parent
        yield root, version


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
