"""Read SAEs that other tools wrote."""

from posmask.interop.reading.saelens import GEMMA_SCOPE_FILE, import_sae, is_external, read_external

__all__ = ["GEMMA_SCOPE_FILE", "import_sae", "is_external", "read_external"]
