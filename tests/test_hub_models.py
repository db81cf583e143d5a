"""Hub models on the command line, with a local hub that is online, offline or unreachable."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import make_texts
from hub_stand_in import serve_hub
from posmask.data.models import load_model, load_tokenizer, weights_identity
from posmask.errors import BadSetting
from test_model_hub import local_hub  # noqa: F401 (a fixture)
from test_wheel import STUDY

NAME = "user/tiny"


@pytest.fixture
def hub(model_folder):
    with serve_hub() as hub:
        hub.files[NAME] = {path.name: path.read_bytes() for path in model_folder.iterdir()}
        yield hub


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Change to a folder with texts and a study of the model on the hub."""
    monkeypatch.chdir(tmp_path)
    write_study(NAME)
    Path("texts").mkdir()
    for number, text in enumerate(make_texts(400)):
        Path(f"texts/{number:04}.txt").write_text(text)
    return tmp_path


def write_study(model_name):
    Path("study.toml").write_text(STUDY.format(model=model_name))


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


def posmask(hub, *commands, **environment):
    """Run commands in one process, with the local hub and a separate cache, and return the completed process."""
    home = {"HF_HOME": str(Path("hf").resolve()), "HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER, *commands],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **home, **environment},
    )


def succeeds(hub, *commands, **environment):
    done = posmask(hub, *commands, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def weights_in(root):
    """Return the weights identities in the manifests of all finished folders."""
    manifests = [json.loads(path.read_text()) for path in sorted(Path(root).glob("*/*/manifest.json"))]
    assert manifests
    return {manifest["made_from"]["model"]["weights"] for manifest in manifests}


OFFLINE = {"HF_HUB_OFFLINE": "1"}


def test_a_study_of_a_model_on_the_hub_runs_online_and_from_the_cache(hub, here):
    online = succeeds(hub, "run study.toml --root online", "status study.toml --root online")
    assert "2 of 2 finished" in online
    (commit,) = (path.name for path in Path("hf/hub/models--user--tiny/snapshots").iterdir())
    assert weights_in("online") == {f"{NAME}@{commit}"}
    hub.requests.clear()
    offline = succeeds(hub, "run study.toml --root offline", "status study.toml --root online", **OFFLINE)
    assert weights_in("offline") == {f"{NAME}@{commit}"}
    assert "2 of 2 finished" in offline
    assert not hub.requests


@pytest.mark.slow  # huggingface_hub retries for most of a minute.
def test_other_commands_and_an_unreachable_hub(hub, here):
    evaluate = "evaluate online/cells/open-seed0 study.toml --root online"
    succeeds(hub, "run study.toml --root online", "plan study.toml --root online", evaluate)
    shutil.rmtree("online/evaluated")
    succeeds(hub, evaluate, "plan study.toml", **OFFLINE)
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens on this port
    done = succeeds(hub, "status study.toml --root online", "run study.toml --root unreachable", **unreachable)
    assert "2 of 2 finished" in done
    assert weights_in("unreachable") == weights_in("online")


def test_a_plan_downloads_no_weights(hub, here):
    done = posmask(hub, "plan study.toml")
    assert done.returncode == 2
    assert "has no config.json" in done.stderr
    succeeds(hub, "plan study.toml --set model.layer=0.5")
    assert not [request for request in hub.requests if ".safetensors" in request]
    assert not list(Path("hf").rglob("*.safetensors"))


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
