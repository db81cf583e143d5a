"""Reading in a thread while the caller computes."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["read_ahead"]

T = TypeVar("T")
_SECONDS = 0.1  # after which a waiting thread checks whether the iteration was abandoned


def read_ahead(items: Iterable[T], n_ahead: int) -> Iterator[T]:
    """Iterate over items that a thread produces, up to `n_ahead` of them before they are needed.

    An exception in the thread is raised where the item was expected. The thread ends with the iteration, also if that
    is abandoned.

    >>> list(read_ahead(iter("abc"), 2))
    ['a', 'b', 'c']
    """
    finished, abandoned = object(), threading.Event()
    ready: queue.Queue[object] = queue.Queue(n_ahead)

    def put(item: object) -> None:
        while not abandoned.is_set():
            try:
                return ready.put(item, timeout=_SECONDS)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for item in items:
                put(item)
                if abandoned.is_set():
                    return
            put(finished)
        except BaseException as error:
            put(_Failure(error))

    thread = threading.Thread(target=produce, name="read ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not finished:
            if isinstance(item, _Failure):
                raise item.error
            yield item  # type: ignore[misc]
    finally:
        abandoned.set()
        thread.join(10 * _SECONDS)


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error
