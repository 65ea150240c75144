"""Lists beside CSV, .zip files, labels of flat folders, and names that look the same."""

import json
import os
import shutil
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from sslfast.cli import main as cli
from sslfast.data.ground_truth import label_images
from sslfast.data.manifest import Manifest
from sslfast.data.opening import open_data, reopen_data
from sslfast.data.spelling import alike, alike_among
from sslfast.evaluation.folders import load_manifests
from tests.data.test_members import labels_of
from tests.data.test_tar import image, raises
from tests.pictures import write_folder

FILES = ["imgs/a/my photo 1.jpg", "imgs/a/0", "imgs/b/1.jpg"]
WANTED = {FILES[0]: "0", FILES[1]: "0", FILES[2]: "1"}
PAIRS = [*WANTED.items()]
SUFFIXED = {FILES[0]: "0", FILES[2]: "1"}


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("l.txt", "\r\n".join(f"{path} {label}" for path, label in PAIRS), WANTED),
        ("l.lst", "\n\n".join(f"{path}\t{label}" for path, label in PAIRS) + "\n", WANTED),
        ("l.txt", "imgs/a/my photo 1.jpg\nimgs/b/1.jpg cat\n", {FILES[0]: None, FILES[2]: "cat"}),
        ("l.tsv", "".join(f"{path}\t{label}\n" for path, label in PAIRS), WANTED),
        ("l.tsv", "id\tlabel\tpath\n" + "".join(f"9\t{label}\t{path}\n" for path, label in PAIRS), WANTED),
        ("l.csv", "filename,width,Class\n" + "".join(f"{path},9,{label}\n" for path, label in PAIRS), WANTED),
        ("l.json", json.dumps([{"filename": p[5:], "prefix": "imgs", "label": int(c)} for p, c in PAIRS]), WANTED),
        ("l.json", json.dumps({"labels": PAIRS}), WANTED),
        ("l.json", json.dumps(FILES), dict.fromkeys(FILES)),
        ("l.jsonl", "".join(json.dumps({"path": p, "category": c}) + "\n" for p, c in PAIRS), WANTED),
        ("l.lst", "".join(f"{k}\t{label}.000000\t{path}\n" for k, (path, label) in enumerate(PAIRS[::2])), SUFFIXED),
        ("l.txt", "imgs/a/my photo 1.jpg,0\nimgs/b/1.jpg; 1\n", SUFFIXED),
        ("l.txt", "imgs/a/my photo 1.jpg  big cat\nimgs/b/1.jpg\tdog\n", {FILES[0]: "big cat", FILES[2]: "dog"}),
        ("l.csv", "path;label\n" + "".join(f"{path};{label}\n" for path, label in PAIRS), WANTED),
        ("l.csv", "".join(f"{path};{label}\r\n" for path, label in PAIRS), WANTED),
        ("l.csv", "".join(f'"{path}"\t{label}\n' for path, label in PAIRS), WANTED),
        ("l.csv", "imgs/b/1.jpg,a;b\n", {FILES[2]: "a;b"}),
        ("l.csv", "image_id,Haustier\n" + "".join(f"{path},{label}\n" for path, label in PAIRS), WANTED),
        ("l.csv", "Class Name,Image Path\n" + "".join(f"{label},{path}\n" for path, label in PAIRS), WANTED),
        ("l.csv", ",File-Name,Target\n" + "".join(f"0,{path},{label}\n" for path, label in PAIRS), WANTED),
        ("l.csv", "path,caption\n" + "".join(f"{path},text\n" for path in FILES), dict.fromkeys(FILES)),
        ("l.csv", "path,width,x\n" + "".join(f"{path},9,1\n" for path in FILES), dict.fromkeys(FILES)),
        ("l.jsonl", "".join(json.dumps({"imagePath": p, "classLabel": c}) + "\n" for p, c in PAIRS), WANTED),
    ],
)
def test_lists(tmp_path: Path, name: str, text: str, wanted: dict[str, str | None]) -> None:
    write_folder(tmp_path, FILES)
    (tmp_path / name).write_bytes(text.encode())
    manifest = open_data(tmp_path / name)
    assert labels_of(manifest) == wanted
    manifest.save(tmp_path / "kept")
    assert labels_of(reopen_data(tmp_path / name, tmp_path / "kept")) == wanted


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["l.txt", "l.csv", "l.tsv", "l.json"])
def test_lists_of_every_system(tmp_path: Path, name: str, end: str, encoding: str) -> None:
    write_folder(tmp_path, ["ü 1.jpg"])
    text = {"l.txt": f"ü 1.jpg 7{end}", "l.csv": f"ü 1.jpg,7{end}", "l.tsv": f"ü 1.jpg\t7{end}"}
    (tmp_path / name).write_bytes(text.get(name, f'[["ü 1.jpg", 7]]{end}').encode(encoding))
    assert labels_of(open_data(tmp_path / name)) == {"ü 1.jpg": "7"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.txt", "imgs/b/1.jpg 1 2\n", r"l.txt line 1 has several labels"),
        ("l.txt", "imgs/b/1.jpg\0 1\n", r"l.txt line 1 holds a NUL byte"),
        ("l.txt", "imgs/b/1.jpg 1\nimgs/b/1", r"imgs/b/1 \(.*line 2, where the list ends.*still being written"),
        ("l.lst", "0\t1\t2\timgs/b/1.jpg\n", r"l.lst line 1 has several labels"),
        ("l.txt", "imgs\\b\\1.jpg 1\n", r"line 1; write / in place of \\"),
        ("l.txt", "1 imgs/b/1.jpg\n", r"; 'imgs/b/1.jpg' is a file: write the path, then the label"),
        (
            "l.txt",
            "1\timgs/b/1.jpg\n1\timgs/a/0.jpg\n",
            r"l.txt line 2 begins with '1': write the path, then the label",
        ),
        ("l.csv", "image_id,label\nimgs/b/1,0\n", r"; 'imgs/b/1.jpg' is there: write names with their suffixes"),
        ("l.csv", "0,imgs/b/1.jpg\n", r"; 'imgs/b/1.jpg' is a file: write the path, then the label"),
        ("l.csv", "Bild;Art\nimgs/b/1.jpg;1\n", r"if this is a header, name its columns path and label"),
        (
            "l.txt",
            "https://example.org/1.jpg\n",
            r"l.txt line 1 names a URL, 'https://example.org/1.jpg': .*; download the images",
        ),
        ("l.txt", "s3://b/1.tar\n", r"l.txt line 1 names a URL, 's3://b/1.tar': .*in a file whose name ends in .roots"),
        ("l.json", '[["imgs/b/1.jpg", 1]]'.encode("utf-16-le").decode(), r"line 1 holds a NUL byte"),
        ("l.txt", "imgs/b/1.jpg\nimgs//b/1.jpg\n", r"one file twice, as 'imgs/b/1.jpg' in line 1 .*line 2"),
        ("l.txt", "imgs/b/../b/1.jpg\nimgs/b/1.jpg\n", r"one file twice"),
        ("l.txt", "imgs/B/1.jpg\n", r"no usable image|cannot be used"),
        ("l.json", '[{"path": "imgs/b/1.jpg"}, {"pa', r"l.json line 1 is cut short: is the list still being written"),
        ("l.json", '{"images": []}', r"l.json is no list of images: write an array"),
        ("l.jsonl", '{"path": "imgs/b/1.jpg"}\n{"lab', r"l.jsonl line 2 is cut short"),
        ("l.jsonl", '{"label": 1}\n', r"l.jsonl entry 1 has no key path or file"),
        ("l.json", '[{"path": "imgs/b/1.jpg", "label": [1]}]', r"entry 1 has a label that is neither"),
        ("l.parquet", "x", r"l.parquet is not a whole Parquet file .*get a good copy"),
        ("l.h5", "x", r"l.h5 is not a folder: .h5 files are not read"),
        ("l.arrow", "x", r"l.arrow is not a whole Arrow file \(.*; 1 bytes\): get a good copy"),
        (
            "l.rst",
            "x",
            r"l.rst is not a folder: .*DATA is a folder of images or of .tar or .parquet shards, one .tar",
        ),
        ("l.tsv", "", r"l.tsv is not a manifest .*: verify the data again"),
        ("l.tsv", "# sslfast manifest 1\n# root\t/x\n", r"manifest .*l.tsv was cut short .*: verify the data again"),
        ("l.zip", "x", r"l.zip is not a whole zip file"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, name: str, text: str, message: str) -> None:
    write_folder(tmp_path, FILES)
    (tmp_path / name).write_bytes(text.encode())
    with raises(message) as error:
        open_data(tmp_path / name)
    assert "\n" not in str(error.value)


def test_lists_leave_out_folders_of_systems(tmp_path: Path) -> None:
    names = ["a/1.jpg", "a/@eaDir/1.jpg/M.jpg", "#recycle/2.jpg", "b/._1.jpg"]
    root = write_folder(tmp_path / ".snapshot", names)
    for where in ("", f"{root}/"):
        (root / "l.txt").write_text("".join(f"{where}{name}\n" for name in names))
        manifest = open_data(root / "l.txt")
        assert manifest.paths == [f"{where}a/1.jpg"]
        assert manifest.ignored == {"@eaDir/": 1, "#recycle/": 1, "._*": 1}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_files(tmp_path: Path, method: int) -> None:
    files = {"x/b/1.jpg": image(1), "x/a/0.jpg": image(0), "x/a/2.png": image(2, "PNG")}
    path = tmp_path / "d.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("__MACOSX/x/a/._0.jpg", b"x")
        archive.writestr("x/notes.txt", b"x")
    manifest = open_data(path)
    assert labels_of(manifest) == {"x/a/0.jpg": "a", "x/a/2.png": "a", "x/b/1.jpg": "b"}
    assert [manifest.source.read(row) for row in range(3)] == [files[name] for name in sorted(files)]
    assert manifest.ignored == {"__MACOSX/": 1, ".txt": 1}
    manifest.save(tmp_path / "kept")
    reopen_data(path, tmp_path / "kept").check(contents=True)
    data = bytearray(path.read_bytes())
    data[int(manifest.source.offsets[0]) + 60] ^= 255  # type: ignore[attr-defined]
    path.write_bytes(data)
    with raises("cannot be used: x/a/0.jpg"):
        open_data(path)
    path.write_bytes(data[:-30])
    with raises(r"d.zip is not a whole zip file .*write the file again, or get a good copy"):
        open_data(path)


def test_zip_files_of_programs_that_write_backslashes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("x\\", b"")
        for k, name in enumerate(["x\\a\\0.jpg", "x\\b\\1.jpg"]):
            archive.writestr(name, image(k))
    manifest = open_data(tmp_path / "d.zip")
    assert labels_of(manifest) == {"x/a/0.jpg": "a", "x/b/1.jpg": "b"}
    manifest.save(tmp_path / "kept")
    assert reopen_data(tmp_path / "d.zip", tmp_path / "kept").source.read(1) == image(1)


def test_a_run_does_not_resume_with_another_kind_of_data(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "d", ["a/1.jpg"])
    (root / "l.txt").write_text("a/1.jpg a\n")
    open_data(root / "l.txt").save(tmp_path / "kept")
    with raises(r"started with a list \(.txt.*, and .* is another kind of data"):
        reopen_data(root, tmp_path / "kept")


def test_files_that_vanished_are_bad_images_under_skip_alone(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "d", ["a/1.jpg", "a/2.jpg", "b/3.jpg"])
    manifest = open_data(root)
    manifest.save(tmp_path / "kept")
    (root / "a" / "1.jpg").unlink()
    with raises(r"1 missing: a/1.jpg \(unreadable: No such file"):
        reopen_data(root, tmp_path / "kept")
    manifest.save(tmp_path / "m.tsv")
    with raises(r"1 missing: a/1.jpg"):
        reopen_data(tmp_path / "m.tsv", tmp_path / "kept")
    for data in (root, tmp_path / "m.tsv"):
        assert reopen_data(data, tmp_path / "kept", on_bad_image="skip").digest() == manifest.digest()
    (root / "a" / "2.jpg").write_bytes(b"shorter")
    with raises(r"1 changed: a/2.jpg"):
        reopen_data(root, tmp_path / "kept", on_bad_image="skip")
    (root / "a" / "2.jpg").unlink()
    (root / "b" / "3.jpg").unlink()
    with raises(r"3 missing: "):
        reopen_data(root, tmp_path / "kept", on_bad_image="skip")


def flat(root: Path) -> Path:
    write_folder(root / "train", [f"{word}/{k}.jpg" for word in ("n1", "n2", "n3") for k in range(2)])
    write_folder(root / "val", [f"ILSVRC2012_val_{k:08}.JPEG" for k in range(1, 7)])
    return root


@pytest.mark.parametrize(
    ("file", "text", "names"),
    [
        ("ground_truth.txt", "3\n1\n2\n3\n1\n2\n", "sorted"),
        ("ground_truth.txt", "n3\nn1\nn2\nn3\nn1\nn2\n", None),
        ("val.txt", "".join(f"ILSVRC2012_val_{k:08}.JPEG {(k + 1) % 3}\n" for k in range(6, 0, -1)), "sorted"),
        ("val.txt", "".join(f"ILSVRC2012_val_{k:08}.JPEG {(k + 1) % 3}\n" for k in range(1, 7)), "words.txt"),
        (
            "LOC_val_solution.csv",
            "ImageId,PredictionString\n"
            + "".join(f"ILSVRC2012_val_{k:08},n{(k + 1) % 3 + 1} 85 1 499 272 \n" for k in range(1, 7)),
            None,
        ),
    ],
)
def test_a_flat_validation_folder_gets_its_labels(tmp_path: Path, file: str, text: str, names: str | None) -> None:
    root = flat(tmp_path)
    (root / file).write_text(text)
    (root / "words.txt").write_text("n1 tench\nn2 goldfish\nn3 shark\n")
    with raises(r"val has 6 images outside class folders .*run `sslfast data labels .*/val LABELS --train .*val.csv`"):
        load_manifests(root)
    options = ["--train", str(root / "train"), "-o", str(root / "val.csv")]
    options += [] if names is None else ["--names", names if names == "sorted" else str(root / names)]
    assert cli.main(["data", "labels", str(root / "val"), str(root / file), *options]) == 0
    train, val = load_manifests(root)
    assert train.classes == val.classes == ["n1", "n2", "n3"]
    assert val.labels.tolist() == [2, 0, 1, 2, 0, 1]


def write_meta(path: Path, words: list[str]) -> None:
    """As the devkit's: an array of structs, numbers that are not in sorted order, and synsets above the leaves."""
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_train_images", "O")]
    synsets = np.empty((len(words) + 1, 1), dtype=fields)
    for number, word in enumerate([*words, "n0above"], 1):
        synsets[number - 1, 0] = (np.array([[number]], np.uint16), word, "a word", np.array([[732]], np.uint16))
    savemat(path, {"synsets": synsets})


@pytest.mark.parametrize("kind", ["folder", "tar", "folder of a tar", "zip"])
def test_the_devkit_labels_the_validation_set_as_downloaded(tmp_path: Path, kind: str) -> None:
    root = flat(tmp_path)
    files = sorted((root / "val").iterdir())
    data, output = root / "val", root / "val.tsv"
    if kind == "zip":
        data = root / "ILSVRC2012_img_val.zip"
        with zipfile.ZipFile(data, "w") as archive:
            for file in files:
                archive.write(file, file.name)
    elif kind != "folder":
        data = root / "ILSVRC2012_img_val.tar"
        with tarfile.open(data, "w") as tar:
            for file in reversed(files):  # the downloaded file is in no order
                tar.add(file, file.name)
    if kind == "folder":
        output = root / "val.csv"
    else:
        shutil.rmtree(root / "val")
    if kind == "folder of a tar":
        (root / "val").mkdir()
        data.rename(root / "val" / data.name)
        data = root / "val"
        with raises(r"val has 6 images outside class folders .*run `sslfast data labels .*/val LABELS .*/val.tsv`"):
            load_manifests(root)
    (root / "gt.txt").write_text("2\n3\n1\n2\n3\n1\n")
    write_meta(root / "meta.mat", ["n2", "n3", "n1"])
    options = ["--train", str(root / "train"), "--names", str(root / "meta.mat")]
    wrong = root / ("val.tsv" if kind == "folder" else "val.csv")
    with raises(rf"{wrong} will be a .*: name it {output}"):
        label_images(data, root / "gt.txt", wrong)
    assert cli.main(["data", "labels", str(data), str(root / "gt.txt"), *options, "-o", str(output)]) == 0
    train, val = load_manifests(root)
    assert train.classes == val.classes == ["n1", "n2", "n3"]
    assert val.labels.tolist() == [2, 0, 1, 2, 0, 1]


@pytest.mark.parametrize("kind", ["folder", "tar.gz"])
def test_imagenet_as_downloaded_is_evaluated(tmp_path: Path, kind: str) -> None:
    root, words = flat(tmp_path / "made"), ["n00000002", "n00000003", "n00000001"]
    down = tmp_path / "down"
    devkit = down / "ILSVRC2012_devkit_t12"
    (devkit / "data").mkdir(parents=True)
    (devkit / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n3\n1\n2\n3\n1\n")
    write_meta(devkit / "data" / "meta.mat", words)
    with tarfile.open(down / "ILSVRC2012_img_train.tar", "w") as outer:
        for folder in sorted((root / "train").iterdir()):
            word = f"n{int(folder.name[1:]):08}"
            with tarfile.open(tmp_path / f"{word}.tar", "w") as inner:
                for file in folder.iterdir():
                    inner.add(file, f"{word}_{file.name}")
            outer.add(tmp_path / f"{word}.tar", f"{word}.tar")
    with tarfile.open(down / "ILSVRC2012_img_val.tar", "w") as tar:
        for file in (root / "val").iterdir():
            tar.add(file, file.name)
    labels = devkit
    if kind == "tar.gz":
        labels = down / "ILSVRC2012_devkit_t12.tar.gz"
        with tarfile.open(labels, "w:gz") as tar:
            tar.add(devkit, devkit.name)
        shutil.rmtree(devkit)
    with raises(r"ILSVRC2012_img_val.tar has 6 images outside class folders .*run `sslfast data labels .*/val.tsv`"):
        load_manifests(down)
    options = ["--train", str(down / "ILSVRC2012_img_train.tar"), "-o", str(down / "val.tsv")]
    assert cli.main(["data", "labels", str(down / "ILSVRC2012_img_val.tar"), str(labels), *options]) == 0
    train, val = load_manifests(down)
    assert train.classes == val.classes == sorted(words)
    assert val.labels.tolist() == [2, 0, 1, 2, 0, 1]
    assert train.source.read(0) == (root / "train" / "n1" / "0.jpg").read_bytes()


def test_devkits_that_are_none(tmp_path: Path) -> None:
    root = flat(tmp_path)
    for name, why in (
        ("val", r"val holds no ILSVRC2012_validation_ground_truth.txt: name ImageNet's devkit"),
        ("x.tar.gz", r"x.tar.gz cannot be read \(ReadError: .*\): get a good copy of ImageNet's devkit"),
        ("y.tar", r"y.tar holds no data/ILSVRC2012_validation_ground_truth.txt: name ImageNet's devkit"),
    ):
        (root / "x.tar.gz").write_bytes(b"x" * 900)
        with tarfile.open(root / "y.tar", "w"):
            pass
        with raises(why):
            label_images(root / "val", root / name, root / "val.csv")


@pytest.mark.parametrize(
    "content", [None, b"", b"x" * 500, b"MATLAB 7.3 MAT-file" + bytes(105) + b"\0\2IM" + bytes(99)]
)
def test_meta_mat_files_that_are_none(tmp_path: Path, content: bytes | None) -> None:
    root = flat(tmp_path)
    (root / "gt.txt").write_text("2\n3\n1\n2\n3\n1\n")
    if content is not None:
        (root / "meta.mat").write_bytes(content)
    with raises(
        "meta.mat (does not exist: give|is not the meta.mat of ImageNet's devkit .*: get a good copy)"
    ) as error:
        label_images(root / "val", root / "gt.txt", root / "val.csv", names=str(root / "meta.mat"))
    assert "\n" not in str(error.value)
    savemat(root / "meta.mat", {"other": np.zeros(3)})
    with raises("is not the meta.mat"):
        label_images(root / "val", root / "gt.txt", root / "val.csv", names=str(root / "meta.mat"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3\n1\n2\n3\n1\n2\n", r"are numbers and the classes are names \(n1, ...\): add --names META.mat"),
        ("3\n1\n", "has 2 labels for 6 images"),
        ("n3\nn1\nn2\nn3\nn1\nn4\n", r"1 labels of .* are no class of .*'n4'; its classes are 'n1', 'n2', 'n3'"),
        ("N3\nn1\nn2\nn3\nn1\nn2\n", "'n3' and 'N3' differ in upper and lower case"),
        ("x.jpg n1\n", "has no label of 6 of 6 images"),
        ("", "is empty"),
    ],
)
def test_labels_that_do_not_fit(tmp_path: Path, text: str, message: str) -> None:
    root = flat(tmp_path)
    (root / "gt.txt").write_text(text)
    with raises(message):
        label_images(root / "val", root / "gt.txt", root / "val.csv", train=root / "train")
    assert not (root / "val.csv").exists()


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        (unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café"), "the Unicode form"),
        ("Cat", "cat", "upper and lower case"),
        ("cat ", "cat", "spaces at the end"),
        ("ca\u200bt", "cat", "spaces or invisible characters"),
        ("a\u00a0cat", "a cat", "spaces or invisible characters"),
    ],
)
def test_names_that_look_the_same_are_told_apart(tmp_path: Path, one: str, other: str, why: str) -> None:
    assert f"{one!a} and {other!a} differ in {why}" in alike([one], [other])
    for split, name in (("train", one), ("val", other)):
        write_folder(tmp_path / "d" / split, [f"{name}/1.jpg", f"b/{split}.jpg"])
    with raises("have names that look the same and are not: .*differ in " + why):
        load_manifests(tmp_path / "d")
    root = write_folder(tmp_path / "one", [f"{one}/1.jpg", f"{other}/2.jpg"])
    assert why in Manifest.scan(root).class_remarks()[0]
    assert alike(["a"], ["a"]) == alike_among(["a", "b"]) == ""


def test_a_list_in_another_encoding_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, ["ü.jpg"])
    (tmp_path / "l.txt").write_bytes("ü.jpg\n".encode("latin-1"))
    with raises("its name is not UTF-8: save the list as UTF-8"):
        open_data(tmp_path / "l.txt")
    (tmp_path / "both.txt").write_text(f"ü.jpg\n{tmp_path}/ü.jpg\n")
    with raises("one file twice"):
        open_data(tmp_path / "both.txt")


