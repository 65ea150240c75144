"""``sslfast data labels``: the images of a flat folder or archive with the labels that another file gives them."""

import csv
import tarfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from sslfast.data.csv_list import find_columns, open_list
from sslfast.data.listing import list_files
from sslfast.data.manifest import Manifest
from sslfast.data.members import stem_of
from sslfast.data.spelling import alike
from sslfast.data.text_list import TextListSource
from sslfast.files import OUTPUT, write_file
from sslfast.text import csv_lines

SORTED = "sorted"
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


def label_images(
    images: Path, labels: Path, output: Path, *, train: Path | None = None, names: str | None = None
) -> int:
    """Write the labels of images: of a folder a CSV list of ``path,label``, of other data (an archive, a folder of
    them) a manifest; returns how many.

    Args:
        images: folder, at any depth, or data of another kind; folders are no classes here.
        labels: one label a line in the order of the sorted file names (the devkit's
            ``ILSVRC2012_validation_ground_truth.txt``), ``name label`` lines, a CSV file with a header (of Kaggle's
            ``LOC_val_solution.csv`` the first word of each prediction is the label). Or ImageNet's devkit itself, as
            downloaded (``ILSVRC2012_devkit_t12.tar.gz``) or unpacked, which also says what its numbers mean.
        output: the list (.csv), whose paths are relative to its folder where they can be, or the manifest (.tsv).
        train: data set whose classes the labels must be.
        names: what numbers mean: the devkit's ``meta.mat``, a text file whose line k names class k (of the lowest
            number the first one), or ``sorted``: the k-th class of ``train`` in sorted order.

    Raises:
        ValueError: an image without a label or the reverse, numbers without ``names``, or labels that are no classes.
    """
    if not images.exists():
        raise ValueError(f"{images} does not exist: name a folder of images, or one .tar, .zip or .parquet file")
    listing = list_files(images) if images.is_dir() else None
    if listing is not None and listing.unreadable:
        raise ValueError(f"{images}/{listing.unreadable[0][0]}: {listing.unreadable[0][1]}")
    is_folder = listing is not None and bool(listing.paths)
    suffix = ".csv" if is_folder else ".tsv"
    if output.suffix.lower() != suffix:
        what = "a list, of a folder of images" if is_folder else "a manifest, of data in other files than images"
        raise ValueError(f"{output} will be {what}: name it {output.with_suffix(suffix)}")
    manifest = None if is_folder else Manifest.scan(images, on_bad_image="skip")
    if manifest is None:
        paths = listing.paths if listing is not None else []
    else:  # also the bad images have labels
        paths = sorted([*manifest.paths, *(path for path, _ in manifest.excluded)])
    with _devkit_files(labels) as (truth, meta):
        given = _labels_of(paths, truth)
        numbers = _devkit(meta) if meta is not None and names is None else None
    classes = None if train is None else Manifest.scan(train, on_bad_image="skip").classes
    given = _named(given, labels, classes, names, numbers)
    if classes is not None and (unknown := sorted(set(given.values()) - set(classes))):
        raise ValueError(
            f"{len(unknown)} labels of {labels} are no class of {train}: {', '.join(map(ascii, unknown[:5]))}; its "
            f"classes are {', '.join(map(ascii, classes[:5]))}{', ...' if len(classes) > 5 else ''}"
            + (f"; names that look the same: {same}" if (same := alike(classes, unknown)) else "")
        )
    if manifest is not None:
        manifest.labelled([given[path] for path in manifest.paths]).save(output)
        return len(manifest)
    folder, root = output.absolute().parent.resolve(), images.resolve()
    start = root.relative_to(folder) if root.is_relative_to(folder) else root
    rows = [["path", "label"], *([(start / path).as_posix(), given[path]] for path in paths)]
    write_file(output, "".join(csv_lines(rows)), remedy=OUTPUT)
    return len(paths)


@contextmanager
def _devkit_files(labels: Path) -> Iterator[tuple[Path, Path | None]]:
    """The devkit's labels and ``meta.mat`` where ``labels`` is its folder or archive; else ``labels`` and None."""
    if labels.is_dir():
        places = [labels / "data", labels]
        found = next((place for place in places if (place / _TRUTH).is_file()), None)
        if found is None:
            raise ValueError(f"{labels} holds no {_TRUTH}: name ImageNet's devkit, or the file of labels")
        yield found / _TRUTH, found / _META
        return
    if not labels.name.lower().endswith((".tar.gz", ".tgz", ".tar")):
        yield labels, None
        return
    with TemporaryDirectory(prefix="sslfast-") as folder:
        try:
            with tarfile.open(labels) as archive:
                for name in (_TRUTH, _META):
                    member = next((one for one in archive if one.name.endswith(f"data/{name}")), None)
                    content = None if member is None else archive.extractfile(member)
                    if content is None:
                        raise ValueError(f"{labels} holds no data/{name}: name ImageNet's devkit")
                    (Path(folder) / name).write_bytes(content.read())
        except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{labels} cannot be read ({why:.160}): get a good copy of ImageNet's devkit") from None
        yield Path(folder) / _TRUTH, Path(folder) / _META


