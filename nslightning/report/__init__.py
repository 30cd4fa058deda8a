"""Renders run folders and audits as HTML pages with interactive figures, and measurements as text.

``pages.py`` is the one place that makes HTML; the figures' Vega-Lite specs are in ``charts/``, and Vega itself is in
``vega/``.
"""

from .pages import chart
from .run_folders import ReportError, RunFolder, find_runs, read_run
from .runs_page import page

__all__ = ["ReportError", "RunFolder", "chart", "find_runs", "page", "read_run"]
