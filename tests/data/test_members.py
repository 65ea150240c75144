"""Labels of archives' members, archives of archives, and what costs of hostile tar headers."""

import gzip
import io
import json
import tarfile
import time
from pathlib import Path

import pytest

from sslfast.data.manifest import Manifest
from sslfast.data.tar_walk import ShardError, walk_tar
from tests.data.test_tar import image, raises, write_tar

WORDS = ["n01440764", "n01443537", "n01484850"]


def tar_bytes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def labels_of(manifest: Manifest) -> dict[str, str | None]:
    return {
        path: manifest.classes[label] if label >= 0 else None
        for path, label in zip(manifest.paths, manifest.labels, strict=True)
    }


@pytest.mark.parametrize(
    ("members", "label"),
    [
        ({"0.json": '{"label": 7, "class_name": "dog"}'}, "7"),
        ({"0.json": '{"class_name": "dog"}'}, "dog"),
        ({"0.json": '{"Label": " 007 "}'}, "7"),
        ({"0.json": '{"cls": 3.0}'}, "3"),
        ({"0.json": '{"label": null, "category": "x"}'}, "x"),
        ({"0.json": '{"labels": [4]}'}, "4"),
        ({"0.json": '{"x": 1, "y": 2}'}, None),
        ({"0.json": '{"label": [1, 2]}'}, None),
        ({"0.json": '{"label": true}'}, None),
        ({"0.json": '{"caption": "a dog"}'}, None),
        ({"0.json": "[" * 100_000}, None),
        ({"0.json": "7"}, "7"),
        ({"0.json": '"a dog on a lawn"'}, None),
        ({"0.JSON": '{"class-name": "dog"}'}, "dog"),
        ({"0.json": '{"className": "dog"}'}, "dog"),
        ({"0.json": '{"meta": {"label": 7}}'}, "7"),
        ({"0.json": '{"label": {"id": 7, "name": "dog"}}'}, "7"),
        ({"0.json": '{"class": {"name": "dog"}}'}, "dog"),
        ({"0.json": '{"annotations": [{"category_id": 7}]}'}, "7"),
        ({"0.json": '{"annotations": [{"category_id": 7}, {"category_id": 8}]}'}, None),
        ({"0.json": '{"label": [0, 1, 0]}'}, None),
        *(({f"0.{word}{form}": "7"}, "7") for word in ("class", "Label", "target") for form in ("", ".txt", ".json")),
        ({"0.label.json": '"dog"'}, "dog"),
        ({"0.cls.json": '{"label": 7}'}, "7"),
        ({"0.CLS": "7"}, "7"),
        ({"0.cls": "7.0"}, "7"),
        ({"0.output.cls": "7"}, "7"),
        ({"0.a.cls": "7", "0.b.cls": "8"}, None),
        ({"0.1.cls": "7"}, None),
        ({"0.txt": "7"}, "7"),
        ({"0.cls.txt": "dog\n"}, "dog"),
        ({"0.cls": "\ufeff7\r\n"}, "7"),
        ({"0.cls": "7", "0.json": '{"label": 7}'}, "7"),
        ({"0.cls": "7", "0.json": '{"label": "dog"}'}, "7"),
        ({"0.cls": "dog", "0.json": '{"label": 7, "class_name": "dog"}'}, "dog"),
        ({"0.txt": "a photograph"}, None),
    ],
)
def test_labels_of_other_members(tmp_path: Path, members: dict[str, str], label: str | None) -> None:
    files = {"0.jpg": image(0), "d/1.jpg": image(1), **{name: text.encode() for name, text in members.items()}}
    found = labels_of(Manifest.scan(write_tar(tmp_path / "s-000.tar", files)))
    assert found == {"0.jpg": label, "d/1.jpg": "d"}


def test_text_beside_images_is_a_label_where_all_of_it_is_a_number(tmp_path: Path) -> None:
    files = {f"{k}.jpg": image(k) for k in range(3)} | {"0.txt": b"7\n", "1.txt": b"8", "note.txt": b"x"}
    found = labels_of(Manifest.scan(write_tar(tmp_path / "s.tar", files)))
    assert found == {"0.jpg": "7", "1.jpg": "8", "2.jpg": None}
    for more in ({"2.txt": b"a dog"}, {"2.txt": b"1 2"}, {"2.txt": b"1" * 20}):
        found = labels_of(Manifest.scan(write_tar(tmp_path / "s.tar", files | more)))
        assert [*found.values()] == [None, None, None]


@pytest.mark.parametrize("text", [b"", b"\x93NUMPY\x01\0", b"1\n2", b"dog\0", b"x" * 2000])
def test_members_that_hold_no_label_are_named(tmp_path: Path, text: bytes) -> None:
    with raises(r"member '0.cls' holds no label: it must be a number or the name of a class"):
        Manifest.scan(write_tar(tmp_path / "x.tar", {"0.jpg": image(0), "0.cls": text}))


