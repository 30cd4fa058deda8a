"""What run folders hold, as one HTML page with interactive figures; the figures' Vega-Lite specs are in ``charts/``."""

from .page import chart, page
from .read import ReportError, Run, find_runs, read_run

__all__ = ["ReportError", "Run", "chart", "find_runs", "page", "read_run"]
