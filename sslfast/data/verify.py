"""``sslfast data verify``: decode every image of a folder once, and write the manifest of those that can be used."""

import os
from dataclasses import replace

from sslfast.data.images import BadImageError, decode_full, require_strict_pillow
from sslfast.data.manifest import Manifest, some_paths
from sslfast.data.pool import map_processes
from sslfast.data.tar import ImageLocation, read_image_bytes


def verify_images(
    root: str | os.PathLike[str], *, workers: int | None = None, progress: bool = False
) -> tuple[Manifest, list[tuple[str, str]]]:
    """Scan a folder, decode every image whole, and number those that can be used.

    Args:
        root: the folder, of images or of tar shards, or a tar file.
        workers: processes; None: one per available core; 0 or 1: in this process.
        progress: show progress bars on the terminal.

    Returns:
        The manifest, marked as verified, and path and reason of every file left out, sorted by path (also in its
        ``excluded``). ValueError where no image is left.
    """
    manifest = Manifest.scan(root, on_bad_image="skip", progress=progress)
    bad = check_images(manifest, workers=workers, progress=progress)
    usable = replace(manifest.without(bad), verified=True)
    if not len(usable):
        raise ValueError(f"no usable image in {manifest.root}; all {len(bad)} are bad: {some_paths(bad)}")
    return usable, bad


def check_images(manifest: Manifest, *, workers: int | None = None, progress: bool = False) -> list[tuple[str, str]]:
    """Decode every image of the manifest whole and return path and reason of each bad one, sorted by path.

    Args:
        manifest: what to check; files that its scan excluded come back too.
        workers: processes; None: one per available core; 0 or 1: in this process.
        progress: show a progress bar on the terminal.
    """
    require_strict_pillow()
    tasks = [(path, manifest.location(row)) for row, path in enumerate(manifest.paths)]
    bad = list(manifest.excluded)
    for found in map_processes(_decode_whole, tasks, workers=workers, progress=progress, title="decoding"):
        bad.extend(found)
    return sorted(bad)


def _decode_whole(task: tuple[str, ImageLocation]) -> list[tuple[str, str]]:
    path, place = task
    try:
        decode_full(read_image_bytes(place))
    except BadImageError as error:
        return [(path, error.reason)]
    return []
