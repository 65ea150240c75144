"""What a person looks at: HTML report, preview and neighbour sheets. Imports ``evaluation`` and what lies
below."""

from sslfast.report.build import report
from sslfast.report.neighbours import run_neighbours, write_neighbours
from sslfast.report.preview import write_preview

__all__ = [
    "report",
    "run_neighbours",
    "write_neighbours",
    "write_preview",
]
