"""Report of a run or a sweep: one self-contained HTML page, its figures, and its tables."""

from hfprune.report.data import ConvergencePoint, FrontierPoint, Generation, ReportData, TextTable
from hfprune.report.figures import figures, save_figures
from hfprune.report.page import render, write_report
from hfprune.report.run_folder import read_run

__all__ = [
    "ConvergencePoint",
    "FrontierPoint",
    "Generation",
    "ReportData",
    "TextTable",
    "figures",
    "read_run",
    "render",
    "save_figures",
    "write_report",
]
