"""``data verify``: what only decoding detects, hostile names, and a manifest that lists bad images."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sslfast.cli import main as cli
from sslfast.data.images import Decoding
from sslfast.data.listing import list_files
from sslfast.data.manifest import Manifest
from sslfast.data.opening import open_data, reopen_data
from sslfast.data.pool import map_processes
from sslfast.data.verify import check_images, verify_images
from tests.pictures import encoded, picture, write_folder

HOSTILE = [
    b"with space.jpg",
    b"line\nbreak.jpg",
    b"tab\t.jpg",
    b"back\\slash.jpg",
    b"\xff\xfe not utf-8.jpg",
    b"-o.jpg",
]


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def end_abruptly(task: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task


def square(task: int) -> int:
    return task**2


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_found_by_header_and_by_decoding(tmp_path: Path, workers: int) -> None:
    root = write_folder(tmp_path, [f"{i:02}.jpg" for i in range(20)])
    (root / "03.jpg").write_bytes(b"")
    cut(root / "05.jpg")
    cut(root / "11.jpg")
    manifest, bad = verify_images(root, workers=workers)
    assert [path for path, _ in bad] == ["03.jpg", "05.jpg", "11.jpg"]
    assert bad[0][1] == "empty file"
    assert "damaged" in bad[1][1]
    assert (len(manifest), manifest.verified, manifest.excluded) == (17, True, bad)
    assert not {"03.jpg", "05.jpg", "11.jpg"} & set(manifest.paths)


def test_a_verified_manifest_stands_for_its_folder(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", ["a/0.jpg", "b/1.jpg", "b/2.jpg", "c/3.jpg"])
    cut(root / "c" / "3.jpg")
    verified, bad = verify_images(root, workers=0)
    path = tmp_path / "data.tsv"
    verified.save(path)
    with pytest.raises(ValueError, match=r"1 images of .*data.tsv cannot be used: c/3.jpg \(damaged.*skip"):
        open_data(path)
    known = open_data(path, on_bad_image="skip")
    assert (known.paths, known.classes, known.verified) == (["a/0.jpg", "b/1.jpg", "b/2.jpg"], ["a", "b"], True)
    assert (known.digest(), known.excluded) == (verified.digest(), bad)
    known.save(tmp_path / "run.tsv")
    assert reopen_data(path, tmp_path / "run.tsv").digest() == known.digest()
    assert reopen_data(root, tmp_path / "run.tsv").digest() == known.digest()
    cut(root / "a" / "0.jpg")
    with pytest.raises(ValueError, match=r"1 changed: a/0.jpg"):
        open_data(path, on_bad_image="skip")
    (root / "a" / "0.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 missing: a/0.jpg"):
        open_data(path, on_bad_image="skip")


def test_a_manifest_is_verified_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As ``data verify RUN/manifest.tsv``, which was read as a list of four fields a line."""
    root = write_folder(tmp_path / "data", ["a/0.jpg", "a/1.jpg", "b/2.jpg", "b/3.jpg"])
    scanned, verified = tmp_path / "scanned.tsv", tmp_path / "verified.tsv"
    Manifest.scan(root).decoded(Decoding(white_level=4095)).save(scanned)
    (root / "b" / "3.jpg").unlink()
    assert cli.main(["data", "verify", str(scanned), "-o", str(verified)]) == 1
    printed = capsys.readouterr().out
    assert "b/3.jpg\tunreadable: No such file or directory\n3 of 4 images can be used, 2 classes" in printed
    found = Manifest.load(verified)
    assert (found.verified, found.root, [*found.paths]) == (True, root, ["a/0.jpg", "a/1.jpg", "b/2.jpg"])
    assert found.source.decoding.white_level == 4095
    assert cli.main(["data", "verify", str(verified), "-o", str(verified)]) == 2
    assert "is read and would be replaced; name another file with --output" in capsys.readouterr().err
    (root / "a" / "0.jpg").write_bytes(encoded(picture(40, 40, 7)))
    assert cli.main(["data", "verify", str(verified), "-o", str(scanned)]) == 2
    assert "1 changed: a/0.jpg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "remedy"),
    [
        (["x.beton", "y.beton"], "a .beton file is read by itself: name one of them, not their folder"),
        (
            ["config.json", "checkpoints/step_00000001.pt"],
            "it is a run directory: name its images, or its manifest.tsv",
        ),
    ],
)
def test_folders_without_images_that_have_a_place_of_their_own(tmp_path: Path, files: list[str], remedy: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"no usable image in {tmp_path} .*: {remedy}$"):
        open_data(tmp_path)


