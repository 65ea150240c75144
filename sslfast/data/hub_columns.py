"""The columns of images and labels in Arrow tables, as the Hugging Face Hub writes them, and what their rows hold."""

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from io import BytesIO
from typing import Any, NamedTuple
from urllib.parse import unquote

from sslfast.data.images import MAX_BYTES, BadImageError, open_header
from sslfast.data.members import LABEL_NAMES, label_text, plain_name
from sslfast.data.sharded import ShardError
from sslfast.data.source import HASHED_BYTES, content_hash

_IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes", "content")


class Columns(NamedTuple):
    """What a file's schema says."""

    image: str
    """Name of the column."""
    inner: str
    """Field of the bytes in a column of structs; empty for plain binary values."""
    label: str
    """Name of the column; empty for none."""
    names: tuple[str, ...]
    """What the numbers of the label column mean; empty where they mean themselves."""


class Found(NamedTuple):
    """One row of a row group."""

    name: str
    """Of the image in the table; empty for none."""
    bytes: int
    sha1: str
    label: str | None
    reason: str
    """Why it cannot be used; empty for good images."""


def find_columns(file: str, schema: Any) -> Columns:
    """The columns that a schema of pyarrow names or has metadata of; ShardError where they are not clear."""
    types = {field.name: field.type for field in schema}
    features = _features(schema.metadata or {})
    images = {name: inner for name, kind in types.items() if (inner := _bytes_field(kind)) is not None}
    typed = [name for name in images if _kind(features, name) == "Image"]
    candidates = typed or [name for name in images if plain_name(name) not in LABEL_NAMES] or [*images]
    named = [name for name in _IMAGE_NAMES for column in candidates if column.lower() == name]
    if not candidates:
        raise ShardError(
            f"{file} has no column of images, which is binary or has structs with a field bytes (its columns: "
            f"{', '.join(types)}): write the image files into such a column"
        )
    if len(candidates) > 1 and not named:
        raise ShardError(
            f"{file} has several columns of images ({', '.join(candidates)}): write a table with one of them, or name "
            "one image"
        )
    image = next((column for column in candidates if named and column.lower() == named[0]), candidates[0])
    lowered = {plain_name(name): name for name in types if name != image}
    classes = [name for name in types if _kind(features, name) == "ClassLabel"]
    label = next((lowered[name] for name in LABEL_NAMES if name in lowered), "")
    if not label and len(classes) > 1:
        raise ShardError(
            f"{file} has several columns of classes ({', '.join(classes)}): write a table with one of them, or name "
            "one label"
        )
    label = label or (classes[0] if classes else "")
    names = features.get(label, {}).get("names") if _kind(features, label) == "ClassLabel" else None
    return Columns(image, images[image] or "", label, tuple(map(str, names)) if isinstance(names, list) else ())


def has_numbers(schema: Any, columns: Columns) -> bool | None:
    """Whether the labels are numbers, which mean themselves, or names; None where there are none."""
    if not columns.label:
        return None
    types, kind = import_module("pyarrow.types"), schema.field(columns.label).type
    return not columns.names and (types.is_integer(kind) or types.is_floating(kind))


def partition_label(path: str) -> str | None:
    """The label in the folders of a file: ``label=cat/part-0.parquet``, as Hive's and Spark's tables have it."""
    for folder in reversed(path.split("/")[:-1]):
        name, equals, value = folder.partition("=")
        if equals and plain_name(name) in LABEL_NAMES:
            return label_text(unquote(value))
    return None


def _features(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """Column -> what the Hub's metadata says of it."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _kind(features: Mapping[str, Any], name: str) -> str:
    feature = features.get(name)
    return str(feature.get("_type", "")) if isinstance(feature, dict) else ""


def _bytes_field(kind: Any) -> str | None:
    """Of a column's type: the field that holds bytes, empty for the values themselves; None: it holds none."""
    types = import_module("pyarrow.types")
    names = ("is_binary", "is_large_binary", "is_fixed_size_binary", "is_binary_view")  # the last since pyarrow 16
    if any(getattr(types, name)(kind) for name in names if hasattr(types, name)):
        return ""
    if not types.is_struct(kind):
        return None
    fields = {kind.field(at).name: kind.field(at).type for at in range(kind.num_fields)}
    return "bytes" if "bytes" in fields and _bytes_field(fields["bytes"]) == "" else None


def look_at_batch(file: str, batch: Any, columns: Columns) -> Iterator[tuple[Found, Any]]:
    """What each row of a record batch or table holds, and its image, a ``pyarrow.Buffer`` or None."""
    column = batch.column(columns.image)
    chunks = [binary_values(chunk, columns.inner) for chunk in getattr(column, "chunks", [column])]
    names = [name for chunk in getattr(column, "chunks", [column]) for name in _names(chunk, columns)]
    labels = batch.column(columns.label).to_pylist() if columns.label else [None] * len(names)
    buffers = (value.as_buffer() for chunk in chunks for value in chunk)
    for buffer, name, label in zip(buffers, names, labels, strict=True):
        value = None if buffer is None else memoryview(buffer)
        yield _look(value, name, read_label(file, label, columns)), buffer


def _look(value: memoryview | None, name: str, label: str | None) -> Found:
    reason = ""
    if value is None:
        reason = "no image in this row of the table: put the image file's bytes into it"
    elif not len(value):
        reason = "empty file"
    elif len(value) > MAX_BYTES:
        reason = f"too large: a file of {len(value):,} bytes, at most {MAX_BYTES:,}"
    else:
        try:
            open_header(BytesIO(value))
        except BadImageError as error:
            reason = error.reason
    head = b"" if value is None else bytes(value[:HASHED_BYTES])
    return Found(name, 0 if value is None else len(value), content_hash(head), label, reason)


def read_label(file: str, value: Any, columns: Columns) -> str | None:
    """The class of a row. Of a ``ClassLabel`` -1 stands for none, as in the Hub's test sets."""
    if value is None or (columns.names and value == -1):
        return None
    if isinstance(value, int) and not isinstance(value, bool) and columns.names:
        if not 0 <= value < len(columns.names):
            raise ShardError(
                f"{file}: label {value} in column {columns.label!r}, which names {len(columns.names)} classes: write "
                "the table again"
            )
        return columns.names[value]
    if isinstance(value, bytes):  # a column of text whose writer did not say so
        value = value.decode("utf-8", "surrogateescape")
    text = label_text(int(value) if isinstance(value, bool) else value)
    if text is None:
        raise ShardError(
            f"{file} has a label that is neither a number nor a name in column {columns.label!r}: {value!r:.60}; write "
            "the table again with one label a row"
        )
    return text


def binary_values(column: Any, inner: str) -> Any:
    """The array of bytes in an array of a column."""
    if not inner:
        return column
    position = column.type.get_field_index(inner)
    return column.flatten()[position]  # null where the struct is


def _names(column: Any, columns: Columns) -> list[str]:
    """File name of each image of an array, empty where the table has none."""
    position = column.type.get_field_index("path") if columns.inner else -1
    if position < 0:
        return [""] * len(column)
    values = column.flatten()[position].to_pylist()
    return [value.rpartition("/")[2] if isinstance(value, str) and "\0" not in value else "" for value in values]


def value_at(chunks: Sequence[Any], position: int) -> memoryview | None:
    """One value of a column's arrays, without a copy."""
    for chunk in chunks:
        if position < len(chunk):
            buffer = chunk[position].as_buffer()
            return None if buffer is None else memoryview(buffer)
        position -= len(chunk)
    return None
