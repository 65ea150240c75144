"""The run directory: paths of a run's files, the lock that excludes a second process, and the record of versions.

``config.json`` resolved configuration · ``versions.json`` software, device and git state of every start ·
``manifest.tsv`` rows of the data · ``log.jsonl`` log records · ``log.csv``, ``tensorboard/`` the same, if asked for ·
``pictures/`` likewise · ``checkpoints/`` · ``bad_images.txt`` files that could not be read.
"""

import errno
import fcntl
import os
import platform
import shutil
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sslfast.config import load_json, save_json
from sslfast.distributed import broadcast_object
from sslfast.files import WriteError, check_writable, open_regular, reason_of, write_file
from sslfast.runs.log import print_error

_WAIT_SECONDS = 120.0  # a network file system releases the lock of a lost machine when its lease expires


_locked: set[int] = set()
"""Descriptors of the lock files that this process holds."""


def _close_locks() -> None:
    """In a forked child, which would otherwise hold its parent's locks."""
    while _locked:
        os.close(_locked.pop())


@cache
def _close_locks_in_forks() -> None:
    """From now on; once, since it cannot be undone."""
    os.register_at_fork(after_in_child=_close_locks)


def _lock_file(descriptor: int, *, release: bool = False) -> None:
    """Lock a whole file for its open file description without waiting, or release it. Raises OSError.

    Such locks and the record locks of earlier versions exclude each other; where there are none (other systems than
    Linux, some network file systems), ``flock`` is the next best.
    """
    if hasattr(fcntl, "F_OFD_SETLK"):
        whole = struct.pack("hhlli0l", fcntl.F_UNLCK if release else fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, whole)
            return
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    fcntl.flock(descriptor, fcntl.LOCK_UN if release else fcntl.LOCK_EX | fcntl.LOCK_NB)


