"""Visual output: HTML report, preview sheet, nearest-neighbour sheet, table of runs. Imports ``evaluation`` and what
lies below."""

from sslfast.report.build import ReportConfig, report
from sslfast.report.neighbours import NeighboursConfig, run_neighbours, write_neighbours
from sslfast.report.preview import write_preview
from sslfast.report.run_list import RunSummary, csv_of_runs, list_runs, render_runs, sort_runs
from sslfast.report.run_pictures import draw_pictures

__all__ = [
    "NeighboursConfig",
    "ReportConfig",
    "RunSummary",
    "csv_of_runs",
    "draw_pictures",
    "list_runs",
    "render_runs",
    "report",
    "run_neighbours",
    "sort_runs",
    "write_neighbours",
    "write_preview",
]
