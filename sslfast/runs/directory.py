"""The run directory: paths of a run's files, the lock that excludes a second process, and the record of versions.

``config.json`` resolved configuration · ``versions.json`` software, device and git state of every start ·
``manifest.tsv`` rows of the data · ``log.jsonl`` log records · ``log.csv``, ``tensorboard/`` the same, if asked for ·
``checkpoints/`` · ``bad_images.txt`` files that could not be read.
"""

import errno
import fcntl
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sslfast.config import load_json, save_json

_WAIT_SECONDS = 120.0  # a network file system releases the lock of a lost machine when its lease expires


class RunDirectory:
    """Paths of a run. Nothing is written before :meth:`create`."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.versions = self.path / "versions.json"
        self.manifest = self.path / "manifest.tsv"
        self.log = self.path / "log.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.bad_images = self.path / "bad_images.txt"
        self._lock = self.path / ".lock"

    def create(self) -> None:
        """Create the directory.

        Raises:
            ValueError: it cannot be created or written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror
            raise ValueError(f"cannot write to {self.path} ({reason}); choose another output directory") from None

    def free_bytes(self) -> int:
        """Free space on the disk of the directory, which need not exist yet."""
        path = self.path.absolute()
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free

    def check_space(self, needed: int) -> None:
        """Raises ValueError unless ``needed`` more bytes of checkpoints fit."""
        free = self.free_bytes()
        if free < needed:
            raise ValueError(
                f"the checkpoints need {needed / 1e9:.2f} GB and {self.path} has {free / 1e9:.2f} GB free; "
                "free some space, lower keep_checkpoints, or choose another output directory"
            )

    def check_unlocked(self) -> None:
        """Raises ValueError if another process holds the lock; writes nothing."""
        if self._lock.exists():
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                self._acquire(descriptor, wait=0.0)
            finally:
                os.close(descriptor)

    @contextmanager
    def locked(self, *, is_restart: bool = False) -> Iterator[None]:
        """Hold the lock of the directory; the system releases it when the process ends, however it ends.

        A POSIX record lock: unlike ``flock`` it is not inherited by loader workers, so that workers which briefly
        outlive a killed trainer do not block its successor. A restart after a failure (``is_restart``) waits for the
        lock of its predecessor, which may have died on another machine.

        Raises:
            ValueError: another process holds the lock, or the file system has none.
        """
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._acquire(descriptor, wait=_WAIT_SECONDS if is_restart else 0.0)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
            yield
        finally:
            os.close(descriptor)

    def _acquire(self, descriptor: int, *, wait: float) -> None:
        end = time.monotonic() + wait
        while True:
            try:
                return fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise ValueError(
                        f"{self.path} lies on a file system without locks ({error.strerror}); mount it with them "
                        "(Lustre: -o flock), or choose another output directory"
                    ) from None
                if time.monotonic() < end:
                    time.sleep(0.2)
                    continue
                holder = os.pread(descriptor, 64, 0).decode("ascii", "replace").strip()
                raise ValueError(
                    f"{self.path} is in use by process {holder or 'unknown'}; "
                    "wait for it, stop it, or choose another output directory"
                ) from None

    def add_versions(self, facts: dict[str, Any]) -> None:
        """Append a record of this start to ``versions.json``."""
        starts = []
        if self.versions.exists():
            starts = load_json(self.versions).get("starts", [])
        save_json(self.versions, {"starts": [*starts, facts]})

    def add_bad_images(self, found: Iterable[tuple[str, str]]) -> int:
        """Merge ``(path, reason)`` pairs into ``bad_images.txt``, sorted; returns how many it lists."""
        known: dict[str, str] = {}
        if self.bad_images.exists():
            for line in self.bad_images.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
                path, _, reason = line.partition("\t")
                known[path] = reason
        # A tab or a line break in a name or a reason would corrupt the table.
        clean = str.maketrans("\t\r\n", "   ")
        known.update((str(path).translate(clean), str(reason).translate(clean)) for path, reason in found)
        if known:
            text = "".join(f"{path}\t{reason}\n" for path, reason in sorted(known.items()))
            self.bad_images.write_text(text, encoding="utf-8", errors="surrogateescape")
        return len(known)


def versions() -> dict[str, Any]:
    """Software versions, devices and git state of this process; works without git."""
    import sslfast

    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "sslfast": getattr(sslfast, "__version__", "unknown"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [torch.cuda.get_device_name(i) for i in cuda] or ["cpu"],
        "git": git_state(Path(sslfast.__file__).resolve().parent),
        "command": sys.argv,
        "unix_seconds": round(time.time(), 3),
    }


def git_state(directory: Path) -> dict[str, Any] | None:
    """``{"commit", "dirty"}`` of the working tree that tracks ``directory``, None where there is none."""
    try:
        # An installed package may lie inside a repository that does not track it.
        if not _git(directory, "ls-files", "."):
            return None
        return {"commit": _git(directory, "rev-parse", "HEAD"), "dirty": bool(_git(directory, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10, check=True)
    return done.stdout.strip()
