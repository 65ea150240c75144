"""Rows, labels, links, the text file, and every way in which a folder can stop matching its manifest."""

import hashlib
import inspect
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import sslfast.data.manifest as manifest_module
import sslfast.data.pool as pool_module
from sslfast.data import left_out
from sslfast.data.images import HAS_HEIF
from sslfast.data.left_out import system_key
from sslfast.data.listing import list_files
from sslfast.data.manifest import Manifest
from sslfast.data.opening import open_data
from sslfast.data.source import HASHED_BYTES
from tests.pictures import encoded, picture, write_folder


def test_rows_are_the_sorted_relative_paths(tmp_path: Path) -> None:
    names = ["b/2.jpg", "a/10.jpg", "a/9.JPEG", "a/deep/er/1.png", "ü/漢.jpg", "a-b/0.jpg", "B/1.jpg"]
    manifest = Manifest.scan(write_folder(tmp_path, names))
    assert manifest.paths == sorted(names)
    assert len(manifest) == 7
    assert manifest.path(2) == tmp_path / sorted(names)[2]
    for path, size, sha1 in zip(manifest.paths, manifest.bytes, manifest.sha1, strict=True):
        data = (tmp_path / path).read_bytes()
        assert (size, sha1) == (len(data), hashlib.sha1(data[:HASHED_BYTES]).hexdigest()[:16])


def test_labels_are_the_first_level_folders(tmp_path: Path) -> None:
    manifest = Manifest.scan(write_folder(tmp_path, ["dog/x/1.jpg", "cat/1.jpg", "dog/0.jpg", "loose.jpg"]))
    assert manifest.classes == ["cat", "dog"]
    assert dict(zip(manifest.paths, manifest.labels.tolist(), strict=True)) == {
        "cat/1.jpg": 0,
        "dog/0.jpg": 1,
        "dog/x/1.jpg": 1,
        "loose.jpg": -1,
    }


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    manifest = Manifest.scan(write_folder(tmp_path, ["1.jpg", "0.jpg"]))
    assert manifest.classes == []
    assert manifest.labels.dtype == np.int64
    assert manifest.labels.tolist() == [-1, -1]


def test_hidden_and_other_files_are_left_out_and_other_files_are_counted(tmp_path: Path) -> None:
    root = write_folder(tmp_path, ["a.jpg", ".hidden.jpg", ".cache/b.jpg", "c/._d.jpg"])
    (root / "notes.txt").write_text("x")
    (root / "c" / "LICENSE").write_text("x")
    (root / "c" / "old.txt").write_text("x")
    manifest = Manifest.scan(root)
    assert manifest.paths == ["a.jpg"]
    assert manifest.ignored == {"": 1, ".txt": 2, ".*": 2, "._*": 1}


def test_links_are_followed_but_not_in_a_cycle(tmp_path: Path) -> None:
    elsewhere = write_folder(tmp_path / "elsewhere", ["1.jpg", "2.jpg"])
    root = write_folder(tmp_path / "data", ["a/0.jpg"])
    (root / "b").symlink_to(elsewhere)
    (root / "a" / "linked.jpg").symlink_to(elsewhere / "1.jpg")
    (root / "a" / "up").symlink_to(root)
    (elsewhere / "self").symlink_to(elsewhere)
    (tmp_path / "entry").symlink_to(root)
    for start in (root, tmp_path / "entry"):
        assert Manifest.scan(start).paths == ["a/0.jpg", "a/linked.jpg", "b/1.jpg", "b/2.jpg"]


def bad_folder(root: Path) -> Path:
    write_folder(root, ["x/good.jpg", "x/good2.jpg"])
    (root / "x" / "empty.jpg").touch()
    (root / "x" / "text.png").write_text("not a picture")
    (root / "x" / "dot.png").write_bytes(encoded(picture(1, 1), "PNG"))
    (root / "x" / "dangling.jpg").symlink_to(root / "nowhere.jpg")
    os.mkfifo(root / "x" / "pipe.jpg")
    return root


def test_error_names_the_images_that_the_scan_finds_bad(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"5 of 7 images in .* cannot be used: .*; repair .*--on-bad-image skip"
    ) as error:
        Manifest.scan(bad_folder(tmp_path))
    assert "x/empty.jpg (empty file)" in str(error.value)
    assert "\n" not in str(error.value)