@pytest.mark.parametrize("output", ["x.beton", "./x.beton", "y.beton"])
def test_a_beton_is_not_prepared_again(
    tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(write_folder(tmp_path, ["a/0.jpg", "b/1.jpg"]))
    assert cli.main(["data", "prepare", ".", "x.beton", "--workers", "0"]) == 0
    before = (tmp_path / "x.beton").read_bytes()
    assert cli.main(["data", "prepare", "x.beton", output]) == 2
    assert f"x.beton is a .beton file already: name what it was made of ({tmp_path})" in capsys.readouterr().err
    assert (tmp_path / "x.beton").read_bytes() == before


def test_a_run_does_not_resume_with_another_manifest(tmp_path: Path) -> None:
    for name, count in (("one", 3), ("two", 4)):
        verify_images(write_folder(tmp_path / name, [f"{i}.jpg" for i in range(count)]), workers=0)[0].save(
            tmp_path / f"{name}.tsv"
        )
    with pytest.raises(ValueError, match=r"two.tsv holds other images than the run .*one.tsv.*4 rows, then 3"):
        reopen_data(tmp_path / "two.tsv", tmp_path / "one.tsv")


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    root = write_folder(tmp_path, ["a.jpg", "b.jpg"])
    cut(root / "a.jpg")
    cut(root / "b.jpg")
    with pytest.raises(ValueError, match=r"no usable image in .*; all 2 are bad: a.jpg \(damaged"):
        verify_images(root, workers=0)


def test_hostile_names_and_link_cycles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for key, name in enumerate(HOSTILE):
        with open(os.path.join(os.fsencode(root), name), "wb") as file:
            file.write(encoded(picture(key=key)))
    with open(os.fsencode(root) + b"/bad\n\xff.jpg", "wb") as file:
        file.write(encoded(picture())[:300])
    (root / "circle").symlink_to(root)
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    (root / "gone.jpg").symlink_to("nowhere.jpg")
    output = tmp_path / "out.tsv"
    assert cli.main(["data", "verify", str(root), "-o", str(output), "--workers", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("bad\\n\\xff.jpg\tdamaged")
    assert lines[1].startswith("gone.jpg\tunreadable: ")
    assert lines[2] == f"6 of 8 images can be used, 0 classes; wrote {output}"
    assert {os.fsencode(path) for path in Manifest.load(output).paths} == set(HOSTILE)
    Manifest.load(output).check(contents=True)


def test_listing_calls_stat_once_per_folder_and_not_per_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3000):
        (tmp_path / f"{number}.jpg").touch()
    asked = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda *arguments, **options: asked.append(1) or stat(*arguments, **options))
    assert len(list_files(tmp_path).paths) == 3000
    assert len(asked) <= 2


def test_a_file_deleted_during_verification_is_bad(tmp_path: Path) -> None:
    root = write_folder(tmp_path, ["a.jpg", "b.jpg"])
    manifest = Manifest.scan(root)
    (root / "b.jpg").unlink()
    assert check_images(manifest, workers=0) == [("b.jpg", "unreadable: No such file or directory")]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers: int) -> None:
    found = map_processes(square, range(100), workers=workers, progress=False, title="counting", chunk=3)
    assert list(found) == [task**2 for task in range(100)]


def test_a_killed_process_is_one_clear_error() -> None:
    with pytest.raises(
        RuntimeError, match=r"a process died while counting: it was killed \(SIGKILL\): usually memory ran out"
    ):
        list(map_processes(end_abruptly, range(10), workers=2, progress=False, title="counting"))
    with pytest.raises(ValueError, match="workers must be 0 or more, got workers=-1"):
        list(map_processes(square, range(10), workers=-1, progress=False, title="counting"))


def descendants_with(mark: str) -> list[int]:
    """Processes that have ``mark`` on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_main_process(tmp_path: Path, number: signal.Signals) -> None:
    mark = f"mark-{tmp_path.name}-{number}"
    code = (
        "import sys, time; from tests.data.test_verify import *\n"
        "def slow(task): time.sleep(0.05); return task\n"
        f"for done in map_processes(slow, range(4000), workers=2, progress=False, title={mark!r}, chunk=1):\n"
        "    print('step', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "step\n"
        os.killpg(child.pid, number) if number == signal.SIGINT else os.kill(child.pid, number)
        child.communicate(timeout=60)
    for _ in range(100):
        if not descendants_with(mark):
            break
        time.sleep(0.1)
    assert descendants_with(mark) == []
