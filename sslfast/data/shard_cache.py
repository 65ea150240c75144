"""Shards elsewhere (https, s3, gs, hf, whatever fsspec opens), each downloaded whole into a bounded folder.

The folder is ``$SSLFAST_CACHE``, else ``sslfast`` in the user's cache folder; it holds at most ``$SSLFAST_CACHE_GIB``
(default 100) GiB, downloads in progress included, and the shards used longest ago make room for others. All processes
of a machine share it: a file of it that is being read is locked (flock) and never removed, and a shard is downloaded by
one process at a time, under a temporary name. Memory: a few MiB for each download in progress, 8 at most in a process.
"""

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

from sslfast.data.pool import map_threads
from sslfast.data.source import SourceError

DEFAULT_GIB = 100.0
ATTEMPTS = 4
SECONDS = 60.0
"""Without a byte, until an attempt counts as failed."""
_PAUSE = 1.0
"""Before the second attempt; doubled before each further one."""
_POLL = 0.05
_TAGS = ("ETag", "etag", "md5Hash", "blob_id", "Last-Modified", "LastModified", "updated", "mtime")
"""What file systems of fsspec tell of a file's version."""
_ENTRY = re.compile(r"[0-9a-f]{16}-(?P<size>[0-9]+)-.*")
_PART = ".part"
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Of the disk, not of the network."""
_PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
}


@dataclass(frozen=True, kw_only=True)
class Remote:
    """The shards of a source that is elsewhere."""

    urls: tuple[str, ...]
    sizes: tuple[int, ...]
    """Bytes of each, as the server says."""
    tags: tuple[int, ...]
    """A number for the version of each, 0 where the server names none. It stands where the modification time of a local
    shard does."""

    @classmethod
    def of(cls, urls: Sequence[str], *, progress: bool = False) -> "Remote":
        """Ask for size and version of each. SourceError: one of them is not there."""
        found = [info for _, info in map_threads(_info, urls, progress=progress, title="asking for shards", chunk=1)]
        return cls(urls=tuple(urls), sizes=tuple(size for size, _ in found), tags=tuple(tag for _, tag in found))

    @contextmanager
    def local(self, shard: int) -> Iterator[str]:
        """The path of a local copy, which stays inside of the block. SourceError: it cannot be had; and errors of the
        block name the URL."""
        url, size = self.urls[shard], self.sizes[shard]
        key = hashlib.sha1(f"{url}\n{size}\n{self.tags[shard]}".encode(), usedforsecurity=False).hexdigest()[:16]
        name = f"{key}-{size}-{re.sub(r'[^A-Za-z0-9._-]', '_', url.rpartition('/')[2])[-80:]}"
        with ShardCache().held(name, size, url) as path:
            try:
                yield path
            except SourceError as error:
                raise type(error)(str(error).replace(path, url)) from None


class ShardCache:
    """The folder, as the environment names it."""

    def __init__(self) -> None:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.folder = Path(os.environ.get("SSLFAST_CACHE") or home / "sslfast" / "shards")
        text = os.environ.get("SSLFAST_CACHE_GIB") or str(DEFAULT_GIB)
        try:
            self.limit = int(float(text) * 2**30)
        except (ValueError, OverflowError):
            self.limit = 0
        if self.limit <= 0:
            raise SourceError(f"SSLFAST_CACHE_GIB must be a number of GiB above 0, got {text!r}: set it, or unset it")

    @contextmanager
    def held(self, name: str, size: int, url: str) -> Iterator[str]:
        """The path of an entry, downloaded if it is not there, and kept from being removed."""
        path = self.folder / name
        while (descriptor := _lock(path, fcntl.LOCK_SH)) is None or os.fstat(descriptor).st_size != size:
            if descriptor is not None:
                os.close(descriptor)
            self._fill(path, size, url)
        try:
            with suppress(OSError):
                os.utime(path)  # used last now
            yield str(path)
        finally:
            os.close(descriptor)

    def _fill(self, path: Path, size: int, url: str) -> None:
        part = path.with_name(path.name + _PART)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(part, size, url)
            descriptor = _lock(part, fcntl.LOCK_EX)
            if descriptor is None:
                return  # removed again, or filled by another process
            try:
                if _is_whole(path, size):
                    part.unlink(missing_ok=True)
                    return
                download(url, part, size)
                os.fsync(descriptor)
                os.replace(part, path)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise SourceError(
                f"{url} cannot be stored in {self.folder} ({error.strerror or error}): free space there, or set "
                "SSLFAST_CACHE to a folder of another disk"
            ) from None

    def _make_room(self, part: Path, size: int, url: str) -> None:
        """Reserve ``size`` bytes by creating ``part``: entries count by the size in their names. Waits while everything
        is in use; SourceError where that cannot help."""
        if size > self.limit:
            raise SourceError(
                f"{url} has {size:,} bytes, and the cache {self.folder} may hold {self.limit:,}: set SSLFAST_CACHE_GIB "
                "to more"
            )
        while True:
            (self.folder / "lock").touch()
            descriptor = _lock(self.folder / "lock", fcntl.LOCK_EX)
            if descriptor is not None:
                try:
                    if part.exists() or self._evict(self.limit - size):
                        part.touch()
                        return
                finally:
                    os.close(descriptor)
            time.sleep(_POLL)

    def _evict(self, limit: int) -> bool:
        """Remove what was used longest ago and is not in use, until all are ``limit`` bytes or less; whether they
        are."""
        entries = []
        for entry in os.scandir(self.folder):
            if found := _ENTRY.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    entries.append((entry.stat().st_mtime_ns, entry.path, int(found["size"])))
        total = sum(size for _, _, size in entries)
        for _, path, size in sorted(entries):
            if total <= limit:
                break
            descriptor = _lock(Path(path), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if descriptor is not None:
                with suppress(FileNotFoundError):
                    os.unlink(path)
                os.close(descriptor)
                total -= size
        return total <= limit


def _lock(path: Path, kind: int) -> int | None:
    """A descriptor of the file that has this name, locked; None where there is none, or (``LOCK_NB``) it is in use."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, kind)
            # It may have been removed or renamed between the two calls.
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _is_whole(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def download(url: str, target: Path, size: int) -> None:
    """Fill ``target`` with what ``url`` holds, in up to ``ATTEMPTS`` attempts. SourceError: not to be had, or not of
    ``size`` bytes."""

    def attempt() -> None:
        system, path = _open(url)
        system.get_file(path, str(target))
        if (got := target.stat().st_size) != size:
            raise ConnectionError(f"{got:,} of {size:,} bytes came")

    _tried(url, attempt)


def _info(url: str) -> tuple[int, int]:
    """Bytes, and a number for the version."""
    found: dict[str, Any] = {}

    def attempt() -> None:
        system, path = _open(url)
        system.invalidate_cache()
        found.update(system.info(path))

    _tried(url, attempt)
    size = found.get("size")
    if not isinstance(size, int) or found.get("type") == "directory":
        raise SourceError(
            f"{url} cannot be read (no size is known): name files, of a server that states Content-Length"
        )
    tag = next((str(found[name]) for name in _TAGS if found.get(name)), "")
    return size, int(hashlib.sha1(tag.encode(), usedforsecurity=False).hexdigest()[:12], 16) if tag else 0


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    scheme = url.partition("://")[0].lower()
    try:
        core = import_module("fsspec.core")
        options = {}
        if scheme in ("http", "https"):
            timeout = import_module("aiohttp").ClientTimeout(total=None, sock_connect=SECONDS, sock_read=SECONDS)
            options = {"client_kwargs": {"timeout": timeout}}
        system, path = core.url_to_fs(url, **options)
    except ImportError:
        packages = " ".join(dict.fromkeys(["fsspec", _PACKAGES.get(scheme, "")])).strip()
        raise SourceError(f"{url} needs packages that are not installed: pip install {packages}") from None
    except ValueError as error:
        raise SourceError(f"{url} cannot be read ({_one_line(error)}): use https, s3, gs or hf") from None
    return system, path


def _tried(url: str, attempt: Any) -> None:
    """SourceError, in one line, where the last attempt fails, or one in a way that does not pass."""
    for number in range(ATTEMPTS):
        try:
            return attempt()
        except SourceError:
            raise
        except Exception as error:  # of any library below fsspec
            status = _status(error)
            if isinstance(error, OSError) and error.errno in _LOCAL:
                raise
            lasts = status is not None and 400 <= status < 500 and status not in (408, 429)
            if lasts or number == ATTEMPTS - 1:
                raise SourceError(f"{url} cannot be read ({_reason(error, status)}): {_remedy(status)}") from None
            time.sleep(_PAUSE * 2**number)


def _status(error: Exception) -> int | None:
    """The HTTP status that an error stands for."""
    for one in (error, error.__cause__):
        status = getattr(one, "status", None) or getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        if "Credential" in type(one).__name__:  # botocore and google.auth found none; there is no answer yet
            return 401
    if isinstance(error, PermissionError):
        return 403
    return 404 if isinstance(error, FileNotFoundError) and error.__cause__ is None else None


def _reason(error: Exception, status: int | None) -> str:
    if status is not None and "Credential" not in type(error).__name__:
        return f"status {status}"
    error = (
        error.__cause__ if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception) else error
    )
    if isinstance(error, TimeoutError):
        return f"no answer for {SECONDS:.0f} s, {ATTEMPTS} times"
    return f"{_one_line(error):.160}" + (f", {ATTEMPTS} times" if status is None else "")