def test_labels_of_no_image_are_counted(tmp_path: Path) -> None:
    files = {"0.jpg": image(0), "0.cls": b"1", "1.cls": b"2", "x/0.label": b"3"}
    manifest = Manifest.scan(write_tar(tmp_path / "s.tar", files))
    assert manifest.ignored == {".cls holding labels": 1, ".label holding labels": 1}
    assert manifest.left_out() == [
        "1 x .cls (labels), 1 x .label (labels): of no image here: the names of an image and of its label begin alike, "
        "as 0.jpg and 0.cls do"
    ]


@pytest.mark.parametrize(
    ("files", "ignored"),
    [
        ({"0.jpg": image(0), "0.json": b'{"caption": "a dog"}'}, {".json holding no label": 1}),
        ({"0.jpg": image(0), "0.json": b"{}", "0.cls": b"1"}, {".json": 1}),
        ({"0.a.jpg": image(0), "0.b.jpg": image(1), "0.json": b"{}"}, {".json holding no label": 1}),
        ({"0.jpg": image(0), "stats.json": b"{}"}, {".json": 1}),
    ],
)
def test_json_members_without_a_label_are_counted(tmp_path: Path, files: dict[str, bytes], ignored: dict) -> None:
    manifest = Manifest.scan(write_tar(tmp_path / "s-000.tar", files))
    assert manifest.ignored == ignored
    assert bool(manifest.left_out()) == (".json holding no label" in ignored)
    assert all("1 x .json (no label): beside images" in line for line in manifest.left_out())


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["./t/cat/0.jpg", "./t/dog/1.jpg"], ["cat", "dog"]),
        (["t/cat/x/0.jpg", "t/cat/y/1.jpg"], ["cat"]),
        (["t/cat/0.jpg", "t/1.jpg"], ["t"]),
        (["cat/0.jpg", "dog/1.jpg"], ["cat", "dog"]),
        (["cat/0.jpg"], ["cat"]),
        (["0.jpg"], []),
    ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_one_folder_around_all_others_is_no_class(tmp_path: Path, names, classes: list[str], shards: int) -> None:
    files = {name: image(k) for k, name in enumerate(names)}
    for k in range(shards):
        write_tar(tmp_path / "d" / f"s-{k:03}.tar", dict([*files.items()][k::shards] or files))
    manifest = Manifest.scan(tmp_path / "d")
    assert manifest.classes == classes
    Manifest.parse(manifest.dump(), "m").check()


def test_json_labels_are_sorted_by_number(tmp_path: Path) -> None:
    files = {}
    for k in (10, 9, 2):
        files |= {f"{k}.jpg": image(k), f"{k}.json": json.dumps({"label": k}).encode()}
    manifest = Manifest.scan(write_tar(tmp_path / "s-000.tar", files))
    assert manifest.classes == ["2", "9", "10"]
    assert manifest.ignored == {}


@pytest.mark.parametrize(("one", "other"), [("7", 8), ("dog", "cat")])
def test_labels_that_contradict_each_other_are_named(tmp_path: Path, one: str, other: object) -> None:
    files = {"0.jpg": image(0), "0.cls": one.encode(), "0.json": json.dumps({"label": other}).encode()}
    with raises(rf"member '0.cls' says class '{one}' and member '0.json' says '{other}': two labels"):
        Manifest.scan(write_tar(tmp_path / "x.tar", files))


def test_imagenet_as_downloaded_has_its_classes(tmp_path: Path) -> None:
    inner = {word: {f"{word}_{k}.JPEG": image(10 * i + k) for k in range(4)} for i, word in enumerate(WORDS)}
    outer = {f"{word}.tar": tar_bytes(files) for word, files in inner.items()}
    write_tar(tmp_path / "down" / "ILSVRC2012_img_train.tar", outer)
    for word, data in outer.items():
        (tmp_path / "once").mkdir(exist_ok=True)
        (tmp_path / "once" / word).write_bytes(data)
    wanted = [files[name] for files in inner.values() for name in files]
    for place in ("down", "down/ILSVRC2012_img_train.tar", "once"):
        manifest = Manifest.scan(tmp_path / place)
        assert manifest.classes == WORDS
        assert [manifest.source.read(row) for row in range(12)] == wanted
        again = Manifest.parse(manifest.dump(), "m")
        again.check()
        assert labels_of(again) == labels_of(manifest)
    assert manifest.paths[0] == "n01440764.tar/n01440764_0.JPEG"


