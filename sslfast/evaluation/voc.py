"""Pascal VOC folders: image labels, boxes, and a manifest of the images of a split.

``Annotations/<id>.xml`` · ``ImageSets/Main/<class>_<split>.txt`` · ``JPEGImages/<id>.jpg``, as the devkits of 2007 to
2012 have them (Everingham et al., IJCV 2010).
"""

import math
import os
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sslfast.data import HASHED_BYTES, FolderSource, Manifest, content_hash
from sslfast.evaluation.folders import read_list
from sslfast.files import open_regular, reason_of

PARTS = ("Annotations", "ImageSets/Main", "JPEGImages")
RESTORE = "restore the files of the devkit"
_MAX_ANNOTATION = 1 << 24


@dataclass(frozen=True, kw_only=True)
class VOCObject:
    """An object in an image."""

    name: str
    """Class."""
    box: tuple[float, float, float, float]
    """xmin, ymin, xmax, ymax as the file has them: pixels counted from 1, the last one inside."""
    difficult: bool
    """Marked as hard to recognise; evaluations ignore it."""


@dataclass(kw_only=True)
class VOCSplit:
    """Which image shows which class."""

    root: Path
    """Folder with :data:`PARTS`."""
    name: str
    """For example trainval."""
    ids: list[str]
    """Image names without suffix, in the order of the lists."""
    classes: list[str]
    """Sorted."""
    labels: NDArray[np.int8]
    """``[N, C]``: 1 the image shows the class, -1 it does not, 0 only objects marked difficult."""


def voc_root(folder: Path | str) -> Path:
    """The folder that holds :data:`PARTS`: the one named, or the only one inside it (``VOCdevkit/VOC2007``).

    Raises:
        ValueError: there is none, or there are several.
    """
    folder = Path(folder)
    if _is_voc(folder):
        return folder
    inside = sorted(path for path in folder.iterdir() if _is_voc(path)) if folder.is_dir() else []
    if len(inside) > 1:
        raise ValueError(f"{folder} holds several sets ({', '.join(path.name for path in inside)}); name one of them")
    if not inside:
        raise ValueError(f"{folder} is no VOC folder: it needs {', '.join(PARTS)}, itself or in one folder inside")
    return inside[0]


def read_split(folder: Path | str, name: str) -> VOCSplit:
    """Labels of a split from ``ImageSets/Main/<class>_<name>.txt``, one file per class.

    Raises:
        ValueError: no such files, a line that is no ``<id> -1|0|1``, or files that list different images.
    """
    root = voc_root(folder)
    lists = sorted((root / "ImageSets" / "Main").glob(f"*_{name}.txt"))
    if not lists:
        splits = sorted({path.stem.rpartition("_")[2] for path in (root / "ImageSets" / "Main").glob("*_*.txt")})
        raise ValueError(
            f"{root}/ImageSets/Main has no <class>_{name}.txt; there are lists of {', '.join(splits) or 'nothing'}"
        )
    ids: list[str] = []
    columns = []
    for path in lists:
        found = [
            _label_line(path, number, line)
            for number, line in enumerate(read_list(path, remedy=RESTORE).splitlines(), 1)
            if line
        ]
        names = [image for image, _ in found]
        if ids and names != ids:
            raise ValueError(f"{path} and {lists[0]} list different images; {RESTORE}")
        ids = names
        columns.append([label for _, label in found])
    if not ids:
        raise ValueError(f"{lists[0]} is empty; {RESTORE}")
    labels = np.array(columns, dtype=np.int8).T.copy()
    classes = [path.stem.removesuffix(f"_{name}") for path in lists]
    return VOCSplit(root=root, name=name, ids=ids, classes=classes, labels=labels)


def split_ids(folder: Path | str, name: str) -> list[str]:
    """Image names of a split from ``ImageSets/Main/<name>.txt``; ValueError where there is no such file."""
    path = voc_root(folder) / "ImageSets" / "Main" / f"{name}.txt"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name a split that the devkit has, for example trainval or test")
    ids = read_list(path, remedy=RESTORE).split()
    if not ids:
        raise ValueError(f"{path} is empty; {RESTORE}")
    return ids


def voc_manifest(root: Path, ids: list[str]) -> Manifest:
    """The images ``JPEGImages/<id>.jpg`` in the order of ``ids``, without labels.

    Raises:
        ValueError: an image is missing.
    """
    images = root / "JPEGImages"
    paths = [f"{name}.jpg" for name in ids]
    sizes, hashes = [], []
    for path in paths:
        try:
            with open_regular(images / path) as file:
                hashes.append(content_hash(file.read(HASHED_BYTES)))
                sizes.append(os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise ValueError(f"{images / path} cannot be read ({reason_of(error)}); restore the images") from None
    none = np.full(len(paths), -1, dtype=np.int64)
    sizes_array = np.array(sizes, dtype=np.int64)
    source = FolderSource(root=images, paths=paths)
    return Manifest(source=source, bytes=sizes_array, sha1=hashes, labels=none, classes=[])


def annotation_path(root: Path, image: str) -> Path:
    """File of the boxes of an image."""
    return root / "Annotations" / f"{image}.xml"


def read_annotation(path: Path | str) -> list[VOCObject]:
    """The objects of one image, in the order of the file; parts of objects (heads, hands) are left out.

    Raises:
        ValueError: the file cannot be read, is no annotation, or an object lacks its name or box.
    """
    objects = []
    for element in _annotation(Path(path)).findall("object"):
        name = element.findtext("name")
        corners = [element.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
        try:
            xmin, ymin, xmax, ymax = (float(corner or "nothing") for corner in corners)
        except ValueError:
            raise ValueError(f"{path} has an object {name!r} without a box of four numbers; restore it") from None
        if not name or not (-math.inf < xmin <= xmax < math.inf and -math.inf < ymin <= ymax < math.inf):
            raise ValueError(f"{path} has an object {name!r} with the box {(xmin, ymin, xmax, ymax)}; restore it")
        difficult = (element.findtext("difficult") or "0").strip() == "1"
        objects.append(VOCObject(name=name, box=(xmin, ymin, xmax, ymax), difficult=difficult))
    return objects


def _annotation(path: Path) -> ElementTree.Element:
    """The root element. Files that are huge or declare entities, which a few bytes can blow up, are not parsed."""
    try:
        with open_regular(path) as file:
            data = file.read(_MAX_ANNOTATION + 1)
        if len(data) > _MAX_ANNOTATION:
            raise ValueError(f"it has more than {_MAX_ANNOTATION:,} bytes")
        if b"<!ENTITY" in data.replace(b"\0", b""):  # UTF-16 has a zero in every character
            raise ValueError("it declares entities")
        root = ElementTree.fromstring(data)
        if root.tag != "annotation":
            raise ValueError(f"its root is {root.tag!r:.60}, not annotation")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({reason_of(error)}); restore it") from None
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise ValueError(f"{path} is no annotation of VOC's format ({error}); restore it") from None
    return root


def _is_voc(folder: Path) -> bool:
    return all((folder / part).is_dir() for part in PARTS)


def _label_line(path: Path, number: int, line: str) -> tuple[str, int]:
    words = line.split()
    if len(words) != 2 or words[1] not in ("-1", "0", "1"):
        raise ValueError(f"{path} line {number} must be an image and -1, 0 or 1, got {line!r}; restore the file")
    return words[0], int(words[1])
