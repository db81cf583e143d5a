"""Call vl_convert, which runs Vega in V8.

Under a limit of address space (`ulimit -v`) V8 ends the process that it runs in, so it then runs in another one.
"""

import pickle
import subprocess
import sys
from typing import Any

from posmask.errors import OutOfMemory

__all__ = ["call_vl_convert"]

_IN_ANOTHER_PROCESS = """
import pickle, sys
import vl_convert
name, arguments = pickle.load(sys.stdin.buffer)
pickle.dump(getattr(vl_convert, name)(*arguments), sys.stdout.buffer)
"""


def call_vl_convert(function: str, *arguments: Any) -> Any:
    """Return the result of a function of vl_convert.

    Raises:
        OutOfMemory: V8 cannot start under the process's limit of address space.
    """
    limit = _address_space()
    if limit is None:
        import vl_convert

        return getattr(vl_convert, function)(*arguments)
    done = subprocess.run(
        [sys.executable, "-c", _IN_ANOTHER_PROCESS],
        input=pickle.dumps((function, arguments)),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise OutOfMemory(
            f"charts need V8, which cannot start with {limit / 1e9:.1f} GB of address space: raise the limit (`ulimit "
            "-v unlimited`), then write the page with `posmask report`"
        )
    return pickle.loads(done.stdout)


def _address_space() -> int | None:
    """The limit of this process's address space in bytes; None without one."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit
