"""Files that survive a full disk: atomic replacement, whole records appended, and errors in one line.

Whatever is written here has the mode that the umask gives. A write that fails raises :class:`WriteError`, which says
what could not be written, why, and what helps.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any, BinaryIO

ANOTHER_PLACE = "choose another place"
OUTPUT = "name another file with --output"
"""Remedy of commands that have the option."""
_IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR)
_FIRST_AID = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EIO: "correct the disk",
}
# What a directory answers where its file system cannot sync it, or where it may be written and not read.
_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EBADF)


class WriteError(OSError):
    """A file that could not be written, in one line; ``errno`` is the system's."""

    def __init__(self, error: OSError, path: Path, *, remedy: str) -> None:
        self.reason = reason_of(error)
        if error.errno in _IN_THE_WAY:
            found = (str(folder) for folder in path.parents if os.path.lexists(folder) and not folder.is_dir())
            self.reason = next((f"{name} is no folder" for name in found), self.reason)
        super().__init__(f"cannot write {path} ({self.reason}); {what_helps(error.errno, remedy)}")
        self.errno = error.errno


def reason_of(error: BaseException) -> str:
    """Why something failed, without the path: of an error of the system its text, else its type and message."""
    if isinstance(error, WriteError):
        return error.reason
    if isinstance(error, OSError) and error.strerror:
        # Of a library: pyarrow's begins with "Error writing bytes to file. Detail: [errno 28]".
        return os.strerror(error.errno) if error.errno and "[errno" in error.strerror else error.strerror
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def what_helps(number: int | None, remedy: str = "") -> str:
    """What helps against an error number of a write, and the ``remedy`` that its caller knows."""
    first = _FIRST_AID.get(number or 0, "")
    return " or ".join(words for words in (first, remedy) if words)


@contextmanager
def writing(path: Path | str, *, remedy: str = ANOTHER_PLACE) -> Iterator[None]:
    """A block that writes ``path``: an error of the system about it becomes a :class:`WriteError`.

    Args:
        path: file or folder that is written.
        remedy: what helps besides space and a sound disk, names the option: "choose another file with --output".
    """
    path = Path(path)
    try:
        yield
    except (WriteError, ConnectionError, TimeoutError):
        raise
    except OSError as error:
        if error.errno is None or not _is_about(error, path):
            raise
        raise WriteError(error, path, remedy=remedy) from None


def _is_about(error: OSError, path: Path) -> bool:
    """Whether an error is about a file, one beside it or a folder above it; other files may be read meanwhile."""
    if not isinstance(error.filename, str | os.PathLike):
        return True
    name, path = Path(os.path.abspath(os.fspath(error.filename))), Path(os.path.abspath(path))
    return name == path or name.parent == path.parent or name in path.parents


@contextmanager
def replacing(path: Path | str, *, remedy: str = ANOTHER_PLACE) -> Iterator[Path]:
    """A temporary path beside ``path`` to write: renamed to ``path`` when the block ends, deleted if it raises.

    Creates missing folders. Several processes may do this for one path: the last to finish wins. The file has the mode
    that the umask gives, whatever the writer in the block prefers.

    Args:
        path: to be written; a folder, a pipe or a device is not replaced.
        remedy: as of :func:`writing`.

    Raises:
        WriteError: the disk is full, read-only or fails; what was there before is untouched.
    """
    path = Path(path)
    with writing(path, remedy=remedy):
        with suppress(FileNotFoundError):
            check_regular(path, os.stat(path).st_mode)
        make_folder(path.parent)
        temporary = temporary_beside(path)
        try:
            mode = _create(temporary)
            yield temporary
            with temporary.open("rb") as file:
                if os.fstat(file.fileno()).st_mode != mode:
                    os.fchmod(file.fileno(), stat.S_IMODE(mode))
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)


def temporary_beside(path: Path) -> Path:
    """A new name for what becomes ``path``, or is made of it. Files and folders of such names that a killed process of
    this machine left are deleted: they may be as large as features of a million images."""
    # Short enough for a name of the greatest length that a file system takes.
    start = f".{path.name[:40]}.{_machine()}-"
    if (path.parent, start) not in _cleaned and _machine():
        _cleaned.add((path.parent, start))
        with suppress(OSError):
            for name in os.listdir(path.parent):
                found = re.fullmatch(r"(\d+)-[0-9a-f]{16}\.tmp", name.removeprefix(start))
                if found is not None and not os.path.exists(f"/proc/{found[1]}"):
                    left = path.parent / name
                    if left.is_dir() and not left.is_symlink():
                        shutil.rmtree(left, ignore_errors=True)
                    else:
                        left.unlink(missing_ok=True)
    return path.with_name(f"{start}{os.getpid()}-{secrets.token_hex(8)}.tmp")


_cleaned: set[tuple[Path, str]] = set()


