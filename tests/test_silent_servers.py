"""Servers that say nothing, close the connection or answer with a page: a sentence within seconds, and no traceback."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from posmask.errors import BadSetting, DamagedFolder, MissingAsset
from posmask.storage import remote
from posmask.study import ray_engine
from posmask.study.study_file import read_study

PAGE = b"<html><body>Please log in to this network</body></html>"
HTML = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(PAGE) + PAGE
)
ANSWERS = {"a page": HTML, "an error": b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"}
ANSWERS |= {"nothing": None, "an early end": b"", "noise": b"\x00\xff" * 50, "half": HTML[:60]}


@contextlib.contextmanager
def serving(answer):
    """Yield the address of a server that answers every request in this way; None: it keeps connections open."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connections = []

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connections.append(connection)
                if answer is not None:
                    with contextlib.suppress(OSError):
                        connection.settimeout(5)
                        connection.recv(65536)
                        connection.sendall(answer)
                        connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_is_no_ray_cluster_is_refused_within_seconds(study_file, answer, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
    monkeypatch.setattr(ray_engine, "_ANSWER_SECONDS", 1)
    study = read_study(study_file)
    started = time.monotonic()
    with serving(ANSWERS[answer]) as address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(BadSetting, match="no Ray cluster can be reached at 127"), ray_engine.connected(study, 1):
            pass
    assert time.monotonic() - started < 10


@pytest.mark.slow
def test_a_ray_cluster_answers(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install -e '.[ray]'")
    code = (
        "import os; from ray.cluster_utils import Cluster; from posmask.study.ray_engine import _check_answers\n"
        "cluster = Cluster(initialize_head=True, head_node_args={'num_cpus': 1})\n"
        "host, port = cluster.address.split(':'); _check_answers(host, int(port)); print('answered')\n"
        "cluster.shutdown()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.endswith("answered\n"), done.stderr


def command(*words, **environment):
    here = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "posmask.cli", *map(str, words)],
        env=here,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


@pytest.mark.parametrize("answer", ["a page", *(pytest.param(way, marks=pytest.mark.slow) for way in ANSWERS)])
def test_a_hub_that_does_not_answer_is_reported(study_file, answer, tmp_path):
    study = tmp_path / "study.toml"
    name = study_file.read_text().partition("[model]\nname = ")[2].partition("\n")[0]
    text = study_file.read_text().replace(name, '"user/model"')
    study.write_text(text.replace('["toy_order"]', "[]").replace('["toy"]', "[]"))
    with serving(ANSWERS[answer]) as address:
        places = {"HF_ENDPOINT": f"http://{address}", "HF_HOME": str(tmp_path / "hub")}
        uses = [["import", "hf:user/name", tmp_path / "out"], ["run", study, "--root", tmp_path / "run"]]
        for words in uses[: 1 if answer == "nothing" else 2]:  # huggingface_hub retries the download of a model.
            done = command(*words, **places)
            assert done.returncode in (1, 2), (words, done.stderr[-2000:])
            assert "Traceback" not in done.stderr
            last = done.stderr.strip().splitlines()[-1]
            assert last.startswith("posmask: ")
            assert ": " in last.removeprefix("posmask: ")


@pytest.mark.parametrize("answer", [way for way in ANSWERS if way != "nothing"])
def test_a_store_that_answers_nonsense_is_reported(answer, tmp_path, monkeypatch):
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed: pip install -e '.[remote]'")
    monkeypatch.setattr(remote, "_FIRST_WAIT", 0.0)
    monkeypatch.setattr(remote, "_TRIES", 2)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with serving(ANSWERS[answer]) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        s3fs.S3FileSystem.clear_instance_cache()
        folder = remote.Store("s3://bucket/vectors", tmp_path, 10**6).folder("x")
        with pytest.raises((MissingAsset, DamagedFolder), match=r"could not (read|list) x|cannot be read"):
            folder.manifest()
        s3fs.S3FileSystem.clear_instance_cache()
