"""Reading JSON files, which may be damaged or hostile."""

import json
from pathlib import Path
from typing import Any

__all__ = ["read_json"]


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON in UTF-8, or nested too deeply.
    """
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
