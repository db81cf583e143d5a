"""End the process soon after Ctrl-C, whatever its threads do."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["INTERRUPTED", "interrupts"]

INTERRUPTED = 130
"""Exit code of an interrupted command."""
_SECONDS = 2.0


@contextmanager
def interrupts() -> Iterator[None]:
    """End the process at the latest two seconds after a Ctrl-C that arrives in the block, with exit code 130.

    `KeyboardInterrupt` is raised as usual. But the main thread may wait for others (an upload that is retried, a shard
    that is written), in the block and when the interpreter ends. Files and folders are written so that a process may
    end at any moment; helper processes end with this one.
    """
    if threading.current_thread() is not threading.main_thread():  # Signals arrive in the main thread only.
        yield
        return
    arrived, sent = os.pipe()
    os.set_blocking(sent, False)
    before = signal.set_wakeup_fd(sent, warn_on_full_buffer=False)
    threading.Thread(target=_end_after_interrupt, args=(arrived,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(sent)


def _end_after_interrupt(arrived: int) -> None:
    with os.fdopen(arrived, "rb", buffering=0) as numbers:
        while (number := numbers.read(1)) and number[0] != signal.SIGINT:
            pass
    if number:
        time.sleep(_SECONDS)
        sys.stderr.flush()
        os._exit(INTERRUPTED)
