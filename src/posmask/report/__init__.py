"""Writes run folders as a self-contained HTML page, or as a folder with every latent. Reads run folders only."""

from posmask.report.page import N_LATENTS, write_paper_figures, write_report, write_report_folder
from posmask.report.serving import page_server

__all__ = ["N_LATENTS", "page_server", "write_paper_figures", "write_report", "write_report_folder"]
