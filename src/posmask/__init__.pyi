from .errors import PosmaskError
from .report import write_report
from .rows import read_rows
from .sae import SparseAutoencoder, read_sae, write_sae
from .settings import read_study
from .study import run_study
from .summary import summarise
from .verdicts import read_verdicts
from .workbench import fit, make_sae, measure, read_vectors

__all__ = [
    "PosmaskError",
    "SparseAutoencoder",
    "fit",
    "make_sae",
    "measure",
    "read_rows",
    "read_sae",
    "read_study",
    "read_vectors",
    "read_verdicts",
    "run_study",
    "summarise",
    "write_report",
    "write_sae",
]
