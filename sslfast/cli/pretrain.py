"""``sslfast pretrain`` and ``sslfast preview``: every value of a recipe is an option."""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from sslfast.cli.exit_codes import EXIT_INTERRUPTED, EXIT_NOT_FINITE
from sslfast.cli.options import parse_recipe, print_table, report
from sslfast.data import data_name, parse_data
from sslfast.distributed import destroy_process_group, is_main, lost_ranks_named
from sslfast.files import OUTPUT, check_writable
from sslfast.recipes import as_yaml
from sslfast.report import draw_pictures
from sslfast.runs import RunDirectory
from sslfast.training import (
    CollapseError,
    NonFiniteLossError,
    RunInterruptedError,
    TrainConfig,
    Trainer,
    TrainResult,
    check_memory,
    stopping_at_once,
    summary,
)


@dataclass(kw_only=True)
class Pretrain:
    """Options of ``sslfast pretrain``."""

    data: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DATA [DATA ...]")]
    """Folder of images (class folders or flat, any nesting) or of .tar or .parquet shards, one .tar, .parquet, .arrow
    or .zip, a folder of datasets' save_to_disk, a list of images with or without labels (.csv, .tsv, .txt, .lst, .json,
    .jsonl), a manifest of `sslfast data verify` (.tsv), a file of `sslfast data prepare` (.beton), a URL of .tar or
    .parquet shards (https, s3, gs, hf), or synthetic:N for N synthetic images. Several are one data set, in this
    order; a .roots file names one a line."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="RUN")] = None
    """Run directory; default runs/RECIPE-FOLDER."""
    resume: Annotated[str, tyro.conf.arg(metavar="auto|never|PATH")] = "auto"
    """auto: continue from the newest good checkpoint in RUN if there is one. never: refuse a RUN that holds a run.
    PATH: continue from a checkpoint or from another run directory."""
    settings: Annotated[Path | None, tyro.conf.arg(name="config", metavar="FILE|RUN")] = None
    """Settings from a file (.yaml, .toml, .json; the recipe may stand in it), or from a run directory: a new run like
    it. Options on the command line come on top."""
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the whole configuration as YAML, which --config takes, and stop. Needs no DATA."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Check configuration, data, disk space, output directory, lock, checkpoint and loader processes, estimate memory,
    print what would run, and stop."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


@dataclass(kw_only=True)
class Preview:
    """Options of ``sslfast preview``."""

    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """What `sslfast pretrain` takes as DATA, of image files: a folder, shards, a list, a manifest, a URL, ..."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = Path("preview.png")
    """Picture to write."""
    count: int = 4
    """Number of images on the sheet."""
    settings: Annotated[Path | None, tyro.conf.arg(name="config", metavar="FILE|RUN")] = None
    """Settings from a file (.yaml, .toml, .json; the recipe may stand in it), or from a run directory: a new run like
    it. Options on the command line come on top."""
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


def pretrain(arguments: list[str]) -> int:
    """Run ``sslfast pretrain``; returns the exit code."""
    chosen = parse_recipe(Pretrain, arguments, command="pretrain")
    if isinstance(chosen, int):
        return chosen
    if chosen.print_config:
        print(as_yaml(chosen.config), end="")
        return 0
    if not chosen.data:
        raise ValueError("DATA is missing; `sslfast pretrain --help` lists the options")
    config, data = chosen.config, parse_data(chosen.data)
    folder = data_name(data)
    output = chosen.output or Path("runs") / f"{config.recipe}-{folder}"
    try:
        with lost_ranks_named():
            with stopping_at_once():
                trainer = Trainer(config, data, output, resume=chosen.resume, report=report, draw=draw_pictures)
                lines = summary(trainer)
                if chosen.dry_run:
                    try:
                        trainer.check()
                        lines.append(("memory", check_memory(trainer)))
                    finally:
                        trainer.close()
                if trainer.is_main:
                    print_table(lines)
                if chosen.dry_run:
                    return 0
            result = trainer.fit()
    except RunInterruptedError as stop:
        if is_main():
            report(str(stop))
        return EXIT_INTERRUPTED
    except (NonFiniteLossError, CollapseError) as error:
        trainer.report(f"error: {error}")
        return EXIT_NOT_FINITE
    finally:
        destroy_process_group()
    if trainer.is_main:
        _print_result(result, trainer.run)
    return 0


def preview(arguments: list[str]) -> int:
    """Run ``sslfast preview``; returns the exit code."""
    chosen = parse_recipe(Preview, arguments, command="preview")
    if isinstance(chosen, int):
        return chosen
    check_writable(chosen.output, remedy=OUTPUT)
    from sslfast.report import write_preview

    method, seed = chosen.config.method, chosen.config.seed
    method.validate()
    panels = partial(method.preview_panels, seed=seed)
    write_preview(
        chosen.data,
        method.preview_views(),
        chosen.output,
        count=chosen.count,
        seed=seed,
        panels=panels,
        decoding=chosen.config.loader.decoding(),
    )
    print(chosen.output)
    return 0


def _print_result(result: TrainResult, run: RunDirectory) -> None:
    print_table(
        [
            ("steps done", f"{result.step:,} in {result.seconds:.1f} s, {result.samples_per_second:.1f} samples/s"),
            ("waited", f"{result.loader_wait_share:.1%} of the time for data"),
            ("loss", f"{result.metrics.get('loss', float('nan')):.4f}"),
            ("checkpoint", str(result.checkpoint)),
        ]
    )
    if result.bad_images:
        print(f"{result.bad_images} images could not be used, see {run.bad_images}:")
        with suppress(OSError):  # where it could not be written, a line has said so
            print(run.bad_images.read_text(encoding="utf-8", errors="surrogateescape"), end="")
