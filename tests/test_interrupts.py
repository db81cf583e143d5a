"""Ctrl-C ends a command within three seconds, whatever its threads do."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import STUDY
from posmask.storage.manifest import damage_under

BUSY = {
    "a pool that is waited for": """
with ThreadPoolExecutor(1) as threads:
    threads.submit(time.sleep, 60)
    ready()
    time.sleep(60)
""",
    "a thread that is waited for at the end": """
threading.Thread(target=time.sleep, args=(60,)).start()
ready()
time.sleep(60)
""",
    "an error that is caught and retried": """
ready()
while True:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        pass
""",
    "a loop without Python": """
ready()
hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
""",
}
BEGIN = """
import hashlib, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # A shell's background jobs ignore the signal.
from concurrent.futures import ThreadPoolExecutor
from posmask.cli import commands
def ready():
    print("ready", flush=True)
def app():
"""


@pytest.mark.parametrize("busy", BUSY)
def test_ctrl_c_ends_a_command_within_three_seconds(busy):
    code = BEGIN + BUSY[busy].replace("\n", "\n    ") + "\ncommands.app = app\ncommands.main()\n"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)  # The work begins after the line.
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        try:
            assert process.wait(30) == 130
            assert time.monotonic() - started < 4  # 2 s alone; others may use the processor.
        finally:
            process.kill()


STAGES = ["training", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("harvest", "evaluation", "page"))]


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_ends_a_run_within_three_seconds(model_folder, tmp_path, stage, jobs):
    study = tmp_path / "study.toml"
    study.write_text(STUDY.replace("MODEL", str(model_folder)))
    script = Path(__file__).parent / "study_in_a_process.py"
    words = [sys.executable, script, "run", study, "--root", tmp_path / "run", "--jobs", str(jobs)]
    with subprocess.Popen(
        words,
        env={**os.environ, "POSMASK_TEST_ENDLESS": stage},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        for line in process.stderr:
            if line == f"stage {stage}\n":
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        try:
            output = process.communicate(timeout=30)[1]
            assert time.monotonic() - started < 4  # 3 s alone; others may use the processor.
            assert process.returncode == 130, output
            assert "Traceback" not in output
        finally:
            process.kill()
    _, problems = damage_under(tmp_path / "run")
    assert problems == []


def test_a_command_that_ends_leaves_neither_a_thread_nor_a_pipe(posmask_command):
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    for _ in range(5):
        posmask_command("--version")
    assert len(os.listdir("/proc/self/fd") if before else []) <= len(before) + 1


@pytest.fixture
def posmask_command(monkeypatch):
    def run(*words):
        from posmask.cli.commands import main

        monkeypatch.setattr("sys.argv", ["posmask", *words])
        with pytest.raises(SystemExit):
            main()

    return run
