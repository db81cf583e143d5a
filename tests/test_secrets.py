"""Secrets in environment variables are never printed, written or sent to the hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hub_stand_in import TOKEN, serve_hub

TESTS = Path(__file__).parent
SECRETS = {
    "HF_TOKEN": TOKEN,
    "HUGGING_FACE_HUB_TOKEN": "hf_anothersecrettoken",
    "WANDB_API_KEY": "5ec4e75ec4e75ec4e75ec4e75ec4e75ec4e75ec4",
    "AWS_SECRET_ACCESS_KEY": "awssecretawssecretawssecret",
    "TRACKIO_WRITE_TOKEN": "trackiosecrettrackiosecret",
}
COMMANDS = """
import sys
from pathlib import Path
sys.path[:0] = [TESTS, TESTS + "/reliability"]
from tiny_study import STUDY, put_toy_texts, write_tiny_model
from posmask import cli

folder = Path(sys.argv[1])
write_tiny_model(folder / "model")
put_toy_texts()
one_cell = STUDY.partition('[[cells]]\\nname = "importance"')[0]
(folder / "tiny.toml").write_text(one_cell.replace("MODEL", str(folder / "model")))
study, root = str(folder / "tiny.toml"), str(folder / "run")
cell = root + "/cells/open-seed0"
for words, code in (
    (["run", study, "--root", root, "--track", "wandb"], 0),
    (["status", study, "--root", root], 0),
    (["report", root], 0),
    (["doctor"], 0),
    (["push", cell, "user/new"], 0),
    (["push", cell, "user/other"], 2),
    (["run", study, "--root", root, "--set", "model.name=user/gated"], 2),
    (["run", study, "--root", root, "--set", "model.name=user/nowhere"], 2),
    (["run", study, "--root", root, "--set", "training.learning_rate=-1"], 2),
    (["run", str(folder / "missing.toml")], 2),
    (["run", study, "--root", root, "--set", "training.learning_rate=1e9"], 2),
):
    sys.argv = ["posmask", *words]
    ended = 0
    try:
        cli.main()
    except SystemExit as end:
        ended = end.code or 0
    print("COMMAND", words[0], ended, flush=True)
    assert ended == code, (words, ended)
"""


@pytest.mark.slow
def test_no_secret_is_printed_written_or_sent(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    with serve_hub() as hub:
        environment = os.environ | SECRETS
        environment |= {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(home / "hf"),
            "HOME": str(home),
            "WANDB_MODE": "offline",
        }
        command = [sys.executable, "-c", f"TESTS = {str(TESTS)!r}\n{COMMANDS}", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        pushed = {f"hub/{path}": content for path, content in (hub.files["user/new"] | hub.storage).items()}
    written = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert any("wandb" in name for name in written)
    assert "hub/README.md" in pushed
    everything = {"output": done.stdout.encode(), "errors": done.stderr.encode(), **written, **pushed}
    leaks = [
        (name, variable)
        for name, content in everything.items()
        for variable, secret in SECRETS.items()
        if secret.encode() in content
    ]
    assert not leaks
