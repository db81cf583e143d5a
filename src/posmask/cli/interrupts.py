"""End the process soon after Ctrl-C, whatever its threads do."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

__all__ = ["INTERRUPTED", "interrupts"]

INTERRUPTED = 130
"""Exit code of an interrupted command."""
_SECONDS = 2.0
_NOTICE_SECONDS = 0.1
"""Within which the thread that waits for a Ctrl-C notices it."""


@contextmanager
def interrupts() -> Iterator[None]:
    """End the process at the latest two seconds after a Ctrl-C that arrives in the block, with exit code 130.

    `KeyboardInterrupt` is raised as usual. But the main thread may wait for others (an upload that is retried, a shard
    that is written) in the block. When the block ends by any exception after a Ctrl-C, the process ends at once: the
    end of the interpreter may take many seconds, in which no thread can run. Files and folders are written so that a
    process may end at any moment; helper processes end with this one.
    """
    if threading.current_thread() is not threading.main_thread():  # Signals arrive in the main thread only.
        yield
        return
    arrived, sent = os.pipe()
    os.set_blocking(sent, False)
    before = signal.set_wakeup_fd(sent, warn_on_full_buffer=False)
    interrupted = threading.Event()
    threading.Thread(target=_end_after_interrupt, args=(arrived, interrupted), daemon=True).start()
    try:
        yield
    except BaseException as ended:
        code = ended.code if isinstance(ended, SystemExit) and isinstance(ended.code, int) else None
        if code in (None, INTERRUPTED):
            interrupted.wait(_NOTICE_SECONDS)
        if interrupted.is_set():
            if code is None:  # Compiled code turns `KeyboardInterrupt` into other errors.
                print("\nposmask: interrupted", file=sys.stderr)
            _end(INTERRUPTED if code is None else code)
        raise
    finally:
        signal.set_wakeup_fd(before)
        os.close(sent)


def _end_after_interrupt(arrived: int, interrupted: threading.Event) -> None:
    with os.fdopen(arrived, "rb", buffering=0) as numbers:
        while (number := numbers.read(1)) and number[0] != signal.SIGINT:
            pass
    if number:
        interrupted.set()
        time.sleep(_SECONDS)
        _end(INTERRUPTED)


def _end(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # Nobody reads it any more.
            stream.flush()
    os._exit(code)
