import os
from pathlib import Path

import pytest

from sslfast.evaluation.voc import annotation_path, read_annotation, read_split, split_ids, voc_manifest, voc_root
from tests.evaluation.voc_data import write_voc

BOX = (
    "<annotation><object><name>cat</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
    "</object></annotation>"
)
BOMB = '<!ENTITY a "ha">' + "".join(f'<!ENTITY {b} "{f"&{a};" * 9}">' for a, b in ("ab", "bc"))


def test_labels_and_annotations_agree(tmp_path: Path) -> None:
    voc = write_voc(tmp_path, trainval=12, test=7)
    assert voc_root(tmp_path) == voc_root(voc) == voc
    split = read_split(tmp_path, "trainval")
    assert split.classes == ["bird", "car", "dog"]
    assert split.labels.shape == (12, 3)
    assert split.ids == split_ids(voc, "trainval") == [f"{number:06d}" for number in range(1, 13)]
    assert set(split.labels.flatten().tolist()) == {-1, 0, 1}
    for row, image in enumerate(split.ids):
        objects = read_annotation(annotation_path(voc, image))
        for column, name in enumerate(split.classes):
            seen = [one.difficult for one in objects if one.name == name]
            assert split.labels[row, column] == (-1 if not seen else 0 if all(seen) else 1)


def test_annotation(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    box = "<bndbox><xmax>98.5</xmax><ymax>70</ymax><xmin>1</xmin><ymin>2</ymin></bndbox>"
    path.write_text(
        f"<annotation><object><name>cat</name>{box}<part><name>head</name>{box}</part></object>"
        f"<object><name>sofa</name><difficult>1</difficult>{box}</object></annotation>"
    )
    cat, sofa = read_annotation(path)
    assert (cat.name, cat.box, cat.difficult) == ("cat", (1.0, 2.0, 98.5, 70.0), False)
    assert (sofa.name, sofa.difficult) == ("sofa", True)
    path.write_text("<annotation></annotation>")
    assert read_annotation(path) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<annotation>", r"no annotation of VOC's format \(no element found"),
        ("<annotation><object><name>cat</name></object></annotation>", "'cat' without a box of four numbers"),
        (BOX.format(9, 1, 3, 4), r"'cat' with the box \(9.0, 1.0, 3.0, 4.0\)"),
        (BOX.format(1, 1, "inf", 4), r"'cat' with the box \(1.0, 1.0, inf, 4.0\)"),
        (BOX.format(1, "nan", 3, 4), r"'cat' with the box"),
        ("<html><body/></html>", "its root is 'html', not annotation"),
        (f"<!DOCTYPE a [{BOMB}]><annotation>&c;</annotation>", "it declares entities"),
        (f"<!DOCTYPE a [{BOMB}]><annotation>&c;</annotation>".encode("utf-16"), "it declares entities"),
        (b"<annotation>\xff\xfe</annotation>", "not well-formed"),
        ("<?xml version='1.0' encoding='nonsense'?><annotation/>", "unknown encoding"),
        ("<annotation>" + " " * (1 << 24), "it has more than 16,777,216 bytes"),
        ("", "no element found"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) or len(value) > 40 else value,
)
def test_bad_annotation(tmp_path: Path, text: str | bytes, words: str) -> None:
    path = tmp_path / "a.xml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=words) as caught:
        read_annotation(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith("restore it")


@pytest.mark.parametrize("kind", ["pipe", "folder", "nothing"])
def test_what_is_no_file_is_never_waited_for(tmp_path: Path, kind: str) -> None:
    voc = write_voc(tmp_path, trainval=2, test=2)
    image, annotation = voc / "JPEGImages" / "000001.jpg", annotation_path(voc, "000001")
    for path in (image, annotation):
        path.unlink()
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
    with pytest.raises(ValueError, match=r"000001\.xml cannot be read .*; restore it"):
        read_annotation(annotation)
    with pytest.raises(ValueError, match=r"000001\.jpg cannot be read .*; restore the images"):
        voc_manifest(voc, ["000001"])


def test_a_list_that_is_not_text(tmp_path: Path) -> None:
    voc = write_voc(tmp_path, trainval=2, test=2)
    lists = voc / "ImageSets" / "Main"
    (lists / "trainval.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"trainval\.txt is empty; restore the files of the devkit"):
        split_ids(voc, "trainval")
    (lists / "bird_trainval.txt").write_bytes(b"\xff\xfe\x00 junk line\n")
    with pytest.raises(ValueError, match=r"bird_trainval\.txt line 1 must be an image and -1, 0 or 1"):
        read_split(voc, "trainval")


def test_manifest(tmp_path: Path) -> None:
    voc = write_voc(tmp_path, trainval=5, test=4)
    ids = split_ids(voc, "test")
    manifest = voc_manifest(voc, ids)
    assert manifest.path(2) == voc / "JPEGImages" / f"{ids[2]}.jpg"
    assert manifest.bytes[2] == manifest.path(2).stat().st_size
    assert manifest.digest() != voc_manifest(voc, ids[::-1]).digest()
    manifest.path(2).unlink()
    with pytest.raises(ValueError, match=rf"{ids[2]}.jpg cannot be read \(No such file.*restore the images"):
        voc_manifest(voc, ids)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no VOC folder: it needs Annotations, ImageSets/Main, JPEGImages"):
        voc_root(tmp_path / "none")
    voc = write_voc(tmp_path, trainval=5, test=4)
    with pytest.raises(ValueError, match=r"no <class>_val.txt; there are lists of test, trainval"):
        read_split(voc, "val")
    with pytest.raises(ValueError, match=r"val.txt does not exist; name a split that the devkit has"):
        split_ids(voc, "val")
    lists = voc / "ImageSets" / "Main"
    (lists / "car_test.txt").write_text("000006 1\n000007 2\n")
    with pytest.raises(ValueError, match=r"car_test.txt line 2 must be an image and -1, 0 or 1, got '000007 2'"):
        read_split(voc, "test")
    (lists / "car_test.txt").write_text("000006 1\n")
    with pytest.raises(ValueError, match=r"car_test.txt and .*bird_test.txt list different images"):
        read_split(voc, "test")
    voc.rename(tmp_path / "VOC2012")
    write_voc(tmp_path, trainval=1, test=1)
    with pytest.raises(ValueError, match=r"holds several sets \(VOC2007, VOC2012\); name one of them"):
        voc_root(tmp_path)
