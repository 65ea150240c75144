"""Results of evaluations as text tables."""

import io
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def accuracy_table(result: dict[str, Any], *, width: int = 100) -> str:
    """Encoders down, protocols across: top-1 in percent with its binomial standard error, and top-5.

    Args:
        result: what an ``evaluate_*`` function returned.
        width: most columns of text.
    """
    protocols = list(dict.fromkeys(row["protocol"] for row in result["results"]))
    encoders = list(dict.fromkeys(row["encoder"] for row in result["results"]))
    cells = {(row["encoder"], row["protocol"]): row for row in result["results"]}
    data = result["data"]
    title = (
        f"{result['protocol']}: {data['classes']} classes, {data['train']['images']:,} training and "
        f"{data['val']['images']:,} validation images"
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("encoder")
    for protocol in protocols:
        table.add_column(f"{protocol.removeprefix(result['protocol'] + '-')} top-1 %", justify="right")
        table.add_column("top-5 %", justify="right")
    for encoder in encoders:
        values = []
        for protocol in protocols:
            row = cells[encoder, protocol]
            values += [f"{100 * row['top1']:.1f} ± {100 * row['top1_standard_error']:.1f}", f"{100 * row['top5']:.1f}"]
        table.add_row(encoder, *values)
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return f"{title}\n{text.getvalue().rstrip()}"
