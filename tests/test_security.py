"""Files of strangers run no code: whatever loads a file is given pickles that would leave a mark."""

import pickle
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sslfast
from sslfast.cli.main import main
from sslfast.data.opening import open_data
from sslfast.evaluation.cache import FeatureCache
from sslfast.evaluation.sgd import ResumeState
from sslfast.runs.checkpoint import load_checkpoint, load_latest


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.mark,))


def plain(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content))


def zipped(path: Path, content: Any) -> None:
    torch.save(content, path)


def legacy(path: Path, content: Any) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def rewritten(path: Path, content: Any) -> None:
    """A good file of torch.save whose pickle was replaced."""
    good = path.with_suffix(".good")
    torch.save({"step": 1, "conv1.weight": torch.zeros(1)}, good)
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            data = pickle.dumps(content, protocol=2) if name.endswith("/data.pkl") else source.read(name)
            target.writestr(name, data)


FORMATS = {"pickle": plain, "torch.save": zipped, "legacy torch.save": legacy, "replaced pickle": rewritten}


def contents(payload: Payload) -> dict[str, Any]:
    """Keys of every kind of file that is read here, and the payload in all of them."""
    names = ("step", "method", "config", "state_dict", "model", "identity", "values", "key", "module", "optimizer")
    return {**dict.fromkeys(names, payload), "conv1.weight": payload}


def test_the_payloads_work(tmp_path: Path) -> None:
    for number, write in enumerate(FORMATS.values()):
        mark = tmp_path / f"mark{number}"
        write(tmp_path / "file", contents(Payload(mark)))
        if write is plain:
            pickle.loads((tmp_path / "file").read_bytes())
        else:
            torch.load(tmp_path / "file", weights_only=False)
        assert mark.exists()


def with_sum(path: Path) -> Path:
    path.with_name(f"{path.name}.sha256").write_text(f"{sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    return path


def refused(call: Callable[..., Any], *args: Any) -> None:
    """One error of one line without torch's advice to load the file as code."""
    with pytest.raises((ValueError, OSError)) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    assert "weights_only" not in text


def read_resume_state(path: Path) -> None:
    assert ResumeState(path, {}).load(nn.Linear(1, 1), torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)) == 0


def read_cache(path: Path) -> None:
    cache = FeatureCache(path.parent)
    wanted = cache.path({"a": 1})
    assert wanted is not None
    path.rename(wanted)
    assert cache.load({"a": 1}) is None


def read_run(path: Path) -> None:
    checkpoints = path.parent / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    with_sum(path.rename(checkpoints / "step_00000001.pt"))
    refused(load_checkpoint, checkpoints / "step_00000001.pt")
    refused(load_latest, checkpoints)
    refused(sslfast.load, checkpoints.parent)
    refused(sslfast.load, checkpoints / "step_00000001.pt")


def read_with_commands(path: Path) -> None:
    data = path.parent / "data"
    run = path.parent / "run"
    (run / "checkpoints").mkdir(parents=True)
    for split in ("train", "val"):
        (data / split / "a").mkdir(parents=True)
    with_sum(path.rename(run / "checkpoints" / "step_00000001.pt"))
    target = str(path.parent / "out.pt")
    assert main(["evaluate", "knn", str(run), str(data)]) == 2
    assert main(["export", str(run), target, "--format", "torchvision"]) == 2
    assert main(["report", str(run), "-o", target]) in (0, 2)


def read_weights(path: Path) -> None:
    for suffix in (".pth", ".pt", ".tar", ".pkl", ".torch", ".safetensors"):
        renamed = path.with_suffix(suffix)
        renamed.write_bytes(path.read_bytes())
        refused(sslfast.load, renamed)


def read_data(path: Path) -> None:
    for suffix in (".tsv", ".beton", ".csv", ".tar", ".zip", ".parquet", ".json", ".jsonl", ".txt", ".npy"):
        renamed = path.with_suffix(suffix)
        renamed.write_bytes(path.read_bytes())
        assert main(["data", "verify", str(renamed)]) == 2
        refused(open_data, renamed)


PLACES = {
    "checkpoint": read_run,
    "commands": read_with_commands,
    "weights": read_weights,
    "feature cache": read_cache,
    "state of a training on features": read_resume_state,
    "data": read_data,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("format", FORMATS)
def test_no_pickle_runs_code(place: str, format: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    FORMATS[format](tmp_path / "file", contents(Payload(mark)))
    PLACES[place](tmp_path / "file")
    assert not mark.exists()
