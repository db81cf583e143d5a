"""Hub models on the command line, with a local hub that is online, offline or unreachable."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch

from conftest import make_texts
from posmask.cli import commands
from posmask.data.models import load_model, load_tokenizer, weights_identity
from posmask.errors import BadSetting
from test_model_hub import local_hub  # noqa: F401 (a fixture)
from test_wheel import STUDY

NAME = "user/tiny"


@pytest.fixture
def hub(local_hub, model_folder):  # noqa: F811
    local_hub.files[NAME] = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    return local_hub


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Change to a folder with texts and a study of the model on the hub."""
    monkeypatch.chdir(tmp_path)
    Path("study.toml").write_text(STUDY.format(model=NAME))
    Path("texts").mkdir()
    for number, text in enumerate(make_texts(400)):
        Path(f"texts/{number:04}.txt").write_text(text)
    return tmp_path


@pytest.fixture
def posmask(here, monkeypatch, capsys):
    """Run a command in this process, with the local hub; return its exit code, standard output and standard error."""

    def run(words):
        monkeypatch.setattr(sys, "argv", ["posmask", *words.split()])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        return ended.value.code, *capsys.readouterr()

    return run


ONE_AFTER_ANOTHER = """
import sys
from posmask.cli import commands
for words in sys.argv[1:]:
    sys.argv = ["posmask", *words.split()]
    try:
        commands.main()
    except SystemExit as ended:
        if ended.code:
            raise
"""


def in_a_new_process(hub, *commands, **environment):
    """Run commands in one process, with the local hub and its cache, and return their standard output."""
    cache = {"HF_HUB_CACHE": str(Path("hub-cache").resolve()), "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER, *commands],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **cache, **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def weights_in(root):
    """Return the weights identities in the manifests of all finished folders."""
    manifests = [json.loads(path.read_text()) for path in sorted(Path(root).glob("*/*/manifest.json"))]
    assert manifests
    return {manifest["made_from"]["model"]["weights"] for manifest in manifests}


OFFLINE = {"HF_HUB_OFFLINE": "1"}


def test_a_study_of_a_model_on_the_hub_runs_online_and_from_the_cache(hub, posmask, monkeypatch):
    assert posmask("run study.toml --root online")[0] == 0
    assert "2 of 2 finished" in posmask("status study.toml --root online")[1]
    (commit,) = (path.name for path in Path("hub-cache/models--user--tiny/snapshots").iterdir())
    assert weights_in("online") == {f"{NAME}@{commit}"}
    hub.requests.clear()
    assert "2 of 2 finished" in in_a_new_process(hub, "status study.toml --root online", **OFFLINE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert posmask("run study.toml --root offline")[0] == 0
    assert weights_in("offline") == {f"{NAME}@{commit}"}
    assert not hub.requests


@pytest.mark.slow  # huggingface_hub retries for most of a minute.
def test_other_commands_and_an_unreachable_hub(hub, here):
    evaluate = "evaluate online/cells/open-seed0 study.toml --root online"
    in_a_new_process(hub, "run study.toml --root online", "plan study.toml --root online", evaluate)
    shutil.rmtree("online/evaluated")
    in_a_new_process(hub, evaluate, "run study.toml --root offline", "plan study.toml", **OFFLINE)
    assert weights_in("offline") == weights_in("online")
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens on this port
    done = in_a_new_process(hub, "status study.toml --root online", "run study.toml --root unreachable", **unreachable)
    assert "2 of 2 finished" in done
    assert weights_in("unreachable") == weights_in("online")


def test_a_plan_downloads_no_weights(hub, posmask):
    code, _, errors = posmask("plan study.toml")
    assert code == 2
    assert "has no config.json" in errors
    assert posmask("plan study.toml --set model.layer=0.5")[0] == 0
    assert not [request for request in hub.requests if ".safetensors" in request]
    assert not list(Path("hub-cache").rglob("*.safetensors"))


def test_weights_are_those_of_the_commit_in_the_identity(local_hub, model_folder, causal_lm, tmp_path):  # noqa: F811
    """The repository changes between the two calls."""
    local_hub.files["user/moving"] = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    identity = weights_identity("user/moving")
    type(causal_lm)(causal_lm.config).save_pretrained(tmp_path / "other")
    local_hub.files["user/moving"] |= {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    ids = torch.arange(12).view(2, 6)
    expected = load_model(str(model_folder), 3, "float32").vectors(ids)
    assert torch.equal(load_model("user/moving", 3, "float32").vectors(ids), expected)
    assert load_tokenizer("user/moving")("red bird")["input_ids"]
    assert weights_identity("user/moving") == identity
    (commit,) = (path.name for path in tmp_path.glob("hub-cache/*/snapshots/*"))
    assert identity == f"user/moving@{commit}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "user/no-config",
            r"^user/no-config on the hub has no file config\.json: choose a model in the format of trans",
        ),
        (
            "user/no-weights",
            r"^model 'user/no-weights' cannot be loaded \(.*does not appear to have a file named model",
        ),
        ("user/missing", r"^model 'user/missing' cannot be loaded \(no such folder, and the hub has no model of that"),
        (
            "/no/such/folder",
            r"^model '/no/such/folder' is missing: there is no such folder; check the path",
        ),
    ],
)
def test_models_that_cannot_be_loaded_raise_an_error(local_hub, model_folder, name, message):  # noqa: F811
    local_hub.files["user/no-config"] = {}
    local_hub.files["user/no-weights"] = {"config.json": (model_folder / "config.json").read_bytes()}
    with pytest.raises(BadSetting, match=message) as caught:
        load_model(name, 1, "float32")
    assert "\n" not in str(caught.value)
