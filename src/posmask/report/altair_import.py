"""Import altair where a user has no home, as in some containers. To be imported before any module that imports altair.

Altair asks for the home folder when it is imported, though it writes to it for its own datasets only.
"""

import os
from pathlib import Path

try:
    Path.home()
except RuntimeError:
    os.environ["HOME"] = os.devnull
    import altair  # noqa: F401

    del os.environ["HOME"]
