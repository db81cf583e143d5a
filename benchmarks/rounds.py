"""Order of requests and statistics of a comparison on a machine whose speed drifts.

Each request of a peer stands between two requests of ours. Its ratio is its time over the mean of these two, in which a
steady change of the machine's speed cancels. A comparison reports the median of the ratios of all rounds and their
range.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Protocol

WIDE = 1.5
"""A comparison whose largest ratio is more than this times its smallest is marked as wide."""
LEAST_ROUNDS = 2


class Asked(Protocol):
    """What does one thing each time it is asked, and appends its answer to `answers`."""

    answers: list[dict]

    def ask(self) -> None: ...


def in_turn(
    ours: Sequence[Asked], theirs: Sequence[Asked], n_rounds: int, warm_up: int = 2, seconds: float | None = None
) -> None:
    """Warm up, then ask in rounds: ours, the first peer, ours, the second peer, ours, and so on.

    Args:
        warm_up: requests of each before the first that counts.
        seconds: no round begins after them, except the first two.
    """
    started = time.monotonic()
    for worker in (*ours, *theirs):
        for _ in range(warm_up):
            worker.ask()
        worker.answers.clear()
    _ask(ours)
    for done in range(n_rounds):
        if seconds is not None and done >= LEAST_ROUNDS and time.monotonic() - started > seconds:
            break
        for peer in theirs:
            peer.ask()
            _ask(ours)


def _ask(workers: Sequence[Asked]) -> None:
    for worker in workers:
        worker.ask()


def ratios(ours: Sequence[float], theirs: Sequence[float], place: int, n_peers: int) -> list[float]:
    """The ratio of each round.

    Args:
        ours: times of one of ours, in the order of `in_turn`: one before everything and one after each peer's request.
        theirs: times of one peer, one per round.
        place: of the peer among the `n_peers`.
    """
    return [time / statistics.mean(ours[number * n_peers + place :][:2]) for number, time in enumerate(theirs)]


def figures(ours: Sequence[float], theirs: Sequence[float], place: int, n_peers: int) -> dict[str, float]:
    """The numbers of one comparison: median times, the median ratio and its range."""
    rounds = ratios(ours, theirs, place, n_peers)
    return {
        "ours_ms": round(statistics.median(ours), 2),
        "peer_ms": round(statistics.median(theirs), 2),
        "ratio": round(statistics.median(rounds), 2),
        "low": round(min(rounds), 2),
        "high": round(max(rounds), 2),
        "rounds": len(rounds),
    }


def is_wide(row: dict) -> bool:
    """Whether the rounds of a comparison differ so much that its ratio is uncertain."""
    return row["high"] > WIDE * row["low"]
