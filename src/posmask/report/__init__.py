"""Run folders -> one self-contained HTML page. Reads folders and nothing else; needs no torch."""

from posmask.report.page import write_report

__all__ = ["write_report"]
