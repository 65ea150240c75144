"""Shards behind URLs, from an HTTP server on this machine that also fails in the ways of real ones."""

import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sslfast.data import open_data, parse_data, reopen_data, shard_cache, verify_images
from sslfast.data.shard_cache import Remote, expand_urls
from sslfast.data.sharded import shard_names
from sslfast.data.source import Url, as_data
from sslfast.loaders.pillow import PillowLoader
from sslfast.loaders.registry import LoaderConfig
from sslfast.training.trainer import Trainer
from sslfast.views.types import CropConfig, ViewConfig
from tests.data.test_parquet import write_shards as write_tables
from tests.data.test_tar import write_shards
from tests.tiny import TinyConfig

VIEWS = {"image": ViewConfig(crop=CropConfig(size=24))}


class Server(ThreadingHTTPServer):
    """Serves a folder; ``faults`` name -> (kind, how many times)."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.faults: dict[str, tuple[str, int]] = {}
        self.gets: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that a fault has sent away


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.gets[name] += 1
        kind, left = self.server.faults.get(name, ("", 0))
        if left <= 0:
            return super().do_GET()
        self.server.faults[name] = (kind, left - 1)
        data = Path(self.translate_path(self.path)).read_bytes()
        if kind.isdecimal():
            return self.send_error(int(kind))
        self.send_response(200)
        self.send_header("Content-Length", str(len(data) - (10 if kind == "wrong" else 0)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2 if kind in ("half", "stall") else len(data) - 10])
        if kind == "stall":
            time.sleep(1.5)
        return None

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    write_shards(tmp_path / "www" / "tars")
    write_tables(tmp_path / "www" / "tables", shards=2, rows=6)
    monkeypatch.setenv("SSLFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_cache, "_PAUSE", 0.01)
    with Server(tmp_path / "www") as server:
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.02))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def raises(pattern: str) -> Any:
    return pytest.raises(ValueError, match=pattern)


def stored(tmp_path: Path) -> int:
    return sum(file.stat().st_size for file in (tmp_path / "cache").iterdir())


@pytest.mark.parametrize("kind", ["tars", "tables"])
def test_shards_elsewhere_are_those_here(server: Server, tmp_path: Path, kind: str) -> None:
    local = open_data(tmp_path / "www" / kind)
    files = sorted(path.name for path in (tmp_path / "www" / kind).iterdir())
    pattern = "{" + ",".join(files) + "}"
    manifest = open_data(f"{server.url}/{kind}/{pattern}")
    assert (type(manifest.source), manifest.paths, manifest.sha1) == (type(local.source), local.paths, local.sha1)
    assert (manifest.digest(), manifest.classes) == (local.digest(), local.classes)
    assert manifest.source.where(0) == f"{server.url}/{kind}/{local.paths[0]}"
    assert np.array_equal(manifest.source.row_shards, local.source.row_shards)
    manifest.save(tmp_path / "m.tsv")
    again = reopen_data(f"{server.url}/{kind}/{pattern}", tmp_path / "m.tsv")
    assert server.gets == dict.fromkeys(files, 1)
    loaders = [
        PillowLoader(data, VIEWS, batch_size=5, seed=1, workers=workers, mixed_shards=1)
        for data, workers in ((local, 0), (again, 2))
    ]
    for one, other in zip(*(loader.epoch(0) for loader in loaders), strict=True):
        assert torch.equal(one.crops["image"], other.crops["image"])
    for loader in loaders:
        loader.close()
    assert verify_images(Url(f"{server.url}/{kind}/{pattern}"), workers=0)[0].digest() == local.digest()
    assert server.gets == dict.fromkeys(files, 1)
    assert reopen_data(tmp_path / "www" / kind, tmp_path / "m.tsv").source.read(2) == local.source.read(2)


def test_the_cache_is_bounded_and_evicts_what_was_used_longest_ago(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted((tmp_path / "www" / "tars").iterdir())
    sizes = [file.stat().st_size for file in files]
    limit = sizes[0] + sizes[1] + 10
    monkeypatch.setenv("SSLFAST_CACHE_GIB", str(limit / 2**30))
    manifest = open_data(f"{server.url}/tars/*.tar")
    local = open_data(tmp_path / "www" / "tars")
    for row in range(len(manifest)):
        assert manifest.source.read(row) == local.source.read(row)
        assert stored(tmp_path) <= limit
    before = server.gets.copy()
    shards = [int(np.flatnonzero(manifest.source.row_shards == shard)[0]) for shard in range(len(files))]
    for shard in (0, 1, 0, 2, 0):
        manifest.source.read(shards[shard])
    asked = server.gets - before
    assert asked[files[2].name] == 1
    manifest.source.read(shards[0])
    assert server.gets - before == asked
    monkeypatch.setenv("SSLFAST_CACHE_GIB", str(1000 / 2**30))
    monkeypatch.setenv("SSLFAST_CACHE", str(tmp_path / "cache" / "other"))
    with raises(
        rf"{server.url}/tars/.* has [0-9,]+ bytes, and the cache .*other may hold 1,000: set SSLFAST_CACHE_GIB"
    ):
        open_data(f"{server.url}/tars/{files[2].name}")
    for text in ("0", "many", "nan"):
        monkeypatch.setenv("SSLFAST_CACHE_GIB", text)
        with raises(rf"SSLFAST_CACHE_GIB must be a number of GiB above 0, got '{text}'"):
            manifest.source.read(0)


def wait_briefly(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Where the server stalls, and only there: on a busy machine it may take a while to answer."""
    if kind == "stall":
        monkeypatch.setattr(shard_cache, "SECONDS", 1.0)