def test_a_listed_file_in_another_unicode_form_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, [unicodedata.normalize("NFD", "é.jpg")])
    (tmp_path / "l.txt").write_text(unicodedata.normalize("NFC", "é.jpg") + "\n")
    with raises("a file with a name that looks the same is there: .*Unicode form"):
        open_data(tmp_path / "l.txt")


def test_names_that_are_not_text_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.makedirs(folder + b"/a")
    with open(folder + b"/a/\xff.jpg", "wb") as file:
        file.write(image(0))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "verify", os.fsdecode(folder), "-o", os.fsdecode(b"m\xe9.tsv")]) == 0
    assert os.path.exists(b"m\xe9.tsv")


WRITTEN = {
    ".csv": "path,label\n{0}.png,{1}\n",
    ".tsv": "path\tlabel\n{0}.png\t{1}\n",
    ".txt": "{0}.png {1}\n",
    ".jsonl": '{{"path": "{0}.png", "label": "{1}"}}\n',
    ".json": '[{{"path": "{0}.png", "label": "{1}"}}]\n',
}


@pytest.mark.parametrize("suffix", WRITTEN)
@pytest.mark.parametrize(
    ("written", "label"),
    [("1.0", "1"), ("1.", "1"), ("01", "01"), ("1", "1"), ("1.5", "1.5"), ("-1.00", "-1"), ("x.0", "x.0")],
)
def test_a_label_is_the_same_in_every_kind_of_list(tmp_path: Path, suffix: str, written: str, label: str) -> None:
    """A whole number that a table with gaps wrote as 1.0 is 1; other text is a name as it stands, 01 as well."""
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    path = tmp_path / f"list{suffix}"
    path.write_text(WRITTEN[suffix].format(0, written))
    assert Manifest.scan(path).classes == [label]


def test_lists_of_earlier_versions_are_unchanged_data(tmp_path: Path) -> None:
    """They kept 1.0 of a table as the name 1.0; a run on such a list resumes."""
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "list.csv").write_text("path,label\n0.png,1.0\n")
    manifest = Manifest.scan(tmp_path / "list.csv")
    manifest.classes[0] = "1.0"
    manifest.check()
    manifest.classes[0] = "2"
    with pytest.raises(ValueError, match="label 2 -> 1"):
        manifest.check()


def test_leading_zeros_are_named_where_classes_differ(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    (tmp_path / "list.csv").write_text("path,label\n0.png,1\n1.png,01\n")
    (line,) = Manifest.scan(tmp_path / "list.csv").class_remarks()
    assert "differ in leading zeros" in line
