"""``data prepare``: what is stored and how, in FFCV's own format, atomically."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import sslfast.data.beton as beton_module
import sslfast.data.prepare as prepare_module
from sslfast.cli import main as cli
from sslfast.data.beton import ALLOCATION, FOOTER, HEADER, JPG, RAW, Beton, BetonSource, BetonWriter
from sslfast.data.ffcv_library import load_decoder
from sslfast.data.images import decode_full, decode_pixels, open_image
from sslfast.data.manifest import Manifest
from sslfast.data.opening import open_data, reopen_data
from sslfast.data.prepare import PrepareConfig, prepare_beton
from sslfast.data.verify import verify_images
from sslfast.report.preview import write_preview
from tests.pictures import encoded, picture, write_folder

NAMES = [f"class{i % 3}/{i:02}.jpg" for i in range(11)]


def stored(beton: Beton, row: int) -> bytes:
    return os.pread(beton.descriptor, int(beton.sizes[row]), int(beton.offsets[row]))


def seen(beton: Beton, row: int) -> NDArray[np.uint8]:
    """The picture of a row."""
    width, height = beton.shapes[row].tolist()
    data = np.frombuffer(stored(beton, row), dtype=np.uint8)
    if beton.modes[row] == RAW:
        return data.reshape(height, width, 3)
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    assert load_decoder()(data.ctypes.data, len(data), height, width, pixels.ctypes.data, 1) == 0
    return pixels


def difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    assert one.shape == other.shape
    return float(np.abs(one.astype(int) - other).mean())


def turned(orientation: int, format: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(60, 40, orientation), format, exif=exif)


def odd_folder(root: Path) -> Path:
    """Every kind of picture that is converted."""
    write_folder(root, ["plain.jpg"])
    files = {f"turned{n}.jpg": turned(n) for n in range(2, 9)}
    files["gray.jpg"] = encoded(picture().convert("L"))
    files["cmyk.jpg"] = encoded(picture().convert("CMYK"))
    files["progressive.jpg"] = encoded(picture(), progressive=True)
    files["palette.png"] = encoded(picture().convert("P"), "PNG", transparency=3)
    files["deep.png"] = encoded(Image.fromarray((np.arange(48 * 40).reshape(40, 48) * 30).astype(np.uint16)), "PNG")
    files["turned.png"] = turned(6, "PNG")
    files["moving.gif"] = encoded(picture(), "GIF", save_all=True, append_images=[picture(key=9)])
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


def test_jpegs_keep_their_bytes_and_rows_are_the_manifests(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", NAMES)
    made = prepare_beton(root, tmp_path / "out.beton", workers=2)
    manifest = Manifest.scan(root)
    assert made.counts == {"original JPEG kept": 11}
    assert made.size == (tmp_path / "out.beton").stat().st_size
    with Beton(tmp_path / "out.beton") as beton:
        assert (beton.manifest.digest(), beton.manifest.paths) == (manifest.digest(), sorted(NAMES))
        assert (beton.manifest.verified, beton.manifest.classes) == (True, ["class0", "class1", "class2"])
        assert str(beton.manifest.source) == str(tmp_path / "out.beton")
        assert beton.settings["mode"] == "jpg"
        for row in range(11):
            assert stored(beton, row) == manifest.path(row).read_bytes()
            assert beton.shapes[row].tolist() == list(Image.open(manifest.path(row)).size)


def test_ffcvs_own_reader_reads_the_file(tmp_path: Path) -> None:
    prepare_beton(
        write_folder(tmp_path / "data", NAMES), tmp_path / "out.beton", PrepareConfig(mode="proportion"), workers=0
    )
    code = (
        "import json, sys, ffcv.types, ffcv.reader, numpy as np; from sslfast.data import beton\n"
        "assert ffcv.types.HeaderType == beton.HEADER and ffcv.types.FieldDescType == beton.FIELD\n"
        "assert ffcv.types.ALLOC_TABLE_TYPE == beton.ALLOCATION and ffcv.types.CURRENT_VERSION == beton.VERSION\n"
        "r = ffcv.reader.Reader(sys.argv[1])\n"
        "assert r.metadata_type == beton.SAMPLE\n"
        "print(json.dumps([r.field_names, [type(h).__name__ for h in r.handlers.values()], r.metadata['f1'].tolist(),"
        " r.metadata['f2'].tolist(), r.metadata['f0']['mode'].tolist(), r.alloc_table['ptr'].tolist(),"
        " r.metadata['f0']['data_ptr'].tolist(), int(r.page_size), len(r.alloc_table)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out.beton")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},  # compiling what is only imported takes seconds
    )
    names, kinds, labels, rows, modes, places, pointers, page, count = json.loads(done.stdout)
    assert names == ["image", "label", "row"]
    assert kinds == ["RGBImageField", "IntField", "IntField"]
    with Beton(tmp_path / "out.beton") as beton:
        assert (labels, rows) == (beton.manifest.labels.tolist(), list(range(11)))
        assert (modes, places, pointers) == (beton.modes.tolist(), beton.offsets.tolist(), places)
    assert (page & (page - 1), count) == (0, 11)


@pytest.mark.parametrize("mode", ["jpg", "raw"])
def test_every_kind_of_image_is_stored_as_the_image_policy_decodes_it(tmp_path: Path, mode: str) -> None:
    root = odd_folder(tmp_path / "data")
    made = prepare_beton(root, tmp_path / "out.beton", PrepareConfig(mode=mode, quality=95), workers=0)  # type: ignore[arg-type]
    if mode == "jpg":
        assert made.counts == {"original JPEG kept": 3, "encoded as JPEG": 12}
    else:
        assert made.counts == {"stored raw": 15}
    with Beton(tmp_path / "out.beton") as beton:
        assert set(beton.modes.tolist()) == {JPG if mode == "jpg" else RAW}
        for row, path in enumerate(beton.manifest.paths):
            upright = decode_full((root / path).read_bytes())
            if mode == "raw":
                assert np.array_equal(seen(beton, row), upright), path
            else:
                # JPEG halves the resolution of colours, which a dithered palette changes from pixel to pixel.
                assert difference(seen(beton, row), upright) < (20 if path == "palette.png" else 8), path


def test_the_longer_side_is_limited(tmp_path: Path) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name, size in {"wide.jpg": (200, 50), "tall.png": (30, 300), "small.jpg": (100, 90)}.items():
        format = "PNG" if name.endswith("png") else "JPEG"
        (root / name).write_bytes(encoded(picture(*size), format))
    made = prepare_beton(root, tmp_path / "out.beton", PrepareConfig(max_resolution=100), workers=0)
    assert made.counts == {"original JPEG kept": 1, "scaled down and encoded as JPEG": 2}
    with Beton(tmp_path / "out.beton") as beton:
        shapes = dict(zip(beton.manifest.paths, beton.shapes.tolist(), strict=True))
        assert shapes == {"wide.jpg": [100, 25], "tall.png": [10, 100], "small.jpg": [100, 90]}
        row = beton.manifest.paths.index("wide.jpg")
        expected = Image.open(root / "wide.jpg").resize((100, 25), Image.Resampling.BILINEAR)
        assert difference(seen(beton, row), np.asarray(expected)) < 6
    prepare_beton(root, tmp_path / "out.beton", PrepareConfig(max_resolution=100, mode="raw"), workers=0)
    with Beton(tmp_path / "out.beton") as beton:
        assert np.array_equal(seen(beton, row), np.asarray(expected))


@pytest.mark.parametrize(("share", "jpegs"), [(0.0, 0), (0.3, 3), (0.5, 5), (1.0, 11)])
def test_proportion_stores_a_share_as_jpeg(tmp_path: Path, share: float, jpegs: int) -> None:
    root = write_folder(tmp_path / "data", NAMES)
    prepare_beton(root, tmp_path / "out.beton", PrepareConfig(mode="proportion", jpg_share=share), workers=0)
    with Beton(tmp_path / "out.beton") as beton:
        assert int((beton.modes == JPG).sum()) == jpegs


def test_a_jpeg_that_the_decoder_warns_about_is_encoded_again(tmp_path: Path) -> None:
    good = encoded(picture(120, 100))
    decode = load_decoder()
    for place in range(len(good) - 40, len(good) // 2, -1):
        data = bytearray(good)
        data[place] ^= 0x55
        try:
            pixels, _ = decode_pixels(open_image(bytes(data)))
        except ValueError:
            continue
        target = np.zeros((100, 120, 3), dtype=np.uint8)
        source = np.frombuffer(bytes(data), dtype=np.uint8)
        if decode(source.ctypes.data, len(data), 100, 120, target.ctypes.data, 1):
            break
    else:
        pytest.fail("no damage found that only the decoder's return code shows")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jpg").write_bytes(data)
    made = prepare_beton(tmp_path / "data", tmp_path / "out.beton", workers=0)
    assert made.counts == {"encoded as JPEG (the decoder warns about the original)": 1}
    with Beton(tmp_path / "out.beton") as beton:
        assert difference(seen(beton, 0), pixels) < 8


def test_no_sample_crosses_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beton_module, "_PAGE", 4096)
    root = write_folder(tmp_path / "data", NAMES)
    (root / "class1" / "large.png").write_bytes(encoded(picture(130, 100), "PNG"))
    prepare_beton(root, tmp_path / "out.beton", PrepareConfig(mode="proportion"), workers=0)
    with Beton(tmp_path / "out.beton") as beton:
        page = int(np.fromfile(tmp_path / "out.beton", HEADER, 1)[0]["page_size"])
        assert page >= beton.sizes.max()
        assert (beton.offsets // page == (beton.offsets + beton.sizes - 1) // page).all()
        assert (np.diff(beton.offsets) >= beton.sizes[:-1]).all()
        for row, path in enumerate(beton.manifest.paths):
            assert difference(seen(beton, row), decode_full((root / path).read_bytes())) < 8


def test_bad_images_follow_the_policy(tmp_path: Path) -> None:
    root, output = write_folder(tmp_path / "data", NAMES), tmp_path / "out.beton"
    (root / NAMES[4]).write_bytes((root / NAMES[4]).read_bytes()[:-300])
    with pytest.raises(ValueError, match=rf"{NAMES[4]} cannot be used: damaged.*--on-bad-image skip"):
        prepare_beton(root, output, workers=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]
    made = prepare_beton(root, output, on_bad_image="skip", workers=2)
    assert [path for path, _ in made.manifest.excluded] == [NAMES[4]]
    manifest = open_data(output)
    assert (len(manifest), manifest.paths) == (10, sorted(set(NAMES) - {NAMES[4]}))
    verified, _ = verify_images(root, workers=0)
    assert manifest.digest() == verified.digest()
    verified.save(tmp_path / "data.tsv")
    again = prepare_beton(tmp_path / "data.tsv", tmp_path / "again.beton", on_bad_image="skip", workers=0)
    assert again.manifest.digest() == verified.digest()
    for name in NAMES:
        (root / name).write_bytes((root / name).read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"no usable image in .*: all 11 are bad"):
        prepare_beton(root, output, on_bad_image="skip", workers=0)


def test_a_changed_file_is_an_error_in_both_modes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path / "data", NAMES)
    manifest = Manifest.scan(root)
    (root / NAMES[3]).write_bytes(encoded(picture(key=77)))
    monkeypatch.setattr(prepare_module, "open_data", lambda *_, **__: manifest)
    with pytest.raises(ValueError, match=rf"{NAMES[3]}: content hash differs from the manifest: verify"):
        prepare_beton(root, tmp_path / "out.beton", on_bad_image="skip", workers=0)
    assert not (tmp_path / "out.beton").exists()


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, output = write_folder(tmp_path / "data", NAMES), tmp_path / "out.beton"
    prepare_beton(root, output, workers=0)
    before = output.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for target, name in ((BetonWriter, "add"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, full)
            with pytest.raises(ValueError, match=r"the disk is full: .* has no room for out.beton; free some"):
                prepare_beton(root, output, workers=0)
        assert output.read_bytes() == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out.beton"]
    usage = type("Usage", (), {"free": 10})()
    monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"out.beton needs .* GB or more and .* GB free"):
        prepare_beton(root, output, workers=0)


def test_a_killed_process_keeps_the_old_file_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    root, output = write_folder(tmp_path / "data", [f"{i:03}.jpg" for i in range(300)]), tmp_path / "out.beton"
    prepare_beton(write_folder(tmp_path / "old", NAMES), output, workers=0)
    before, part = output.read_bytes(), tmp_path / "out.beton.part"
    code = (
        "import sys, time; from pathlib import Path; import sslfast.data.prepare as prepare\n"
        "store = prepare._store\n"
        "def slow(*task): time.sleep(0.02); return store(*task)\n"
        "prepare._store = slow\n"
        f"prepare.prepare_beton(Path({str(root)!r}), Path({str(output)!r}), workers=2)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], start_new_session=True) as child:
        for _ in range(600):
            if part.exists():
                break
            time.sleep(0.05)
        time.sleep(0.3)
        with pytest.raises(ValueError, match=r"out.beton.part is being written by another process"):
            prepare_beton(root, output, workers=0)
        os.kill(child.pid, signal.SIGKILL)
    assert part.exists()
    assert output.read_bytes() == before
    assert len(prepare_beton(root, output, workers=0).manifest) == 300
    assert not part.exists()
    assert len(open_data(output)) == 300


def test_foreign_truncated_and_edited_files(tmp_path: Path) -> None:
    output = tmp_path / "out.beton"
    with pytest.raises(ValueError, match=r"out.beton does not exist: make it with `sslfast data prepare`"):
        open_data(output)
    output.write_bytes(b"short")
    with pytest.raises(ValueError, match=r"is not a .beton file"):
        open_data(output)
    output.write_bytes(bytes(100_000))
    with pytest.raises(ValueError, match=r"was not written by `sslfast data prepare`"):
        open_data(output)
    prepare_beton(write_folder(tmp_path / "data", NAMES), output, workers=0)
    good = output.read_bytes()
    table = int(np.frombuffer(good, HEADER, 1)[0]["alloc_table_ptr"])
    footer = np.frombuffer(good, FOOTER, 1, table - FOOTER.itemsize)[0]
    for length in (3000, len(good) // 2, table, len(good) - 1):
        output.write_bytes(good[:length])
        with pytest.raises(ValueError, match=r"cut short or edited: make it again|was not written"):
            open_data(output)
    samples = HEADER.itemsize + 3 * beton_module.FIELD.itemsize
    for place in (
        samples + 1,
        samples + 40,
        int(footer["manifest"]) + 500,
        int(footer["settings"]) + 3,
        int(footer["sums"]) + 5,
        table - FOOTER.itemsize + 7,
        table + ALLOCATION.itemsize + 9,
    ):
        edited = bytearray(good)
        edited[place] ^= 0x80
        output.write_bytes(edited)
        with pytest.raises(ValueError, match="cut short or edited: make it again"):
            open_data(output)
    output.write_bytes(good)
    assert len(open_data(output)) == 11


def test_names_that_are_not_text(tmp_path: Path) -> None:
    root = tmp_path / "data.beton"  # a folder may be called anything
    root.mkdir()
    names = [b"a space.jpg", b"line\nbreak.jpg", b"tab\t.jpg", b"\xff\xfe.jpg"]
    for key, name in enumerate(names):
        with open(os.path.join(os.fsencode(root), name), "wb") as file:
            file.write(encoded(picture(key=key)))
    prepare_beton(root, tmp_path / "out.beton", workers=2)
    assert {os.fsencode(path) for path in open_data(tmp_path / "out.beton").paths} == set(names)


def test_a_run_resumes_only_with_the_file_it_started_with(tmp_path: Path) -> None:
    root, output, run = write_folder(tmp_path / "data", NAMES), tmp_path / "out.beton", tmp_path / "run.tsv"
    prepare_beton(root, output, workers=0)
    manifest = open_data(output)
    manifest.save(run)
    assert reopen_data(output, run).source.identity() == manifest.source.identity() != ""
    with pytest.raises(ValueError, match=r"started with a .beton file: give that one, not"):
        reopen_data(root, run)
    prepare_beton(root, output, PrepareConfig(mode="raw"), workers=0)
    with pytest.raises(ValueError, match="holds the same images stored in another way than the run"):
        reopen_data(output, run)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, output = odd_folder(tmp_path / "data"), tmp_path / "out.beton"
    (root / "line\nbreak.jpg").write_bytes(b"")
    assert cli.main(["data", "prepare", str(root), str(output), "--workers", "0"]) == 2
    assert "cannot be used: line break.jpg (empty file)" in capsys.readouterr().err
    command = ["data", "prepare", str(root), str(output), "--workers", "0", "--on-bad-image", "skip", "--quality", "80"]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert re.search(r"images +15 in 0 classes", text)
    assert re.search(r"12 +encoded as JPEG\n", text)
    assert re.search(r"left out +line\\nbreak.jpg \(empty file\)", text)
    for arguments, words in (
        (["--quality", "0"], "quality must be in [1, 100], got 0"),
        (["--max-resolution", "4"], "max_resolution must be in [8, 65535], got 4"),
        (["--jpg-share", "2"], "jpg_share must be in [0, 1], got 2.0"),
        (["--workers", "-1"], "--workers must be at least 0, got -1"),
    ):
        assert cli.main([*command, *arguments]) == 2
        assert words in capsys.readouterr().err
    assert cli.main(["data", "prepare", str(root), str(tmp_path / "out.bin")]) == 2
    assert "must be named *.beton" in capsys.readouterr().err
    assert cli.main(["data", "prepare", str(output), str(output)]) == 2
    assert "is a .beton file already" in capsys.readouterr().err


def test_tar_shards_become_a_file_with_their_rows_and_classes(tmp_path: Path) -> None:
    members = {f"{i}.jpg": encoded(picture(60, 40, i)) for i in range(5)}
    labels = {f"{i}.cls": str(10 - i).encode() for i in range(5)}
    (tmp_path / "data").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "data" / f"{shard}.tar", "w") as tar:
            for name, data in (members | labels).items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    shards = Manifest.scan(tmp_path / "data")
    prepare_beton(tmp_path / "data", tmp_path / "x.beton", workers=2)
    manifest = open_data(tmp_path / "x.beton")
    assert manifest.paths == shards.paths
    assert isinstance(manifest.source, BetonSource)
    assert manifest.classes == ["6", "7", "8", "9", "10"]
    assert manifest.labels.tolist() == shards.labels.tolist() == [4, 3, 2, 1, 0] * 2
    with Beton(tmp_path / "x.beton") as beton:
        assert [stored(beton, row) for row in range(10)] == [*members.values()] * 2


def test_a_preview_of_the_file_names_what_it_was_made_of(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "data", NAMES)
    prepare_beton(root, tmp_path / "x.beton", workers=0)
    with pytest.raises(ValueError, match=rf"x.beton is a .beton file: name what it was made of \({root}\)"):
        write_preview(tmp_path / "x.beton", {}, tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()
