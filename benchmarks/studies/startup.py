"""What a start costs for each image: listing, header check, manifest, check of a resumed run, order of an epoch.

    python -m benchmarks.studies.startup --files 1e6 --names 1e7 --scratch /dev/shm/startup --output /tmp/startup

``--files`` names of one JPEG of 645 bytes (hard links, a thousand in a folder) are listed and scanned as DATA is;
``--names`` rows are ordered, made up, packed, written and read. 0: neither. ``--no-text`` leaves out writing and
reading manifest.tsv, 62 bytes a row. Writes OUTPUT.json, with the rows of other sizes that are in it, and OUTPUT.md;
SCRATCH is deleted.
"""

import argparse
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from benchmarks.studies.large_bank import from_here, memory
from sslfast.data import Manifest, available_cores
from sslfast.data.folder import FolderSource
from sslfast.data.listing import first_folder, list_files
from sslfast.data.mapped import mapped_pickle, write_pickle
from sslfast.data.source import PackedPaths
from sslfast.loaders.plan import epoch_order

T = TypeVar("T")
_A_FOLDER = 1000


class Table:
    """Rows of the result."""

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        self.rows = list(rows)

    def timed(self, name: str, count: int, action: Callable[[], T]) -> T:
        """Run an action about ``count`` images, and print what it took of each."""
        before, started = from_here(), time.perf_counter()
        cpu = sum(os.times()[:4])
        result = action()
        row = {
            "what": name,
            "images": count,
            "seconds": time.perf_counter() - started,
            "us_of_a_core": 1e6 * (sum(os.times()[:4]) - cpu) / count,
            "bytes_stay": (memory("VmRSS") - before) / count,
            "bytes_peak": (memory("VmHWM") - before) / count,
        }
        self.rows = [old for old in self.rows if (old["what"], old["images"]) != (name, count)] + [row]
        print(json.dumps(row), flush=True)
        return result

    def markdown(self) -> str:
        """A line for each action."""
        lines = [
            "| | images | seconds | µs of a core an image | stays, bytes an image | peak, bytes an image |",
            "|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            numbers = f"{row['us_of_a_core']:.2f} | {round(row['bytes_stay'])} | {round(row['bytes_peak'])}"
            lines.append(f"| {row['what']} | {row['images']:,} | {row['seconds']:.1f} | {numbers} |")
        return "\n".join(lines) + "\n"


def real(table: Table, count: int, scratch: Path) -> None:
    """Files that are there."""
    data = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 100, 3)).save(data, "JPEG")
    one = scratch / "one"
    one.write_bytes(data.getvalue())
    root = scratch / "data"
    for start in range(0, count, _A_FOLDER):
        folder = root / f"n{start // _A_FOLDER:08d}"
        folder.mkdir(parents=True)
        for number in range(start, min(start + _A_FOLDER, count)):
            os.link(one, folder / f"{folder.name}_{number:08d}.JPEG")
    table.timed("listing", count, lambda: list_files(root))
    manifest = table.timed("listing, header check and manifest", count, lambda: Manifest.scan(root))
    table.timed("writing manifest.tsv", count, lambda: manifest.save(scratch / "manifest.tsv"))
    again = table.timed("reading it and its digest", count, lambda: Manifest.load(scratch / "manifest.tsv"))
    table.timed("check of a resumed run", count, again.check)


def made_up(table: Table, count: int, scratch: Path, *, text: bool = True) -> None:
    """Names alone."""
    table.timed("order of an epoch", count, lambda: epoch_order(count, seed=0, epoch=0))

    def paths() -> PackedPaths:
        def some(start: int) -> PackedPaths:
            numbers = range(start, min(start + (1 << 16), count))
            return PackedPaths(f"n{n // 1300:08d}/n{n // 1300:08d}_{n:09d}.JPEG" for n in numbers)

        return PackedPaths.join(some(start) for start in range(0, count, 1 << 16))

    names = table.timed("packed names of 34 characters", count, paths)
    hashes = PackedPaths.of_text(np.full(16 * count, ord("7"), dtype=np.uint8), 16 * np.arange(1, count + 1))

    def build() -> Manifest:
        return Manifest.from_columns(
            FolderSource(root=Path("/data"), paths=names), sizes=np.full(count, 110_000), sha1=hashes,
            names=map(first_folder, names), excluded=[], on_bad_image="error",
        )  # fmt: skip

    manifest = table.timed("manifest of them", count, build)
    table.timed("digest", count, manifest.digest)
    if text:
        table.timed("writing manifest.tsv", count, lambda: manifest.save(scratch / "names.tsv"))
    table.timed("columns for processes of a machine", count, lambda: write_pickle(manifest, scratch / "m"))


def made_up_again(table: Table, count: int, scratch: Path, *, text: bool = True) -> None:
    """What another process, and a resumed run, do with what :func:`made_up` wrote."""
    table.timed("mapping the columns", count, lambda: mapped_pickle(scratch / "m"))
    if text:
        table.timed("reading manifest.tsv and its digest", count, lambda: Manifest.load(scratch / "names.tsv"))


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=float, default=1e6)
    parser.add_argument("--names", type=float, default=1e7)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--no-text", action="store_true")
    chosen = parser.parse_args()
    output = chosen.output.with_suffix(".json")
    table = Table(json.loads(output.read_text())["rows"] if output.exists() else ())
    chosen.scratch.mkdir(parents=True)
    try:
        if chosen.files:
            real(table, int(chosen.files), chosen.scratch)
        if chosen.names:
            made_up(table, int(chosen.names), chosen.scratch, text=not chosen.no_text)
            made_up_again(table, int(chosen.names), chosen.scratch, text=not chosen.no_text)
    finally:
        shutil.rmtree(chosen.scratch)
    facts = {"cores": available_cores(), "rows": table.rows}
    output.write_text(json.dumps(facts, indent=1) + "\n")
    chosen.output.with_suffix(".md").write_text(table.markdown())


if __name__ == "__main__":
    main()