def test_skip_leaves_out_and_lists_the_images_that_the_scan_finds_bad(tmp_path: Path) -> None:
    manifest = Manifest.scan(bad_folder(tmp_path / "data"), on_bad_image="skip")
    assert manifest.paths == ["x/good.jpg", "x/good2.jpg"]
    reasons = dict(manifest.excluded)
    assert reasons["x/empty.jpg"] == "empty file"
    assert reasons["x/text.png"].startswith("not an image")
    assert reasons["x/dot.png"] == "too small: 1 x 1, smallest side is 8"
    assert reasons["x/dangling.jpg"] == "unreadable: No such file or directory"
    assert reasons["x/pipe.jpg"] == "unreadable: not a regular file"
    manifest.save(tmp_path / "m.tsv")
    loaded = Manifest.load(tmp_path / "m.tsv")
    assert loaded.excluded == manifest.excluded
    loaded.check()


def test_permission_problems_are_bad_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path, ["a/0.jpg", "b/1.jpg", "b/locked.jpg"])
    real_open, real_scandir = os.open, os.scandir

    def no_open(file, *args, **options):
        if str(file).endswith("locked.jpg"):
            raise PermissionError(13, "Permission denied")
        return real_open(file, *args, **options)

    def no_scandir(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied")
        return real_scandir(path)

    monkeypatch.setattr(os, "open", no_open)
    monkeypatch.setattr(manifest_module.os, "scandir", no_scandir)
    manifest = Manifest.scan(root, on_bad_image="skip")
    assert manifest.paths == ["b/1.jpg"]
    assert manifest.excluded == [
        ("a/", "unreadable folder: Permission denied"),
        ("b/locked.jpg", "unreadable: Permission denied"),
    ]


def test_folders_without_a_usable_image(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"gone does not exist: name a folder that holds images. DATA is a folder of images"
    ):
        Manifest.scan(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is not a folder"):
        Manifest.scan(tmp_path / "file")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(
        ValueError, match=r"no usable image in .* \(other files: 1 x no suffix, 1 x .txt\): name a folder"
    ):
        Manifest.scan(tmp_path)
    (tmp_path / "a.jpg").touch()
    with pytest.raises(ValueError, match=r"no usable image in .*; all 1 are bad: a.jpg \(empty file\)"):
        Manifest.scan(tmp_path, on_bad_image="skip")
    with pytest.raises(ValueError, match="on_bad_image must be 'error' or 'skip', got on_bad_image='no'"):
        Manifest.scan(tmp_path, on_bad_image="no")  # type: ignore[arg-type]


def test_the_text_file_holds_everything(tmp_path: Path) -> None:
    names = ["a/plain.jpg", "b/tab\there.jpg", "b/line\nbreak.jpg", "b/back\\slash\\t.jpg", "ü/漢.jpg", "c/\udcff.jpg"]
    manifest = Manifest.scan(write_folder(tmp_path / "data", names))
    assert len(manifest) == len(names)
    manifest.save(tmp_path / "run" / "manifest.tsv")
    assert os.listdir(tmp_path / "run") == ["manifest.tsv"]
    loaded = Manifest.load(tmp_path / "run" / "manifest.tsv")
    assert (loaded.root, loaded.paths, loaded.sha1) == (manifest.root, manifest.paths, manifest.sha1)
    assert (loaded.classes, loaded.ignored) == (manifest.classes, manifest.ignored)
    assert np.array_equal(loaded.bytes, manifest.bytes)
    assert np.array_equal(loaded.labels, manifest.labels)
    assert loaded.digest() == manifest.digest()
    loaded.check(contents=True)
    rows = [line for line in (tmp_path / "run" / "manifest.tsv").read_bytes().split(b"\n") if line[:1] != b"#"]
    assert rows[0] == b"path\tbytes\tsha1\tlabel"
    assert all(row.count(b"\t") == 3 for row in rows[:-1])


def test_the_digest_depends_on_rows_and_contents_and_not_on_the_location(tmp_path: Path) -> None:
    names = ["0.jpg", "1.jpg", "2.jpg"]
    first = Manifest.scan(write_folder(tmp_path / "first", names))
    second = Manifest.scan(write_folder(tmp_path / "second", names))
    assert first.digest() == second.digest()
    (tmp_path / "second" / "1.jpg").write_bytes(encoded(picture(key=9)))
    assert Manifest.scan(tmp_path / "second").digest() != first.digest()
    (tmp_path / "first" / "1.jpg").rename(tmp_path / "first" / "9.jpg")
    assert Manifest.scan(tmp_path / "first").digest() != first.digest()


def test_a_moved_folder_is_found_again(tmp_path: Path) -> None:
    Manifest.scan(write_folder(tmp_path / "old", ["a.jpg", "b.jpg"])).save(tmp_path / "m.tsv")
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(ValueError, match="old does not exist"):
        Manifest.load(tmp_path / "m.tsv").check()
    moved = Manifest.load(tmp_path / "m.tsv", root=tmp_path / "new")
    moved.check()
    assert moved.path(1) == tmp_path / "new" / "b.jpg"


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.scan(write_folder(tmp_path / "data", ["a.jpg"]))
    target = tmp_path / "m.tsv"
    manifest.save(target)
    before = target.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        manifest.save(target)
    assert target.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["data", "m.tsv"]


def test_damaged_manifest_files(tmp_path: Path) -> None:
    target = tmp_path / "m.tsv"
    with pytest.raises(ValueError, match=r"no manifest at .*m.tsv"):
        Manifest.load(target)
    Manifest.scan(write_folder(tmp_path / "data", ["a.jpg", "b.jpg", "c.jpg"])).save(target)
    text = target.read_text()
    target.write_text(text[: text.rindex("c.jpg")])
    with pytest.raises(ValueError, match=r"cut short or edited .*start a new run"):
        Manifest.load(target)
    target.write_text(text[:-15])
    with pytest.raises(ValueError, match=r"cut short or edited|is damaged"):
        Manifest.load(target)
    target.write_text(text.replace("b.jpg", "d.jpg"))
    with pytest.raises(ValueError, match="cut short or edited"):
        Manifest.load(target)
    target.write_text(re.sub(r"b.jpg\t\d+", "b.jpg\tmany", text))
    with pytest.raises(ValueError, match="is damaged"):
        Manifest.load(target)
    target.write_text("hello")
    with pytest.raises(ValueError, match="is not a manifest"):
        Manifest.load(target)


def test_check_names_missing_changed_and_added_files(tmp_path: Path) -> None:
    root = write_folder(tmp_path, [f"{i:02}.jpg" for i in range(12)])
    manifest = Manifest.scan(root)
    manifest.check(contents=True)
    for i in range(7):
        (root / f"{i:02}.jpg").unlink()
    (root / "08.jpg").write_bytes(b"x")
    write_folder(root, ["new.jpg"])
    with pytest.raises(ValueError, match="no longer matches its manifest of 12 images") as error:
        manifest.check()
    message = str(error.value)
    assert "7 missing: 00.jpg (unreadable: No such file or directory), 01.jpg" in message
    assert "and 2 more" in message
    assert re.search(r"1 changed: 08.jpg \(\d+ -> 1 bytes\)", message)
    assert "1 added: new.jpg" in message
    assert "nothing is renumbered" in message
    assert "start a new run" in message


def test_added_files_are_an_error_with_a_remedy_unless_ignored(tmp_path: Path) -> None:
    manifest = Manifest.scan(write_folder(tmp_path, ["b.jpg", "c.jpg"]))
    write_folder(tmp_path, ["a.jpg"])
    with pytest.raises(ValueError, match=r"1 added: a.jpg\. Rows are identities .* start a new run"):
        manifest.check()
    manifest.check(added="ignore")
    assert manifest.paths == ["b.jpg", "c.jpg"]


def test_contents_are_compared_when_asked(tmp_path: Path) -> None:
    manifest = Manifest.scan(write_folder(tmp_path, ["a.jpg"]))
    data = bytearray((tmp_path / "a.jpg").read_bytes())
    data[700] ^= 1
    (tmp_path / "a.jpg").write_bytes(bytes(data))
    manifest.check()
    with pytest.raises(ValueError, match=r"1 changed: a.jpg .same size, other content"):
        manifest.check(contents=True)


def test_load_or_scan_writes_once_and_then_only_checks(tmp_path: Path) -> None:
    root, target = write_folder(tmp_path / "data", ["b.jpg", "c.jpg"]), tmp_path / "run" / "manifest.tsv"
    first = Manifest.load_or_scan(root, target)
    written = target.read_bytes()
    again = Manifest.load_or_scan(root, target)
    assert (first.paths, first.digest()) == (again.paths, again.digest())
    write_folder(root, ["a.jpg"])
    with pytest.raises(ValueError, match=r"1 added: a.jpg"):
        Manifest.load_or_scan(root, target)
    assert target.read_bytes() == written


def test_the_scan_does_not_depend_on_the_chunk_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path, [f"{i % 3}/{i:02}.jpg" for i in range(20)])
    whole = Manifest.scan(root)
    monkeypatch.setattr(pool_module, "_CHUNK", 3)
    assert Manifest.scan(root).digest() == whole.digest()


def test_progress_writes_nothing_into_pipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Manifest.scan(write_folder(tmp_path, ["a/0.png"]), progress=True)
    assert tuple(capsys.readouterr()) == ("", "")


SYSTEM = [
    *("@eaDir", "#recycle", "#snapshot", "@Recycle", "@Recently-Snapshot", "$RECYCLE.BIN", "$Recycle.Bin"),
    *("System Volume Information", ".Trashes", ".Trash-1000", "lost+found", "__MACOSX", ".thumbnails", ".AppleDouble"),
    *(".ipynb_checkpoints", ".git", ".snapshot"),
]


@pytest.mark.parametrize("depth", ["", "a/", "a/b/"])
@pytest.mark.parametrize("name", SYSTEM)
def test_folders_of_systems_are_left_out_and_counted(tmp_path: Path, name: str, depth: str) -> None:
    write_folder(tmp_path, ["a/1.jpg", "b/2.jpg", f"{depth}{name}/x.jpg/SYNOPHOTO_THUMB_M.jpg", f"{depth}{name}/y.jpg"])
    manifest = Manifest.scan(tmp_path)
    assert (manifest.paths, manifest.classes) == (["a/1.jpg", "b/2.jpg"], ["a", "b"])
    (line,) = manifest.left_out()
    assert line.lower().startswith(f"1 x {name.lower()}/: folders and files of the system")
    assert system_key(f"{depth}{name}.jpg") is None


def test_a_manifest_with_rows_in_system_folders_says_why_it_no_longer_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_folder(tmp_path / "d", ["a/1.jpg", "a/@eaDir/2.jpg"])
    monkeypatch.setattr("sslfast.data.listing.hidden_key", lambda path: None)
    Manifest.scan(root).save(tmp_path / "m.tsv")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"1 of the 2 images of its manifest are in folders of the system.*@eaDir"):
        open_data(tmp_path / "m.tsv")


