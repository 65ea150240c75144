"""The source that is made of several: a list of DATA in Python or on the command line, or a ``.roots`` file."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from sslfast.data.csv_list import open_list
from sslfast.data.images import OnBadImage
from sslfast.data.manifest import Manifest
from sslfast.data.opening import bind_source, open_data
from sslfast.data.source import Changes, ImageSource, SourceError, Url, as_data, is_file, source_of_manifest

ROOTS = ".roots"


@dataclass(kw_only=True, eq=False, repr=False)
class PartsSource(ImageSource):
    """The rows of several sources, part after part: ``1/n01440764/x.jpg`` is ``n01440764/x.jpg`` of the second.

    Classes of the same name are one class. Each part keeps its own identity, checks and order of rows. A ``.roots``
    file names one DATA a line, relative to its folder; empty lines and those that begin with ``#`` do not count.
    """

    name: ClassVar[str] = "parts"

    parts: list[ImageSource]
    part_of: NDArray[np.int64]
    """``[num_rows]`` part of each row."""
    rows: NDArray[np.int64] = field(init=False)
    """``[num_rows]`` row of each row in its part: parts hold their rows in the order that they have here."""

    def __post_init__(self) -> None:
        order = np.argsort(self.part_of, kind="stable")
        counts = np.bincount(self.part_of, minlength=len(self.parts))
        starts = np.cumsum(counts) - counts
        self.rows = np.empty(len(self.part_of), dtype=np.int64)
        self.rows[order] = np.arange(len(order)) - starts[self.part_of[order]]

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return is_file(path, ROOTS)

    @classmethod
    def takes(cls, data: object) -> bool:
        return isinstance(data, tuple)

    @classmethod
    def open(cls, path: Any, *, on_bad_image: OnBadImage, progress: bool) -> Manifest:
        roots = roots_of(path)
        manifests = [open_data(root, on_bad_image=on_bad_image, progress=progress) for root in roots]
        for root, manifest in zip(roots, manifests, strict=True):
            if manifest.source.loader is not None or isinstance(manifest.source, cls):
                raise SourceError(f"{root} cannot be a part of several: name what it was made of ({manifest.root})")
        decodings = {manifest.source.decoding for manifest in manifests}
        if len(decodings) > 1:
            raise SourceError(
                f"the manifests of {_shown(path)} record different white levels or largest sizes: verify each with the "
                "same options"
            )
        source = cls(
            root=path if isinstance(path, Path) else Path("parts").absolute(),
            paths=[f"{part}/{name}" for part, manifest in enumerate(manifests) for name in manifest.paths],
            parts=[manifest.source for manifest in manifests],
            part_of=np.repeat(np.arange(len(manifests)), [len(manifest) for manifest in manifests]),
            decoding=decodings.pop(),
        )
        names = [manifest.classes[label] if label >= 0 else None for manifest in manifests for label in manifest.labels]
        ignored: dict[str, int] = {}
        for manifest in manifests:
            ignored |= {key: count + ignored.get(key, 0) for key, count in manifest.ignored.items()}
        whole = Manifest(
            source=source,
            bytes=np.concatenate([manifest.bytes for manifest in manifests]),
            sha1=[sha1 for manifest in manifests for sha1 in manifest.sha1],
            labels=np.empty(0, dtype=np.int64),
            classes=[],
            excluded=[
                (f"{part}/{name}", reason)
                for part, manifest in enumerate(manifests)
                for name, reason in manifest.excluded
            ],
            ignored=ignored,
            verified=all(manifest.verified for manifest in manifests),
        )
        return whole.labelled(names)

    def read(self, row: int) -> bytes:
        return self.parts[self.part_of[row]].read(int(self.rows[row]))

    def where(self, row: int) -> str:
        return self.parts[self.part_of[row]].where(int(self.rows[row]))

    def changes(self, manifest: Manifest, *, contents: bool) -> Changes:
        """Those of every part, with its number before each path."""
        changes = Changes()
        for number, part in enumerate(self.parts):
            mine = np.flatnonzero(self.part_of == number)
            of_part = replace(
                manifest,
                source=part,
                bytes=manifest.bytes[mine],
                sha1=[manifest.sha1[row] for row in mine.tolist()],
                labels=manifest.labels[mine],
                excluded=[(path.partition("/")[2], why) for path, why in manifest.excluded if _part(path) == number],
            )
            found = part.changes(of_part, contents=contents)
            for name in vars(changes):
                getattr(changes, name).extend((f"{number}/{path}", remark) for path, remark in getattr(found, name))
        return changes

    def system_keys(self) -> Iterable[str | None]:
        keys = [list(part.system_keys()) for part in self.parts]
        return [keys[part][row] for part, row in zip(self.part_of, self.rows, strict=True)]

    def late_labels(self) -> list[str | None] | None:
        late = [part.late_labels() for part in self.parts]
        if None in late:
            return None
        return [(late[part] or [])[row] for part, row in zip(self.part_of, self.rows, strict=True)]

    @property
    def row_shards(self) -> NDArray[np.int64] | None:
        """Where all parts have shards."""
        found, start = np.empty(len(self), dtype=np.int64), 0
        for number, part in enumerate(self.parts):
            shards = part.row_shards
            if shards is None:
                return None
            mine = self.part_of == number
            found[mine] = start + shards[self.rows[mine]]
            start += int(shards.max(initial=-1)) + 1
        return found

    def identity(self) -> str:
        return "+".join(part.identity() for part in self.parts).strip("+")

    def bind(self, data: Any) -> Self:
        roots = roots_of(data)
        if len(roots) != len(self.parts):
            raise SourceError(
                f"{_shown(data)} is {len(roots)} roots, and the run started with {len(self.parts)}: give the same, in "
                "the same order"
            )
        parts = [bind_source(part, root) for part, root in zip(self.parts, roots, strict=True)]
        return replace(self, root=data if isinstance(data, Path) else self.root, parts=parts)

    def take(self, rows: NDArray[np.int64]) -> Self:
        part_of = self.part_of[rows]
        parts = [part.take(self.rows[rows[part_of == number]]) for number, part in enumerate(self.parts)]
        return replace(super().take(rows), parts=parts, part_of=part_of)

    def packed(self) -> Self:
        return replace(super().packed(), parts=[part.packed() for part in self.parts])

    def columns(self) -> Mapping[str, Iterable[object]]:
        """``part``, and the columns of every part, which are empty for the rows of others that have none."""
        columns: dict[str, NDArray[Any]] = {"part": self.part_of}
        for number, part in enumerate(self.parts):
            mine = self.part_of == number
            for name, values in part.columns().items():
                column = columns.setdefault(name, np.full(len(self), "", dtype=object))
                column[mine] = np.array(list(values), dtype=object)
        return columns

    def notes(self) -> Iterable[tuple[object, ...]]:
        yield ("source", self.name)
        for number, part in enumerate(self.parts):
            yield ("part", number, part.root)
            for note in (("source", part.name), *part.notes()):
                yield ("of-part", number, *note)

    @classmethod
    def parse(
        cls,
        *,
        root: Path,
        paths: Sequence[str],
        sizes: NDArray[np.int64],
        notes: Sequence[Sequence[str]],
        columns: Mapping[str, Sequence[str]],
    ) -> Self:
        part_of = np.array([int(value) for value in columns["part"]], dtype=np.int64)
        parts = []
        for number, place in ((int(note[1]), note[2]) for note in notes if note[0] == "part"):
            mine = np.flatnonzero(part_of == number).tolist()
            own_notes = [list(note[2:]) for note in notes if note[0] == "of-part" and int(note[1]) == number]
            own = {name: [values[row] for row in mine] for name, values in columns.items() if name != "part"}
            kind = source_of_manifest(own_notes, own)
            names = [paths[row].partition("/")[2] for row in mine]
            parts.append(kind.parse(root=Path(place), paths=names, sizes=sizes[mine], notes=own_notes, columns=own))
        return cls(root=root, paths=paths, parts=parts, part_of=part_of)

    def __str__(self) -> str:
        return " + ".join(str(part) for part in self.parts)


def roots_of(data: Any) -> list[Any]:
    """The DATA arguments that a tuple or a ``.roots`` file names; SourceError where two of them are the same place."""
    roots = [*data] if isinstance(data, tuple) else _lines(data)
    if not roots:
        raise SourceError(f"{_shown(data)} names no data: give a folder, an archive or a list for each part")
    places: list[str] = []
    for root in roots:
        if isinstance(root, int):
            raise SourceError(f"synthetic images cannot be a part of several: give {root} alone")
        place = os.path.realpath(root) if isinstance(root, Path) else str(root) if isinstance(root, Url) else ""
        for other, known in zip(places, roots, strict=False):
            is_within = place.startswith(f"{other}/") or other.startswith(f"{place}/")
            if root is known or (place and place == other) or (place and other and is_within):
                raise SourceError(
                    f"{root} and {known} are the same data, or one lies in the other: every image is one row, so name "
                    "each place once"
                )
        places.append(place)
    return roots


def _lines(path: Path) -> list[Any]:
    try:
        with open_list(path) as file:
            lines = [line.strip() for line in file.read().splitlines()]
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror or error}): name a file of roots") from None
    named = [as_data(line) for line in lines if line and not line.startswith("#")]
    relative = [line for line in lines if line and not line.startswith("#")]
    return [root if isinstance(root, Url) else path.parent / line for root, line in zip(named, relative, strict=True)]


def _part(path: str) -> int:
    return int(path.partition("/")[0])


def _shown(data: Any) -> str:
    return str(data) if isinstance(data, Path) else "the list"