@pytest.mark.parametrize("kind", ["half", "stall", "wrong", "503", "429"])
def test_what_passes_is_tried_again(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    wait_briefly(monkeypatch, kind)
    name = sorted((tmp_path / "www" / "tars").iterdir())[0].name
    server.faults[name] = (kind, 2)
    manifest = open_data(f"{server.url}/tars/{name}")
    assert manifest.sha1 == open_data(tmp_path / "www" / "tars" / name).sha1
    assert server.gets[name] == 3
    assert not [*(tmp_path / "cache").glob("*.part")]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("stall", r"no answer for 1 s, 4 times\): see that network and server work, then start again"),
        ("half", r".*, 4 times\): see that network and server work"),
        ("wrong", r"ConnectionError: [0-9,]+ of [0-9,]+ bytes came, 4 times\): see that network"),
        ("403", r"status 403\): set the credentials of its service"),
        ("404", r"status 404\): correct the URL"),
        ("500", r"status 500\): see that network and server work"),
    ],
)
def test_what_does_not_pass_is_one_line_with_the_url(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, why: str
) -> None:
    wait_briefly(monkeypatch, kind)
    name = sorted((tmp_path / "www" / "tars").iterdir())[0].name
    server.faults[name] = (kind, 99)
    with raises(rf"{server.url}/tars/{name} cannot be read \({why}") as error:
        open_data(f"{server.url}/tars/{name}")
    assert "\n" not in str(error.value)
    assert server.gets[name] == (1 if kind in ("403", "404") else 4)
    server.faults.clear()
    assert len(open_data(f"{server.url}/tars/{name}"))


def test_urls_that_cannot_be_data_are_one_line(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "www" / "x.tar").write_bytes(b"no tar" * 200)
    for url, why in (
        ("none.tar", r"none.tar cannot be read \(status 404\): correct the URL"),
        ("x.tar", r"http://[^ ]*/x.tar is not a tar file, or is compressed"),
        ("list.csv", r"names files .csv: of data elsewhere, .tar or .parquet files are read"),
        (
            "tars/",
            r"/tars/ names no .tar or .parquet file: of a folder elsewhere name the shards, as in .*/tars/\*.tar",
        ),
        ("tars/none-*.tar", r"none-\*.tar matches no file: correct it, or name the shards by {000..099}"),
        ("{x,x}.tar", "names a shard twice"),
    ):
        with raises(why):
            open_data(f"{server.url}/{url}")
    with raises(r"nothing://a/x.tar cannot be read \(ValueError: Protocol not known: nothing\): use https"):
        open_data("nothing://a/x.tar")
    server.shutdown()
    server.server_close()
    with raises(r"x.tar cannot be read \(.*(Cannot connect|refused).*, 4 times\): see that network and server work"):
        open_data(f"{server.url}/x.tar")

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(shard_cache, "import_module", missing)
    with raises(r"s3://a/x.tar needs packages that are not installed: pip install fsspec s3fs$"):
        open_data("s3://a/x.tar")


