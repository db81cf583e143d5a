"""Read SAEs that other tools wrote. `formats` lists the formats; each has a small reader; `convert` does the rest."""

from posmask.interop.reading.sources import (
    SAELENS_PREFIX,
    from_saelens,
    import_sae,
    is_external,
    read_external,
    remarks,
)

__all__ = ["SAELENS_PREFIX", "from_saelens", "import_sae", "is_external", "read_external", "remarks"]
