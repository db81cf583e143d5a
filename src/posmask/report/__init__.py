"""Writes run folders as a self-contained HTML page, or as a folder with every latent. Reads run folders only."""

import posmask.report.altair_import  # noqa: F401, before the others
from posmask.report.audit_page import write_audit_figures, write_audit_page
from posmask.report.kept_latents import keep_latents
from posmask.report.page import N_LATENTS, write_paper_figures, write_report, write_report_folder
from posmask.report.serving import page_server

__all__ = [
    "N_LATENTS",
    "keep_latents",
    "page_server",
    "write_audit_figures",
    "write_audit_page",
    "write_paper_figures",
    "write_report",
    "write_report_folder",
]