def test_missing_credentials_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentialsError(Exception):
        """As botocore's, which has no status: nothing was asked."""

    asked = []

    def url_to_fs(url: str) -> Any:
        asked.append(url)
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr("fsspec.core.url_to_fs", url_to_fs)
    with raises(r"x.tar cannot be read \(NoCredentialsError: Unable to locate credentials\): set the credentials of"):
        open_data("s3://a/x.tar")
    assert len(asked) == 1


def test_a_shard_that_changed_there_is_noticed(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/tars/*.tar"
    open_data(url).save(tmp_path / "m.tsv")
    first = sorted((tmp_path / "www" / "tars").iterdir())[0]
    data = first.read_bytes()
    os.utime(first, (1, 1))
    assert reopen_data(url, tmp_path / "m.tsv").source.read(0)  # another date, the same contents
    offset = int(open_data(first).source.offsets[0])  # type: ignore[attr-defined]
    first.write_bytes(data[: offset + 100] + b"?" + data[offset + 101 :])
    os.utime(first, (2, 2))
    with raises("1 changed: .*same size, other content"):
        reopen_data(url, tmp_path / "m.tsv")
    first.write_bytes(data + bytes(10240))
    with raises(rf"1 changed: {first.name} \({len(data)} -> {len(data) + 10240} bytes\)"):
        reopen_data(url, tmp_path / "m.tsv")
    first.unlink()
    with raises(r"the run that .*m.tsv belongs to started with 3 shards \(.*\), and .*: give the data that the run"):
        reopen_data(url, tmp_path / "m.tsv")


def fetch(remote: Remote, queue: Any) -> None:
    for shard in (0, 1, 2, 1, 0, 2):
        with remote.local(shard) as path:
            queue.put(os.path.getsize(path) == remote.sizes[shard])


def test_several_processes_and_a_killed_download(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(path.name for path in (tmp_path / "www" / "tars").iterdir())
    remote = Remote.of([f"{server.url}/tars/{name}" for name in names])
    monkeypatch.setenv("SSLFAST_CACHE_GIB", str((sum(remote.sizes) - 10) / 2**30))
    context = multiprocessing.get_context("fork")
    server.faults[names[0]] = ("stall", 1)
    killed = context.Process(target=fetch, args=(remote, context.SimpleQueue()))
    killed.start()
    while not server.gets[names[0]] or not [*(tmp_path / "cache").glob("*.part")]:
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert [*(tmp_path / "cache").glob("*.part")]
    queue = context.Queue()
    workers = [context.Process(target=fetch, args=(remote, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    assert all(queue.get(timeout=60) for _ in range(18))
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert stored(tmp_path) <= sum(remote.sizes) - 10
    assert not [*(tmp_path / "cache").glob("*.part")]


def test_a_run_resumes_bit_equal(server: Server, tmp_path: Path) -> None:
    config = TinyConfig(epochs=2, loader=LoaderConfig(workers=0, shuffle="shards", mixed_shards=2))
    url = parse_data(f"{server.url}/tars/*.tar")
    whole = Trainer(config, tmp_path / "www" / "tars", tmp_path / "whole", report=lambda _: None).fit()
    Trainer(config, url, tmp_path / "run", report=lambda _: None).fit()
    sorted((tmp_path / "run" / "checkpoints").glob("step_*.pt"))[-1].unlink()
    assert Trainer(config, url, tmp_path / "run", report=lambda _: None).fit().metrics["loss"] == whole.metrics["loss"]


def test_patterns_and_names() -> None:
    assert expand_urls("s3://b/{08..11}/t-{a,b}.tar")[:3] == [
        "s3://b/08/t-a.tar",
        "s3://b/08/t-b.tar",
        "s3://b/09/t-a.tar",
    ]
    assert expand_urls("https://h/{2..0}.tar?x=1") == [f"https://h/{k}.tar?x=1" for k in (2, 1, 0)]
    assert expand_urls("https://h/{x}.tar") == ["https://h/{x}.tar"]
    assert shard_names(["https://h/d/a/1.tar", "https://h/d/b/1.tar?q"]) == ["a/1.tar", "b/1.tar"]
    assert shard_names(["https://h/d/a/1.tar"]) == [""]
    assert as_data(Path("https://h/x.tar")) == "https://h/x.tar"
    assert as_data(["s3://b/x.tar", "there"]) == ("s3://b/x.tar", Path("there").absolute())
