"""Ratios of the benchmark on a machine whose speed drifts, simulated with a planted ratio."""

import importlib.util
import json
import math
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
spec = importlib.util.spec_from_file_location("rounds", BENCHMARKS / "rounds.py")
rounds = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rounds)


class Machine:
    """A clock, and a speed that depends on the time and on chance."""

    def __init__(self, speed, noise=0.0):
        self.speed, self.noise, self.now = speed, noise, 0.0
        self.random = random.Random(0)

    def run(self, seconds):
        taken = seconds / self.speed(self.now) * (1 + self.noise * self.random.random())
        self.now += taken
        return 1000 * taken


class Worker:
    def __init__(self, machine, seconds):
        self.machine, self.seconds, self.answers = machine, seconds, []

    def ask(self):
        self.answers.append({"cpu_ms": self.machine.run(self.seconds)})

    def times(self):
        return [answer["cpu_ms"] for answer in self.answers]


def measured(machine, seconds_of_ours, seconds_of_peers, n_rounds):
    ours = [Worker(machine, seconds) for seconds in seconds_of_ours]
    theirs = [Worker(machine, seconds) for seconds in seconds_of_peers]
    rounds.in_turn(ours, theirs, n_rounds)
    return [
        [rounds.figures(own.times(), peer.times(), place, len(theirs)) for place, peer in enumerate(theirs)]
        for own in ours
    ]


def slow_wave(now):
    return 0.8 + 0.2 * math.sin(now / 15)


def falling(now):
    return 1 / (1 + now / 120)


@pytest.mark.parametrize("speed", [slow_wave, falling])
def test_a_planted_ratio_is_recovered_although_the_speed_drifts(speed):
    """Steps of 0.5 and 0.15 s against 3.4 and 1.4 s, while the speed changes by 40 %."""
    for own, row in zip((0.5, 0.15), measured(Machine(speed, 0.05), (0.5, 0.15), (3.4, 1.4), 5), strict=True):
        for peer, numbers in zip((3.4, 1.4), row, strict=True):
            assert numbers["ratio"] == pytest.approx(peer / own, rel=0.06)
            assert numbers["low"] <= numbers["ratio"] <= numbers["high"]
            assert numbers["rounds"] == 5
            assert not rounds.is_wide(numbers)


def test_a_steady_drift_cancels_where_the_ratio_of_separate_runs_is_wrong():
    (numbers,), *_ = measured(Machine(falling), (1.0,), (4.0,), 6)
    assert numbers["ratio"] == pytest.approx(4, rel=0.02)
    machine = Machine(falling)
    first, then = [machine.run(1.0) for _ in range(12)], [machine.run(4.0) for _ in range(6)]
    assert statistics.median(then) / statistics.median(first) > 4.5


def test_one_disturbed_round_does_not_change_the_median_but_widens_the_range():
    steady = Machine(lambda now: 1.0)
    (expected,), *_ = measured(steady, (0.5,), (2.0,), 5)
    hit = Machine(lambda now: 0.4 if 5 < now < 7.5 else 1.0)
    (numbers,), *_ = measured(hit, (0.5,), (2.0,), 5)
    assert numbers["ratio"] == expected["ratio"] == 4
    assert rounds.is_wide(numbers)
    assert not rounds.is_wide(expected)


def test_each_peer_is_compared_with_ours_just_before_and_after_it():
    assert rounds.ratios([1, 3, 5, 7, 9], [8, 32], 0, 2) == [4, 32 / 6]
    assert rounds.ratios([1, 3, 5, 7, 9], [8, 32], 1, 2) == [2, 4]


def test_rounds_stop_after_their_time_but_not_before_the_second(monkeypatch):
    machine = Machine(lambda now: 1.0)
    monkeypatch.setattr(rounds.time, "monotonic", lambda: machine.now)
    for seconds, expected in ((0.0, 2), (15.0, 4), (None, 9)):
        ours, peer = Worker(machine, 1.0), Worker(machine, 2.0)
        rounds.in_turn([ours], [peer], 9, warm_up=1, seconds=seconds)
        assert len(peer.answers) == expected
        assert len(ours.answers) == expected + 1


def test_a_benchmark_process_answers_each_request_with_the_time_of_one_step():
    command = [sys.executable, str(BENCHMARKS / "steps_posmask.py"), "mask-slice@64", "16x32", "1"]
    path = os.pathsep.join([str(BENCHMARKS / "peers"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, input="\n\n", env=environment, capture_output=True, text=True, check=False)
    ready, *answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert ready == {"ready": True}, done.stderr
    assert len(answers) == 2
    assert all(answer["cpu_ms"] > 0 and answer["peak_mb"] > 0 for answer in answers)
