"""Visual output: HTML report, preview sheet, nearest-neighbour sheet. Imports ``evaluation`` and what lies
below."""

from sslfast.report.build import ReportConfig, report
from sslfast.report.neighbours import NeighboursConfig, run_neighbours, write_neighbours
from sslfast.report.preview import write_preview

__all__ = [
    "NeighboursConfig",
    "ReportConfig",
    "report",
    "run_neighbours",
    "write_neighbours",
    "write_preview",
]
