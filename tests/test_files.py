import errno
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sslfast import files
from sslfast.files import (
    OUTPUT,
    AppendFile,
    WriteError,
    check_writable,
    open_regular,
    replacing,
    save_picture,
    save_tensors,
    temporary_beside,
    write_file,
)


def test_the_file_appears_complete_with_the_usual_permissions(tmp_path: Path) -> None:
    path = tmp_path / "new" / "notes.txt"
    with replacing(path) as temporary:
        temporary.write_text("complete")
        assert temporary.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "complete"
    assert os.listdir(path.parent) == ["notes.txt"]
    (tmp_path / "usual").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def test_what_a_killed_process_left_is_deleted(tmp_path: Path) -> None:
    """And nothing else: the temporary file of a process that runs, of another machine, of another file."""
    path, child = tmp_path / "x.features", os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    own = temporary_beside(path)
    gone = [own.with_name(own.name.replace(f"-{os.getpid()}-", f"-{child}-")) for _ in range(2)]
    kept = [own, own.with_name(f".x.features.0123456789ab-{child}-{'0' * 16}.tmp"), tmp_path / "x.features.tmp"]
    gone[1] = gone[1].with_name(gone[1].name[:-20] + "0" * 16 + ".tmp")
    gone[0].write_text("half")
    gone[1].mkdir()
    (gone[1] / "part").touch()
    for left in kept:
        left.touch()
    files._cleaned.clear()  # as a new process
    temporary_beside(tmp_path / "y.features")
    assert all(left.exists() for left in gone)
    write_file(path, "whole")
    assert sorted(tmp_path.iterdir()) == sorted([*kept, path])


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_block_that_raises_keeps_the_old_file(tmp_path: Path, error: type[BaseException], written: bool) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as temporary:  # noqa: PT012
        if written:
            temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_two_writers_do_not_interfere(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer block ends last
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_the_mode_is_the_umask_s_whatever_the_writer_prefers(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "new" / "a") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o600))  # as libraries do that use mkstemp
        write_file(tmp_path / "b", "text")
        AppendFile(tmp_path / "c").close()
        save_picture(Image.new("RGB", (2, 2)), tmp_path / "d.png")
    finally:
        os.umask(before)
    for name in ("new/a", "b", "c", "d.png"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask, name
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "(No space left on device); free some space or name another file with --output"),
        (errno.EDQUOT, "(Disk quota exceeded); free some space or name another file with --output"),
        (errno.EFBIG, "(File too large); raise the limit on file sizes (ulimit -f) or name another file with --output"),
        (errno.EIO, "(Input/output error); correct the disk or name another file with --output"),
        (errno.EROFS, "(Read-only file system); name another file with --output"),
        (errno.EACCES, "(Permission denied); name another file with --output"),
    ],
)
def test_an_error_says_what_was_written_why_not_and_what_helps(tmp_path: Path, number: int, words: str) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(WriteError) as found, replacing(path, remedy=OUTPUT):
        raise OSError(number, os.strerror(number))
    assert str(found.value) == f"cannot write {path} {words}"
    assert found.value.errno == number


def test_errors_about_other_files_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), replacing(tmp_path / "a"):
        Path("/elsewhere/picture").read_bytes()
    with pytest.raises(BrokenPipeError), replacing(tmp_path / "a"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=rf"cannot write .*file/a/b \({tmp_path}/file is no folder\)"):
        write_file(tmp_path / "file" / "a" / "b", "")


def folder(path: Path) -> None:
    path.mkdir()


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("/nowhere/at/all")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (folder, "it is a folder"),
        (os.mkfifo, "it is a named pipe"),
        (device, "it is a device"),
        (loop, "Too many levels of symbolic links"),
        (dangling, "it is a link to /nowhere/at/all, which does not exist"),
    ],
)
def test_what_is_no_file_is_neither_read_nor_replaced(tmp_path: Path, make: Any, words: str) -> None:
    path = tmp_path / "x"
    make(path)
    with pytest.raises(OSError, match=words):
        open_regular(path)
    if make is not dangling:  # a link to nothing is replaced
        with pytest.raises(WriteError, match=words):
            write_file(path, "")
        assert os.listdir(tmp_path) == ["x"]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process grows beyond ``size`` bytes: what a full disk is to a writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_record_is_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "log")
    file.write(b"1" * 60)
    with file_size_limit(100), pytest.raises(OSError, match="File too large"):
        file.write(b"2" * 60)
    assert file.size == 60
    file.write(b"3" * 60)
    assert (tmp_path / "log").read_bytes() == b"1" * 60 + b"3" * 60


def test_a_part_that_cannot_be_removed_goes_before_the_next_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    file = AppendFile(tmp_path / "log")
    file.write(b"1\n")
    with monkeypatch.context() as patch, file_size_limit(4):
        patch.setattr(os, "ftruncate", fail)
        for _ in range(2):
            with pytest.raises(OSError, match=r"too large|Input/output"):
                file.write(b"222\n")
    assert (tmp_path / "log").read_bytes() == b"1\n22"
    file.write(b"333\n")
    assert (tmp_path / "log").read_bytes() == b"1\n333\n"


@pytest.mark.parametrize("write", [write_file, replacing])
def test_a_full_disk_leaves_no_partial_file(tmp_path: Path, write: Any) -> None:
    with file_size_limit(1000), pytest.raises(WriteError, match=r"File too large.*ulimit"):  # noqa: PT012
        if write is write_file:
            write_file(tmp_path / "a", b"x" * 5000)
        else:
            with replacing(tmp_path / "a") as temporary, temporary.open("wb") as file:
                save_tensors({"x": torch.zeros(5000)}, file)
    with file_size_limit(20), pytest.raises(WriteError):
        save_picture(Image.new("RGB", (64, 64)), tmp_path / "a.png")
    assert os.listdir(tmp_path) == []


def test_a_picture_needs_a_suffix_that_is_a_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.foo has no suffix of a picture that can be written; name it \.png"):
        save_picture(Image.new("RGB", (2, 2)), tmp_path / "a.foo")


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    write_file(tmp_path / ("x" * 255), "text")
    assert os.listdir(tmp_path) == ["x" * 255]


def test_whether_a_file_could_be_written_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "new" / "a")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=rf"\({tmp_path}/file is no folder\); {OUTPUT}"):
        check_writable(tmp_path / "file" / "a", remedy=OUTPUT)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(WriteError, match=r"cannot write .*new/a \(Permission denied\); choose another place"):
        check_writable(tmp_path / "new" / "a")