class RunDirectory:
    """Paths of a run. Nothing is written before :meth:`create`."""

    def __init__(self, path: Path | str) -> None:
        self._descriptor: int | None = None
        self._move(Path(path))

    def _move(self, path: Path) -> None:
        self.path = path
        self.config = self.path / "config.json"
        self.versions = self.path / "versions.json"
        self.manifest = self.path / "manifest.tsv"
        self.log = self.path / "log.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.pictures = self.path / "pictures"
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
            self.check_writable()
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                weakref.finalize(self, os.close, self._descriptor)
        except OSError as error:
            raise _not_writable(self.path, reason_of(error)) from None

    def check_writable(self) -> None:
        """Raises ValueError unless the directory can be written, or created where it does not exist; writes nothing."""
        try:
            for folder in (self.checkpoints, self.path):
                check_writable(folder / "file")
        except WriteError as error:
            raise _not_writable(self.path, error.reason) from None

    def follow(self) -> bool:
        """Whether the directory was renamed or moved since :meth:`create`; its paths are then those of the new place.

        Raises:
            FileNotFoundError: it was deleted, or copied to another disk.
        """
        if self._descriptor is None:
            return False
        own = os.fstat(self._descriptor)
        try:
            there = os.stat(self.path)
        except (FileNotFoundError, NotADirectoryError):
            there = None
        except OSError:  # a disk that does not answer is no move
            return False
        if there is not None and os.path.samestat(there, own):
            return False
        try:
            now = Path(os.readlink(f"/proc/self/fd/{self._descriptor}"))
            if there is not None and now == self.path.resolve():  # file systems whose inode numbers change
                return False
            is_found = os.path.samestat(os.stat(now), own)
        except OSError:
            is_found = False
        if not is_found:
            raise FileNotFoundError(
                f"{self.path} was deleted or moved to another disk while it was trained in; "
                "the same command, with --output where it is now, resumes from the last checkpoint there"
            )
        self._move(now)
        return True

    def follow_together(self) -> Path:
        """:meth:`follow` of rank 0 for every rank; where the directory is now. Raises on all of them."""
        error = None
        try:
            self.follow()
        except FileNotFoundError as problem:
            error = str(problem)
        path, error = broadcast_object((self.path, error))
        if error is not None:
            raise FileNotFoundError(error)
        if path != self.path:
            self._move(path)
        return path

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
        """Raises ValueError if the lock is held, by this process or another; writes nothing."""
        if self._lock.exists():
            descriptor = os.open(self._lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                self._acquire(descriptor, wait=0.0)
            finally:
                os.close(descriptor)

    def is_locked(self) -> bool:
        """Whether a process holds the lock. Takes no lock itself: no run that starts meanwhile is disturbed."""
        try:
            descriptor = os.open(self._lock, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            whole = struct.pack("hhlli0l", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            if hasattr(fcntl, "F_OFD_GETLK"):
                with suppress(OSError):
                    kind: int = struct.unpack("hhlli0l", fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, whole))[0]
                    return kind != fcntl.F_UNLCK
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False
        finally:
            os.close(descriptor)

    @contextmanager
    def locked(self, *, is_restart: bool = False) -> Iterator[None]:
        """Hold the lock of the directory; the system releases it when the process ends, however it ends.

        The lock belongs to the open file: reading ``.lock`` or a second attempt in this process does not release it, as
        it would a POSIX record lock. Processes forked from this one close the file at once, so that workers which
        briefly outlive a killed trainer do not block its successor. A restart after a failure (``is_restart``) waits
        for the lock of its predecessor, which may have died on another machine.

        Raises:
            ValueError: the lock is held, by this process or another, or the file system has none.
        """
        _close_locks_in_forks()
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        _locked.add(descriptor)
        try:
            self._acquire(descriptor, wait=_WAIT_SECONDS if is_restart else 0.0)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
            yield
        finally:
            if descriptor in _locked:  # not in a process forked meanwhile
                _locked.remove(descriptor)
                with suppress(OSError):  # also where a process that is being forked still has the file open
                    _lock_file(descriptor, release=True)
                os.close(descriptor)

    def _acquire(self, descriptor: int, *, wait: float) -> None:
        end = time.monotonic() + wait
        while True:
            try:
                return _lock_file(descriptor)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise ValueError(
                        f"{self.path} lies on a file system without locks ({error.strerror}); mount it with them "
                        "(Lustre: -o flock), or choose another output directory"
                    ) from None
                if time.monotonic() < end:
                    time.sleep(0.2)
                    continue
                own, others = os.fstat(descriptor), _locked - {descriptor}
                if any(os.path.samestat(os.fstat(other), own) for other in others):
                    raise ValueError(
                        f"{self.path} is in use by another run of this process ({os.getpid()}); "
                        "let it end first, or choose another output directory"
                    ) from None
                holder = os.pread(descriptor, 64, 0).decode("ascii", "replace").strip()
                raise ValueError(
                    f"{self.path} is in use by process {holder or 'unknown'}; "
                    "wait for it, stop it, or choose another output directory"
                ) from None

    def records(
        self,
        config: dict[str, Any],
        facts: dict[str, Any],
        save_manifest: Callable[[Path], None] | None,
        *,
        report: Callable[[str], None],
    ) -> dict[str, Callable[[], None]]:
        """What a start records, by file name, for an :class:`~sslfast.runs.outbox.Outbox`.

        Args:
            config: of the run.
            facts: go to ``versions.json``, beside :func:`versions`.
            save_manifest: writes the manifest to a path; None: there is none.
            report: takes one line for the user.
        """
        facts = {**versions(), **facts}
        actions: dict[str, Callable[[], None]] = {
            "config.json": lambda: save_json(self.config, config),
            "versions.json": lambda: self.add_versions(facts, report=report),
        }
        if save_manifest is not None and not self.manifest.exists():
            actions["manifest.tsv"] = lambda: save_manifest(self.manifest)
        return actions

    def add_versions(self, facts: dict[str, Any], *, report: Callable[[str], None] = print_error) -> None:
        """Append a record of this start to ``versions.json``. A damaged one is set aside, as ``report`` is told."""
        starts: list[Any] = []
        try:
            found = load_json(self.versions).get("starts")
            if not isinstance(found, list):
                raise ValueError(f"{self.versions} holds no list of starts")
            starts = found
        except FileNotFoundError:
            pass
        except ValueError as error:
            aside = self.versions.with_name(f"versions.damaged-{time.time_ns()}.json")
            os.replace(self.versions, aside)
            report(f"{str(error).partition(';')[0]}; it is now {aside.name}, and a new record begins")
        save_json(self.versions, {"starts": [*starts, facts]})

    def add_bad_images(self, found: Iterable[tuple[str, str]]) -> int:
        """Merge ``(path, reason)`` pairs into ``bad_images.txt``, sorted; returns how many it lists."""
        known: dict[str, str] = {}
        before = ""
        with suppress(FileNotFoundError), open_regular(self.bad_images) as file:
            before = file.read().decode("utf-8", "surrogateescape")
        for line in before.split("\n"):
            path, tab, reason = line.partition("\t")
            if tab:
                known[path] = reason
        # A tab or a line break in a name or a reason would corrupt the table.
        clean = str.maketrans("\t\r\n", "   ")
        known.update((str(path).translate(clean), str(reason).translate(clean)) for path, reason in found)
        text = "".join(f"{path}\t{reason}\n" for path, reason in sorted(known.items()))
        if text != before:
            write_file(self.bad_images, text)
        return len(known)


def _not_writable(path: Path, reason: str) -> ValueError:
    return ValueError(f"cannot write to {path} ({reason}); choose another output directory with --output")


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
