"""``sslfast pretrain`` and ``sslfast preview``: options made from the recipe's configuration."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from sslfast.cli.exit_codes import EXIT_CODES, EXIT_INTERRUPTED, EXIT_NOT_FINITE
from sslfast.config import nearest
from sslfast.data import PrepareConfig, parse_data
from sslfast.distributed import destroy_process_group
from sslfast.models import CustomTrunkConfig
from sslfast.recipes import RECIPES
from sslfast.training import (
    NonFiniteLossError,
    RunInterruptedError,
    TrainConfig,
    Trainer,
    TrainResult,
    check_memory,
    summary,
)

T = TypeVar("T")

SHORT_OPTIONS = {
    "--workers": "--loader.workers",
    "--on-bad-image": "--loader.on-bad-image",
}
"""Options of nested configurations of ``pretrain`` and ``preview`` that also have a short name."""


@dataclass(kw_only=True)
class Pretrain:
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of images (class folders or flat, any nesting) or of .tar shards, one .tar, a list of `path,label` lines
    (.csv), a manifest of `sslfast data verify` (.tsv), a file of `sslfast data prepare` (.beton), or synthetic:N for N
    synthetic images."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="RUN")] = None
    """Run directory; default runs/RECIPE-FOLDER."""
    resume: Annotated[str, tyro.conf.arg(metavar="auto|never|PATH")] = "auto"
    """auto: go on from the newest good checkpoint in RUN if there is one. never: refuse a RUN that holds a run.
    PATH: a checkpoint or another run directory."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Check configuration, data, disk space, lock and checkpoint, estimate the memory, say what would run, and stop."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


@dataclass(kw_only=True)
class Verify:
    """Decode every image once, list those that cannot be used with the reason, and write the manifest of the others.

    The manifest can be given to `sslfast pretrain` and `sslfast data prepare` in place of the folder: what is bad is
    then known from the start. Exit code 0: all images can be used, 1: some cannot."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of images (class folders or flat, any nesting) or of .tar shards, one .tar, or a list of `path,label`
    lines (.csv)."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """Manifest to write; default NAME-OF-DIR.tsv here."""
    workers: int | None = None
    """Decoding processes; default one per core."""


@dataclass(kw_only=True)
class Prepare:
    """Store the images of a folder in one file for the ffcv loader: row numbers, manifest and checksums inside."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of images or of .tar shards, one .tar, a list (.csv), or a manifest of `sslfast data verify` (.tsv)."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.beton")]
    """File to write. It appears, or replaces an old one, only when it is complete."""
    on_bad_image: Literal["error", "skip"] = "error"
    """error: stop at an image that cannot be used, naming it. skip: leave it out and list it."""
    workers: int | None = None
    """Processes; default one per core."""
    config: Annotated[PrepareConfig, tyro.conf.arg(name="")] = field(default_factory=PrepareConfig)


