from pathlib import Path

import pytest

from sslfast.evaluation.voc import annotation_path, read_annotation, read_split, split_ids, voc_manifest, voc_root
from tests.evaluation.voc_data import write_voc


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
        ("<annotation>", "cannot be read as an annotation"),
        ("<annotation><object><name>cat</name></object></annotation>", "'cat' without a box of four numbers"),
        (
            "<a><object><name>cat</name><bndbox><xmin>9</xmin><ymin>1</ymin><xmax>3</xmax><ymax>4</ymax></bndbox>"
            "</object></a>",
            r"'cat' with the box \(9.0, 1.0, 3.0, 4.0\)",
        ),
    ],
)
def test_bad_annotation(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "a.xml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_annotation(path)


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
