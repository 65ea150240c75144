"""Results of evaluations as text tables."""

import io
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sslfast.text import printable


def accuracy_table(result: dict[str, Any], *, width: int = 100) -> str:
    """Encoders down, protocols across: top-1 in percent with its binomial standard error, and top-5.

    Args:
        result: of an ``evaluate_*`` function.
        width: maximum number of columns of text.
    """
    protocols = list(dict.fromkeys(row["protocol"] for row in result["results"]))
    encoders = list(dict.fromkeys(row["encoder"] for row in result["results"]))
    cells = {(row["encoder"], row["protocol"]): row for row in result["results"]}
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("encoder")
    for protocol in protocols:
        (heading,) = _plain(f"{protocol.removeprefix(result['protocol'] + '-')} top-1 %")
        table.add_column(heading, justify="right")
        table.add_column("top-5 %", justify="right")
    for encoder in encoders:
        values = []
        for protocol in protocols:
            row = cells[encoder, protocol]
            values += [f"{100 * row['top1']:.1f} ± {100 * row['top1_standard_error']:.1f}", f"{100 * row['top5']:.1f}"]
        table.add_row(*_plain(encoder, *values))
    return _print(_title(result), table, width)


def layer_table(result: dict[str, Any], *, width: int = 100) -> str:
    """A line per classifier and the best of each encoder: top-1 and top-5 in percent.

    After ± is the standard deviation over seeds, or for one seed the binomial standard error.
    """
    many = len(result["seeds"]) > 1
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("encoder", "classifier"):
        table.add_column(heading)
    for heading in ("top-1 %", "top-5 %"):
        table.add_column(heading, justify="right")
    for row in (*result["results"], *result.get("best", ())):
        error = "spread" if many else "standard_error"
        cells = [f"{100 * row[top]:.1f} ± {100 * row[f'{top}_{error}']:.1f}" for top in ("top1", "top5")]
        table.add_row(*_plain(row["encoder"], row["protocol"].removeprefix(f"{result['protocol']}-"), *cells))
    words = f", mean and spread of {len(result['seeds'])} seeds" if many else ""
    return _print(_title(result) + words, table, width)


def precision_table(result: dict[str, Any], *, width: int = 100) -> str:
    """A line per classifier: mean average precision in percent, with the standard deviation over draws, if any."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("encoder", "layer", "images of a class"):
        table.add_column(heading)
    table.add_column("mAP %", justify="right")
    for row in result["results"]:
        spread = f" ± {100 * row['mAP_spread']:.1f}" if "mAP_spread" in row else ""
        table.add_row(
            *_plain(row["encoder"], row["layer"], str(row.get("k", "all")), f"{100 * row['mAP']:.1f}{spread}")
        )
    return _print(_title(result), table, width)


def detection_table(result: dict[str, Any], *, width: int = 100) -> str:
    """A line per encoder and rule (COCO's; VOC 2007's, exact and as detectron2 computes it): AP in percent, with the
    standard deviation over seeds."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("encoder", "rule"):
        table.add_column(heading)
    for heading in ("AP", "AP50", "AP75"):
        table.add_column(heading, justify="right")
    rules = {"": "COCO", "voc07_": "VOC07", "voc07_detectron2_": "VOC07, detectron2"}
    for row in result["results"]:
        for start, words in rules.items():
            keys = [f"{start}{name}" for name in ("ap", "ap50", "ap75")]
            spreads = [f" ± {100 * row[f'{key}_spread']:.1f}" if f"{key}_spread" in row else "" for key in keys]
            cells = [f"{100 * row[key]:.1f}{spread}" for key, spread in zip(keys, spreads, strict=True)]
            table.add_row(*_plain(row["encoder"], words, *cells))
    return _print(_title(result), table, width)


def _plain(*cells: str) -> list[Text]:
    """Cells without markup: a name may hold the brackets that rich reads as styles."""
    return [Text(printable(cell)) for cell in cells]


def _title(result: dict[str, Any]) -> str:
    data = result["data"]
    return printable(
        f"{result['protocol']}: {data['classes']} classes, {data['train']['images']:,} training and "
        f"{data['val']['images']:,} validation images"
    )


def _print(title: str, table: Table, width: int) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return f"{title}\n{text.getvalue().rstrip()}"
