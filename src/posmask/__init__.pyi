from .auditing import AuditReport, audit, read_audit
from .errors import PosmaskError
from .interop.reading import from_saelens
from .notebook import fit, make_sae, measure, read_vectors
from .report import write_report
from .results.comparisons import read_verdicts
from .results.rows import read_rows
from .results.table import summarize
from .sae.autoencoder import SparseAutoencoder
from .sae.files import read_sae, write_sae
from .study.run import run_study
from .study.study_file import read_study

__all__ = [
    "AuditReport",
    "PosmaskError",
    "SparseAutoencoder",
    "audit",
    "fit",
    "from_saelens",
    "make_sae",
    "measure",
    "read_audit",
    "read_rows",
    "read_sae",
    "read_study",
    "read_vectors",
    "read_verdicts",
    "run_study",
    "summarize",
    "write_report",
    "write_sae",
]
