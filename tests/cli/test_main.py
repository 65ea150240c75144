import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sslfast import __version__
from sslfast.cli import main as cli
from sslfast.cli.exit_codes import EXIT_CODES
from sslfast.config import from_dict, load_json
from sslfast.data.manifest import Manifest
from sslfast.recipes.registry import RECIPES
from sslfast.runs.log import read_log
from tests.tiny import Tiny, TinyConfig, write_images


def tiny() -> TinyConfig:
    """Six epochs of a tiny method."""
    return TinyConfig()


def tiny_long() -> TinyConfig:
    """The same, longer."""
    return TinyConfig(epochs=600)


@pytest.fixture(autouse=True)
def recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in reversed(list(RECIPES)):  # put back in their order
        monkeypatch.delitem(RECIPES, name)
    monkeypatch.setitem(RECIPES, "tiny", tiny)
    monkeypatch.setitem(RECIPES, "tiny-long", tiny_long)
    monkeypatch.setenv("COLUMNS", "200")


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The single line on standard error."""
    text = capsys.readouterr().err
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    assert text.startswith("sslfast: error: ")
    return text.strip()


def test_help_lists_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for expected in (*cli.COMMANDS, "--version", EXIT_CODES):
        assert expected in text
    assert cli.main([]) == 2


@pytest.mark.parametrize("group", ["evaluate", "data", "bench"])
def test_help_of_groups(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([group, "--help"]) == 0
    assert f"usage: sslfast {group} " in capsys.readouterr().out
    assert cli.main([group]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"sslfast {__version__}\n"


def test_dispatch_imports_nothing_heavy() -> None:
    code = (
        "import sys; from sslfast.cli.main import main; main(['--help']); main(['--version']);"
        "heavy = {'torch', 'numpy', 'tyro', 'rich', 'PIL', 'torchvision'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("words", "code"), [("--version", 0), ("data verify /nowhere", 2)])
def test_streams_that_the_starting_program_closed(closed: str, words: str, code: int, tmp_path: Path) -> None:
    """The file that is opened next must not get what is printed."""
    program = (
        "import os, sys; from sslfast.cli.main import main; main(['--version']); file = open('next', 'w');"
        f"os.write(2, b'a library'); print('x'); print('y', file=sys.stderr); sys.exit(main({words.split()!r}))"
    )
    done = subprocess.run(f'"{sys.executable}" -c "{program}" {closed}', shell=True, cwd=tmp_path, check=False)
    assert done.returncode == code
    assert (tmp_path / "next").read_text() == ""


def test_pretrain_help_lists_recipes_options_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "--help"]) == 0
    text = capsys.readouterr().out
    for expected in (
        "tiny: Six epochs of a tiny method.",
        "tiny-long: The same, longer.",
        "75   stopped by a signal (SIGTERM, SIGINT, SIGHUP,",
        "--epochs INT",
        "Passes over the data; the cosine ends with the last one. (default: 6)",
        "--optim.momentum FLOAT",
        "--method.bank-momentum FLOAT",
        "--loader.on-bad-image {error,skip}",
        "--resume auto|never|PATH",
        "--dry-run",
        "DATA",
    ):
        assert expected in text, expected


def test_pretrain_runs_and_records_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    options = ["--recipe", "tiny", "--epochs", "2", "--optim.momentum=0.5", "--workers", "0", "-o", str(output)]
    assert cli.main(["pretrain", "synthetic:17", *options]) == 0
    text = capsys.readouterr().out
    for expected in (
        "synthetic: 17 images",
        "2 epochs x 4 steps of 4 = 8 steps",
        str(output),
        "samples/s",
        "step_00000008.pt",
    ):
        assert expected in text, expected
    config = from_dict(TinyConfig, load_json(output / "config.json"))
    assert (config.recipe, config.epochs, config.optim.momentum, config.loader.workers) == ("tiny", 2, 0.5, 0)
    assert [record["step"] for record in read_log(output / "log.jsonl")] == [3, 6, 8]


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert cli.main(["pretrain", "synthetic:17", "--recipe=tiny", "--output", str(output), "--dry-run"]) == 0
    assert "24 steps" in capsys.readouterr().out
    assert not output.exists()


def test_default_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pretrain", "synthetic:17", "--recipe", "tiny", "--dry-run"]) == 0
    assert "runs/tiny-synthetic (new run)" in capsys.readouterr().out


def test_resume_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["pretrain", "synthetic:17", "--recipe", "tiny", "-o", str(tmp_path)]
    assert cli.main(run) == 0
    assert cli.main([*run, "--dry-run"]) == 0
    assert "resumes after step 24" in capsys.readouterr().out
    assert cli.main(run) == 0
    assert "resumed from" in capsys.readouterr().err
    assert cli.main([*run, "--resume", "never"]) == 2
    assert "already holds a run" in error_line(capsys)
    assert cli.main([*run, "--seed", "1"]) == 2
    assert "seed was 0, is 1" in error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pretrian"], "unknown command 'pretrian'; did you mean pretrain or "),
        (["evaluate", "kn"], "unknown command of evaluate 'kn'; did you mean knn?"),
        (["pretrain", "synthetic:9"], "--recipe is missing; sslfast pretrain DATA --recipe tiny|tiny-long"),
        (["pretrain", "synthetic:9", "--recipe", "tinny"], "unknown recipe 'tinny'; did you mean tiny"),
        (["pretrain", "/nowhere", "--recipe", "tiny"], "/nowhere does not exist"),
        (["pretrain", "synthetic:0", "--recipe", "tiny"], "synthetic:N needs a number of images of at least 1"),
        (["pretrain", "synthetic:9", "--recipe", "tiny", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["pretrain", "synthetic:9", "--recipe", "tiny", "--device", "cuda:77"], "device='cuda:77', but torch sees"),
        (["pretrain", "synthetic:3", "--recipe", "tiny"], "3"),
        (["pretrain", "", "--recipe", "tiny"], "an argument is empty: give it a value"),
        (["pretrain", "synthetic:9", "--recipe", "tiny", "--output", ""], "--output is empty: give it a value"),
        (["pretrain", "synthetic:9", "--recipe", "tiny", "--output="], "--output is empty: give it a value"),
        (["preview", "."], "--recipe is missing; sslfast preview DATA"),
        (["data", "verify", "/nowhere"], "/nowhere does not exist"),
        (["bench", "opps"], "unknown command of bench 'opps'; did you mean ops"),
        (["bench", "ops", "--rounds", "0"], "rounds must be at least 1, got 0"),
        (["bench", "ops", "--device", "cuda:77"], "device='cuda:77', but torch sees"),
        (["bench", "step", "--recipe", "tinny"], "unknown recipe 'tinny'; did you mean tiny"),
        (["bench", "loader", "/nowhere", "--recipe", "tiny"], "/nowhere does not exist"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    assert expected in error_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_unknown_option_suggests_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "synthetic:9", "--recipe", "tiny", "--epoch", "3"]) == 2
    assert "--epochs" in capsys.readouterr().err


def test_traceback_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSLFAST_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown command"):
        cli.main(["nothing"])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
        RuntimeError("could not create a primitive"),
        ImportError("libx.so: failed to map segment from shared object"),
    ],
)
def test_no_memory_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["info"]) == 2
    line = error_line(capsys)
    assert "memory ran out (" in line
    assert "use smaller batches (--batch-size), fewer processes (--workers) or smaller images" in line


def test_missing_package_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("pretrain", "options", "usage"):
        monkeypatch.delitem(sys.modules, f"sslfast.cli.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.main(["pretrain", "synthetic:9", "--recipe", "tiny"]) == 2
    line = error_line(capsys)
    assert "tyro" in line
    assert "pip install 'sslfast[train]'" in line


def test_info_runs_without_the_parser(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "sslfast.cli.options", raising=False)
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.main(["info"]) == 0
    assert f"sslfast {__version__}" in capsys.readouterr().out


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["sslfast"] == __version__
    assert set(facts) == {"versions", "core", "devices", "packages", "loaders", "plugins"}
    assert cli.main(["info", "--jsn"]) == 2
    assert "--json" in capsys.readouterr().err


def test_loss_that_is_not_finite_exits_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RECIPES, "tiny", lambda: TinyConfig(method=Tiny.Config(bad_step=6)))
    assert cli.main(["pretrain", "synthetic:17", "--recipe", "tiny", "-o", str(tmp_path)]) == 3
    line = error_line(capsys)
    assert "the loss of step 7 is not finite" in line
    assert "step_00000005.pt" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_exits_75_and_the_same_command_resumes(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pretrain", "synthetic:17", "--recipe", "tiny", "-o", str(tmp_path)]
    after_step = Tiny.after_step
    steps = 0

    def signal_once(self: Tiny) -> None:
        nonlocal steps
        after_step(self)
        steps += 1
        if steps == 4:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Tiny, "after_step", signal_once)
    assert cli.main(command) == 75
    assert f"stopped by {number.name} after step 4/24" in capsys.readouterr().err
    assert cli.main(command) == 0
    assert "step 4/24" in capsys.readouterr().err


def test_bad_images_are_skipped_counted_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = tmp_path / "data", tmp_path / "run"
    write_images(data, 16)
    (data / "class0" / "empty.png").write_bytes(b"")
    cut = data / "class1" / "cut.png"
    cut.write_bytes((data / "class1" / "01.png").read_bytes()[:-200])
    verified = tmp_path / "verified.tsv"
    assert cli.main(["data", "verify", str(data), "-o", str(verified)]) == 1
    text = capsys.readouterr().out
    assert "class0/empty.png\t" in text
    assert "class1/cut.png\t" in text
    assert "16 of 18 images can be used, 2 classes" in text
    command = ["pretrain", str(data), "--recipe", "tiny", "-o", str(output), "--workers", "1"]
    assert cli.main(command) == 2
    assert "empty.png" in error_line(capsys)
    assert cli.main([*command, "--on-bad-image", "skip"]) == 0
    text = capsys.readouterr().out
    assert "2 images could not be used" in text
    listed = [line.split("\t")[0] for line in (output / "bad_images.txt").read_text().splitlines()]
    assert listed == ["class0/empty.png", "class1/cut.png"]
    known = ["pretrain", str(verified), "--recipe", "tiny", "-o", str(tmp_path / "known"), "--workers", "0"]
    assert cli.main(known) == 2
    assert "2 images of" in error_line(capsys)
    assert cli.main([*known, "--on-bad-image", "skip"]) == 0
    assert "16 images" in capsys.readouterr().out
    assert cli.main([*known, "--on-bad-image", "skip"]) == 0
    assert "resumed from" in capsys.readouterr().err
    (data / "class0" / "00.png").unlink()  # a bad image to skip, as while a run goes on; an error otherwise
    assert cli.main([*command, "--on-bad-image", "skip"]) == 0
    assert "resumed from" in capsys.readouterr().err
    assert cli.main([*command, "--on-bad-image", "error"]) == 2
    assert "1 missing: class0/00.png" in error_line(capsys)
    (data / "class0" / "02.png").write_bytes(b"")
    assert cli.main([*command, "--on-bad-image", "skip"]) == 2
    assert "1 changed: class0/02.png" in error_line(capsys)


def test_data_verify_of_good_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "photos", 3)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "verify", "photos", "--workers", "2"]) == 0
    assert capsys.readouterr().out == "3 of 3 images can be used, 2 classes; wrote photos.tsv\n"
    assert Manifest.load("photos.tsv").verified
    assert cli.main(["data", "verify", "--help"]) == 0
    assert cli.main(["data", "verify"]) == 2


def test_evaluating_a_missing_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        write_images(tmp_path / split, 8)
    assert cli.main(["evaluate", "knn", str(tmp_path / "no_run"), str(tmp_path)]) == 2
    assert "no_run" in error_line(capsys)


@pytest.mark.parametrize("command", ["evaluate knn", "evaluate linear", "evaluate lowshot", "neighbours"])
def test_help_names_the_positional_arguments(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command.split(), "--help"]) == 0
    usage = capsys.readouterr().out.split("\n\n")[0]
    assert usage.startswith(f"usage: sslfast {command} [-h] [OPTIONS] RUN ")
    assert "PATH" not in usage


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["--help"],
        ["evaluate", "--help"],
        ["nothing"],
        ["pretrain", "missing", "--recipe", "pirl-small"],
    ],
    ids=" ".join,
)
def test_what_needs_no_torch_does_not_import_it(arguments: list[str]) -> None:
    code = (
        "import sys; from sslfast.cli.main import main; main(sys.argv[1:]); "
        "assert not {'torch', 'numpy', 'tyro'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