@pytest.mark.parametrize(
    ("name", "data", "shown"),
    [
        ("1.CR2", b"II*\0", "1 x .cr2: pictures in formats that are not read; convert"),
        ("1.jxl", b"", "1 x .jxl: pictures in formats"),
        ("raw.DNG", b"II*\0", "1 x .dng: pictures in formats"),
        ("photo", b"\0\0\0\x18ftypmif1", f"1 x no suffix (HEIF): pictures {'by their' if HAS_HEIF else 'in formats'}"),
        ("photo", "JPEG", "1 x no suffix (JPEG): pictures by their content, and not by their names; rename"),
        ("a.JPG_large", "JPEG", "1 x .jpg_large (JPEG): pictures by"),
        ("a.jpg.1", "PNG", "1 x .1 (PNG): pictures by"),
        ("a.jpg ", "WEBP", "1 x .jpg  (WebP): pictures by"),
        ("a.x", "BMP", "1 x .x (BMP): pictures by"),
        ("images.tar.gz", b"", "1 x .gz: archives"),
        ("notes.txt", "JPEG", None),
        ("a.bak", b"no picture", None),
    ],
)
def test_pictures_that_are_not_used_are_said(tmp_path: Path, name: str, data: str | bytes, shown: str | None) -> None:
    write_folder(tmp_path, ["a.jpg", "b.JPG", "c.jfif", "d.JPE"])
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else encoded(picture(), data))
    manifest = Manifest.scan(tmp_path)
    assert manifest.paths == ["a.jpg", "b.JPG", "c.jfif", "d.JPE"]
    lines = manifest.left_out()
    assert len(lines) == (shown is not None)
    assert not lines or lines[0].startswith(shown)
    assert Manifest.parse(manifest.dump(), "m").left_out() == lines


def test_a_deep_tree_is_listed(tmp_path: Path) -> None:
    write_folder(tmp_path, ["a.jpg"])
    folders = [os.open(tmp_path, os.O_RDONLY)]
    try:
        for _ in range(400):
            os.mkdir("d", dir_fd=folders[-1])
            folders.append(os.open("d", os.O_RDONLY, dir_fd=folders[-1]))
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(len(inspect.stack()) + 150)
        try:
            assert list_files(tmp_path).paths == ["a.jpg"]
        finally:
            sys.setrecursionlimit(limit)
    finally:
        for folder in reversed(folders[:-1]):
            os.rmdir("d", dir_fd=folder)
        for folder in folders:
            os.close(folder)


@pytest.mark.parametrize("has", [True, False])
def test_heic_says_what_would_read_it(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_out, "HAS_HEIF", has)
    (line,) = left_out.left_out({".heic": 3})
    assert ("or pip install pillow-heif, which reads .heic and .heif" in line) is not has
