"""Tar shards as data: members as of ``tarfile``, labels, rows equal to a folder's, every way a shard can be bad."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sslfast.cli import main as cli
from sslfast.data.manifest import Manifest
from sslfast.data.opening import open_data, reopen_data
from sslfast.data.source import HASHED_BYTES, content_hash
from sslfast.data.tar import TarSource, shard_index
from sslfast.data.tar_walk import walk_tar
from sslfast.evaluation.encoders import RawPixels, extract_features
from sslfast.evaluation.folders import load_manifests
from sslfast.loaders.pillow import PillowLoader
from sslfast.loaders.registry import LoaderConfig, build_loader, loader_status
from sslfast.report.preview import write_preview
from sslfast.training.trainer import Trainer
from sslfast.views.types import CropConfig, ViewConfig
from tests.pictures import encoded, picture
from tests.tiny import TinyConfig

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
VIEWS = {"image": ViewConfig(crop=CropConfig(size=24)), "other": ViewConfig(crop=CropConfig(size=16))}


def image(key: int, format: str = "JPEG") -> bytes:
    return encoded(picture(48 + key % 3, 40 + key % 4, key), format)


def write_tar(path: Path, members: dict[str, bytes], format: str = "gnu") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=FORMATS[format], encoding="utf-8", errors="surrogateescape") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(root: Path, shards: int = 3, images: int = 6) -> Path:
    for shard in range(shards):
        members = {f"class{i % 2}/{shard}-{i}.jpg": image(shard * images + i) for i in range(images)}
        write_tar(root / f"shard-{shard:03}.tar", members)
    return root


def unpack(root: Path, folder: Path) -> Path:
    """The same images as files, where a tar file is a folder of its name."""
    for shard in root.glob("*.tar"):
        with tarfile.open(shard) as tar:
            tar.extractall(folder / shard.name, filter="data")
    return folder


def raises(pattern: str):
    return pytest.raises(ValueError, match=pattern)


@pytest.mark.parametrize("format", FORMATS)
def test_members_are_those_that_tarfile_finds(tmp_path: Path, format: str) -> None:
    names = ["a.jpg", "./b/c.png", "/d.gif", "ü/漢.jpg", "x" * 60 + "/" + "y" * 90 + ".jpg", "e.jpg"]
    if format != "ustar":
        names += ["deep/" * 60 + "z.jpg", "w" * 300 + ".jpg", "\udcff.jpg"]
    members = {name: bytes([i]) * (i * 511) for i, name in enumerate(names)}
    path = write_tar(tmp_path / "x.tar", members, format)
    found = list(walk_tar(str(path)))
    assert [member.name for member in found] == [name.removeprefix("./").removeprefix("/") for name in names]
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
        for member, info in zip(found, tar.getmembers(), strict=True):
            assert (member.offset, member.size, member.problem) == (info.offset_data, info.size, "")
            assert path.read_bytes()[member.offset : member.offset + member.size] == members[info.name]


NAMES = st.text("ab/.ü", min_size=1, max_size=260).filter(lambda name: not name.endswith("/"))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(NAMES, st.integers(0, 1100)), max_size=6), st.sampled_from(["gnu", "pax"]))
def test_any_names_and_sizes(tmp_path_factory: pytest.TempPathFactory, members, format: str) -> None:
    path = tmp_path_factory.mktemp("t") / "x.tar"
    with tarfile.open(path, "w", format=FORMATS[format]) as tar:
        for name, size in members:
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(b"x" * size))
    with tarfile.open(path) as tar:
        expected = [(info.offset_data, info.size) for info in tar.getmembers()]
    assert [(member.offset, member.size) for member in walk_tar(str(path))] == expected


def test_large_and_old_headers(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.jpg": b"12345"})
    data = bytearray(path.read_bytes())
    data[257:265] = bytes(8)  # before POSIX: no magic
    data[124:136] = b"\x80" + (5).to_bytes(11, "big")  # GNU: sizes of 8 GiB and more
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    path.write_bytes(data)
    assert [(m.name, m.offset, m.size) for m in walk_tar(str(path))] == [("a.jpg", 512, 5)]


def test_rows_are_those_of_the_same_folder(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "shards")
    shards, folder = Manifest.scan(root), Manifest.scan(unpack(root, tmp_path / "folder"))
    assert shards.paths == folder.paths
    assert shards.paths[0] == "shard-000.tar/class0/0-0.jpg"
    assert shards.sha1 == folder.sha1
    assert np.array_equal(shards.bytes, folder.bytes)
    assert shards.classes == ["class0", "class1"]
    for row in range(len(folder)):
        assert shards.location(row).read() == folder.path(row).read_bytes() == folder.location(row).read()
    assert str(shards.location(1)) == str(root / "shard-000.tar/class0/0-2.jpg") == str(shards.path(1))


@pytest.mark.parametrize(
    ("name", "workers"), [("pillow", 0), ("pillow", 2), *([("dali", 2)] if loader_status()["dali"][0] else [])]
)
def test_loaders_yield_what_they_yield_from_a_folder(tmp_path: Path, name: str, workers: int) -> None:
    root = write_shards(tmp_path / "shards")
    manifests = [Manifest.scan(root), Manifest.scan(unpack(root, tmp_path / "folder"))]
    config = LoaderConfig(name=name, workers=workers)  # type: ignore[arg-type]
    loaders = [build_loader(config, manifest=m, views=VIEWS, batch_size=4, seed=3) for m in manifests]
    for a, b in zip(loaders[0].epoch(1), loaders[1].epoch(1), strict=True):
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert all(torch.equal(a.crops[view], b.crops[view]) for view in VIEWS)
    for loader in loaders:
        loader.close()


def test_labels_come_from_cls_members_or_folders(tmp_path: Path) -> None:
    members = {
        "000.cls": b"10\n",
        "000.jpg": image(0),
        "001.jpg": image(1),
        "001.cls": b" 002",
        "002.seg.png": image(2, "PNG"),
        "002.cls": b"10",
        "002.json": b"{}",
    }
    manifest = Manifest.scan(write_tar(tmp_path / "x.tar", members))
    assert manifest.paths == ["000.jpg", "001.jpg", "002.seg.png"]
    assert manifest.classes == ["2", "10"]  # by number
    assert manifest.labels.tolist() == [1, 0, 1]
    assert manifest.ignored == {".json": 1}
    mixed = {"dog/0.jpg": image(0), "dog/1.jpg": image(1), "dog/1.cls": "Katze ü".encode(), "loose.png": image(2)}
    manifest = Manifest.scan(write_tar(tmp_path / "y.tar", mixed))
    assert manifest.classes == ["Katze ü", "dog"]
    assert manifest.labels.tolist() == [1, 0, -1]
    kept = manifest.without([("dog/0.jpg", "bad")])
    assert (kept.classes, kept.labels.tolist()) == (["Katze ü"], [0, -1])
    assert [kept.source.read(row) for row in range(2)] == [mixed["dog/1.jpg"], mixed["loose.png"]]
    with raises(r"member '0.cls' holds no label"):
        Manifest.scan(write_tar(tmp_path / "z.tar", {"0.jpg": image(0), "0.cls": b" \n"}))


def test_the_text_file_holds_everything(tmp_path: Path) -> None:
    names = ["a/tab\there.jpg", "a/line\nbreak.jpg", "b/\udcff.jpg", "plain.jpg"]
    root = tmp_path / "data"
    write_tar(root / "one.tar", {name: image(i) for i, name in enumerate(names)}, "pax")
    write_tar(root / "deep" / "a-b.tar", {"0.jpg": image(7), "0.cls": b"tab\tclass"})
    write_tar(root / "deep" / "a.tar", {"0.jpg": image(8)})
    manifest = Manifest.scan(root)
    assert len(manifest) == 6
    manifest.save(tmp_path / "m.tsv")
    loaded = Manifest.load(tmp_path / "m.tsv")
    assert (loaded.paths, loaded.sha1, loaded.classes) == (manifest.paths, manifest.sha1, manifest.classes)
    assert loaded.digest() == manifest.digest()
    assert loaded.labels.tolist() == manifest.labels.tolist()
    assert isinstance(loaded.source, TarSource)
    assert isinstance(manifest.source, TarSource)
    assert loaded.source.shards == ["deep/a-b.tar", "deep/a.tar", "one.tar"]
    for table in ("shard_sizes", "shard_times", "shard_of", "offsets", "sizes"):
        assert np.array_equal(getattr(loaded.source, table), getattr(manifest.source, table)), table
    assert [loaded.source.read(row) for row in range(6)] == [manifest.source.read(row) for row in range(6)]
    loaded.check(contents=True)
    text = (tmp_path / "m.tsv").read_bytes()
    for place in (b"\t512\n", b"# shard\tone.tar"):
        changed = text.replace(place, place[:-1] + b"9\n" if place[-1:] == b"\n" else b"# shard\ttwo.tar")
        (tmp_path / "m.tsv").write_bytes(changed)
        with raises(r"cut short or edited|is damaged"):
            Manifest.load(tmp_path / "m.tsv")


def test_a_single_tar_is_data_too_and_may_move(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "one.tar", {"a/0.jpg": image(0), "b/1.jpg": image(1)})
    write_tar(tmp_path / "unrelated.tar", {"c/0.jpg": image(0)})
    manifest = Manifest.scan(path)
    assert manifest.paths == ["a/0.jpg", "b/1.jpg"]
    assert manifest.path(1) == path / "b/1.jpg"
    manifest.check()
    manifest.save(tmp_path / "m.tsv")
    moved = tmp_path / "elsewhere" / "two.tar"
    moved.parent.mkdir()
    shutil.copy(path, moved)  # with another time
    os.utime(moved, ns=(1, 1))
    path.unlink()
    again = reopen_data(moved, tmp_path / "m.tsv")
    assert again.digest() == manifest.digest()
    assert again.source.read(1) == image(1)
    with raises(r"1 missing: one.tar \(unreadable: No such file"):
        open_data(tmp_path / "m.tsv")


def test_bad_members_follow_the_policy(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"good.jpg": image(0), "empty.jpg": b"", "text.png": b"no picture"})
    with tarfile.open(path, "a") as tar:
        for name, kind in (
            ("hard.jpg", tarfile.LNKTYPE),
            ("soft.jpg", tarfile.SYMTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "good.jpg"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("._good.jpg"))
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    with raises(r"5 of 6 images in .*x.tar cannot be used: empty.jpg \(empty file\), hard.jpg .*--on-bad-image skip"):
        Manifest.scan(path)
    manifest = Manifest.scan(path, on_bad_image="skip")
    assert manifest.paths == ["good.jpg"]
    reasons = dict(manifest.excluded)
    assert reasons["hard.jpg"] == "unreadable: a hard link of a tar file"
    assert reasons["soft.jpg"] == "unreadable: a symbolic link of a tar file"
    assert reasons["pipe.jpg"] == "unreadable: a pipe of a tar file"


def test_sparse_members_are_rejected_and_skipped(tmp_path: Path) -> None:
    # As GNU tar writes them: one continued map, then the data; and POSIX's records.
    def header(name: bytes, kind: bytes, size: int) -> bytearray:
        block = bytearray(tarfile.TarInfo(name.decode()).tobuf(tarfile.GNU_FORMAT))
        block[124:136] = f"{size:011o}\0".encode()
        block[156:157] = kind
        return block

    def signed(block: bytearray) -> bytes:
        block[148:156] = b" " * 8
        block[148:156] = f"{sum(block):06o}\0 ".encode()
        return bytes(block)

    gnu = header(b"old.jpg", b"S", 700)
    gnu[482] = 1
    more, last = bytearray(512), bytes(512)
    more[504] = 1
    record = b"22 GNU.sparse.major=1\n"
    pax = signed(header(b"pax", b"x", len(record))) + record.ljust(512, b"\0") + signed(header(b"new.jpg", b"0", 100))
    tail = signed(header(b"good.jpg", b"0", len(image(1)))) + image(1).ljust(-(-len(image(1)) // 512) * 512, b"\0")
    path = tmp_path / "x.tar"
    path.write_bytes(signed(gnu) + bytes(more) + last + bytes(1024) + pax + bytes(512) + tail + bytes(1024))
    manifest = Manifest.scan(path, on_bad_image="skip")
    assert manifest.paths == ["good.jpg"]
    assert dict(manifest.excluded) == dict.fromkeys(["old.jpg", "new.jpg"], "unreadable: a sparse member of a tar file")
    assert manifest.source.read(0) == image(1)


def test_shards_that_cannot_be_used(tmp_path: Path) -> None:
    good = write_tar(tmp_path / "good" / "x.tar", {"0.jpg": image(0), "1.jpg": image(1)})
    data = good.read_bytes()
    path = tmp_path / "data" / "x.tar"
    path.parent.mkdir()
    members = list(walk_tar(str(good)))
    end = members[1].offset + -(-members[1].size // 512) * 512
    for cut in (members[1].offset + 100, end - 1, end, members[1].offset - 12):
        path.write_bytes(data[:cut])
        for policy in ("error", "skip"):
            with raises(
                r"shard .*x.tar is truncated: .* needs [\d,]+ bytes, the file has [\d,]+: write the shard again"
            ):
                Manifest.scan(path.parent, on_bad_image=policy)  # type: ignore[arg-type]
    path.write_bytes(b"")
    with raises(r"shard .*x.tar is empty \(0 bytes\)"):
        Manifest.scan(path.parent)
    path.write_bytes(b"\x1f\x8b" + bytes(1022))
    with raises(r"x.tar is not a tar file, or is compressed: .*plain .tar; run `mv"):
        Manifest.scan(path)
    damaged = bytearray(data)
    damaged[members[1].offset - 500] ^= 255
    path.write_bytes(damaged)
    with raises(rf"x.tar is damaged: no valid header at byte {members[1].offset - 512:,}"):
        Manifest.scan(path)
    path.write_bytes(data + data)
    with raises(r"x.tar has data after its end mark .*joined with cat"):
        Manifest.scan(path)
    write_tar(path, {})
    with raises(r"x.tar holds no image: images are members named .*leave this file out"):
        Manifest.scan(path)
    write_tar(path, {"a.txt": b"x", "b.cls": b"1"})
    with raises(r"x.tar holds no image \(other members: 1 x .txt\)"):
        Manifest.scan(path)
    write_tar(path, {"./0.jpg": image(0), "0.jpg": image(1)})
    with raises(r"x.tar has two members named '0.jpg': .*write the shard again"):
        Manifest.scan(path)
    with raises(r"shard .*gone.tar cannot be read \(No such file"):
        Manifest.scan(tmp_path / "gone.tar")
    write_tar(path, {"0.jpg": image(0)})
    (path.parent / "loose.jpg").write_bytes(image(0))
    with raises(
        r"data holds 1 images \(loose.jpg, ...\) and 1 tar files \(x.tar, ...\): name a folder with one of both"
    ):
        Manifest.scan(path.parent)


def test_check_names_missing_changed_and_added_shards(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "data", shards=5)
    manifest = Manifest.scan(root)
    os.utime(root / "shard-004.tar", ns=(5, 5))  # copied: not changed
    manifest.check()
    (root / "shard-000.tar").unlink()
    with (root / "shard-001.tar").open("ab") as file:
        file.write(bytes(512))
    assert isinstance(manifest.source, TarSource)
    data = bytearray((root / "shard-002.tar").read_bytes())
    data[manifest.source.offsets[2 * 6 + 1] + 300] ^= 1
    (root / "shard-002.tar").write_bytes(data)
    os.utime(root / "shard-002.tar", ns=(7, 7))
    write_tar(root / "shard-9.tar", {"0.jpg": image(0)})
    with raises("no longer matches its manifest of 30 images") as error:
        manifest.check()
    message = str(error.value)
    assert "1 missing: shard-000.tar (unreadable: No such file or directory)" in message
    size = (root / "shard-001.tar").stat().st_size
    assert f"shard-001.tar ({size - 512} -> {size} bytes)" in message
    assert "shard-002.tar/class0/2-2.jpg (same size, other content)" in message
    assert "2 changed" in message
    assert "1 added: shard-9.tar" in message


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_a_shard_lost_at_run_time_ends_the_run(tmp_path: Path, workers: int, harm: str) -> None:
    """Also with ``skip``: a lost shard is not a bad image."""
    root = write_shards(tmp_path / "data", shards=1)
    loader = PillowLoader(Manifest.scan(root), VIEWS, batch_size=3, seed=0, workers=workers, on_bad_image="skip")
    shard = root / "shard-000.tar"
    if harm == "gone":
        shard.unlink()
        pattern = r"shard .*shard-000.tar cannot be read \(No such file or directory\): put it back"
    else:
        shard.write_bytes(shard.read_bytes()[:3000])
        pattern = r"shard .*shard-000.tar changed while it was in use \(\d+ -> 3000 bytes\): put the old one back"
    with raises(pattern):
        next(loader.epoch(0))
    loader.close()


def test_a_run_on_shards_resumes_and_knows_its_data(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "data")
    whole = Trainer(TinyConfig(epochs=2), root, tmp_path / "whole", report=lambda _: None).fit()
    run = tmp_path / "run"
    first = Trainer(TinyConfig(epochs=2), root, run, report=lambda _: None)
    first.fit()
    kept = sorted((run / "checkpoints").glob("step_*.pt"))
    kept[-1].unlink()
    again = Trainer(TinyConfig(epochs=2), root, run, report=lambda _: None)
    assert again.manifest is not None
    assert isinstance(again.manifest.source, TarSource)
    assert again.fit().metrics["loss"] == whole.metrics["loss"]
    write_tar(root / "shard-7.tar", {"0.jpg": image(0)})
    with raises("1 added: shard-7.tar"):
        Trainer(TinyConfig(epochs=2), root, run, report=lambda _: None)


def test_a_run_that_mixes_few_shards_resumes_too(tmp_path: Path) -> None:
    root = write_shards(tmp_path / "data", shards=4)
    loader = LoaderConfig(workers=0, shuffle="shards", mixed_shards=2)

    def train(run: Path) -> dict[str, torch.Tensor]:
        trainer = Trainer(TinyConfig(epochs=2, loader=loader), root, run, report=lambda _: None)
        order = trainer.loader.plan.order(0)  # type: ignore[attr-defined]
        assert {row // 6 for row in order[:12].tolist()} & {row // 6 for row in order[12:].tolist()} == set()
        trainer.fit()
        return {name: value.clone() for name, value in trainer.method.state_dict().items()}

    whole = train(tmp_path / "run")
    sorted((tmp_path / "run" / "checkpoints").glob("step_*.pt"))[-1].unlink()
    again = train(tmp_path / "run")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    for data in (unpack(root, tmp_path / "folder"), 40):
        with raises("--loader.shuffle shards is for tar shards"):
            Trainer(TinyConfig(loader=loader), data, tmp_path / "other", report=lambda _: None)


def test_commands_take_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    root = write_shards(tmp_path / "data")
    members = {f"{i}.jpg": image(i) for i in range(3)} | {"bad.jpg": image(4)[:-200]}
    write_tar(root / "shard-zzz.tar", members)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "verify", "data", "--workers", "1"]) == 1
    assert "shard-zzz.tar/bad.jpg\tdamaged" in capsys.readouterr().out
    manifest = open_data(tmp_path / "data.tsv", on_bad_image="skip")
    assert (len(manifest), manifest.verified) == (21, True)
    for data in ("data", "data.tsv", "data/shard-001.tar"):
        write_preview(data, VIEWS, "sheet.png", count=2)
        assert Image.open("sheet.png").size[0] > 300
        (tmp_path / "sheet.png").unlink()


def test_evaluations_take_shards_and_refuse_files(tmp_path: Path) -> None:
    for split, keys in (("train", range(4)), ("val", range(4, 8))):
        members = {f"{key}.jpg": image(key) for key in keys} | {f"{key}.cls": str(key % 2).encode() for key in keys}
        write_tar(tmp_path / "data" / split / "0.tar", members)
    train, val = load_manifests(tmp_path / "data")
    assert (train.classes, val.labels.tolist()) == (["0", "1"], [0, 1, 0, 1])
    features = extract_features(RawPixels(side=4), val, size=16)
    assert features.shape == (4, 48)
    with raises(r"0.tar is a file: an evaluation needs two labelled sets, a folder with train/<class>/"):
        load_manifests(tmp_path / "data" / "val" / "0.tar")


def test_hashes_and_headers_of_unusual_images(tmp_path: Path) -> None:
    """A header that needs more than the first 16 KiB."""
    large = encoded(picture(300, 300), "TIFF")
    assert len(large) > HASHED_BYTES
    padded = image(1)[:2] + b"\xff\xfe\xff\xff" + bytes(65533) + image(1)[2:]
    manifest = Manifest.scan(write_tar(tmp_path / "x.tar", {"a.tif": large, "b.jpg": padded}))
    assert manifest.sha1 == [content_hash(large[:HASHED_BYTES]), content_hash(padded[:HASHED_BYTES])]


def test_shard_index_takes_the_shard_a_path_begins_with() -> None:
    names = ["a-1.tar", "a.tar", "d/a.tar"]
    paths = ["a-1.tar/x/a.tar/0.jpg", "a.tar/0.jpg", "a.tar/a-1.tar/0.jpg", "d/a.tar/0.jpg"]
    assert shard_index(names, paths).tolist() == [0, 1, 1, 2]
    assert shard_index([""], ["a/b", "c"]).tolist() == [0, 0]
    with raises("is in none of the shards"):
        shard_index(names, ["b.tar/0.jpg"])
