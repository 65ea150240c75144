"""The images among the members of an archive, and the labels that other members give them."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from types import MappingProxyType
from typing import Any

from sslfast.data.images import SUFFIXES, BadImageError, open_header
from sslfast.data.left_out import (
    NO_IMAGE,
    NO_LABEL,
    SNIFFED,
    hidden_key,
    image_suffixes,
    left_out,
    may_be_picture,
    named_counts,
    other_key,
    suffix_of,
)
from sslfast.data.listing import first_folder
from sslfast.data.source import HASHED_BYTES, ListedImage, SourceError, content_hash

LABELS = tuple(f".{word}{form}" for word in ("cls", "class", "label", "target") for form in (".txt", ".json", ""))
"""Suffixes, in any letter case, of members that hold the label of the image with the same stem."""
_BESIDE = (*LABELS, ".json", ".txt")
LABEL_NAMES = (
    *("label", "class", "classname", "classid", "labelname", "category", "target", "gtlabel", "wnid", "synset", "y"),
    *("finelabel", "cls", "labels", "categoryid", "classindex", "classidx", "labelid", "labelidx", "labelindex"),
    *("classlabel", "categoryname", "targetid", "targetname", "classes", "species", "breed", "gt"),
)
"""Names of a table's column of labels, as :func:`plain_name` makes them of any spelling; the first that there is
counts."""
JSON_KEYS = tuple(sorted(set(LABEL_NAMES) - {"y"}, key=("label", "cls", *LABEL_NAMES).index))
"""Keys of a ``.json`` member that hold the label, made likewise; the first one that is there. ``y`` may be a
coordinate."""
_LONGEST_LABEL = 1024
_LONGEST_JSON = 1 << 20
_LONGEST_NUMBER = 16
_WORDNET = re.compile(r"n[0-9]{8}")

Read = Callable[[str, int], bytes]
"""``read(name, count)``: the first ``count`` bytes of a member; BadImageError where it cannot be read."""


@dataclass(kw_only=True)
class ListedMembers:
    """What an archive holds."""

    images: list[ListedImage] = field(default_factory=list)
    """In the order of the archive."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    """By the keys of :mod:`sslfast.data.left_out`."""
    has_labels: bool = False
    """Whether a label came from another member."""


def visible(name: str, ignored: Counter[str]) -> bool:
    """Whether a member is neither hidden nor in a folder of the system; else it is counted."""
    key = hidden_key(name)
    if key is not None and (key != ".*" or suffix_of(name) in SUFFIXES):
        ignored[key] += 1
    return key is None


def list_members(
    file: str, sizes: Mapping[str, int], read: Read, *, folders: Mapping[str, str | None] = MappingProxyType({})
) -> ListedMembers:
    """The images of an archive, with their labels; the header of each image is checked.

    A member whose suffix is an image's is an image. Its class is the content of the member with the same stem and a
    suffix of ``LABELS`` (a number or a name; a stem ends at the last dot or, as for WebDataset, the first), else what
    a ``.json`` member of that stem has under one of ``JSON_KEYS``, else the first-level folder in its name, else
    none. ``folders`` takes the place of the folder where it has the name. Where no member is a label by its name,
    ``.txt`` members are if all of those beside images hold a whole number.

    Args:
        file: what to call the archive.
        sizes: name -> bytes of every visible member.
        read: of a member.
        folders: classes by name.

    Raises:
        SourceError: no image, an empty label, or two labels that contradict each other.
    """
    found = ListedMembers()
    used: set[str] = set()
    images = [name for name in sizes if suffix_of(name) in SUFFIXES]
    beside = _beside(sizes)
    labels = {name: _label_of(file, name, sizes, read, beside, used, found.ignored) for name in images}
    if all(label is None for label in labels.values()):
        labels |= _numbers_in_text(images, sizes, read, beside, used)
    for name in images:
        size, label = sizes[name], labels[name]
        found.has_labels |= label is not None
        if label is None:
            label = folders[name] if name in folders else first_folder(name)
        try:
            sha1 = _check(name, size, read)
        except BadImageError as error:
            found.bad.append((name, error.reason))
        else:
            found.images.append(ListedImage(name, size, sha1, label))
    for name, size in sizes.items():
        suffix = suffix_of(name)
        if suffix in SUFFIXES or name in used:
            continue
        if not name.lower().endswith(LABELS):
            found.ignored[other_key(suffix, _head(name, size, read) if may_be_picture(suffix) else b"")] += 1
        elif images:
            found.ignored[f"{suffix} holding {NO_IMAGE}"] += 1
    if not found.images and not found.bad:
        others = f" (other members: {named_counts(found.ignored)})" if found.ignored else ""
        why = left_out(found.ignored) or [f"images are members named {image_suffixes()}"]
        raise SourceError(f"{file} holds no image{others}: {'; '.join(why)}; leave this file out, or write it again")
    return found


def folder_classes(names: Collection[str]) -> dict[str, str | None]:
    """The class of each of an archive's images by its folder: the first one, or the one below where all images lie in
    folders of one folder (``tar -cf train.tar train``)."""
    first = {name: first_folder(name) for name in names}
    below = {name: first_folder(name.partition("/")[2]) for name in names}
    return below if len({*first.values()}) == 1 and None not in below.values() else first


def is_class_archive(stems: Sequence[str]) -> bool:
    """Whether archives are named by the class that they hold, as those of ImageNet are, and not numbered."""
    if all(_WORDNET.fullmatch(stem) for stem in stems):
        return True
    return len(stems) > 1 and len(set(stems)) == len(stems) and not any(stem[-1:].isdecimal() for stem in stems)


def stem_of(path: str) -> str:
    """Name of an archive without folder and suffix."""
    return os.path.splitext(path.rpartition("/")[2])[0]


def _stems(image: str) -> list[str]:
    """Of an image: its name up to the last dot, and up to the first."""
    folder, slash, base = image.rpartition("/")
    return [*dict.fromkeys(f"{folder}{slash}{stem}" for stem in (base.rpartition(".")[0], base.partition(".")[0]))]


def _beside(names: Iterable[str]) -> dict[str, str]:
    """What may say something of images: a stem and one of ``_BESIDE`` -> name of the member.

    ``0.output.cls`` also stands for ``0.cls`` if it is the only one (``0.input.jpg`` is beside it).
    """
    found: dict[str, str] = {}
    parts: dict[str, set[str]] = {}
    for name in names:
        lowered = name.lower()
        end = next((end for end in _BESIDE if lowered.endswith(end)), None)
        if end is None:
            continue
        stem = name[: -len(end)]
        found[stem + end] = name
        folder, slash, base = stem.rpartition("/")
        first, dot, rest = base.partition(".")
        if dot and end in LABELS and rest.isidentifier():
            parts.setdefault(f"{folder}{slash}{first}{end}", set()).add(name)
    return {key: min(those) for key, those in parts.items() if len(those) == 1} | found


def _label_of(
    file: str,
    image: str,
    sizes: Mapping[str, int],
    read: Read,
    beside: Mapping[str, str],
    used: set[str],
    ignored: Counter[str],
) -> str | None:
    stems = _stems(image)
    text = next((beside[stem + suffix] for stem in stems for suffix in LABELS if stem + suffix in beside), None)
    label = None if text is None else _text_label(file, text, sizes, read)
    if text is not None:
        used.add(text)
    name = next((beside[f"{stem}.json"] for stem in stems if f"{stem}.json" in beside), None)
    stated = [] if name is None else _json_labels(name, sizes, read)
    if name is None:
        return label
    if not stated and name not in used:
        ignored[NO_LABEL if label is None else ".json"] += 1
    used.add(name)
    if not stated:
        return label
    if label is not None and all(label.isdecimal() == other.isdecimal() and label != other for other in stated):
        raise SourceError(
            f"{file}: member {text!r} says class {label!r} and member {name!r} says {stated[0]!r}: two labels of "
            "one image; write the archive again with one of them"
        )
    return stated[0] if label is None else label


def _numbers_in_text(
    images: Sequence[str], sizes: Mapping[str, int], read: Read, beside: Mapping[str, str], used: set[str]
) -> dict[str, str]:
    """Of each image beside a ``.txt`` member the number in that, if all of those hold one; else they are captions."""
    found: dict[str, str] = {}
    for image in images:
        name = next((beside[f"{stem}.txt"] for stem in _stems(image) if f"{stem}.txt" in beside), None)
        if name is None:
            continue
        try:
            text = read(name, sizes[name]).strip() if sizes[name] <= _LONGEST_NUMBER else b""
        except BadImageError:
            text = b""
        if not text.isdigit():
            return {}
        found[image] = str(int(text))
        used.add(name)
    return found


def _text_label(file: str, name: str, sizes: Mapping[str, int], read: Read) -> str:
    if name.lower().endswith(".json"):
        found = _json_labels(name, sizes, read)
        label = found[0] if found else ""
    else:
        try:
            text = read(name, min(sizes[name], _LONGEST_LABEL + 1))
        except BadImageError:
            text = b""
        label = text.decode("utf-8-sig", "surrogateescape").strip() if len(text) <= _LONGEST_LABEL else ""
    if not label or re.search(r"[\0-\x08\n]", label):
        raise SourceError(
            f"{file}: member {name!r} holds no label: it must be a number or the name of a class; write the archive "
            "again"
        )
    return _plain(label_text(label) or label)


def _plain(label: str) -> str:
    """In archives, whose labels are class numbers or names, 007 is 7: the same in every member of an image."""
    return str(int(label)) if label.isdecimal() else label


def _json_labels(name: str, sizes: Mapping[str, int], read: Read) -> list[str]:
    """The labels in a JSON member, the most usual key first; none where it has none. A number alone is a label, and in
    a member with a suffix of ``LABELS`` a name alone, too."""
    if sizes[name] > _LONGEST_JSON:
        return []
    try:
        values = json.loads(read(name, sizes[name]))
    except (BadImageError, ValueError, RecursionError):
        return []
    if not isinstance(values, dict):
        is_alone = type(values) is int or name.lower().endswith(LABELS)
        label = label_text(values) if is_alone else None
        return [] if label is None else [_plain(label)]
    labels = _labels_in(values)
    for inner in () if labels else values.values():
        if isinstance(inner, list) and len(inner) == 1:
            inner = inner[0]
        if isinstance(inner, dict):
            labels += _labels_in(inner)
    return labels


def _labels_in(values: Mapping[str, Any]) -> list[str]:
    """What an object has under ``JSON_KEYS``: a label, a list of one, or an object with an ``id``, ``label`` or
    ``name``."""
    found: dict[str, str | None] = {}
    for key, value in values.items():
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, dict):
            value = next((value[part] for part in ("id", "label", "name") if part in value), None)
        found[plain_name(key)] = label_text(value)
    labels = [found.get(key) for key in JSON_KEYS]
    return [*dict.fromkeys(_plain(label) for label in labels if label is not None)]


def plain_name(name: str) -> str:
    """The same for all spellings of a column or key: ``Class Name``, ``class-name`` and ``className`` are one."""
    return re.sub(r"[\s_-]", "", name).lower()


_WHOLE = re.compile(r"[+-]?[0-9]+\.0*")


def label_text(value: Any) -> str | None:
    """A label that a value of a list, table or archive states: a whole number or a name; None: another kind of value.

    Text is a name and stays as it is written (``01`` is not ``1``), but for a whole number with a fraction of zeros:
    tables with gaps write ``1.0`` for 1.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    text = str(value).strip()
    if not text or len(text) > _LONGEST_LABEL:
        return None
    return text.partition(".")[0] if _WHOLE.fullmatch(text) else text


def _check(name: str, size: int, read: Read) -> str:
    """Hash of a member's first bytes; BadImageError where it or its header breaks a rule of the image policy."""
    head = read(name, min(size, HASHED_BYTES))
    if not head:
        raise BadImageError("empty file")
    try:
        open_header(BytesIO(head))
    except BadImageError:
        if size <= HASHED_BYTES:
            raise
        # A header that is longer than that, or at the end of the file.
        open_header(BytesIO(read(name, size)))
    return content_hash(head)


def _head(name: str, size: int, read: Read) -> bytes:
    try:
        return read(name, min(size, SNIFFED))
    except BadImageError:
        return b""