def _remedy(status: int | None) -> str:
    if status == 404:
        return "correct the URL"
    if status in (401, 403):
        return "set the credentials of its service in the environment, or name another URL"
    return "see that network and server work, then start again, which keeps what is downloaded"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")


def expand_urls(pattern: str) -> list[str]:
    """``train-{000..099}.tar`` and ``{a,b}.tar`` as a shell expands them; then ``*`` and ``?`` by what is there.

    Raises:
        SourceError: nothing is there.
    """
    pieces = _BRACES.split(pattern)
    choices = [_choices(piece) if number % 2 else [piece] for number, piece in enumerate(pieces)]
    urls = ["".join(parts) for parts in product(*choices)]
    found: list[str] = []
    for url in urls:
        name = url.partition("://")[2]
        if "*" not in name and ("?" not in name or url.startswith("http")):  # there it begins the query
            found.append(url)
            continue
        matches: list[str] = []

        def look(url: str = url, matches: list[str] = matches) -> None:
            system, path = _open(url)
            matches.extend(system.unstrip_protocol(match) for match in system.glob(path))

        _tried(url, look)
        if not matches:
            raise SourceError(f"{url} matches no file: correct it, or name the shards by {{000..099}}")
        found += sorted(matches)
    if len(set(found)) < len(found):
        raise SourceError(f"{pattern} names a shard twice: every image is one row, so name each once")
    return found


def _choices(text: str) -> list[str]:
    if span := _RANGE.fullmatch(text):
        first, last = int(span[1]), int(span[2])
        width = (
            max(map(len, span.groups())) if any(end.startswith("0") and len(end) > 1 for end in span.groups()) else 0
        )
        step = 1 if first <= last else -1
        return [f"{number:0{width}d}" for number in range(first, last + step, step)]
    return text.split(",") if "," in text else [f"{{{text}}}"]