@dataclass(kw_only=True)
class Preview:
    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of images or of .tar shards, one .tar, a list (.csv), or a manifest of `sslfast data verify` (.tsv)."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = Path("preview.png")
    """Picture to write."""
    count: int = 4
    """Images on the sheet."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


def pretrain(arguments: list[str]) -> int:
    """Run ``sslfast pretrain``; returns the exit code."""
    chosen = _parse_recipe(Pretrain, arguments, command="pretrain")
    if isinstance(chosen, int):
        return chosen
    config, data = chosen.config, parse_data(chosen.data)
    folder = "synthetic" if isinstance(data, int) else data.resolve().name
    output = chosen.output or Path("runs") / f"{config.recipe}-{folder}"
    try:
        trainer = Trainer(config, data, output, resume=chosen.resume, report=report)
        lines = summary(trainer)
        if chosen.dry_run:
            try:
                trainer.check()
                lines.append(("memory", check_memory(trainer)))
            finally:
                trainer.close()
        if trainer.is_main:
            _print_table(lines)
        if chosen.dry_run:
            return 0
        result = trainer.fit()
    except RunInterruptedError as stop:
        trainer.report(str(stop))
        return EXIT_INTERRUPTED
    except NonFiniteLossError as error:
        trainer.report(f"error: {error}")
        return EXIT_NOT_FINITE
    finally:
        destroy_process_group()
    if trainer.is_main:
        _print_result(result, output)
    return 0


def verify(arguments: list[str]) -> int:
    """Run ``sslfast data verify``; returns the exit code."""
    chosen = parse(Verify, arguments, prog="sslfast data verify")
    if isinstance(chosen, int):
        return chosen
    from sslfast.data import verify_images

    manifest, bad = verify_images(chosen.data, workers=chosen.workers, progress=sys.stderr.isatty())
    output = chosen.output or Path(f"{manifest.root.resolve().name or 'root'}.tsv")
    manifest.save(output)
    for path, reason in bad:
        print(f"{printable(path)}\t{printable(reason)}")
    total, classes = len(manifest) + len(bad), len(manifest.classes)
    print(f"{len(manifest):,} of {total:,} images can be used, {classes:,} classes; wrote {output}")
    return 1 if bad else 0


def prepare(arguments: list[str]) -> int:
    """Run ``sslfast data prepare``; returns the exit code."""
    chosen = parse(Prepare, arguments, prog="sslfast data prepare")
    if isinstance(chosen, int):
        return chosen
    from sslfast.data import prepare_beton

    made = prepare_beton(
        chosen.data,
        chosen.output,
        chosen.config,
        on_bad_image=chosen.on_bad_image,
        workers=chosen.workers,
        progress=sys.stderr.isatty(),
    )
    rows = [("images", f"{len(made.manifest):,} in {len(made.manifest.classes):,} classes, {made.size / 1e9:.3f} GB")]
    rows += [(f"{count:,}", done) for done, count in made.counts.items()]
    rows += [("left out", f"{printable(path)} ({printable(reason)})") for path, reason in made.manifest.excluded]
    _print_table([*rows, ("wrote", str(made.path))])
    return 0


def preview(arguments: list[str]) -> int:
    """Run ``sslfast preview``; returns the exit code."""
    chosen = _parse_recipe(Preview, arguments, command="preview")
    if isinstance(chosen, int):
        return chosen

    from sslfast.report import write_preview

    method, seed = chosen.config.method, chosen.config.seed
    method.validate()
    panels = partial(method.preview_panels, seed=seed)
    write_preview(chosen.data, method.preview_views(), chosen.output, count=chosen.count, seed=seed, panels=panels)
    print(chosen.output)
    return 0


def parse(target: Callable[..., T], arguments: list[str], *, prog: str, **options: Any) -> T | int:
    """What tyro makes of the arguments, or the exit code after it has printed its help or what is wrong."""
    try:
        return tyro.cli(target, args=arguments, prog=prog, **options)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2


def _parse_recipe(target: type[T], arguments: list[str], *, command: str) -> T | int:
    # The recipe has chosen the method: its options are the command's, not a subcommand of each method's.
    recipe = _recipe(arguments, command)
    factory = _value(arguments, "--model.factory")
    if factory is not None:  # likewise a factory chooses a trunk with other options than a ResNet's
        recipe.model = CustomTrunkConfig(factory=factory)
    chosen = [("method", type(recipe.method)), ("model", type(recipe.model))]
    train_config = make_dataclass("TrainConfig", chosen, bases=(TrainConfig,), kw_only=True)
    config = Annotated[train_config, tyro.conf.arg(name="")]  # type: ignore[valid-type]
    target = make_dataclass(target.__name__, [("config", config)], bases=(target,), kw_only=True)
    default = target(data=tyro.MISSING, config=train_config(**vars(recipe)))  # type: ignore[call-arg]
    # A part of the configuration that may be absent (a view's jigsaw) is there or not as the recipe says;
    # its values are plain options then, not a subcommand.
    options = {"default": default, "description": _description(), "config": (tyro.conf.AvoidSubcommands,)}
    expanded = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        expanded.append(SHORT_OPTIONS.get(name, name) + equals + value)
    return parse(target, expanded, prog=f"sslfast {command}", **options)


def report(line: str) -> None:
    """One line for the user, on standard error."""
    print(f"sslfast: {line}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """A file name on one line of any terminal: control characters and bytes that are no text as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _recipe(arguments: list[str], command: str) -> TrainConfig:
    """The values of the recipe that ``--recipe`` names; where only help is asked for, of the first one."""
    name = _value(arguments, "--recipe")
    if name is None:
        if not {"-h", "--help"} & set(arguments):
            raise ValueError(f"--recipe is missing; sslfast {command} DATA --recipe {'|'.join(RECIPES)}")
        name = next(iter(RECIPES))
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; {nearest(name, RECIPES)}")
    config = RECIPES[name]()
    config.recipe = name
    return config


def _value(arguments: list[str], option: str) -> str | None:
    """The value of an option that decides which others there are; the last one given, None where there is none."""
    value: str | None = None
    for position, argument in enumerate(arguments):
        if argument == option and position + 1 < len(arguments):
            value = arguments[position + 1]
        elif argument.startswith(f"{option}="):
            value = argument.removeprefix(f"{option}=")
    return value


def _description() -> str:
    lines = []
    for name, make in RECIPES.items():
        paragraph = " ".join((make.__doc__ or "").strip().partition("\n\n")[0].split())
        lines.append(f"  {name}: {paragraph}")
    return "--recipe NAME sets the defaults of all options below:\n" + "\n".join(lines) + f"\n\n{EXIT_CODES}"


def _print_result(result: TrainResult, output: Path) -> None:
    _print_table(
        [
            ("steps done", f"{result.step:,} in {result.seconds:.1f} s, {result.samples_per_second:.1f} samples/s"),
            ("waited", f"{result.loader_wait_share:.1%} of the time for data"),
            ("loss", f"{result.metrics.get('loss', float('nan')):.4f}"),
            ("checkpoint", str(result.checkpoint)),
        ]
    )
    if result.bad_images:
        path = output / "bad_images.txt"
        print(f"{result.bad_images} images could not be used, see {path}:")
        print(path.read_text(encoding="utf-8", errors="surrogateescape"), end="")


def _print_table(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}", flush=True)