def test_inner_tars_that_are_damaged_are_named(tmp_path: Path) -> None:
    data = tar_bytes({"a.jpg": image(0)})
    path = write_tar(tmp_path / "o.tar", {"a.tar": data, "b.tar": data[:700]})
    with raises(r"o.tar/b.tar is truncated: member 'a.jpg' needs"):
        Manifest.scan(path)
    path = write_tar(tmp_path / "o.tar", {"a.tar": data, "b.tar": gzip.compress(data)})
    with raises(r"o.tar/b.tar is not a tar file, or is compressed: .*; write the shard again"):
        Manifest.scan(path)
    for name, why in (
        ("a.tgz", "`gunzip -k` each .tgz"),
        ("a.zip", "name one .zip"),
        ("a/b", r"\(JPEG\): pictures by"),
    ):
        write_tar(tmp_path / "p.tar", {name: image(0)})
        with raises(rf"p.tar holds no image .*{why}"):
            Manifest.scan(tmp_path / "p.tar")
    path = write_tar(tmp_path / "o.tar", {"a.tar": data, "b.tar": b""})
    with raises(r"o.tar/b.tar is empty"):
        Manifest.scan(path)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["dog.tar", "cat.tar"], ["cat", "dog"]),
        (["n01440764.tar"], ["n01440764"]),
        (["x/n01440764.tar", "y/n01443537.tar"], ["n01440764", "n01443537"]),
        (["shard-000.tar", "shard-001.tar"], []),
        (["images.tar"], []),
        (["x/a.tar", "y/a.tar"], []),
    ],
)
def test_tars_named_by_a_class(tmp_path: Path, names: list[str], classes: list[str]) -> None:
    for name in names:
        write_tar(tmp_path / name, {"0.jpg": image(0), "1.jpg": image(1)})
    assert Manifest.scan(tmp_path).classes == classes


def test_a_compressed_tar_names_the_commands_that_help(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(gzip.compress(tar_bytes({"a.jpg": image(0)})))
    with raises(rf"x.tar is not a tar file, or is compressed.*run `mv {path} {path}.gz && gunzip {path}.gz`"):
        Manifest.scan(tmp_path)
    packed = tmp_path / "y.tgz"
    path.rename(packed)
    with raises(rf"run `gunzip -k {packed}` and give the file"):
        Manifest.scan(packed)


def test_system_and_misnamed_members_are_counted(tmp_path: Path) -> None:
    files = {
        **{"a/0.jpg": image(0), "__MACOSX/a/._0.jpg": b"x", "a/._0.jpg": b"x", "a/@eaDir/0.jpg/M.jpg": image(1)},
        **{".x/1.jpg": image(1), "b/1.CR2": b"x", "b/photo": image(2), "b/notes.txt": b"x", "./a/.DS_Store": b"x"},
    }
    manifest = Manifest.scan(write_tar(tmp_path / "x.tar", files))
    assert manifest.paths == ["a/0.jpg"]
    assert manifest.ignored == {
        **{"__MACOSX/": 1, "._*": 1, "@eaDir/": 1, ".*": 1, ".cr2": 1, " holding JPEG": 1, ".txt": 1}
    }


def test_names_above_the_root_are_no_classes(tmp_path: Path) -> None:
    files = {"../cat/0.jpg": image(0), "/dog/1.jpg": image(1), "../2.jpg": image(2)}
    manifest = Manifest.scan(write_tar(tmp_path / "x.tar", files))
    assert labels_of(manifest) == {"../cat/0.jpg": "cat", "../2.jpg": None, "dog/1.jpg": "dog"}
    with raises(r"two members named 'a.jpg'"):
        Manifest.scan(write_tar(tmp_path / "y.tar", {"a.jpg": image(0), "./a.jpg": image(1)}))


def with_pax(records: bytes, kind: bytes = b"x", name: str = "0.jpg") -> bytes:
    header = tarfile.TarInfo("pax")
    header.type, header.size = kind, len(records)
    data = image(0)
    member = tarfile.TarInfo(name)
    member.size = len(data)
    padded = [part.ljust(-(-len(part) // 512) * 512, b"\0") for part in (records, data)]
    return header.tobuf() + padded[0] + member.tobuf() + padded[1] + bytes(1024)


def test_a_megabyte_of_records_takes_no_quadratic_time(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(with_pax(b"7 ab=c\n" * ((1 << 20) // 7)))
    started = time.perf_counter()
    assert [member.name for member in walk_tar(str(path))] == ["0.jpg"]
    assert time.perf_counter() - started < 3


@pytest.mark.parametrize("records", [b"9" * 5000, b"9" * 19 + b" a=b\n", b"0 a=b\n", b"-5 a=b\n", b"6 ab=c\n", b"\0"])
def test_damaged_records(tmp_path: Path, records: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(with_pax(records))
    with pytest.raises(ShardError, match=r"x.tar is damaged: no valid header at byte 0"):
        list(walk_tar(str(tmp_path / "x.tar")))


def test_global_records_hold_for_what_follows(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(with_pax(b"18 comment=a text\n", b"g"))
    assert [member.name for member in walk_tar(str(path))] == ["0.jpg"]
    path.write_bytes(with_pax(b"14 path=1.jpg\n", b"g"))
    with tarfile.open(path) as tar:
        assert [member.name for member in walk_tar(str(path))] == tar.getnames() == ["1.jpg"]
