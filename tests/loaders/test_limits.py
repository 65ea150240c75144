"""What a machine has left, and that it is compared with what all its ranks need."""

from pathlib import Path

import pytest

from sslfast.data.manifest import Manifest
from sslfast.loaders import limits
from sslfast.loaders.limits import check_limits
from sslfast.loaders.pillow import PillowLoader
from sslfast.views.types import CropConfig, ViewConfig
from tests.pictures import write_folder


@pytest.mark.parametrize(
    ("name", "free", "message"),
    [
        ("free_memory", 300 << 20, r"4 loader workers, 2 ranks on this machine, need 400 MiB .* and 300 MiB are free"),
        ("free_processes", 9, r"2 ranks on this machine, need 16 processes or threads, and 9 more .*ulimit -u"),
        ("free_descriptors", 40, r"4 loader workers need 12 file descriptors .* and 40 of \d+ are free: .*ulimit -n"),
    ],
)
def test_what_all_ranks_need_is_compared_with_what_there_is(
    monkeypatch: pytest.MonkeyPatch, name: str, free: int, message: str
) -> None:
    needs = {"memory": 200 << 20, "processes": 8, "descriptors": 12, "what": "4 loader workers"}
    monkeypatch.setattr(limits, name, lambda: free)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=message):
        check_limits(**needs)  # type: ignore[arg-type]
    for unknown in ("free_memory", "free_processes", "free_descriptors"):
        monkeypatch.setattr(limits, unknown, lambda: None)
    check_limits(**needs)  # type: ignore[arg-type]


def test_a_loader_checks_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.scan(write_folder(tmp_path, ["a.jpg", "b.jpg"]))
    monkeypatch.setattr(limits, "free_memory", lambda: 1000)
    views = {"image": ViewConfig(crop=CropConfig(size=24))}
    with pytest.raises(ValueError, match=r"2 loader workers need \d+ MiB of memory .*use fewer workers \(--loader"):
        PillowLoader(manifest, views, batch_size=2, seed=0, workers=2)
    PillowLoader(manifest, views, batch_size=2, seed=0, workers=0).close()


def test_what_this_machine_has_left() -> None:
    assert (limits.free_memory() or 0) > 1 << 20
    assert (limits.free_descriptors() or 1) > 0


@pytest.mark.parametrize("version", [1, 2])
def test_control_groups_bound_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    folder = tmp_path / ("memory/box" if version == 1 else "box")
    folder.mkdir(parents=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    for name, value in zip(names, (5000, 3000), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text("anon 2000\ninactive_file 1000\n")
    own = "4:memory:/box\n" if version == 1 else "0::/box\n"
    read = limits._read
    monkeypatch.setattr(limits, "_CGROUPS", tmp_path)
    monkeypatch.setattr(limits, "_read", lambda path: own if str(path) == "/proc/self/cgroup" else read(path))
    assert limits.free_memory() == 3000
