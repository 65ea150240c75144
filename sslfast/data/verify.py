"""``sslfast data verify``: decode every image of a data set once, and write the manifest of the usable ones."""

from dataclasses import replace
from functools import partial
from typing import Any

from sslfast.data.contents import Contents, Facts, inspect
from sslfast.data.images import DEFAULT_DECODING, BadImageError, Decoding, require_strict_pillow
from sslfast.data.manifest import Manifest
from sslfast.data.opening import is_manifest
from sslfast.data.pool import map_processes
from sslfast.data.source import ImageSource, as_data, some_paths


def verify_images(
    root: Any,
    *,
    workers: int | None = None,
    progress: bool = False,
    decoding: Decoding = DEFAULT_DECODING,
    contents: Contents | None = None,
) -> tuple[Manifest, list[tuple[str, str]]]:
    """Decode every image of a data set whole, and number those that can be used.

    Args:
        root: a source of image files: a folder of images or of tar shards, a tar file, a CSV list, a dataset; or a
            manifest file, whose own ``decoding`` holds unless another is given.
        workers: processes; None: one per available core; 0 or 1: in this process.
        progress: show progress bars on the terminal.
        decoding: what the policy leaves to the user; the manifest records it.
        contents: gets the counts of what was found.

    Returns:
        The manifest, marked as verified, and path and reason of every file left out, sorted by path (also in its
        ``excluded``). ValueError where no image is left.
    """
    data = as_data(root)
    if is_manifest(data):  # of an earlier verification, or of a run: its rows are decoded again
        manifest = Manifest.load(data, remedy="verify the images that it is of")
        manifest.check(on_bad_image="skip")
        decoding = manifest.source.decoding if decoding == DEFAULT_DECODING else decoding
    else:
        manifest = Manifest.scan(data, on_bad_image="skip", progress=progress)
    if manifest.source.loader is not None:
        raise ValueError(f"{root} holds no image files to decode: name what it was made of ({manifest.root})")
    manifest = manifest.decoded(decoding)
    bad = check_images(manifest, workers=workers, progress=progress, contents=contents)
    usable = replace(manifest.without(bad), verified=True)
    if not len(usable):
        raise ValueError(f"no usable image in {manifest.source}; all {len(bad)} are bad: {some_paths(bad)}")
    return usable, bad


def check_images(
    manifest: Manifest, *, workers: int | None = None, progress: bool = False, contents: Contents | None = None
) -> list[tuple[str, str]]:
    """Decode every image of the manifest whole and return path and reason of each bad one, sorted by path.

    Args:
        manifest: what to check; files that its scan excluded come back too.
        workers: processes; None: one per available core; 0 or 1: in this process.
        progress: show a progress bar on the terminal.
        contents: gets the counts of what the usable ones are.
    """
    require_strict_pillow()
    work = partial(_look, manifest.source.packed())
    found = map_processes(work, range(len(manifest)), workers=workers, progress=progress, title="decoding")
    bad, counts = [], Contents() if contents is None else contents
    for path, facts in zip(manifest.paths, found, strict=True):
        if isinstance(facts, Facts):
            counts.add(facts)
        else:
            bad.append((path, facts))
    return sorted([*manifest.excluded, *bad])


def _look(source: ImageSource, row: int) -> Facts | str:
    try:
        return inspect(source, row)
    except BadImageError as error:
        return error.reason
