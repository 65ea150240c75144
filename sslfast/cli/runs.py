"""``sslfast runs``: a table of the runs below a folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sslfast.cli.usage import parse
from sslfast.report import csv_of_runs, list_runs, render_runs, sort_runs


@dataclass(kw_only=True)
class Runs:
    """One line for each run in and below a folder: state, epochs, loss, best accuracies, and the settings in which runs
    of the same recipe differ."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = Path("runs")
    """Folder that holds run directories, at any depth."""
    sort: str = "name"
    """Column to sort by: name, recipe, state, epochs, loss, an accuracy (knn_top1, val_linear_top1, or an evaluation
    such as knn or linear; the best first) or a setting by its dotted name."""
    columns: tuple[str, ...] = ()
    """Columns to show in place of the usual ones; any that --sort takes."""
    json: bool = False
    """Print JSON."""
    csv: bool = False
    """Print a table with commas."""


def runs(arguments: list[str]) -> int:
    """Run ``sslfast runs``; returns the exit code."""
    chosen = parse(Runs, arguments, prog="sslfast runs", config=(tyro.conf.FlagCreatePairsOff,))
    if isinstance(chosen, int):
        return chosen
    if chosen.json and (chosen.csv or chosen.columns):
        raise ValueError("--json prints everything; leave --csv and --columns out")
    found = sort_runs(list_runs(chosen.folder), chosen.sort)
    if chosen.json:
        print(json.dumps([run.as_dict() for run in found], indent=2))
    elif chosen.csv:
        print(csv_of_runs(found, chosen.columns), end="")
    else:
        print(render_runs(found, chosen.columns))
    return 0