@cache
def _machine() -> str:
    """12 hex digits for the start of this machine and its table of processes (of a container), in which a process has
    its number; empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return hashlib.sha256(f"{boot} {os.readlink('/proc/self/ns/pid')}".encode()).hexdigest()[:12]
    except OSError:
        return ""


def _create(path: Path) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        return os.fstat(descriptor).st_mode
    finally:
        os.close(descriptor)


def write_file(path: Path | str, data: bytes | str, *, remedy: str = ANOTHER_PLACE) -> None:
    """Write a whole file at once or not at all; text as UTF-8, undecodable bytes of names as they were. Raises as
    :func:`replacing` does."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogateescape")
    with replacing(path, remedy=remedy) as temporary:
        temporary.write_bytes(data)


def save_picture(picture: Any, path: Path | str, *, remedy: str = ANOTHER_PLACE) -> None:
    """Write a Pillow image at once or not at all, in the format of the path's suffix. Raises as :func:`replacing`
    does, and ValueError for a suffix that is no format."""
    from PIL import Image

    suffix = Path(path).suffix.lower()
    format = Image.registered_extensions().get(suffix)
    if format not in Image.SAVE:
        raise ValueError(f"{path} has no suffix of a picture that can be written; name it .png or .jpg")
    encoded = BytesIO()  # Pillow would leave half a file, and words of its own for a full disk
    picture.save(encoded, format=format)
    write_file(path, encoded.getvalue(), remedy=remedy)


def save_tensors(state: Any, file: Any) -> None:
    """``torch.save`` to an open file. A failed write raises the system's error; torch raises its own about the position
    in the file, which hides the cause."""
    import torch

    remembering = _Remembering(file)
    try:
        torch.save(state, remembering)  # type: ignore[arg-type]
    except RuntimeError:
        if remembering.error is not None:
            raise remembering.error from None
        raise


class _Remembering:
    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


class AppendFile:
    """A file that whole records are appended to: what a full disk takes of one is removed again.

    Not buffered: a record that is written can be read by others at once, and nothing is left to do at the end.
    """

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        check_regular(path)
        self._file = path.open("ab", buffering=0)
        self._cut: int | None = None  # size without the part of a record that could not be removed yet

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._file.fileno()).st_size

    def write(self, record: bytes) -> None:
        """Append ``record``, all of it or nothing.

        Raises:
            OSError: nothing was appended; it may be tried again.
        """
        if self._cut is not None:
            os.ftruncate(self._file.fileno(), self._cut)
            self._cut = None
        size, left = self.size, memoryview(record)
        try:
            while left:  # a full disk takes a part, and says why it takes no more at the next write
                left = left[self._file.write(left) :]
        except OSError:
            self._cut = size
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), size)
                self._cut = None
            raise

    def sync(self) -> None:
        """Make all records durable."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def make_folder(path: Path) -> None:
    """Create a folder and those above it, durably; nothing where it exists."""
    missing = []
    for folder in (path, *path.parents):
        if os.path.lexists(folder):
            break
        missing.append(folder)
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync_directory(folder.parent)


def check_writable(path: Path | str, *, remedy: str = ANOTHER_PLACE) -> None:
    """Raises WriteError unless a file could be created as ``path``, in folders that need not exist yet; writes nothing.
    For the start of work whose result goes there."""
    path = Path(path)
    with writing(path, remedy=remedy):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        folder = path.absolute().parent
        while not os.path.lexists(folder) and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is no folder", str(folder))
        if not os.access(folder, os.W_OK | os.X_OK):
            number = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(number, os.strerror(number), str(folder))


def fsync_directory(directory: Path) -> None:
    """Make renames in ``directory`` durable, where its file system can."""
    descriptor = None
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


_KINDS: tuple[tuple[Callable[[int], bool], int, str], ...] = (
    (stat.S_ISDIR, errno.EISDIR, "it is a folder"),
    (stat.S_ISFIFO, errno.EINVAL, "it is a named pipe"),
    (stat.S_ISSOCK, errno.EINVAL, "it is a socket"),
    (stat.S_ISCHR, errno.EINVAL, "it is a device"),
    (stat.S_ISBLK, errno.EINVAL, "it is a device"),
)


def check_regular(path: Path, mode: int | None = None) -> None:
    """OSError where ``path`` exists and is no regular file (opening a pipe waits for ever, reading a device may), or is
    a link to nothing."""
    if mode is None:
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            if os.path.islink(path):
                text = f"it is a link to {os.readlink(path)}, which does not exist"
                raise OSError(errno.EINVAL, text, str(path)) from None
            return
    for is_kind, number, text in _KINDS:
        if is_kind(mode):
            raise OSError(number, text, str(path))


def open_without_waiting(path: Path | str | os.PathLike[str]) -> BufferedReader:
    """Open a file to read it, whatever it is: neither a pipe without a writer nor a terminal is waited for."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY))


def open_regular(path: Path) -> BufferedReader:
    """Open a file to read it; never waits. What was opened is checked, so that a name whose file changes in between
    does no harm.

    Raises:
        FileNotFoundError: nothing has this name.
        OSError: it is a folder, pipe, socket, device or link to nothing, or cannot be read; ``strerror`` says which.
    """
    try:
        file = open_without_waiting(path)
    except OSError:
        check_regular(path)  # says more about a folder, a socket and a link to nothing
        raise
    try:
        check_regular(path, os.fstat(file.fileno()).st_mode)
    except OSError:
        file.close()
        raise
    return file
