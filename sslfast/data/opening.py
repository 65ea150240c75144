"""What a DATA argument names: opened for a new run, or again for a resumed one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sslfast.data.images import OnBadImage
from sslfast.data.manifest import Manifest
from sslfast.data.source import ImageSource, SourceError, Url, as_data, is_file, some_paths, source_of

_MANIFEST = ".tsv"
_KINDS = {
    "csv": "a list (.csv)",
    "list": "a list (.txt, .tsv, .json, ...)",
    "zip": "a .zip file",
    "tar": "tar files",
    "parquet": "Parquet files",
    "folder": "a folder of images",
    "arrow": "Arrow files",
    "hub": "a datasets.Dataset",
    "parts": "several data sets",
    "torch": "a torch.utils.data.Dataset",
}
_INSIDE = {("folder", "tar"), ("folder", "parquet"), ("remote", "tar"), ("remote", "parquet")}
"""Kind that DATA is of -> kind of what is in it."""


def open_data(data: Any, *, on_bad_image: OnBadImage = "error", progress: bool = False) -> Manifest:
    """The rows of a data set for a new run; ValueError where it cannot be used as it is.

    Args:
        data: the path, URL or object of an image source (see ``sslfast.data.source``), a list of several, or a manifest
            file (.tsv), which is checked first.
        on_bad_image: ``error``: images known to be bad are a ValueError that names them; ``skip``: they are left out.
        progress: show progress bars on the terminal.
    """
    data = as_data(data)
    if not is_manifest(data):
        return Manifest.scan(data, on_bad_image=on_bad_image, progress=progress)
    manifest = _verified(data)
    manifest.check()
    if manifest.excluded and on_bad_image == "error":
        raise ValueError(
            f"{len(manifest.excluded)} images of {data} cannot be used: {some_paths(manifest.excluded)}; repair or "
            "remove the files and verify again, or pass --on-bad-image skip"
        )
    return manifest


def _verified(path: Path) -> Manifest:
    return Manifest.load(path, remedy="verify the data again (`sslfast data verify`)")


def is_manifest(path: Any) -> bool:
    """Whether a .tsv file is a manifest, be it missing or damaged; other tables are lists of images."""
    if not isinstance(path, Path) or not is_file(path, _MANIFEST):
        return False
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:
        return True
    return b"\t" not in head.partition(b"\n")[0] or head.startswith(b"# sslfast")


def reopen_data(data: Any, known: Path, *, on_bad_image: OnBadImage = "error") -> Manifest:
    """The rows of a resumed run: those of its manifest file ``known``.

    ValueError where the data has changed, or is another data set. With ``skip``, files that cannot be read any more are
    bad images, as they are while a run goes on.
    """
    path = as_data(data)
    if not is_manifest(path) and source_of(path).loader is None:
        run = Manifest.load(known)
        try:
            run = run.of_source(bind_source(run.source, path))
        except SourceError as error:
            raise ValueError(f"the run that {known} belongs to {error}") from None
        run.check(on_bad_image=on_bad_image)
        return run
    if is_manifest(path):
        manifest = _verified(path)
        manifest.check(on_bad_image=on_bad_image)
    else:
        manifest = open_data(path, on_bad_image="skip")
    run = Manifest.load(known)
    is_same = manifest.digest() == run.digest()
    if not is_same or manifest.source.identity() != run.source.identity():
        what = "the same images stored in another way" if is_same else "other images"
        raise ValueError(
            f"{path} holds {what} than the run that {known} belongs to ({len(manifest)} rows, then {len(run)}). "
            "Rows are identities in the bank and in checkpoints, so nothing is renumbered: give the data that the "
            "run started with, or choose another output directory"
        )
    return manifest


def bind_source(source: ImageSource, data: Any) -> ImageSource:
    """A source that a manifest file described, of the data that is given now, as ``as_data`` makes it.

    Raises:
        SourceError: that is data of another kind; to be read after "the run ".
    """
    if is_manifest(data):
        return source.bind(_verified(data).root)
    kind = source_of(data).name
    if source.loader is not None:
        raise SourceError(f"started with a .{source.name} file: give that one, not {_shown(data)}")
    if kind != source.name and (kind, source.name) not in _INSIDE:
        raise SourceError(
            f"started with {_KINDS.get(source.name, source.name)}, and {_shown(data)} is another kind of data: give "
            "the data that the run started with, or choose another output directory"
        )
    return source.bind(data)


def is_named(data: Any) -> bool:
    """Whether DATA is paths and URLs, and no object of Python."""
    data = as_data(data)
    return all(map(is_named, data)) if isinstance(data, tuple) else isinstance(data, Path | Url)


def parse_data(text: str | Sequence[str]) -> Any:
    """A path or URL, the N of ``synthetic:N``, or of several texts a tuple of these."""
    if not isinstance(text, str):
        return parse_data(text[0]) if len(text) == 1 else tuple(map(parse_data, text))
    kind, colon, number = text.partition(":")
    if kind != "synthetic" or not colon:
        data = as_data(text)
        return data if isinstance(data, Url) else Path(text)
    if not number.isdecimal() or int(number) < 1:
        raise ValueError(f"synthetic:N needs a number of images of at least 1, got {text!r}")
    return int(number)


def data_name(data: Any) -> str:
    """A name for a run on data of :func:`parse_data`."""
    if isinstance(data, int):
        return "synthetic"
    if isinstance(data, tuple):
        return "+".join(map(data_name, data[:3]))
    return Path(data).name if isinstance(data, Url) else data.resolve().name


def _shown(data: Any) -> str:
    """A DATA argument, for messages."""
    if isinstance(data, tuple):
        return " + ".join(map(_shown, data))
    return str(data) if isinstance(data, str | Path) else f"{type(data).__module__}.{type(data).__qualname__}"