def _labels_of(paths: Sequence[str], labels: Path) -> dict[str, str]:
    """Label of every path."""
    rows = _rows(labels)
    if all(name is None for name, _ in rows):
        if len(rows) != len(paths):
            raise ValueError(f"{labels} has {len(rows)} labels for {len(paths)} images: give the file of these images")
        return {path: label for path, (_, label) in zip(paths, rows, strict=True)}
    by_name: dict[str, str] = {}
    for name, label in rows:
        for key in (name or "", stem_of(name or "")):
            if by_name.setdefault(key, label) != label:
                raise ValueError(f"{labels} has two labels of {key!r}: remove one of them")
    found = {path: _first(by_name, path) for path in paths}
    missing = [path for path, label in found.items() if label is None]
    if missing:
        raise ValueError(f"{labels} has no label of {len(missing)} of {len(paths)} images ({missing[0]!r}, ...)")
    return {path: label for path, label in found.items() if label is not None}


def _first(by_name: Mapping[str, str], path: str) -> str | None:
    base = path.rpartition("/")[2]
    return next((by_name[key] for key in (path, base, stem_of(path)) if key in by_name), None)


def _rows(labels: Path) -> list[tuple[str | None, str]]:
    """(name or None, label) of every line."""
    try:
        with open_list(labels) as file:
            lines = [line for line in file.read().splitlines() if line.strip()]
    except OSError as error:
        raise ValueError(f"{labels} cannot be read ({error.strerror or error}): name the file of labels") from None
    if not lines:
        raise ValueError(f"{labels} is empty: name the file of labels")
    if all(len(line.split()) == 1 and "," not in line and "\t" not in line for line in lines):
        return [(None, line.strip()) for line in lines]
    if labels.suffix.lower() == ".csv":
        table = list(csv.reader(lines))
        header = find_columns(table[0])
        if header is not None:
            table, (at, label_at) = table[1:], header
            label_at = 1 if label_at is None else label_at
        else:
            at, label_at = 0, 1
        if any(len(row) <= max(at, label_at) or not row[label_at].split() for row in table):
            raise ValueError(f"{labels} has lines without a name and a label: write name,label")
        # Kaggle's predictions: the class, then boxes.
        return [(row[at], row[label_at].split()[0] if " " in row[label_at] else row[label_at]) for row in table]
    entries = list(TextListSource.lines(labels))
    if any(entry.label is None for entry in entries):
        raise ValueError(f"{labels} has lines without a label: write one label a line, or name and label")
    return [(entry.path, entry.label or "") for entry in entries]


def _named(
    given: dict[str, str],
    labels: Path,
    classes: Sequence[str] | None,
    names: str | None,
    known: dict[int, str] | None = None,
) -> dict[str, str]:
    """Labels as names of classes."""
    if not all(label.isdecimal() for label in given.values()):
        return given
    numbers = {path: int(label) for path, label in given.items()}
    if names is None and known is None:
        if classes is None or set(map(str, numbers.values())) <= set(classes):
            return {path: str(number) for path, number in numbers.items()}
        raise ValueError(
            f"the labels of {labels} are numbers and the classes are names ({classes[0]}, ...): add --names META.mat "
            "(of ImageNet's devkit, whose numbers are not in sorted order), --names FILE with the name of class k in "
            f"line k, or --names {SORTED} if the numbers count the sorted classes"
        )
    meaning = known if names is None else _meaning(names, classes, set(numbers.values()))
    assert meaning is not None
    unknown = sorted(set(numbers.values()) - set(meaning))
    if unknown:
        raise ValueError(
            f"{names or labels} has no name of number {unknown[0]} of {labels}: it names {len(meaning)} classes"
        )
    return {path: meaning[number] for path, number in numbers.items()}


def _meaning(names: str, classes: Sequence[str] | None, numbers: Collection[int]) -> dict[int, str]:
    if names.lower().endswith(".mat"):
        return _devkit(Path(names))
    if names == SORTED:
        if classes is None:
            raise ValueError(f"--names {SORTED} needs the classes: add --train DATA")
        ordered = list(classes)
    else:
        try:
            with open_list(Path(names)) as file:
                ordered = [line.split()[0] for line in file if line.strip()]
        except OSError as error:
            raise ValueError(f"{names} cannot be read ({error.strerror or error}): name the file of names") from None
    first = min(numbers)
    if first > 1 or (first == 1 and max(numbers) < len(ordered)):
        raise ValueError(
            f"the numbers {first} to {max(numbers)} may begin at 0 or at 1 for {len(ordered)} classes: write the names "
            "of the classes in place of the numbers"
        )
    return dict(enumerate(ordered, first))


def _devkit(path: Path) -> dict[int, str]:
    try:
        loadmat = import_module("scipy.io").loadmat
    except ImportError:
        raise ImportError(f"{path} needs scipy: pip install scipy") from None
    try:
        synsets = loadmat(str(path), squeeze_me=True)["synsets"]
        return {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: give the devkit's data/meta.mat") from None
    except Exception as error:  # scipy raises arbitrary exceptions on damaged files
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path} is not the meta.mat of ImageNet's devkit ({why:.160}): get a good copy") from None
